"""Engines run the parallel steps of the pipeline. A step does not know which engine runs it.

In: a function and tasks. Out: results in the order of the tasks, as they become available, with few tasks in flight.
Tasks are idempotent: their files get their final names when complete, so an engine may retry a task or run it twice.

- :class:`~prep.engines.local.SerialEngine`: this process.
- :class:`~prep.engines.local.LocalEngine`: processes on this machine.
- :class:`~prep.engines.ray.RayEngine`: the nodes of a Ray cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

from prep.engines.local import LocalEngine, SerialEngine, default_workers
from schemas.errors import ConfigError

__all__ = ["ENGINES", "Engine", "LocalEngine", "SerialEngine", "default_workers", "open_engine"]

ENGINES = ("local", "ray")

Task = TypeVar("Task")
Result = TypeVar("Result")


class Engine(Protocol):
    """What a step of the pipeline needs from an engine."""

    @property
    def num_workers(self) -> int:
        """Tasks that run at the same time."""
        ...

    def renew_workers(self) -> bool:
        """End the workers of earlier steps, if those of the next one would then have what this process has in memory.

        Returns:
            Whether they will have it.
        """
        ...

    def share(self, reads: Iterable[Path] = (), *, writes: Iterable[Path] = ()) -> None:
        """Add paths that the tasks of later calls of :meth:`map` need.

        An engine with workers on other machines uses only those that see all paths.

        Args:
            reads: existing files and folders that tasks read.
            writes: existing folders that tasks write into.
        """
        ...

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Generator[Result, None, None]:
        """Results of ``function`` for every task, in order. Function, tasks and results must pickle.

        Closing the generator ends all running tasks; :meth:`~Generator.close` returns once they have ended.

        Raises:
            VlprepError: a worker is lost for good. Exceptions of ``function`` pass through unchanged.
        """
        ...


@contextmanager
def open_engine(name: str = "local", *, workers: int | None = None, ray_address: str | None = None) -> Iterator[Engine]:
    """Open an engine by name; a context manager.

    Args:
        name: one of :data:`ENGINES`.
        workers: tasks that run at the same time; None for one per core.
        ray_address: of a Ray cluster: ``auto``, ``local``, ``host:port`` or ``ray://host:port``; None to look for one.

    Raises:
        ConfigError: an address with an engine that takes none.
    """
    if name == "ray":
        from prep.engines.ray import RayEngine

        with RayEngine(workers=workers, address=ray_address) as engine:
            yield engine
        return
    if ray_address is not None:
        raise ConfigError(f"--ray-address {ray_address} goes with --engine ray; the {name} engine takes no address.")
    num_workers = default_workers() if workers is None else workers
    if num_workers == 1:
        yield SerialEngine()
        return
    with LocalEngine(num_workers) as local:
        yield local
