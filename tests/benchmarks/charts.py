"""Bar and line charts with labelled values, and the questions about them that the learning benchmark asks.

``sample_chart`` -> ``Chart`` (facts) -> ``Chart.draw`` (RGB image). Bars and points are aligned to the patch grid of
the vision tower, with their names and values above them. A word has the same patches wherever it appears, so a tiny
model can learn to read in minutes. A question names a bar by its category or by its colour.
Cost: 0.03 ms for the facts, 2 ms for the image.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from demo.drawing import COLOUR_RGB, COLOURS, INK, RGB, SUPERSAMPLING, font
from demo.kinds import Exchange, Kind, Wording, pick, sample_names
from schemas.qwen import PATCH_SIZE

Charts = tuple["Chart", ...]

TOPICS: dict[str, tuple[str, ...]] = {
    "Fruit sold": ("apple", "pear", "plum", "grape", "fig"),
    "Drinks ordered": ("tea", "coffee", "juice", "water", "milk"),
    "Pets at school": ("cat", "dog", "bird", "fish", "mouse"),
    "Visitors": ("Jan", "Feb", "Mar", "Apr", "May"),
    "Books read": ("Ann", "Ben", "Cleo", "Dan", "Eve"),
}

COLUMN_WIDTH = 4 * PATCH_SIZE
"""Width of a bar or a point with its label, in pixels."""

_MARGIN = PATCH_SIZE
"""Left, right and bottom margin of the plot, in pixels."""

_HEIGHTS = (14 * PATCH_SIZE, 16 * PATCH_SIZE)
_ROW = PATCH_SIZE
"""Height of a row of text, and of 10 units of value, in pixels."""

_MIN_CATEGORIES = 3
_TITLE_SIZE = 15
_LABEL_SIZE = 12
_LABEL_GAP = 5
"""Pixels from a bar or a point to the baseline of its label."""

_MAX_VALUE = 90
"""The top of the plot."""

_VALUES = tuple(range(10, _MAX_VALUE + 1, 10))
_PAPER: RGB = (255, 255, 255)
_GRID: RGB = (215, 215, 220)


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """One series of different values, printed above its bars or points. ``chart_type`` is "bar" or "line"."""

    chart_type: str
    title: str
    categories: tuple[str, ...]
    values: tuple[int, ...]
    colours: tuple[str, ...]
    width: int
    height: int

    def draw(self) -> Image.Image:
        """Return the RGB image."""
        s = SUPERSAMPLING
        canvas = Image.new("RGB", (self.width * s, self.height * s), _PAPER)
        draw = ImageDraw.Draw(canvas)
        points = _paint_axes(draw, self)
        if self.chart_type == "bar":
            bottom, half = self.height_of(0) * s, COLUMN_WIDTH * s / 3
            for (x, y), colour in zip(points, self.colours, strict=True):
                draw.rectangle((x - half, y, x + half, bottom), fill=COLOUR_RGB[colour], outline=INK, width=s)
        else:
            fill = COLOUR_RGB[self.colours[0]]
            draw.line(points, fill=fill, width=3 * s, joint="curve")
            for x, y in points:
                draw.ellipse((x - 3 * s, y - 3 * s, x + 3 * s, y + 3 * s), fill=fill, outline=INK, width=s)
        _paint_labels(draw, self, points)
        return canvas.reduce(s)

    def point(self, column: int) -> tuple[int, int]:
        """Return the end of a bar or the point of a line, in pixels from the left and from the top."""
        return _MARGIN + column * COLUMN_WIDTH + COLUMN_WIDTH // 2, self.height_of(self.values[column])

    def height_of(self, value: int) -> int:
        """Return the height of a value, in pixels from the top."""
        return self.height - _MARGIN - _ROW * value // 10


def sample_chart(rng: np.random.Generator, chart_types: tuple[str, ...] = ("bar", "line")) -> Chart:
    """Draw the facts of a chart: type, topic, categories, their values and colours."""
    chart_type = pick(rng, chart_types)
    topic = pick(rng, tuple(TOPICS))
    count = int(rng.integers(_MIN_CATEGORIES, len(TOPICS[topic]) + 1))
    indices = sorted(int(i) for i in rng.permutation(len(TOPICS[topic]))[:count])
    colours = sample_names(rng, COLOURS, count)
    # Some charts have unused room at the right of the plot or above it.
    spare = 2 * PATCH_SIZE * int(rng.integers(2))
    height = _HEIGHTS[int(rng.integers(len(_HEIGHTS)))]
    return Chart(
        chart_type=chart_type,
        title=f"{topic}, {int(rng.integers(2001, 2025))}",
        categories=tuple(TOPICS[topic][i] for i in indices),
        values=tuple(_VALUES[i] for i in rng.permutation(len(_VALUES))[:count]),
        colours=tuple(colours if chart_type == "bar" else [colours[0]] * count),
        width=2 * _MARGIN + count * COLUMN_WIDTH + spare,
        height=height,
    )


def _paint_axes(draw: ImageDraw.ImageDraw, chart: Chart) -> list[tuple[int, int]]:
    """Paint title and grid. Return the point of every value, in pixels of the enlarged canvas."""
    s = SUPERSAMPLING
    draw.text((chart.width * s / 2, 6 * s), chart.title, fill=INK, font=font(_TITLE_SIZE * s), anchor="ma")
    points = [chart.point(column) for column in range(len(chart.values))]
    right = _MARGIN + len(points) * COLUMN_WIDTH
    for value in range(0, _MAX_VALUE + 1, 30):
        y = chart.height_of(value)
        draw.line((_MARGIN * s, y * s, right * s, y * s), fill=_GRID if value else INK, width=s)
    return [(x * s, y * s) for x, y in points]


def _paint_labels(draw: ImageDraw.ImageDraw, chart: Chart, points: list[tuple[int, int]]) -> None:
    """Paint the value above every point, and its name above the value."""
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


def ask_value(charts: Charts, rng: np.random.Generator, wording: Wording) -> tuple[Exchange, ...]:
    """The value of some category."""
    column = int(rng.integers(len(charts[0].values)))
    category, value = charts[0].categories[column], charts[0].values[column]
    question = wording.say(
        (f"What is the value for {category}?", f"Which value does {category} have?"), f"图中{category}的数值是多少？"
    )
    sentence = wording.say(f"The value for {category} is {value}.", f"{category}的数值是{value}。")
    return (wording.ask(question, value, sentence=sentence),)


def ask_value_by_colour(charts: Charts, rng: np.random.Generator, wording: Wording) -> tuple[Exchange, ...]:
    """The value of the bar of some colour."""
    column = int(rng.integers(len(charts[0].values)))
    value, colour = charts[0].values[column], charts[0].colours[column]
    word = wording.word(colour)
    question = wording.say(
        (f"What is the value of the {colour} bar?", f"Which value does the {colour} bar have?"),
        f"{word}柱子的数值是多少？",
    )
    sentence = wording.say(f"The value of the {colour} bar is {value}.", f"{word}柱子的数值是{value}。")
    return (wording.ask(question, value, sentence=sentence),)


def _chart(rng: np.random.Generator) -> Charts:
    return (sample_chart(rng),)


def _bar_chart(rng: np.random.Generator) -> Charts:
    return (sample_chart(rng, ("bar",)),)


_ANSWERS = tuple(map(str, _VALUES))

CHART_KINDS: tuple[Kind, ...] = (
    Kind(name="chart/value", weight=1, sample=_chart, ask=ask_value, answers=_ANSWERS, needs_colour=False),
    Kind(name="chart/value_by_colour", weight=1, sample=_bar_chart, ask=ask_value_by_colour, answers=_ANSWERS),
)
