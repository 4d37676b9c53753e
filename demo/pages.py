"""Pages of small documents: titles, paragraphs, tables, charts and coloured figures.

``sample_document`` -> a tuple of ``Page`` (facts), each ``Page.draw`` -> RGB picture. All pages of a document belong
to one annotation. Cost: 0.1 ms for the facts, 3 ms for a page.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from demo.charts import Chart, sample_chart
from demo.kinds import pick
from demo.shapes import Figure, draw_figures, font
from demo.vocabulary import COLOURS, INK, RGB, SHAPES

Document = tuple["Page", ...]

FIGURE_TYPES = ("bar chart", "pie chart", "table", "shape")
ITEMS = ("pens", "cups", "books", "lamps", "chairs", "maps", "boxes", "keys")

_ADJECTIVES = ("Annual", "Short", "Final", "Second", "Public", "Early")
_PLACES = ("Harbour", "Forest", "Station", "Library", "Garden", "Bridge", "Market", "Museum")
_NOUNS = ("report", "survey", "notes", "plan")
_SENTENCES = (
    "The work went on without a break in spring.",
    "Visitors came from the town and from far away.",
    "All measurements were taken twice and written down by hand.",
    "The weather was mild, with little wind.",
    "A new door was set into the northern wall.",
    "Most people asked for longer opening hours.",
    "The old paint was removed before winter.",
    "Nobody complained about the noise.",
    "Two boats brought the timber up the river.",
    "The next meeting will be held in the main hall.",
    "Costs stayed within the limits that were agreed.",
    "The path was closed for three days after the storm.",
    "A list of names is kept at the front desk.",
    "The garden is open to everyone on Sundays.",
)

_SIZES = ((336, 448), (364, 448), (392, 420), (336, 420))
"""High enough for a title, three lines of text and the highest chart above the foot."""
_MIN_PAGES, _MAX_PAGES = 2, 4
_TEXT_ONLY_SHARE = 0.25
_MARGIN = 18
_TITLE_SIZE = 20
_TEXT_SIZE = 13
_LINE_HEIGHT = 18
_ROW_HEIGHT = 20
_PAPER: RGB = (255, 255, 255)
_HEADER_FILL: RGB = (228, 232, 240)


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Items with their numbers, and the total in a last row."""

    rows: tuple[tuple[str, int], ...]

    @property
    def total(self) -> int:
        """The sum of all rows, as printed."""
        return sum(value for _, value in self.rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """One page: its number is printed at the foot. ``figure`` is a chart, a table, a coloured shape, or nothing."""

    number: int
    title: str
    sentences: tuple[str, ...]
    figure: Chart | Table | Figure | None
    width: int
    height: int

    @property
    def figure_type(self) -> str | None:
        """One of ``FIGURE_TYPES``; None for a page of text."""
        if isinstance(self.figure, Chart):
            return f"{self.figure.chart_type} chart"
        if isinstance(self.figure, Table):
            return "table"
        return None if self.figure is None else "shape"

    def draw(self) -> Image.Image:
        """Returns the RGB picture."""
        image = Image.new("RGB", (self.width, self.height), _PAPER)
        draw = ImageDraw.Draw(image)
        draw.text((_MARGIN, 14), self.title, fill=INK, font=font(_TITLE_SIZE))
        draw.line((_MARGIN, 42, self.width - _MARGIN, 42), fill=INK)
        draw.text(
            (self.width / 2, self.height - 8), f"Page {self.number}", fill=INK, font=font(_TEXT_SIZE), anchor="mb"
        )
        top = 50
        for line in _wrap(" ".join(self.sentences), self.width - 2 * _MARGIN):
            draw.text((_MARGIN, top), line, fill=INK, font=font(_TEXT_SIZE))
            top += _LINE_HEIGHT
        if isinstance(self.figure, Chart):
            image.paste(self.figure.draw(), ((self.width - self.figure.width) // 2, top + 8))
        elif isinstance(self.figure, Table):
            _paint_table(draw, self.figure, _MARGIN, top + 10, self.width - 2 * _MARGIN)
        elif self.figure is not None:
            side = round(2 * self.figure.x)
            image.paste(draw_figures(side, side, _PAPER, [self.figure]), ((self.width - side) // 2, top + 10))
        return image


def sample_document(rng: np.random.Generator) -> Document:
    """Draws the facts of a document: two to four pages with different titles and different figures."""
    num = int(rng.integers(_MIN_PAGES, _MAX_PAGES + 1))
    width, height = _SIZES[int(rng.integers(len(_SIZES)))]
    places = rng.permutation(len(_PLACES))[:num]
    figures = rng.permutation(len(FIGURE_TYPES))[:num]
    pages = []
    for i in range(num):
        text_only = rng.random() < _TEXT_ONLY_SHARE
        sentences = rng.permutation(len(_SENTENCES))[: 5 if text_only else 2]
        pages.append(
            Page(
                number=i + 1,
                title=f"{pick(rng, _ADJECTIVES)} {_PLACES[places[i]].lower()} {pick(rng, _NOUNS)}",
                sentences=tuple(_SENTENCES[j] for j in sentences),
                figure=None if text_only else _sample_figure(rng, FIGURE_TYPES[figures[i]]),
                width=width,
                height=height,
            )
        )
    return tuple(pages)


def _sample_figure(rng: np.random.Generator, figure_type: str) -> Chart | Table | Figure:
    if figure_type == "table":
        names = rng.permutation(len(ITEMS))[: int(rng.integers(3, 5))]
        return Table(rows=tuple((ITEMS[i], int(rng.integers(2, 30))) for i in names))
    if figure_type == "shape":
        return Figure(shape=pick(rng, SHAPES), colour=pick(rng, COLOURS), x=60, y=60, radius=54)
    return sample_chart(rng, (figure_type.split()[0],))


def _wrap(text: str, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and font(_TEXT_SIZE).getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _paint_table(draw: ImageDraw.ImageDraw, table: Table, left: int, top: int, width: int) -> None:
    rows = [("Item", "Number"), *((name, str(value)) for name, value in table.rows), ("Total", str(table.total))]
    draw.rectangle((left, top, left + width, top + _ROW_HEIGHT), fill=_HEADER_FILL)
    for i, (name, value) in enumerate(rows):
        y = top + i * _ROW_HEIGHT
        draw.rectangle((left, y, left + width, y + _ROW_HEIGHT), outline=INK)
        draw.text((left + 8, y + _ROW_HEIGHT / 2), name, fill=INK, font=font(_TEXT_SIZE), anchor="lm")
        draw.text((left + width - 8, y + _ROW_HEIGHT / 2), value, fill=INK, font=font(_TEXT_SIZE), anchor="rm")
    split = left + width * 3 // 5
    draw.line((split, top, split, top + len(rows) * _ROW_HEIGHT), fill=INK)
