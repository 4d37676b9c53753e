"""The engines of one machine: this process, or worker processes.

The library of the workers is imported with the first of them, because decoders import this package and start none.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import os
import signal
from collections.abc import Callable, Generator, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from prep.engines.processes import (
    ONE_THREAD,
    can_fork,
    close_inherited,
    die_with_parent,
    forking,
    open_descriptors,
    without,
)
from schemas.errors import VlprepError

if TYPE_CHECKING:
    from concurrent.futures import Future, ProcessPoolExecutor
    from multiprocessing.process import BaseProcess

Task = TypeVar("Task")
Result = TypeVar("Result")

_IN_FLIGHT_PER_WORKER = 3


class SerialEngine:
    """Runs everything in this process."""

    num_workers = 1

    def renew_workers(self) -> bool:
        """See :class:`~prep.engines.Engine`. Tasks run in this process."""
        return False

    def share(self, reads: Iterable[Path] = (), *, writes: Iterable[Path] = ()) -> None:
        """See :class:`~prep.engines.Engine`. Nothing to do: tasks run in this process."""

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Generator[Result, None, None]:
        """See :class:`~prep.engines.Engine`."""
        yield from map(function, tasks)


class LocalEngine:
    """Worker processes on this machine.

    They are forks of this process, which have its modules and its tokenizer at once. If it has threads, one of which
    might hold a lock, they are spawned. Threads of libraries are turned off in them, since the workers already occupy
    the cores. Workers start with the first tasks and stay until the end of the ``with`` block, so that a tokenizer or
    decoder that one step started serves the next step too. A step that can use more of them than there are starts anew.

    Args:
        num_workers: number of processes, at least 1.
    """

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self._pool: ProcessPoolExecutor | None = None
        self._num_started = 0
        self._are_forks = False

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._shut_down()

    def renew_workers(self) -> bool:
        """See :class:`~prep.engines.Engine`."""
        if self._are_forks:
            self._shut_down()
        return self._pool is None and can_fork()

    def share(self, reads: Iterable[Path] = (), *, writes: Iterable[Path] = ()) -> None:
        """See :class:`~prep.engines.Engine`. Nothing to do: all workers run on this machine."""

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Generator[Result, None, None]:
        """See :class:`~prep.engines.Engine`.

        Raises:
            VlprepError: a worker process died.
        """
        from concurrent.futures.process import BrokenProcessPool

        waiting = iter(tasks)
        first = list(itertools.islice(waiting, self.num_workers * _IN_FLIGHT_PER_WORKER))
        if not first:
            return
        pool = self._ready(min(self.num_workers, len(first)))
        is_idle = False
        try:
            flying = collections.deque(_submit(pool, function, task) for task in first)
            while flying:
                result = flying.popleft().result()
                for task in itertools.islice(waiting, 1):
                    flying.append(_submit(pool, function, task))
                # A caller that zips tasks with results stops after the last result, before the generator ends.
                is_idle = not flying
                yield result
        except BrokenProcessPool as error:
            raise VlprepError(
                "a worker process was killed (out of memory, or by a signal). Run the same command again to resume, "
                "with fewer --workers if memory ran out."
            ) from error
        finally:
            if not is_idle:
                for worker in _workers(pool):
                    worker.terminate()
                self._shut_down()

    def _ready(self, num_needed: int) -> ProcessPoolExecutor:
        """The workers of the previous step; new ones if any of them was killed while idle, or if they are too few."""
        import multiprocessing.connection
        from concurrent.futures import ProcessPoolExecutor

        if self._pool is not None:
            # Not is_alive(): the pool's own thread may be waiting for the same process, and only one gets its status.
            ended = multiprocessing.connection.wait([worker.sentinel for worker in _workers(self._pool)], timeout=0)
            if ended or self._pool._broken or self._num_started < num_needed:
                self._shut_down()
        if self._pool is None:
            # Forks all start with the first task, others when they are needed.
            self._are_forks = can_fork()
            self._num_started = num_needed if self._are_forks else self.num_workers
            self._pool = ProcessPoolExecutor(
                self._num_started,
                mp_context=multiprocessing.get_context("fork" if self._are_forks else "spawn"),
                initializer=_prepare_worker,
                initargs=(os.getpid(), open_descriptors() if self._are_forks else {}),
            )
        return self._pool

    def _shut_down(self) -> None:
        """End the workers; returns when all have ended."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


def _workers(pool: ProcessPoolExecutor) -> list[BaseProcess]:
    """The processes of a pool, and no other children of this process."""
    return list((pool._processes or {}).values())


def _submit(pool: ProcessPoolExecutor, function: Callable[[Task], Result], task: Task) -> Future[Result]:
    """Submit a task. This may start workers, which must leave interrupts to this process."""
    with without(signal.SIGINT, signal.SIGTERM), forking():
        return pool.submit(function, task)


def _prepare_worker(parent: int, inherited: Mapping[int, tuple[int, int]]) -> None:
    """Make a worker end with its parent or on SIGTERM, and keep libraries from starting threads.

    Args:
        parent: process id of the parent.
        inherited: open files of the parent that a fork must not hold, such as the lock of the build.
    """
    die_with_parent(parent)
    close_inherited(inherited)
    # Let the kernel end it at once. A Python handler may run too late, if the worker is waiting for a queue lock that
    # another ended worker still holds. The pool would catch an exception.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGTERM,))
    os.environ.update(ONE_THREAD)


def default_workers(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Number of cores that this process may use: those it is bound to, or the quota of its container if that is lower.

    Args:
        quota: the kernel's file with the quota of the container: microseconds of work (or ``max``) per period.
    """
    num_cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        work, period = quota.read_text().split()
        if work != "max":
            return max(1, min(num_cores, int(work) // int(period)))
    return num_cores
