"""Measures contenders in turns: the processor time of a pass, each contender in a process of its own."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Work:
    """Tokens and file bytes of one pass."""

    tokens: int = 0
    num_bytes: int = 0


@dataclass(frozen=True)
class Figure:
    """The fastest of several passes, in seconds of processor time."""

    work: Work
    cpu_s: float

    @property
    def tokens_per_s(self) -> float:
        return self.work.tokens / self.cpu_s

    @property
    def bytes_per_s(self) -> float:
        return self.work.num_bytes / self.cpu_s


Prepare = Callable[[], Callable[[], Work]]
"""Prepares a contender; returns its pass."""


def run_apart(function: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
    """Result of a function in a process of its own. The heap that it grows is not passed on to the contenders."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as pool:
        return pool.submit(function, *args, **options).result()


@contextlib.contextmanager
def apart(prepare: Prepare) -> Iterator[Callable[[], Figure]]:
    """Prepare a contender in a process of its own, and measure its passes there.

    In one process they would change each other: the heap that one has grown saves another its page faults, and threads
    that one leaves behind are counted for another.
    """
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()

    def serve() -> None:
        run = prepare()
        while there.recv():
            start_s = time.process_time()
            work = run()
            there.send(Figure(work, time.process_time() - start_s))
        os._exit(0)  # without waiting for threads of loaders

    def measure_pass() -> Figure:
        here.send(True)
        while not here.poll(1):
            if not process.is_alive():
                raise RuntimeError("a contender has failed; its traceback is above.")
        figure: Figure = here.recv()
        return figure

    process = context.Process(target=serve)
    process.start()
    try:
        yield measure_pass
    finally:
        with contextlib.suppress(BrokenPipeError):
            here.send(False)
        process.join()


def measure(contenders: Mapping[str, Prepare], rounds: int) -> dict[str, Figure]:
    """Run all contenders in turns; the first round is a warm-up."""
    figures: dict[str, list[Figure]] = {name: [] for name in contenders}
    with contextlib.ExitStack() as stack:
        passes = {name: stack.enter_context(apart(prepare)) for name, prepare in contenders.items()}
        for _ in range(rounds + 1):
            for name, measure_pass in passes.items():
                figures[name].append(measure_pass())
    return {name: min(of_rounds[1:], key=lambda figure: figure.cpu_s) for name, of_rounds in figures.items()}
