"""Histograms of integers and of shares as inline SVG, without scripts. Colours come from the page's style.

Input: NumPy arrays. Output: SVG text. Every bar has its counts as a tooltip (``<title>``).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
from numpy.typing import NDArray

from schemas.wording import counted

_WIDTH, _HEIGHT = 480, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 22, 10, 40
_MAX_BARS = 32
_MAX_TICKS = 7
_GRID_LINES = 4
_CHART_WIDTH, _CHART_HEIGHT = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
_BASELINE = _TOP + _CHART_HEIGHT


@dataclass(frozen=True, kw_only=True, slots=True)
class Histogram:
    """Stacked bars.

    Attributes:
        title: what is counted.
        unit: unit of the horizontal axis.
        labels: (B,) range of each bar, for tooltips.
        ticks: (bar edge, text) of the horizontal axis. Edge ``b`` is left of bar ``b``.
        counts: (B,) counts of every series by name. The first series is at the bottom.
    """

    title: str
    unit: str
    labels: tuple[str, ...]
    ticks: tuple[tuple[int, str], ...]
    counts: Mapping[str, NDArray[np.int64]]


def number_histogram(title: str, unit: str, series: Mapping[str, NDArray[np.int64]]) -> Histogram:
    """Histogram of integers >= 0, with at most 32 bars whose equal width is a power of two."""
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
    """Histogram of integers >= 1, with each bar twice as wide as the last (1, 2-3, 4-7, …)."""
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
    """Histogram of shares <= 1, with 20 bars from the lowest share (rounded down to 5 %) to 1."""
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
    """Draw a histogram as SVG.

    Args:
        chart: the histogram.
        colours: CSS class of every series.
    """
    totals = np.sum(list(chart.counts.values()), axis=0) if chart.counts else np.zeros(1, dtype=np.int64)
    step = _nice_step(int(totals.max()))
    top = max(step * -(-int(totals.max()) // step), 1)
    x = _LEFT + _CHART_WIDTH / 2
    return "".join(
        [
            f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(_summary(chart, totals))}">',
            *_grid(top, step),
            *(_bar(chart, bar, colours, top) for bar in range(len(chart.labels)) if totals[bar]),
            *_ticks(chart),
            f'<text class="unit" x="{x:.1f}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(chart.unit)}</text>',
            "</svg>",
        ]
    )


def _grid(top: int, step: int) -> Iterator[str]:
    for level in range(0, top + 1, step):
        y = _BASELINE - _CHART_HEIGHT * level / top
        yield f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="tick" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_short(level)}</text>'


def _bar(chart: Histogram, bar: int, colours: Sequence[str], top: int) -> str:
    """One stacked bar. ``top`` is the count at the full height of the chart."""
    width = _CHART_WIDTH / len(chart.labels)
    parts = [f"<g><title>{escape(_tooltip(chart, bar))}</title>"]
    below = 0
    for counts, colour in zip(chart.counts.values(), colours):
        if counts[bar]:
            height = max(_CHART_HEIGHT * int(counts[bar]) / top, 1)
            y = _BASELINE - _CHART_HEIGHT * below / top - height
            parts.append(
                f'<rect class="{colour}" x="{_LEFT + bar * width + 0.75:.2f}" y="{y:.2f}" '
                f'width="{max(width - 1.5, 0.5):.2f}" height="{height:.2f}"/>'
            )
            below += int(counts[bar])
    return "".join([*parts, "</g>"])


def _ticks(chart: Histogram) -> Iterator[str]:
    width = _CHART_WIDTH / max(len(chart.labels), 1)
    for edge, text in chart.ticks:
        x = _LEFT + edge * width
        yield f'<text class="tick" x="{x:.1f}" y="{_BASELINE + 16}" text-anchor="middle">{escape(text)}</text>'


def _summary(chart: Histogram, totals: NDArray[np.int64]) -> str:
    highest = int(np.argmax(totals))
    most = f"; most at {chart.labels[highest]}" if chart.labels and totals[highest] else ""
    return f"{chart.title}: {int(totals.sum()):,} in {counted(len(chart.labels), 'bar')}{most}"


def _tooltip(chart: Histogram, bar: int) -> str:
    label = chart.labels[bar]
    parts = [f"{int(counts[bar]):,} {name}" for name, counts in chart.counts.items() if counts[bar]]
    return f"{label} {chart.unit}: {', '.join(parts)}" if chart.unit else f"{label}: {', '.join(parts)}"


def _nice_step(largest: int) -> int:
    """Spacing of the grid lines: 1, 2 or 5 times a power of ten."""
    step = 1
    while step * _GRID_LINES < largest:
        step = step * 5 // 2 if str(step).startswith("2") else step * 2
    return step


def _short(count: int) -> str:
    for size, letter in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if count >= size:
            return f"{count / size:.3g}{letter}"
    return str(count)
