"""Figures of a case as a table, and what they say about the claim: turns and activities -> lines."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from tests.benchmarks.gpu.measure import Activity, Turn, flops_of
from train.memory.terms import GIB
from train.model.flops import ModelFlops

MAX_IDLE = 0.02
"""The bar: share of the time that the device may be idle when data is ready."""

COLUMNS = (
    "",
    "tokens/s",
    "over rounds",
    "samples/s",
    "TFLOP/s",
    "MFU",
    "p50 ms",
    "p95 ms",
    "steps",
    "data wait",
    "busy",
    "longest gap",
    "waits/step",
    "peak GiB",
)


@dataclass(slots=True)
class Result:
    """What is known of a contender in a case.

    Attributes:
        is_ours: whether it is this project.
        turns: its turns so far.
        activity: from the profiler.
        losses: mean loss of each compared bin.
        failure: why it could not continue.
    """

    is_ours: bool
    turns: list[Turn] = field(default_factory=list)
    activity: Activity | None = None
    losses: list[float] = field(default_factory=list)
    failure: str | None = None

    @property
    def seconds(self) -> float:
        """Seconds of all steps."""
        return sum(sum(turn.step_s) for turn in self.turns)

    def flops_per_s(self, flops: ModelFlops) -> list[float]:
        """FLOPs per second in each turn."""
        return [sum(flops_of(flops, content) for content in turn.contents) / sum(turn.step_s) for turn in self.turns]


def format_rows(rows: Sequence[Sequence[str]]) -> str:
    """Align the columns of a table."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    return "\n".join(lines)


def case_table(results: Mapping[str, Result], flops: ModelFlops, peak_tflops: float | None) -> str:
    """All figures of all contenders; a dash where there is none."""
    rows = [COLUMNS, *(_row(name, result, flops, peak_tflops) for name, result in results.items())]
    failures = [f"{name}: {result.failure}" for name, result in results.items() if result.failure is not None]
    return "\n".join([format_rows(rows), *failures])


def _row(name: str, result: Result, flops: ModelFlops, peak_tflops: float | None) -> tuple[str, ...]:
    if not result.turns:
        return (name, *["-"] * (len(COLUMNS) - 1))
    contents = [content for turn in result.turns for content in turn.contents]
    step_s = np.array([seconds for turn in result.turns for seconds in turn.step_s])
    wait_s = sum(sum(turn.wait_s) for turn in result.turns)
    speeds = [sum(content.num_tokens for content in turn.contents) / sum(turn.step_s) for turn in result.turns]
    tflops = sum(flops_of(flops, content) for content in contents) / result.seconds / 1e12
    peaks = [turn.peak_bytes for turn in result.turns if turn.peak_bytes is not None]
    activity = result.activity
    return (
        name,
        f"{sum(content.num_tokens for content in contents) / result.seconds:,.0f}",
        f"{min(speeds):,.0f}-{max(speeds):,.0f}",
        f"{sum(len(content.lengths) for content in contents) / result.seconds:.1f}",
        f"{tflops:.2f}",
        "-" if peak_tflops is None else f"{tflops / peak_tflops:.3f}",
        f"{np.percentile(step_s, 50) * 1e3:.0f}",
        f"{np.percentile(step_s, 95) * 1e3:.0f}",
        str(step_s.size),
        f"{wait_s / result.seconds:.1%}",
        "-" if activity is None else f"{activity.busy:.1%}",
        "-" if activity is None else f"{activity.longest_gap_s * 1e3:.1f} ms",
        "-" if activity is None else f"{activity.waits_per_step:.1f}",
        f"{max(peaks) / GIB:.2f}" if peaks else "-",
    )


def loss_lines(results: Mapping[str, Result]) -> Iterator[str]:
    """Losses of the compared bins, and how much each contender's differ from those of the first, at most."""
    known = {name: result.losses for name, result in results.items() if result.losses}
    if not known:
        return
    first, expected = next(iter(known.items()))
    for name, losses in known.items():
        shown = ", ".join(f"{loss:.5f}" for loss in losses)
        difference = max(abs(loss / other - 1) for loss, other in zip(losses, expected))
        yield f"loss: {name}: {shown}" + ("" if name == first else f" (differs from {first} by {difference:.1e})")


def memory_line(results: Mapping[str, Result], estimate: int) -> str:
    """The measured peak of ours against the arithmetic."""
    name, result = next((name, result) for name, result in results.items() if result.is_ours)
    peaks = [turn.peak_bytes for turn in result.turns if turn.peak_bytes is not None]
    measured = f"measured {max(peaks) / GIB:.2f} GiB, {estimate / max(peaks) - 1:+.1%}" if peaks else "not measured"
    return f"memory: train.memory says {estimate / GIB:.2f} GiB for {name}; {measured}"


def verdict_lines(results: Mapping[str, Result], flops: ModelFlops) -> Iterator[str]:
    """Whether ours meets the bar in this case: hardly idle, and faster than both upstream ways in every round."""
    ours = next(result for result in results.values() if result.is_ours)
    others = [result for result in results.values() if not result.is_ours and result.turns]
    if ours.activity is not None:
        idle = 1 - ours.activity.busy
        yield f"bar: idle {idle:.1%}, allowed {MAX_IDLE:.0%}: {'met' if idle < MAX_IDLE else 'MISSED'}"
    if ours.turns and others:
        lowest = min(ours.flops_per_s(flops)) / 1e12
        highest = max(max(result.flops_per_s(flops)) for result in others) / 1e12
        outcome = "met" if lowest > highest else "MISSED"
        yield f"bar: {lowest:.2f} TFLOP/s in the slowest round of ours, {highest:.2f} in upstream's fastest: {outcome}"
