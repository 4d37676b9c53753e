"""The engine of a Ray cluster: tasks run on every node that sees the files of the build.

A task that is lost with its worker or its node is run again elsewhere, a bounded number of times. Results come in the
order of the tasks: at most three for each worker wait for their turn or run. Through the cluster go tasks and results
alone (kilobytes); media are read and shards written by the nodes themselves.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import time
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

from prep.engines.local import default_workers
from prep.engines.ray_cluster import connect, import_ray
from prep.engines.ray_nodes import RayNodes, task_options
from prep.engines.requirements import WorkerRequirements
from schemas.errors import VlprepError

logger = logging.getLogger(__name__)

Task = TypeVar("Task")
Result = TypeVar("Result")

_IN_FLIGHT_PER_WORKER = 3
_MAX_ATTEMPTS = 4
_WAIT_S = 5.0
_ENDING_S = 1.0
"""What a cluster takes to end the tasks of a process that left, and more."""


class RayEngine:
    """Tasks on the nodes of a Ray cluster. A context manager; it connects when the first task comes.

    Args:
        workers: tasks that run at the same time, or None for as many as the nodes have room for.
        address: of the cluster, see :func:`prep.engines.ray_cluster.connect`.
    """

    def __init__(self, *, workers: int | None = None, address: str | None = None) -> None:
        self._workers = workers
        self._address = address
        self._requirements: WorkerRequirements | None = None
        self._cluster: str | None = None
        self._nodes: RayNodes | None = None

    @property
    def num_workers(self) -> int:
        """See :class:`~prep.engines.Engine`; 1 before the first task if it is left to the cluster."""
        room = self._nodes.num_slots if self._nodes is not None else 1
        return self._workers or max(room, 1)

    def __enter__(self) -> RayEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._requirements is not None:
            self._requirements.clear()
        self._disconnect()

    def share(self, reads: Iterable[Path] = (), *, writes: Iterable[Path] = ()) -> None:
        """See :class:`~prep.engines.Engine`."""
        self._requirements = self._requirements or WorkerRequirements()
        if self._requirements.share(reads, writes):
            # Those that were asked before have not been asked for this.
            self._nodes = None

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Generator[Result, None, None]:
        """See :class:`~prep.engines.Engine`.

        Raises:
            ConfigError: there is no cluster, or none of its nodes can do the work.
            VlprepError: a task was lost again and again, or all nodes are.
        """
        numbered = enumerate(tasks)
        first = next(numbered, None)
        if first is None:
            return
        nodes = self._ready_nodes()
        flight = _Flight[Task, Result](nodes, function)
        turn, submitted, over = 0, 0, False
        waiting = collections.deque([first])
        try:
            while True:
                while flight.num_running < self.num_workers and nodes.ids:
                    if flight.lost:
                        flight.submit(flight.lost.popleft())
                        continue
                    if over or submitted >= turn + self.num_workers * _IN_FLIGHT_PER_WORKER:
                        break
                    following = waiting.popleft() if waiting else next(numbered, None)
                    if following is None:
                        over = True
                        break
                    flight.submit(_Attempt(*following))
                    submitted += 1
                if turn in flight.done:
                    yield flight.take(turn)
                    turn += 1
                elif over and turn == submitted:
                    return
                else:
                    # Once a task has failed, those before it are still waited for: the same error comes out every time.
                    over = over or flight.has_failed
                    flight.wait()
        finally:
            if flight.num_running:
                # The cluster ends what a process that leaves had running. To cancel tasks one by one would be milder,
                # but Ray (2.60) aborts this process when a task that it cancels comes to its end at that moment.
                self._disconnect()
                time.sleep(_ENDING_S)

    def _ready_nodes(self) -> RayNodes:
        """Connect, and find the nodes that can do the work, unless that was done."""
        if self._cluster is None:
            self._cluster = connect(self._address, self._workers or default_workers())
        if self._nodes is None:
            self._requirements = self._requirements or WorkerRequirements()
            self._nodes = RayNodes(self._cluster, self._requirements)
            self._nodes.await_some()
        return self._nodes

    def _disconnect(self) -> None:
        if self._cluster is not None:
            import_ray().shutdown()
        self._cluster, self._nodes = None, None


@dataclass(slots=True)
class _Attempt(Generic[Task]):
    """A task on its way.

    Attributes:
        number: place of its result.
        task: what to do.
        nodes: where it may run this time.
        losses: what became of earlier attempts.
    """

    number: int
    task: Task
    nodes: frozenset[str] = frozenset()
    losses: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Failure:
    error: BaseException
    cause: BaseException


class _Flight(Generic[Task, Result]):
    """Tasks that run on the cluster, results that wait for their turn, and tasks that were lost.

    Args:
        nodes: where tasks may run.
        function: what is done with a task.
    """

    def __init__(self, nodes: RayNodes, function: Callable[[Task], Result]) -> None:
        self._ray = import_ray()
        self._nodes = nodes
        self._function = function
        self._name = getattr(function.func if isinstance(function, partial) else function, "__name__", "task")
        self._remote = self._ray.remote(_run)
        self._folder = os.getcwd()
        self._running: dict[Any, _Attempt[Task]] = {}
        self.done: dict[int, Result | _Failure] = {}
        self.lost: collections.deque[_Attempt[Task]] = collections.deque()
        self.has_failed = False

    @property
    def num_running(self) -> int:
        """Tasks given to the cluster that have not come back."""
        return len(self._running)

    def submit(self, attempt: _Attempt[Task]) -> None:
        """Give a task to the cluster."""
        attempt.nodes = self._nodes.ids
        task = self._remote.options(name=f"vlprep {self._name}", **task_options(attempt.nodes))
        self._running[task.remote(self._function, attempt.task, self._folder)] = attempt

    def take(self, number: int) -> Result:
        """The result of a task that is done; raises what the task raised."""
        found = self.done.pop(number)
        if isinstance(found, _Failure):
            raise found.error from found.cause
        return found

    def wait(self) -> None:
        """Wait for some task to come back, a few seconds at most."""
        if self._nodes.look_again():
            self._recall()
        if not self._running:
            # Every node is lost; others may come.
            time.sleep(1.0)
            return
        for reference in self._ray.wait(list(self._running), timeout=_WAIT_S)[0]:
            self._collect(reference)

    def _recall(self) -> None:
        """Cancel tasks that wait for nodes of which none is left; they count as lost when they come back."""
        for reference, attempt in self._running.items():
            if attempt.nodes.isdisjoint(self._nodes.ids):
                self._ray.cancel(reference)

    def _collect(self, reference: Any) -> None:
        attempt = self._running.pop(reference)
        errors = self._ray.exceptions
        try:
            self.done[attempt.number] = self._ray.get(reference)
        except errors.RayTaskError as error:
            # What the function raised; Ray wraps it into a class of its own.
            self._fail(attempt, error.cause, error)
        except (
            errors.WorkerCrashedError,
            errors.NodeDiedError,
            errors.OutOfMemoryError,
            errors.ObjectLostError,
            errors.TaskCancelledError,
            errors.TaskUnschedulableError,
        ) as error:
            self._lose(attempt, error)
        except errors.RayError as error:
            self._fail(attempt, VlprepError(f"Ray could not run a task: {_reason(error)}. {_GO_ON}"), error)

    def _lose(self, attempt: _Attempt[Task], error: Exception) -> None:
        attempt.losses.append(type(error).__name__)
        if len(attempt.losses) < _MAX_ATTEMPTS:
            logger.warning("ray: a task was lost with its worker (%s); it is run again", attempt.losses[-1])
            self.lost.append(attempt)
            return
        message = (
            f"a task of {self._name} was lost with its worker {_MAX_ATTEMPTS} times ({', '.join(attempt.losses)}). "
            f"{_GO_ON} With fewer --workers if memory ran out (OutOfMemoryError, WorkerCrashedError)."
        )
        self._fail(attempt, VlprepError(message), error)

    def _fail(self, attempt: _Attempt[Task], error: BaseException, cause: BaseException) -> None:
        self.done[attempt.number] = _Failure(error, cause)
        self.has_failed = True


_GO_ON = "Run the same command again to go on where it was."


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def _run(function: Callable[[Task], Result], task: Task, folder: str) -> Result:
    """On a node: do one task, with relative paths meaning what they mean to the process that runs the build."""
    with contextlib.suppress(OSError):
        # Where that folder is not visible, the paths of the build are absolute, or the node got no work.
        os.chdir(folder)
    return function(task)
