"""Ctrl-C under ``deepspeed``: the terminal's keys reach the ranks instead of their launcher.

A terminal sends Ctrl-C to every process of the command in its foreground. The launcher would end at the first one, with
an exit code of its own, and a second one would reach no rank. So while the ranks run, a helper process takes the
foreground. It passes Ctrl-C on to the ranks of this machine only. The launcher waits for them, as it does without a
terminal, and ends with their exit code. Other keys and a hang-up go to the whole command, as before: Ctrl-Z stops it,
and ``fg`` continues it.

When the first rank of the machine has ended, however it ended, the helper keeps the foreground until the launcher has
ended, too, and drops Ctrl-C: the launcher looks for the end of its ranks once a second, and a Ctrl-C until then would
replace their exit code by a traceback. Then it gives the foreground back. It leaves the terminal alone while another
program reads its keys (``deepspeed … | less``), and in the background.

This file is also the program of the helper, so it imports the standard library only.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

TERMINAL = "/dev/tty"
"""The terminal that controls a process."""

DEEPSPEED_VARIABLE = "CROSS_RANK"
"""Set by `deepspeed` for its ranks. The ranks of `torchrun` have no terminal: each is a session of its own."""

NUM_RANKS_VARIABLE = "LOCAL_SIZE"
"""Set by `deepspeed`, too: its ranks on this machine, which it starts one after the other."""

_POLL_S = 0.2
"""Seconds until the helper sees that a shell has put the command into the foreground again."""

_LAUNCHER_POLL_S, _RANKS_LIMIT_S, _LAUNCHER_LIMIT_S = 0.02, 5.0, 10.0
"""How often to look for new ranks or for the end of the launcher, and how long to wait for them."""


@contextmanager
def keys_to_ranks(local_rank: int) -> Iterator[None]:
    """Pass Ctrl-C on to the ranks of this machine only, if `deepspeed` has started them from a terminal.

    Args:
        local_rank: index of this process on its machine. The first one starts the helper.
    """
    if local_rank != 0 or DEEPSPEED_VARIABLE not in os.environ or not _hears_terminal():
        yield
        return
    # The pipe to the helper is closed by the end of this block or of this process.
    starter = subprocess.Popen([sys.executable, "-S", "-E", __file__, *_processes()], stdin=subprocess.PIPE)
    starter.wait()
    assert starter.stdin is not None
    try:
        yield
    finally:
        starter.stdin.close()


def _processes() -> tuple[str, str]:
    """The ranks of this machine and the processes of their launcher, as words of the helper's command line.

    `deepspeed` waits for the process that starts the ranks. If a script waits for `deepspeed`, its next command may
    read the terminal at once, so the helper does not wait for `deepspeed` itself.
    """
    import psutil

    launcher = psutil.Process(os.getppid())
    until = time.monotonic() + _RANKS_LIMIT_S
    while len(ranks := launcher.children()) < int(os.environ.get(NUM_RANKS_VARIABLE, "1")) and time.monotonic() < until:
        time.sleep(_LAUNCHER_POLL_S)
    launchers = [launcher.pid]
    with suppress(psutil.Error):
        parent = psutil.Process(launcher.ppid())
        if parent.pid == os.getpgrp() and parent.exe() == launcher.exe():
            launchers.append(parent.pid)
    return ",".join(str(rank.pid) for rank in ranks), ",".join(map(str, launchers))


def _hears_terminal() -> bool:
    """Whether Ctrl-C would reach this process: not in background jobs of scripts, which ignore it."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        return False
    try:
        os.close(os.open(TERMINAL, os.O_RDWR))
    except OSError:
        return False
    return True


class _Foreground:
    """The foreground of the terminal, which the command of the ranks has or this process alone."""

    def __init__(self) -> None:
        self._terminal = os.open(TERMINAL, os.O_RDWR)
        self.command = os.getpgrp()

    @property
    def is_ours(self) -> bool:
        """Whether the keys go to this process. Else it is one of the command, all of which get them."""
        return os.getpgrp() != self.command

    def take(self) -> None:
        """Take it from the command, unless that is in the background or another program reads the keys."""
        *_, modes, _, _, _ = termios.tcgetattr(self._terminal)
        # Without line editing, a program reads single keys. With `stty tostop`, the ranks could no longer write.
        is_free = modes & termios.ICANON and not modes & termios.TOSTOP
        if is_free and os.tcgetpgrp(self._terminal) == self.command:
            os.setpgid(0, 0)
            os.tcsetpgrp(self._terminal, os.getpgrp())

    def give_back(self) -> None:
        """Give it to the command, and be part of that again."""
        with suppress(OSError):  # the command, or the terminal, is gone
            if os.tcgetpgrp(self._terminal) == os.getpgrp():
                os.tcsetpgrp(self._terminal, self.command)
            os.setpgid(0, self.command)


def _pass_on_keys(ranks: Sequence[int], launchers: Sequence[int]) -> None:
    """Pass on what the terminal sends until the pipe from the first rank is closed, and then wait for the launcher."""
    foreground = _Foreground()
    is_over = False

    def to_ranks(signum: int, frame: object) -> None:
        for rank in ranks if foreground.is_ours and not is_over else ():
            with suppress(ProcessLookupError):
                os.kill(rank, signum)

    def to_command(signum: int, frame: object) -> None:
        if foreground.is_ours:
            with suppress(ProcessLookupError):
                os.killpg(foreground.command, signum)

    def stop(signum: int, frame: object) -> None:
        """Stop the command and with it this process, until the shell continues them."""
        foreground.give_back()
        signal.signal(signum, signal.SIG_DFL)
        os.killpg(foreground.command, signum)
        signal.signal(signum, stop)

    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # from a scheduler to all processes of a job
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # for a change of the terminal from the background
    for signum, handler in (
        (signal.SIGINT, to_ranks),
        (signal.SIGTSTP, stop),
        (signal.SIGQUIT, to_command),
        (signal.SIGHUP, to_command),
    ):
        signal.signal(signum, handler)
    try:
        foreground.take()
        while not select.select([sys.stdin], [], [], _POLL_S)[0]:
            foreground.take()
        is_over = True
        until = time.monotonic() + _LAUNCHER_LIMIT_S
        while foreground.is_ours and any(map(_is_alive, launchers)) and time.monotonic() < until:
            time.sleep(_LAUNCHER_POLL_S)
    except OSError:  # the terminal is gone, which ends the command in its foreground
        to_command(signal.SIGHUP, None)
    foreground.give_back()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    if os.fork():  # The helper is no child of a rank: the launcher would end it, or wait for it, with the rank.
        os._exit(0)
    _pass_on_keys(*([int(process) for process in word.split(",")] for word in sys.argv[1:]))
