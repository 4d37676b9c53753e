"""Keeps the benchmark within its time: a process that works in parts -> its report, as far as it came.

The work runs in a child, which reports every figure as soon as there is one. When the time is over, the child and all
its processes are killed, and the figures of the unfinished part are printed. If the child fails by itself, another one
goes on with the parts that are left.

This module imports nothing large, so that the time that it limits is the time of the call.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext, SpawnProcess
from pathlib import Path
from typing import Literal

Kind = Literal["parts", "begin", "line", "partial", "done", "end"]
"""What a message of the child says: all parts in their order, one a line; a part begins; a line to print at once; all
figures of the part so far; the part is done; there is nothing left to do."""

Work = Callable[[Connection, frozenset[str]], None]
"""Sends messages, pairs of :data:`Kind` and text, over a connection; leaves out the parts that are over."""

POLL_S = 0.5
"""Time between two looks whether the child is alive. Its own processes could keep the connection open."""


@dataclass(slots=True)
class _Progress:
    """What is known of the work."""

    parts: tuple[str, ...] = ()
    over: list[str] = field(default_factory=list)
    current: str | None = None
    figures: str = ""


def work(
    sender: Connection, over: frozenset[str], *, smoke: bool, folder: Path, checkpoint: Path | None, until_s: float
) -> None:
    """Do the parts that are not over, in a process that may import what takes long."""
    from tests.benchmarks.gpu.parts import run_parts

    run_parts(sender, over, smoke=smoke, folder=folder, checkpoint=checkpoint, until_s=until_s)


def supervise(task: Work, *, until_s: float) -> Iterator[str]:
    """Yield the report, part by part. It ends in time, whatever the work does.

    The first part makes what the others need: if it fails, nothing goes on.

    Args:
        task: the work; pickled into a new process.
        until_s: when everything ends, in seconds of :func:`time.monotonic`.
    """
    context, progress, reason = multiprocessing.get_context("spawn"), _Progress(), ""
    while not reason:
        reason = yield from _run_child(context, task, progress, until_s)
        if progress.current is not None:
            yield f"\n{progress.current}: {reason}; measured until then:\n{progress.figures or 'nothing'}"
            if progress.current != progress.parts[0] and time.monotonic() < until_s:
                reason = ""  # the other parts go on
            progress.over.append(progress.current)
            progress.current, progress.figures = None, ""
    left = [part for part in progress.parts if part not in progress.over]
    if left or not progress.parts:
        yield f"\nnot reached: {'; '.join(left) or 'anything'} ({reason})"


def _run_child(context: SpawnContext, task: Work, progress: _Progress, until_s: float) -> Iterator[str]:
    """Run a child until it ends or the time is over; return why it ended."""
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_lead, args=(task, sender, frozenset(progress.over)), name="benchmark")
    child.start()
    sender.close()
    try:
        while True:
            left_s = until_s - time.monotonic()
            if left_s <= 0:
                return "the time is over"
            try:
                if not receiver.poll(min(left_s, POLL_S)):
                    if child.is_alive() or receiver.poll():
                        continue
                    raise EOFError
                kind, text = receiver.recv()
            except (EOFError, OSError):
                child.join(POLL_S)
                return f"its process failed (exit code {child.exitcode})"
            if kind == "end":
                return "no time to start it"
            yield from _note(progress, kind, text)
    finally:
        _kill(child)
        receiver.close()


def _note(progress: _Progress, kind: Kind, text: str) -> Iterator[str]:
    if kind == "parts":
        progress.parts = tuple(text.splitlines())
    elif kind == "begin":
        progress.current, progress.figures = text, ""
    elif kind == "line":
        yield text
    elif kind == "partial":
        progress.figures = text
    else:
        if progress.figures:
            yield progress.figures
        progress.over.append(text)
        progress.current, progress.figures = None, ""


def _lead(task: Work, sender: Connection, over: frozenset[str]) -> None:
    """Be the child: lead a group of processes, which ends with it."""
    os.setsid()
    task(sender, over)


def _kill(child: SpawnProcess) -> None:
    """End a child and all processes that it has started."""
    assert child.pid is not None
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.kill()
    child.join(POLL_S)
