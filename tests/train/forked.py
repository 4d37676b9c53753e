"""Python commands that are forked instead of started: a launcher and its ranks, without seconds of imports for each.

:func:`start` forks a command from a process that has imported the trainer and both launchers. The Python programs that
the command starts are forked from it in turn. Each has the arguments, environment, output, session, signals and exit
code of a started one, and runs its script or module as ``__main__``. Only strings hash as in the parent.
"""

from __future__ import annotations

import atexit
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, NoReturn


class Forked:
    """A command that runs in a session of its own, with the methods of ``subprocess.Popen`` that tests need."""

    def __init__(
        self, context: ForkServerContext, command: Sequence[str], folder: Path, environment: Mapping[str, str]
    ) -> None:
        """Fork the command.

        Args:
            context: has a fork server.
            command: a Python interpreter with its arguments, or a script with its own.
            folder: to run it in.
            environment: variables beside those of the fork server.
        """
        self.args = command
        self._stderr, stderr = context.Pipe(duplex=False)
        self._process = context.Process(target=_be_command, args=(command, folder, environment, stderr))
        self._process.start()
        stderr.close()

    @property
    def pid(self) -> int:
        pid = self._process.pid
        assert pid is not None
        return pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end. Raises ``subprocess.TimeoutExpired``."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[None, str]:
        """Wait until the command and all that it started have ended; return what they wrote to stderr."""
        until = None if timeout is None else time.monotonic() + timeout
        errors = bytearray()
        while self._stderr.poll(None if until is None else max(0.0, until - time.monotonic())):
            if not (part := os.read(self._stderr.fileno(), 1 << 16)):
                self.wait(timeout)
                return None, errors.decode()
            errors += part
        raise subprocess.TimeoutExpired(self.args, timeout or 0)

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def forget_disk() -> None:
    """Leave files in memory until the system writes them: tests kill processes, not the machine."""
    os.fsync = lambda file: None


def _be_command(command: Sequence[str], folder: Path, environment: Mapping[str, str], stderr: Connection) -> NoReturn:
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    os.setsid()
    with stderr, open(os.devnull, "wb") as output:
        os.dup2(stderr.fileno(), 2)
        os.dup2(output.fileno(), 1)
    os.chdir(folder)
    forget_disk()
    modules: tuple[Any, ...] = (subprocess, subprocess_handler)
    for module in modules:
        module.Popen = _ForkingPopen
    is_script = command[0] != sys.executable
    _be_program(command if is_script else command[1:], {**os.environ, **environment})


class _ForkingPopen(subprocess.Popen[Any]):
    """Forks Python programs without pipes. Others are started."""

    def _execute_child(self, args: Any, *settings: Any) -> None:
        # Python 3.10 to 3.13: executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell,
        # three pairs of a parent's and a child's end, restore_signals, gid, gids, uid, umask, start_new_session, …
        env, pipes, in_new_session = settings[5], settings[9:15], settings[20]
        # (stdin, its other end), (the other end of stdout, stdout), (the other end of stderr, stderr)
        stdin, to_child, from_child, stdout, errors_from_child, stderr = pipes
        if args[0] != sys.executable or {to_child, from_child, errors_from_child} != {-1}:
            super()._execute_child(args, *settings)  # type: ignore[misc]
            return
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        self._child_created = True
        if self.pid == 0:
            if in_new_session:
                os.setsid()
            for standard, replacement in enumerate((stdin, stdout, stderr)):
                if replacement != -1:
                    os.dup2(replacement, standard)
            _be_program(args[1:], os.environ.copy() if env is None else env)


def _be_program(args: Sequence[str], env: Mapping[str, str]) -> NoReturn:
    """Run a script or module as a new interpreter with these arguments would, and end."""
    code: object = 1
    try:
        _reset_signals()
        atexit._clear()
        env = dict(env)
        os.environ.clear()
        os.environ.update(env)
        if args[0] == "-u":  # unbuffered
            args = args[1:]
        if args[0] == "-m":
            _, module, *rest = args
            sys.argv, sys.path[:0] = [module, *rest], [os.getcwd()]
            sys.modules.pop(module, None)
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[:0] = [*args], [str(Path(args[0]).resolve().parent)]
            runpy.run_path(args[0], run_name="__main__")
        code = 0
    except SystemExit as error:
        code = error.code
    except BaseException:  # noqa: BLE001 - printed, as at the end of any program
        sys.excepthook(*sys.exc_info())
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        if isinstance(code, str):
            sys.stderr.write(f"{code}\n")
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def _reset_signals() -> None:
    """Forget the handlers of the parent; a signal that it ignores stays ignored."""
    for signum in signal.valid_signals():
        if callable(signal.getsignal(signum)):
            signal.signal(signum, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
