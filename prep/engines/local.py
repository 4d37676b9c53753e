"""The engines of one machine: this process, or worker processes."""

from __future__ import annotations

import collections
import contextlib
import itertools
import multiprocessing
import multiprocessing.connection
import os
import signal
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from prep.engines.processes import ONE_THREAD, die_with_parent, without
from schemas.errors import VlprepError

Task = TypeVar("Task")
Result = TypeVar("Result")

_IN_FLIGHT_PER_WORKER = 3


class SerialEngine:
    """Runs everything in this process."""

    num_workers = 1

    def share(self, reads: Iterable[Path] = (), *, writes: Iterable[Path] = ()) -> None:
        """See :class:`~prep.engines.Engine`: this process sees all that it names."""

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Generator[Result, None, None]:
        """See :class:`~prep.engines.Engine`."""
        yield from map(function, tasks)


class LocalEngine:
    """Worker processes on this machine.

    They are started afresh (not forked from a process that has threads), each with the libraries' own threads turned
    off: the workers occupy the cores already. They start with the first tasks and stay until the end of the ``with``
    block, so that a tokenizer or a decoder that one step of the pipeline has started serves the next one too.

    Args:
        num_workers: number of processes, at least 1.
    """

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> LocalEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()

    def share(self, reads: Iterable[Path] = (), *, writes: Iterable[Path] = ()) -> None:
        """See :class:`~prep.engines.Engine`: a process of this machine sees what this one does."""

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Generator[Result, None, None]:
        """See :class:`~prep.engines.Engine`.

        Raises:
            VlprepError: a worker process died.
        """
        waiting = iter(tasks)
        first = list(itertools.islice(waiting, self.num_workers * _IN_FLIGHT_PER_WORKER))
        if not first:
            return
        pool = self._ready()
        is_idle = False
        try:
            flying = collections.deque(_submit(pool, function, task) for task in first)
            while flying:
                result = flying.popleft().result()
                for task in itertools.islice(waiting, 1):
                    flying.append(_submit(pool, function, task))
                # Who zips tasks with results leaves after the last result, without looking for the end.
                is_idle = not flying
                yield result
        except BrokenProcessPool as error:
            raise VlprepError(
                "a worker process was killed (out of memory, or by a signal). Run the same command again to go on "
                "where it was, with fewer --workers if memory ran out."
            ) from error
        finally:
            if not is_idle:
                for worker in _workers(pool):
                    worker.terminate()
                self._end()

    def _ready(self) -> ProcessPoolExecutor:
        """The workers of the step before, or new ones: one that was killed while it had nothing to do cost nothing."""
        if self._pool is not None:
            # Not is_alive(): the pool's own thread may ask the same at this moment, and only one gets an answer.
            ended = multiprocessing.connection.wait([worker.sentinel for worker in _workers(self._pool)], timeout=0)
            if ended or self._pool._broken:
                self._end()
        if self._pool is None:
            self._pool = ProcessPoolExecutor(
                self.num_workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_prepare_worker,
                initargs=(os.getpid(),),
            )
        return self._pool

    def _end(self) -> None:
        """End the workers; returns when nothing of them is left."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)
            self._pool = None


def _workers(pool: ProcessPoolExecutor) -> list[multiprocessing.process.BaseProcess]:
    """The processes of a pool, and no other child of this process."""
    return list((pool._processes or {}).values())


def _submit(pool: ProcessPoolExecutor, function: Callable[[Task], Result], task: Task) -> Future[Result]:
    """Give a task to the workers, which are started as tasks come; interrupts are left to this process."""
    with without(signal.SIGINT):
        return pool.submit(function, task)


def _prepare_worker(parent: int) -> None:
    """End with the parent, or at once when it says so, and keep libraries from starting threads."""
    die_with_parent(parent)
    # By the kernel, whatever the worker is at. A handler of Python's could come too late: just before it waits for the
    # lock of the queue, which is never given back by a worker that ended with it. An exception the pool would catch.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ.update(ONE_THREAD)


def default_workers(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores that this process may use: those it is bound to, or fewer where a container has a share of them only.

    Args:
        quota: where the kernel says what the container may use: microseconds of work (or ``max``) in microseconds.
    """
    num_cores = len(os.sched_getaffinity(0))
    with contextlib.suppress(OSError, ValueError):
        work, period = quota.read_text().split()
        if work != "max":
            return max(1, min(num_cores, int(work) // int(period)))
    return num_cores
