"""Bar, line and pie charts with labelled values: the facts and the picture.

``sample_chart`` -> ``Chart`` (facts) -> ``Chart.draw`` (RGB picture). The values are printed on the chart, so every
answer can be read off. Bars and points stand on the grid of the vision tower's patches, with their names and values
above them: a word has the same patches wherever it stands, so that a tiny model can learn to read in minutes.
Cost: 0.03 ms for the facts, 2 ms for the picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from demo.kinds import pick
from demo.shapes import SUPERSAMPLING, font
from demo.vocabulary import COLOUR_RGB, COLOURS, INK, RGB
from schemas.qwen import PATCH_SIZE

CHART_TYPES = ("bar", "line", "pie")

TOPICS: dict[str, tuple[str, ...]] = {
    "Fruit sold": ("apple", "pear", "plum", "grape", "fig"),
    "Drinks ordered": ("tea", "coffee", "juice", "water", "milk"),
    "Pets at school": ("cat", "dog", "bird", "fish", "mouse"),
    "Visitors": ("Jan", "Feb", "Mar", "Apr", "May"),
    "Books read": ("Ann", "Ben", "Cleo", "Dan", "Eve"),
}

_PIE_SIZES = ((252, 196), (280, 210), (280, 224), (308, 224), (320, 240), (336, 252))

COLUMN_WIDTH = 4 * PATCH_SIZE
"""Of a bar or a point with its label, in pixels."""

_MARGIN = PATCH_SIZE
"""Of the plot, at the left, the right and the bottom of a bar or line chart, in pixels."""

_HEIGHTS = (14 * PATCH_SIZE, 16 * PATCH_SIZE)
_ROW = PATCH_SIZE
"""Of text in a label, and of 10 in a value."""

_MIN_CATEGORIES = 3
_TITLE_SIZE = 15
_LABEL_SIZE = 12
_LABEL_GAP = 5
"""Pixels from a bar or a point to the line that its label stands on."""

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

    def point(self, column: int) -> tuple[int, int]:
        """Where a bar ends or a point of a line lies: pixels from the left and from the top."""
        return _MARGIN + column * COLUMN_WIDTH + COLUMN_WIDTH // 2, self.height_of(self.values[column])

    def height_of(self, value: int) -> int:
        """Where a value lies in a bar or line chart, in pixels from the top."""
        return self.height - _MARGIN - _ROW * value // 10


def sample_chart(rng: np.random.Generator, chart_types: tuple[str, ...] = CHART_TYPES) -> Chart:
    """Draws the facts of a chart: type, topic, which categories, their values and colours."""
    chart_type = pick(rng, chart_types)
    topic = pick(rng, tuple(TOPICS))
    num = int(rng.integers(_MIN_CATEGORIES, len(TOPICS[topic]) + 1))
    kept = sorted(int(i) for i in rng.permutation(len(TOPICS[topic]))[:num])
    colours = [COLOURS[i] for i in rng.permutation(len(COLOURS))[:num]]
    if chart_type == "line":
        colours = [colours[0]] * num
    width, height = _pie_size(rng) if chart_type == "pie" else _plot_size(rng, num)
    return Chart(
        chart_type=chart_type,
        title=f"{topic}, {int(rng.integers(2001, 2025))}",
        categories=tuple(TOPICS[topic][i] for i in kept),
        values=_shares(rng, num) if chart_type == "pie" else _heights(rng, num),
        colours=tuple(colours),
        width=width,
        height=height,
    )


def _pie_size(rng: np.random.Generator) -> tuple[int, int]:
    return _PIE_SIZES[int(rng.integers(len(_PIE_SIZES)))]


def _plot_size(rng: np.random.Generator, num: int) -> tuple[int, int]:
    """Width and height of a chart with ``num`` columns; some have room to spare at the right or above the plot."""
    spare = 2 * PATCH_SIZE * int(rng.integers(2))
    return 2 * _MARGIN + num * COLUMN_WIDTH + spare, _HEIGHTS[int(rng.integers(len(_HEIGHTS)))]


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


def _paint_axes(draw: ImageDraw.ImageDraw, chart: Chart) -> list[tuple[int, int]]:
    """Title and grid; returns the point of every value, in pixels of the enlarged canvas."""
    s = SUPERSAMPLING
    _paint_title(draw, chart)
    points = [chart.point(column) for column in range(len(chart.values))]
    right = _MARGIN + len(points) * COLUMN_WIDTH
    for value in range(0, _MAX_VALUE + 1, 30):
        y = chart.height_of(value)
        draw.line((_MARGIN * s, y * s, right * s, y * s), fill=_GRID if value else INK, width=s)
    return [(x * s, y * s) for x, y in points]


def _paint_labels(draw: ImageDraw.ImageDraw, chart: Chart, points: list[tuple[int, int]]) -> None:
    """Above every point its value, and above that its name."""
    s = SUPERSAMPLING
    for (x, y), category, value in zip(points, chart.categories, chart.values, strict=True):
        for row, text in enumerate((str(value), category)):
            draw.text(
                (x, y - (_LABEL_GAP + row * _ROW) * s),
                text,
                fill=INK,
                font=font(_LABEL_SIZE * s),
                anchor="ms",
                stroke_width=2 * s,
                stroke_fill=_PAPER,
            )


def _paint_bars(draw: ImageDraw.ImageDraw, chart: Chart) -> None:
    s = SUPERSAMPLING
    points = _paint_axes(draw, chart)
    bottom, half = chart.height_of(0) * s, COLUMN_WIDTH * s / 3
    for (x, y), colour in zip(points, chart.colours, strict=True):
        draw.rectangle((x - half, y, x + half, bottom), fill=COLOUR_RGB[colour], outline=INK, width=s)
    _paint_labels(draw, chart, points)


def _paint_line(draw: ImageDraw.ImageDraw, chart: Chart) -> None:
    s = SUPERSAMPLING
    points = _paint_axes(draw, chart)
    colour = COLOUR_RGB[chart.colours[0]]
    draw.line(points, fill=colour, width=3 * s, joint="curve")
    for x, y in points:
        draw.ellipse((x - 3 * s, y - 3 * s, x + 3 * s, y + 3 * s), fill=colour, outline=INK, width=s)
    _paint_labels(draw, chart, points)


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
