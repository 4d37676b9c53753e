"""Runs a function over tasks, in parallel. A step of the pipeline does not know which engine runs it.

An engine yields results in the order of the tasks, as soon as they are there, and holds only a few tasks in flight.
"""

from __future__ import annotations

import collections
import itertools
import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Protocol, TypeVar

from prep.processes import die_with_parent
from schemas.errors import VlprepError

logger = logging.getLogger(__name__)

Task = TypeVar("Task")
Result = TypeVar("Result")

_IN_FLIGHT_PER_WORKER = 3


class Engine(Protocol):
    """What a step of the pipeline needs from whoever runs it.

    Attributes:
        num_workers: tasks that run at the same time.
    """

    num_workers: int

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """Results of ``function`` for every task, in order. Function, tasks and results must pickle."""
        ...


class SerialEngine:
    """Runs everything in this process."""

    num_workers = 1

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """See :class:`Engine`."""
        return map(function, tasks)


class LocalEngine:
    """Worker processes on this machine.

    They are started afresh (not forked from a process that has threads), each with the libraries' own threads turned
    off: the workers occupy the cores already.

    Args:
        num_workers: number of processes, at least 1.
    """

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Iterator[Result]:
        """See :class:`Engine`.

        Raises:
            VlprepError: a worker process died.
        """
        waiting = iter(tasks)
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(self.num_workers, mp_context=context, initializer=_prepare_worker)
        done = False
        try:
            flying: collections.deque[Future[Result]] = collections.deque(
                pool.submit(function, task)
                for task in itertools.islice(waiting, self.num_workers * _IN_FLIGHT_PER_WORKER)
            )
            while flying:
                result = flying.popleft().result()
                for task in itertools.islice(waiting, 1):
                    flying.append(pool.submit(function, task))
                yield result
            done = True
        except BrokenProcessPool as error:
            raise VlprepError(
                "a worker process was killed (out of memory, or by a signal). Run the same command again to go on "
                "where it was, with fewer --workers if memory ran out."
            ) from error
        finally:
            if not done:
                for worker in multiprocessing.active_children():
                    worker.terminate()
            pool.shutdown(wait=True, cancel_futures=True)


def _prepare_worker() -> None:
    """Leave interrupts to the parent, end at once when it says so, and keep libraries from starting threads."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Not an exception: the pool would catch it, and go on with what it had interrupted half way.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(1))
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ[name] = "1"
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def make_engine(workers: int) -> Engine:
    """The engine for a number of workers: this process for one, worker processes for more."""
    return SerialEngine() if workers == 1 else LocalEngine(workers)


def default_workers() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))
