"""Bar charts as inline SVG: histograms of whole numbers and of shares. No script; colours come from the page's style.

Input: NumPy arrays. Output: SVG text. Every bar carries its numbers as a tooltip (``<title>``).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

_WIDTH, _HEIGHT = 480, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 22, 10, 40
_MAX_BARS = 32
_MAX_TICKS = 7
_GRID_LINES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Histogram:
    """Stacked bars.

    Attributes:
        title: what is counted, for readers of the page and of its tooltips.
        unit: of the horizontal axis.
        labels: (B,) what each bar stands for, in tooltips.
        ticks: (bar border, text) of the horizontal axis; border ``b`` is left of bar ``b``.
        counts: for every series, by name, (B,) numbers; the first is lowest.
    """

    title: str
    unit: str
    labels: tuple[str, ...]
    ticks: tuple[tuple[int, str], ...]
    counts: Mapping[str, NDArray[np.int64]]


def number_histogram(title: str, unit: str, series: Mapping[str, NDArray[np.int64]]) -> Histogram:
    """Counts of whole numbers of at least 0, in at most 32 bars of equal width, a power of two."""
    top = max((int(values.max()) for values in series.values() if values.size), default=0)
    width = 1
    while top // width >= _MAX_BARS:
        width *= 2
    num_bars = top // width + 1
    labels = tuple(
        f"{bar * width:,}" if width == 1 else f"{bar * width:,} to {(bar + 1) * width - 1:,}" for bar in range(num_bars)
    )
    every = max(1, -(-num_bars // _MAX_TICKS))
    return Histogram(
        title=title,
        unit=unit,
        labels=labels,
        ticks=tuple((bar, f"{bar * width:,}") for bar in range(0, num_bars + 1, every)),
        counts={name: np.bincount(values // width, minlength=num_bars) for name, values in series.items()},
    )


def doubling_histogram(title: str, unit: str, series: Mapping[str, NDArray[np.int64]]) -> Histogram:
    """Counts of whole numbers of at least 1; each bar is twice as wide as the last (1, 2-3, 4-7 …)."""
    exponents = {name: np.frexp(values.astype(np.float64))[1].astype(np.int64) - 1 for name, values in series.items()}
    num_bars = max((int(values.max()) for values in exponents.values() if values.size), default=0) + 1
    return Histogram(
        title=title,
        unit=unit,
        labels=tuple("1" if bar == 0 else f"{1 << bar:,} to {(2 << bar) - 1:,}" for bar in range(num_bars)),
        ticks=tuple((bar, f"{1 << bar:,}") for bar in range(0, num_bars + 1, max(1, -(-num_bars // _MAX_TICKS)))),
        counts={name: np.bincount(values, minlength=num_bars) for name, values in exponents.items()},
    )


def share_histogram(title: str, unit: str, name: str, shares: NDArray[np.float64]) -> Histogram:
    """Counts of shares of at most 1, in 20 bars from the lowest share (rounded down to 5 %) to 1."""
    low = int(np.floor(shares.min() * 20)) * 5 if shares.size else 0
    low = min(low, 95)
    edges = low + (100 - low) * np.arange(21) / 20
    counts, _ = np.histogram(shares * 100, bins=edges)
    return Histogram(
        title=title,
        unit=unit,
        labels=tuple(f"{start:.4g} % to {end:.4g} %" for start, end in itertools.pairwise(edges)),
        ticks=tuple((bar, f"{edges[bar]:.4g} %") for bar in range(0, 21, 4)),
        counts={name: counts.astype(np.int64)},
    )


def svg(chart: Histogram, colours: Sequence[str]) -> str:
    """The chart as SVG.

    Args:
        chart: what to draw.
        colours: class of every series, as the page's style defines it.
    """
    series = list(chart.counts.items())
    totals = np.sum([counts for _, counts in series], axis=0) if series else np.zeros(1, dtype=np.int64)
    step = _nice_step(int(totals.max()))
    top = max(step * -(-int(totals.max()) // step), 1)
    across, down = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    bar_width = across / max(len(chart.labels), 1)
    floor = _TOP + down
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(_summary(chart, totals))}">',
    ]
    for level in range(0, top + 1, step):
        y = floor - down * level / top
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_short(level)}</text>')
    for bar, label in enumerate(chart.labels):
        if not totals[bar]:
            continue
        parts.append(f"<g><title>{escape(_tooltip(chart, bar, label))}</title>")
        below = 0
        for (_, counts), colour in zip(series, colours):
            if counts[bar]:
                height = max(down * int(counts[bar]) / top, 1)
                y = floor - down * below / top - height
                parts.append(
                    f'<rect class="{colour}" x="{_LEFT + bar * bar_width + 0.75:.2f}" y="{y:.2f}" '
                    f'width="{max(bar_width - 1.5, 0.5):.2f}" height="{height:.2f}"/>'
                )
                below += int(counts[bar])
        parts.append("</g>")
    for border, text in chart.ticks:
        x = _LEFT + border * bar_width
        parts.append(f'<text class="tick" x="{x:.1f}" y="{floor + 16}" text-anchor="middle">{escape(text)}</text>')
    x = _LEFT + across / 2
    parts.append(f'<text class="unit" x="{x:.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(chart.unit)}</text>')
    parts.append("</svg>")
    return "".join(parts)


def _summary(chart: Histogram, totals: NDArray[np.int64]) -> str:
    at = int(np.argmax(totals))
    most = f"; most at {chart.labels[at]}" if chart.labels and totals[at] else ""
    return f"{chart.title}: {int(totals.sum()):,} in {len(chart.labels)} bars{most}"


def _tooltip(chart: Histogram, bar: int, label: str) -> str:
    parts = [f"{int(counts[bar]):,} {name}" for name, counts in chart.counts.items() if counts[bar]]
    return f"{label} {chart.unit}: {', '.join(parts)}" if chart.unit else f"{label}: {', '.join(parts)}"


def _nice_step(largest: int) -> int:
    """Distance of grid lines: 1, 2 or 5 times a power of ten."""
    step = 1
    while step * _GRID_LINES < largest:
        step = step * 5 // 2 if str(step).startswith("2") else step * 2
    return step


def _short(number: int) -> str:
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return str(number)
