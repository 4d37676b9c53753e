"""An interactive shell in a pseudo terminal, as a person has it before them."""

from __future__ import annotations

import os
import pty
import re
import select
import shlex
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from train.run import terminal

HELPER = str(terminal.__file__)
"""The program of the process that passes keys on to the ranks."""

CTRL_C, CTRL_Z, CTRL_BACKSLASH = "\x03", "\x1a", "\x1c"


class Shell:
    """Bash in a terminal. ``screen`` is what it has shown and no wait has passed yet."""

    def __init__(self, process: int, terminal: int, limit_s: float) -> None:
        self.process = process
        self.screen = ""
        self._terminal = terminal
        self._limit_s = limit_s

    def type(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def run(self, *command: str) -> None:
        """Start a command, which is followed by its exit code."""
        self.type(f"{shlex.join(command)}; echo exit code: $?\n")

    @property
    def foreground(self) -> int:
        """The process group that keys go to."""
        return os.tcgetpgrp(self._terminal)

    def wait_until(self, is_true: Callable[[], object]) -> None:
        """Wait for something, and read what is shown until then."""
        deadline = time.monotonic() + self._limit_s
        while not is_true():
            assert time.monotonic() < deadline, self.screen
            if select.select([self._terminal], [], [], 0.02)[0]:
                self.screen += os.read(self._terminal, 1 << 16).decode(errors="replace").replace("\r\n", "\n")

    def wait_for(self, pattern: str) -> re.Match[str]:
        """Wait until a pattern is shown. What comes up to its end is passed."""
        self.wait_until(lambda: re.search(pattern, self.screen))
        match = re.search(pattern, self.screen)
        assert match is not None
        self.screen = self.screen[match.end() :]
        return match


@contextmanager
def shell_in_terminal(folder: Path, environment: Mapping[str, str], *, limit_s: float = 60) -> Iterator[Shell]:
    """A shell in a folder. At the end of the block its terminal is closed.

    Args:
        folder: where it starts.
        environment: its variables.
        limit_s: of each wait.
    """
    process, terminal = pty.fork()
    if process == 0:
        # A program that starts in the background of a script ignores what keys send, and so do those that it starts.
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        os.chdir(folder)
        os.execvpe("bash", ["bash", "--noprofile", "--norc", "-i"], {**environment, "PS1": "", "TERM": "dumb"})
    try:
        yield Shell(process, terminal, limit_s)
    finally:
        os.close(terminal)
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def helper_of(shell: Shell) -> psutil.Process | None:
    """The process that passes Ctrl-C on to the ranks, if the terminal is in its hands."""
    with suppress(psutil.Error):
        process = psutil.Process(shell.foreground)
        return process if HELPER in process.cmdline() else None
    return None
