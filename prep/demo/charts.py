"""Bar, line and pie charts with labelled values: the facts and the picture.

``sample_chart`` -> ``Chart`` (facts) -> ``Chart.draw`` (RGB picture). The values are printed on the chart, so every
answer can be read off. Cost: 0.03 ms for the facts, 2 ms for the picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from prep.demo.kinds import pick
from prep.demo.shapes import SUPERSAMPLING, font
from prep.demo.vocabulary import COLOUR_RGB, COLOURS, INK, RGB

CHART_TYPES = ("bar", "line", "pie")

TOPICS: dict[str, tuple[str, ...]] = {
    "Fruit sold": ("apple", "pear", "plum", "grape", "fig"),
    "Drinks ordered": ("tea", "coffee", "juice", "water", "milk"),
    "Pets at school": ("cat", "dog", "bird", "fish", "mouse"),
    "Visitors": ("Jan", "Feb", "Mar", "Apr", "May"),
    "Books read": ("Ann", "Ben", "Cleo", "Dan", "Eve"),
}

_SIZES = ((252, 196), (280, 210), (280, 224), (308, 224), (320, 240), (336, 252))
_LEFT, _RIGHT, _TOP, _BOTTOM = 16, 10, 44, 26
"""Margins of the plot in a bar or line chart, in pixels."""

_MIN_CATEGORIES = 3
_TITLE_SIZE = 15
_LABEL_SIZE = 12
_MAX_VALUE = 90
"""Of a bar or a point, at the top of the plot."""

_BAR_VALUES = tuple(range(10, _MAX_VALUE + 1, 10))
_PIE_TOTAL = 100
_PAPER: RGB = (255, 255, 255)
_GRID: RGB = (215, 215, 220)


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """One series of values, which bars, points or slices are labelled with. All differ, so extremes are clear."""

    chart_type: str
    title: str
    categories: tuple[str, ...]
    values: tuple[int, ...]
    colours: tuple[str, ...]
    width: int
    height: int

    def draw(self) -> Image.Image:
        """Returns the RGB picture."""
        canvas = Image.new("RGB", (self.width * SUPERSAMPLING, self.height * SUPERSAMPLING), _PAPER)
        draw = ImageDraw.Draw(canvas)
        paint = {"bar": _paint_bars, "line": _paint_line, "pie": _paint_pie}[self.chart_type]
        paint(draw, self)
        return canvas.reduce(SUPERSAMPLING)


def sample_chart(rng: np.random.Generator, chart_types: tuple[str, ...] = CHART_TYPES) -> Chart:
    """Draws the facts of a chart: type, topic, which categories, their values and colours."""
    chart_type = pick(rng, chart_types)
    topic = pick(rng, tuple(TOPICS))
    num = int(rng.integers(_MIN_CATEGORIES, len(TOPICS[topic]) + 1))
    kept = sorted(int(i) for i in rng.permutation(len(TOPICS[topic]))[:num])
    colours = [COLOURS[i] for i in rng.permutation(len(COLOURS))[:num]]
    if chart_type == "line":
        colours = [colours[0]] * num
    width, height = _SIZES[int(rng.integers(len(_SIZES)))]
    return Chart(
        chart_type=chart_type,
        title=f"{topic}, {int(rng.integers(2001, 2025))}",
        categories=tuple(TOPICS[topic][i] for i in kept),
        values=_shares(rng, num) if chart_type == "pie" else _heights(rng, num),
        colours=tuple(colours),
        width=width,
        height=height,
    )


def _plot_on_canvas(chart: Chart) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the plot, in pixels of the enlarged canvas."""
    s = SUPERSAMPLING
    return _LEFT * s, _TOP * s, (chart.width - _RIGHT) * s, (chart.height - _BOTTOM) * s


def _heights(rng: np.random.Generator, num: int) -> tuple[int, ...]:
    return tuple(_BAR_VALUES[i] for i in rng.permutation(len(_BAR_VALUES))[:num])


def _shares(rng: np.random.Generator, num: int) -> tuple[int, ...]:
    """Distinct multiples of 5, at least 5 each, that sum to 100."""
    while True:
        cuts = sorted(int(i) for i in rng.permutation(_PIE_TOTAL // 5 - 1)[: num - 1] + 1)
        parts = tuple(5 * (b - a) for a, b in zip([0, *cuts], [*cuts, _PIE_TOTAL // 5], strict=True))
        if len(set(parts)) == num:
            return parts


def _paint_title(draw: ImageDraw.ImageDraw, chart: Chart) -> None:
    s = SUPERSAMPLING
    draw.text((chart.width * s / 2, 6 * s), chart.title, fill=INK, font=font(_TITLE_SIZE * s), anchor="ma")


def _paint_axes(draw: ImageDraw.ImageDraw, chart: Chart) -> list[tuple[float, float]]:
    """Title, grid and category labels; returns the point of every value, in pixels of the enlarged canvas."""
    s = SUPERSAMPLING
    left, top, right, bottom = _plot_on_canvas(chart)
    _paint_title(draw, chart)
    for part in range(4):
        y = bottom + (top - bottom) * part / 3
        draw.line((left, y, right, y), fill=INK if part == 0 else _GRID, width=s)
    step = (right - left) / len(chart.values)
    points = []
    for column, (category, value) in enumerate(zip(chart.categories, chart.values, strict=True)):
        x = left + step * (column + 0.5)
        draw.text((x, bottom + 5 * s), category, fill=INK, font=font(_LABEL_SIZE * s), anchor="ma")
        points.append((x, bottom + (top - bottom) * value / _MAX_VALUE))
    return points


def _paint_values(draw: ImageDraw.ImageDraw, chart: Chart, points: list[tuple[float, float]], gap: int) -> None:
    s = SUPERSAMPLING
    for (x, y), value in zip(points, chart.values, strict=True):
        draw.text(
            (x, y - gap * s),
            str(value),
            fill=INK,
            font=font(_LABEL_SIZE * s),
            anchor="mb",
            stroke_width=2 * s,
            stroke_fill=_PAPER,
        )


def _paint_bars(draw: ImageDraw.ImageDraw, chart: Chart) -> None:
    s = SUPERSAMPLING
    points = _paint_axes(draw, chart)
    left, _, right, bottom = _plot_on_canvas(chart)
    half = (right - left) / len(points) * 0.32
    for (x, y), colour in zip(points, chart.colours, strict=True):
        draw.rectangle((x - half, y, x + half, bottom), fill=COLOUR_RGB[colour], outline=INK, width=s)
    _paint_values(draw, chart, points, gap=2)


def _paint_line(draw: ImageDraw.ImageDraw, chart: Chart) -> None:
    s = SUPERSAMPLING
    points = _paint_axes(draw, chart)
    colour = COLOUR_RGB[chart.colours[0]]
    draw.line(points, fill=colour, width=3 * s, joint="curve")
    for x, y in points:
        draw.ellipse((x - 4 * s, y - 4 * s, x + 4 * s, y + 4 * s), fill=colour, outline=INK, width=s)
    _paint_values(draw, chart, points, gap=5)


def _paint_pie(draw: ImageDraw.ImageDraw, chart: Chart) -> None:
    s = SUPERSAMPLING
    _paint_title(draw, chart)
    radius = (chart.height - 50) * s / 2
    x, y = 16 * s + radius, 36 * s + radius
    start = -90.0
    row = 22 * s
    legend_x = x + radius + 22 * s
    legend_y = y - row * (len(chart.values) - 1) / 2
    for category, value, colour in zip(chart.categories, chart.values, chart.colours, strict=True):
        end = start + 360 * value / _PIE_TOTAL
        fill = COLOUR_RGB[colour]
        draw.pieslice((x - radius, y - radius, x + radius, y + radius), start, end, fill=fill, outline=INK, width=s)
        draw.rectangle(
            (legend_x, legend_y - 5 * s, legend_x + 10 * s, legend_y + 5 * s), fill=fill, outline=INK, width=s
        )
        label = f"{category} {value}"
        draw.text((legend_x + 16 * s, legend_y), label, fill=INK, font=font(_LABEL_SIZE * s), anchor="lm")
        start, legend_y = end, legend_y + row
