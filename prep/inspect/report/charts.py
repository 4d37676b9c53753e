"""Histograms with axes at round numbers, and bars of shares: numbers in, coordinates of an SVG drawing out.

Input: NumPy arrays. Output: :class:`Histogram`, and a :class:`Drawing` that the template ``charts.html`` writes as
inline SVG. Colours are classes of the page's style. Every bar has its counts as a tooltip (``<title>``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from schemas.wording import counted

WIDTH, HEIGHT = 440, 220
LEFT, RIGHT, TOP, BOTTOM = 46, 24, 10, 44
BASELINE = HEIGHT - BOTTOM
_MAX_BARS = 40
_MAX_TICKS = 7
_GRID_LINES = 4
_CHART_WIDTH, _CHART_HEIGHT = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
_SHARES = ((90, 0.5, 2), (80, 1, 5), (50, 2.5, 10), (0, 5, 20))
"""(lowest percentage, width of a bar, distance of ticks) of a histogram of shares."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Histogram:
    """Stacked bars.

    Attributes:
        title: what is counted.
        unit: unit of the horizontal axis.
        labels: (B,) range of each bar, for tooltips.
        ticks: (position, text) of the horizontal axis. Position ``b`` is the left edge of bar ``b``.
        counts: (B,) counts of every series by name. The first series is at the bottom.
    """

    title: str
    unit: str
    labels: tuple[str, ...]
    ticks: tuple[tuple[float, str], ...]
    counts: Mapping[str, NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class Rect:
    """One series of one bar: CSS class and position."""

    css: str
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawing:
    """A histogram in the coordinates of its SVG.

    Attributes:
        title, unit, summary: texts; the summary is read aloud in place of the drawing.
        levels: height and label of each grid line.
        ticks: position and label of each tick.
        bars: tooltip and rectangles of each bar.
    """

    title: str
    unit: str
    summary: str
    levels: tuple[tuple[float, str], ...]
    ticks: tuple[tuple[float, str], ...]
    bars: tuple[tuple[str, tuple[Rect, ...]], ...]


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a bar of shares, in percent of its width."""

    css: str
    label: str
    start: float
    width: float


def round_step(largest: float, max_steps: int) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, … of which at most ``max_steps`` reach ``largest``."""
    power = 1
    while True:
        for digit in (1, 2, 5):
            if digit * power * max_steps >= largest:
                return digit * power
        power *= 10


def number_histogram(title: str, unit: str, series: Mapping[str, NDArray[np.int64]]) -> Histogram:
    """Histogram of integers >= 0, with at most 40 bars of equal width. Widths and ticks are round numbers."""
    top = max((int(values.max()) for values in series.values() if values.size), default=0)
    width = round_step(top + 1, _MAX_BARS)
    num_bars = top // width + 1
    labels = tuple(
        f"{bar * width:,}" if width == 1 else f"{bar * width:,} to {(bar + 1) * width - 1:,}" for bar in range(num_bars)
    )
    step = max(width, round_step(num_bars * width, _MAX_TICKS))
    return Histogram(
        title=title,
        unit=unit,
        labels=labels,
        ticks=tuple((value / width, f"{value:,}") for value in range(0, num_bars * width + 1, step)),
        counts={name: np.bincount(values // width, minlength=num_bars) for name, values in series.items()},
    )


def growing_histogram(title: str, unit: str, series: Mapping[str, NDArray[np.int64]]) -> Histogram:
    """Histogram of integers >= 1, with bars from 1, 2, 5, 10, 20, 50, … to the next."""
    top = max((int(values.max()) for values in series.values() if values.size), default=1)
    edges = [1]
    while edges[-1] <= top:
        power = 10 ** (len(edges) // 3)
        edges.append((1, 2, 5)[len(edges) % 3] * power)
    every = 1 if len(edges) <= _MAX_TICKS + 1 else 3
    return Histogram(
        title=title,
        unit=unit,
        labels=tuple(f"{low:,}" if high == low + 1 else f"{low:,} to {high - 1:,}" for low, high in pairwise(edges)),
        ticks=tuple((bar, f"{edges[bar]:,}") for bar in range(0, len(edges), every)),
        counts={name: np.histogram(values, bins=edges)[0].astype(np.int64) for name, values in series.items()},
    )


def share_histogram(title: str, unit: str, name: str, shares: NDArray[np.float64]) -> Histogram:
    """Histogram of shares <= 1, with 20 bars from a round percentage to 100 %."""
    lowest = float(shares.min()) * 100 if shares.size else 100.0
    low, width, step = next(scale for scale in _SHARES if lowest >= scale[0])
    edges = np.linspace(low, 100, 21)
    counts, _ = np.histogram(shares * 100, bins=edges)
    return Histogram(
        title=title,
        unit=unit,
        labels=tuple(f"{start:.4g} % to {end:.4g} %" for start, end in pairwise(edges.tolist())),
        ticks=tuple(((percent - low) / width, f"{percent} %") for percent in range(low, 101, step)),
        counts={name: counts.astype(np.int64)},
    )


def draw(chart: Histogram, colours: Sequence[str]) -> Drawing:
    """Place the bars, grid lines and ticks of a histogram.

    Args:
        chart: the histogram.
        colours: CSS class of every series.
    """
    totals = np.sum(list(chart.counts.values()), axis=0) if chart.counts else np.zeros(1, dtype=np.int64)
    step = round_step(int(totals.max()), _GRID_LINES)
    top = max(step * -(-int(totals.max()) // step), 1)
    width = _CHART_WIDTH / max(len(chart.labels), 1)
    highest = int(np.argmax(totals))
    most = f"; most at {chart.labels[highest]}" if chart.labels and totals[highest] else ""
    return Drawing(
        title=chart.title,
        unit=chart.unit,
        summary=f"{chart.title}: {int(totals.sum()):,} in {counted(len(chart.labels), 'bar')}{most}",
        levels=tuple((BASELINE - _CHART_HEIGHT * level / top, _short(level)) for level in range(0, top + 1, step)),
        ticks=tuple((LEFT + edge * width, text) for edge, text in chart.ticks),
        bars=tuple(
            (_tooltip(chart, bar), tuple(_rects(chart, bar, colours, top)))
            for bar in range(len(chart.labels))
            if totals[bar]
        ),
    )


def segments(parts: Sequence[tuple[str, str, int]]) -> list[Segment]:
    """Divide a bar among (CSS class, label, count)."""
    total = sum(count for _, _, count in parts)
    result, start = [], 0.0
    for css, label, count in parts:
        width = 100 * count / total if total else 0.0
        if count:
            result.append(Segment(css, f"{label}: {count:,}", round(start, 3), round(width, 3)))
        start += width
    return result


def _rects(chart: Histogram, bar: int, colours: Sequence[str], top: int) -> Iterator[Rect]:
    """The series of one bar. ``top`` is the count at the full height of the chart."""
    width = _CHART_WIDTH / len(chart.labels)
    below = 0
    for counts, colour in zip(chart.counts.values(), colours):
        if counts[bar]:
            height = max(_CHART_HEIGHT * int(counts[bar]) / top, 1)
            y = BASELINE - _CHART_HEIGHT * below / top - height
            yield Rect(colour, LEFT + bar * width + 0.75, y, max(width - 1.5, 0.5), height)
            below += int(counts[bar])


def _tooltip(chart: Histogram, bar: int) -> str:
    parts = [f"{int(counts[bar]):,} {name}" for name, counts in chart.counts.items() if counts[bar]]
    return f"{chart.labels[bar]} {chart.unit}".rstrip() + f": {', '.join(parts)}"


def _short(count: int) -> str:
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)
