"""The engine of a Ray cluster: tasks run on every node that sees the files of the build.

A task that is lost with its worker or node is retried elsewhere, a bounded number of times. Results come in the order
of the tasks: at most three tasks per worker run or wait for their turn. Only tasks and results (kilobytes) pass through
the cluster. The nodes themselves read media and write shards.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator
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
_DISCONNECT_S = 1.0
"""More than a cluster needs to end the tasks of a process that disconnected."""


class RayEngine:
    """Runs tasks on the nodes of a Ray cluster. A context manager that connects with the first task.

    Args:
        workers: tasks that run at the same time; None for as many as the nodes have room for.
        address: of the cluster, see :func:`prep.engines.ray_cluster.connect`.
    """

    def __init__(self, *, workers: int | None = None, address: str | None = None) -> None:
        self._workers = workers
        self._address = address
        self._requirements: WorkerRequirements | None = None
        self._cluster: str | None = None
        self._nodes: RayNodes | None = None

    def renew_workers(self) -> bool:
        """See :class:`~prep.engines.Engine`. Workers of a cluster have what they read themselves."""
        return False

    @property
    def num_workers(self) -> int:
        """See :class:`~prep.engines.Engine`. If the cluster decides, 1 before the first task."""
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
            # Nodes that were checked earlier have not been checked for this.
            self._nodes = None

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Generator[Result, None, None]:
        """See :class:`~prep.engines.Engine`.

        Raises:
            ConfigError: there is no cluster, or none of its nodes meets the requirements.
            VlprepError: a task was lost too many times, or all nodes are lost.
        """
        attempts = itertools.starmap(_Attempt[Task], enumerate(tasks))
        first = next(attempts, None)
        if first is None:
            return
        nodes = self._ready_nodes()
        flight = _Flight(nodes, function, itertools.chain([first], attempts))
        try:
            for turn in itertools.count():
                max_submitted = turn + self.num_workers * _IN_FLIGHT_PER_WORKER
                flight.submit_tasks(self.num_workers, max_submitted)
                while turn not in flight.done:
                    if flight.is_over and turn == flight.num_submitted:
                        return
                    flight.wait()
                    flight.submit_tasks(self.num_workers, max_submitted)
                yield flight.take(turn)
        finally:
            if flight.num_running:
                # Ray ends the running tasks of a process that disconnects. Cancelling each task would be gentler, but
                # Ray (2.60) aborts this process if a task ends at the moment it is cancelled.
                self._disconnect()
                time.sleep(_DISCONNECT_S)

    def _ready_nodes(self) -> RayNodes:
        """Connect and find the nodes that meet the requirements, once."""
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
    """One attempt to run a task.

    Attributes:
        index: of the task and its result.
        task: argument of the function.
        nodes: nodes that it may run on this time.
        losses: errors of earlier attempts.
    """

    index: int
    task: Task
    nodes: frozenset[str] = frozenset()
    losses: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Failure:
    error: BaseException
    cause: BaseException


class _Flight(Generic[Task, Result]):
    """Tasks that run on the cluster, results that wait for their turn, and lost tasks that wait for a retry.

    Args:
        nodes: nodes that tasks may run on.
        function: applied to each task.
        attempts: one for each task, in order. They are pulled as they are submitted.
    """

    def __init__(self, nodes: RayNodes, function: Callable[[Task], Result], attempts: Iterator[_Attempt[Task]]) -> None:
        self._ray = import_ray()
        self._nodes = nodes
        self._function = function
        self._name = getattr(function.func if isinstance(function, partial) else function, "__name__", "task")
        self._remote = self._ray.remote(_run)
        self._folder = os.getcwd()
        self._attempts = attempts
        self._running: dict[Any, _Attempt[Task]] = {}
        self._lost: collections.deque[_Attempt[Task]] = collections.deque()
        self.done: dict[int, Result | _Failure] = {}
        self.num_submitted = 0
        self.is_over = False

    @property
    def num_running(self) -> int:
        """Tasks that the cluster has not returned yet."""
        return len(self._running)

    def submit_tasks(self, max_running: int, max_submitted: int) -> None:
        """Submit lost tasks again, then new ones, until ``max_running`` run or there are no more.

        Args:
            max_running: tasks that may run at the same time.
            max_submitted: new tasks that may have been submitted in all, so that few results wait for their turn.
        """
        while self.num_running < max_running and self._nodes.ids:
            if self._lost:
                self._submit(self._lost.popleft())
                continue
            if self.is_over or self.num_submitted >= max_submitted:
                return
            attempt = next(self._attempts, None)
            if attempt is None:
                self.is_over = True
                return
            self._submit(attempt)
            self.num_submitted += 1

    def _submit(self, attempt: _Attempt[Task]) -> None:
        attempt.nodes = self._nodes.ids
        task = self._remote.options(name=f"vlprep {self._name}", **task_options(attempt.nodes))
        self._running[task.remote(self._function, attempt.task, self._folder)] = attempt

    def take(self, index: int) -> Result:
        """Return the result of a finished task, or raise what the task raised."""
        outcome = self.done.pop(index)
        if isinstance(outcome, _Failure):
            raise outcome.error from outcome.cause
        return outcome

    def wait(self) -> None:
        """Wait for a task to return, a few seconds at most."""
        if self._nodes.look_again():
            self._recall()
        if not self._running:
            # Every node is lost. Others may join.
            time.sleep(1.0)
            return
        for reference in self._ray.wait(list(self._running), timeout=_WAIT_S)[0]:
            self._collect(reference)

    def _recall(self) -> None:
        """Cancel tasks whose nodes are all gone. They count as lost when they return."""
        for reference, attempt in self._running.items():
            if attempt.nodes.isdisjoint(self._nodes.ids):
                self._ray.cancel(reference)

    def _collect(self, reference: Any) -> None:
        attempt = self._running.pop(reference)
        errors = self._ray.exceptions
        try:
            self.done[attempt.index] = self._ray.get(reference)
        except errors.RayTaskError as error:
            # Ray wraps what the function raised in its own class.
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
            self._fail(attempt, VlprepError(f"Ray could not run a task: {_reason(error)}. {_RESUME}"), error)

    def _lose(self, attempt: _Attempt[Task], error: Exception) -> None:
        attempt.losses.append(type(error).__name__)
        if len(attempt.losses) < _MAX_ATTEMPTS:
            logger.warning("ray: a task was lost with its worker (%s); retrying", attempt.losses[-1])
            self._lost.append(attempt)
            return
        message = (
            f"a task of {self._name} was lost with its worker {_MAX_ATTEMPTS} times ({', '.join(attempt.losses)}). "
            f"{_RESUME} Use fewer --workers if memory ran out (OutOfMemoryError, WorkerCrashedError)."
        )
        self._fail(attempt, VlprepError(message), error)

    def _fail(self, attempt: _Attempt[Task], error: BaseException, cause: BaseException) -> None:
        self.done[attempt.index] = _Failure(error, cause)
        # No new tasks, but those before this one still finish: a rerun raises the same error, whatever the timing.
        self.is_over = True


_RESUME = "Run the same command again to resume."


def _reason(error: Exception) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def _run(function: Callable[[Task], Result], task: Task, folder: str) -> Result:
    """Run one task on a node. Relative paths mean the same as for the process that runs the build."""
    with contextlib.suppress(OSError):
        # A node that does not see this folder gets work only if the paths of the build are absolute.
        os.chdir(folder)
    return function(task)
