"""Worker processes: their environment, their signals, their start by a fork, and their end when the parent dies."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Environment that keeps libraries from starting threads, since the workers already occupy the cores."""

_PR_SET_PDEATHSIG = 1

_LEAVING_S = 0.02
"""How long a thread may take to leave the process after it has been joined."""

_FORKED_WITH_CARE = frozenset({"jemalloc_bg_thd"})
"""Names of threads that their library stops before a fork. pyarrow brings an allocator with such a thread."""


def die_with_parent(parent: int | None = None) -> None:
    """Let the kernel kill this process when its parent dies, for any reason (Linux).

    Args:
        parent: process id of the parent. If the parent is already dead, this process ends at once.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


@contextmanager
def without(*signals: signal.Signals) -> Iterator[None]:
    """Block signals in this process and, permanently, in processes that it starts inside the block.

    Signals that arrive meanwhile are delivered to this process after the block.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def can_fork() -> bool:
    """Whether a fork of this process is safe: no other thread may hold a lock that the fork would wait for (Linux)."""
    deadline = time.monotonic() + _LEAVING_S
    while _num_threads() > 1:
        if threading.active_count() > 1 or time.monotonic() > deadline:
            return False
        time.sleep(_LEAVING_S / 20)
    return True


def _num_threads() -> int:
    """Threads of this process, also those of libraries, without those that are no danger to a fork."""
    names = []
    for thread in Path("/proc/self/task").glob("*/comm"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            names.append(thread.read_text().strip())
    return len([name for name in names if name not in _FORKED_WITH_CARE])


def at_exit(function: Callable[[], object]) -> None:
    """Call a function when this process ends by itself, also if it is a forked worker, which leaves out ``atexit``."""
    atexit.register(function)
    if (util := sys.modules.get("multiprocessing.util")) is not None:
        util.Finalize(None, function, exitpriority=0)


@contextmanager
def forking() -> Iterator[None]:
    """Silence the warning of Python 3.12 and later, which counts threads that :func:`can_fork` knows to be harmless."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def open_descriptors() -> dict[int, tuple[int, int]]:
    """What this process has open beyond the three standard streams: device and inode, by descriptor."""
    opened = {}
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        with contextlib.suppress(OSError):  # that of the list itself, which is closed by now
            status = os.fstat(descriptor)
            opened[descriptor] = status.st_dev, status.st_ino
    return {descriptor: file for descriptor, file in opened.items() if descriptor > 2}


def close_inherited(inherited: Mapping[int, tuple[int, int]]) -> None:
    """Close descriptors in a fork, whatever objects of its parent still refer to them.

    These objects are never collected, since they would close descriptors that have new owners by then.

    Args:
        inherited: result of :func:`open_descriptors` in the parent. What it has closed and opened since stays open.
    """
    gc.freeze()
    opened = open_descriptors()
    for descriptor, file in inherited.items():
        if opened.get(descriptor) == file:
            os.close(descriptor)


class Fork:
    """A fork of this process that runs one function, with pipes to its standard input and from its standard output.

    It has what :class:`subprocess.Popen` has, as far as it is needed here. The fork holds none of the other open files,
    so a pipe or lock of its parent ends with its parent.

    Args:
        main: what it runs. It ends with it.
        keep: descriptors that stay open.
    """

    def __init__(self, main: Callable[[], None], keep: Collection[int]) -> None:
        requests, stdin = os.pipe()
        stdout, answers = os.pipe()
        self.stdin, self.stdout = os.fdopen(stdin, "wb"), os.fdopen(stdout, "rb")
        self.returncode: int | None = None
        try:
            with forking():
                self.pid = os.fork()
            if not self.pid:
                _run_fork(main, requests, answers, keep)
        finally:
            os.close(requests)
            os.close(answers)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._wait(os.WNOHANG)

    def wait(self) -> int:
        """The exit code, once it has ended."""
        code = self._wait(0)
        assert code is not None
        return code

    def send_signal(self, kind: signal.Signals) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, kind)

    def kill(self) -> None:
        """End it at once."""
        self.send_signal(signal.SIGKILL)

    def _wait(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def _run_fork(main: Callable[[], None], stdin: int, stdout: int, keep: Collection[int]) -> NoReturn:
    code = 1
    try:
        os.dup2(stdin, 0)
        os.dup2(stdout, 1)
        close_inherited({descriptor: file for descriptor, file in open_descriptors().items() if descriptor not in keep})
        main()
        code = 0
    finally:
        # Nothing that the parent holds is flushed or ended here.
        os._exit(code)
