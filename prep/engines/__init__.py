"""Engines: whoever runs the parallel steps of the pipeline. A step does not know which one runs it.

An engine takes a function and tasks, and yields results in the order of the tasks, as soon as they are there; it holds
only a few tasks in flight. Tasks are idempotent: what they write gets its name when it is complete, so an engine may
run one again, or twice at the same time.

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
    """What a step of the pipeline needs from whoever runs it."""

    @property
    def num_workers(self) -> int:
        """Tasks that run at the same time."""
        ...

    def share(self, reads: Iterable[Path] = (), *, writes: Iterable[Path] = ()) -> None:
        """Say what the tasks of later calls of :meth:`map` need, besides what was said before.

        An engine whose workers are elsewhere gives work only to those that see all of it.

        Args:
            reads: existing files, and folders with what tasks read.
            writes: existing folders that tasks write into.
        """
        ...

    def map(self, function: Callable[[Task], Result], tasks: Iterable[Task]) -> Generator[Result, None, None]:
        """Results of ``function`` for every task, in order. Function, tasks and results must pickle.

        Closing the generator ends what runs; when :meth:`~Generator.close` returns, nothing of it is left.

        Raises:
            VlprepError: a worker is lost for good. What ``function`` raises comes out as it is.
        """
        ...


@contextmanager
def open_engine(name: str = "local", *, workers: int | None = None, ray_address: str | None = None) -> Iterator[Engine]:
    """The engine of a name, until the end of the block.

    Args:
        name: one of :data:`ENGINES`.
        workers: tasks that run at the same time, or None for as many as there are cores.
        ray_address: of a Ray cluster: ``auto``, ``local``, ``host:port`` or ``ray://host:port``; None to look for one.

    Raises:
        ConfigError: an address for an engine that has none.
    """
    if name == "ray":
        from prep.engines.ray import RayEngine

        with RayEngine(workers=workers, address=ray_address) as engine:
            yield engine
        return
    if ray_address is not None:
        raise ConfigError(f"--ray-address {ray_address} goes with --engine ray; the {name} engine has no address.")
    number = default_workers() if workers is None else workers
    if number == 1:
        yield SerialEngine()
        return
    with LocalEngine(number) as local:
        yield local
