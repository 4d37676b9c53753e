"""Pages of small documents with titles, text and a table, and questions about them.

``sample_document`` -> a tuple of ``Page`` (facts), each ``Page.draw`` -> RGB image. All pages of a document belong to
one annotation. Cost: 0.1 ms for the facts, 3 ms for a page.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from demo.drawing import INK, font
from demo.kinds import Kind, pick, sample_names
from demo.wording import Exchange, Wording

Document = tuple["Page", ...]
Table = tuple[tuple[str, int], ...]
"""Rows of items and numbers. The last row is the total."""

_ITEMS = ("pens", "cups", "books", "lamps", "chairs", "maps", "boxes", "keys")
_ADJECTIVES = ("Annual", "Short", "Final", "Second", "Public", "Early")
_SUBJECTS = ("harbour", "forest", "station", "library", "garden", "bridge", "market", "museum")
_DOCUMENTS = ("report", "survey", "notes", "plan")
_SENTENCES = (
    "The work continued without a break in spring.",
    "All measurements were taken twice and written down by hand.",
    "A new door was set into the northern wall.",
    "Most people asked for longer opening hours.",
    "Two boats brought the timber up the river.",
    "The next meeting will be held in the main hall.",
    "Costs stayed within the agreed limits.",
    "The garden is open to everyone on Sundays.",
)
_SIZES = ((336, 392), (364, 420), (392, 448))
_MIN_PAGES, _MAX_PAGES = 2, 4
_MARGIN, _TOP, _LINE_HEIGHT, _ROW_HEIGHT = 18, 50, 18, 20
_TITLE_SIZE, _TEXT_SIZE = 20, 13


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """One page with its number printed at the foot."""

    number: int
    title: str
    sentences: tuple[str, ...]
    table: Table = ()
    width: int
    height: int

    def draw(self) -> Image.Image:
        """Return the RGB image."""
        image = Image.new("RGB", (self.width, self.height), "white")
        draw = ImageDraw.Draw(image)
        middle, right = self.width / 2, self.width - _MARGIN
        draw.text((_MARGIN, 14), self.title, fill=INK, font=font(_TITLE_SIZE))
        draw.line((_MARGIN, _TOP - 8, right, _TOP - 8), fill=INK)
        draw.text((middle, self.height - 8), f"Page {self.number}", fill=INK, font=font(_TEXT_SIZE), anchor="mb")
        y = _TOP
        for line in textwrap.wrap(" ".join(self.sentences), self.width // 8):
            draw.text((_MARGIN, y), line, fill=INK, font=font(_TEXT_SIZE))
            y += _LINE_HEIGHT
        for name, value in self.table:
            draw.rectangle((_MARGIN, y + 10, right, y + 10 + _ROW_HEIGHT), outline=INK)
            draw.text((_MARGIN + 8, y + 10 + _ROW_HEIGHT / 2), name, fill=INK, font=font(_TEXT_SIZE), anchor="lm")
            draw.text((right - 8, y + 10 + _ROW_HEIGHT / 2), str(value), fill=INK, font=font(_TEXT_SIZE), anchor="rm")
            y += _ROW_HEIGHT
        return image


def sample_document(rng: np.random.Generator) -> Document:
    """Draw the facts of a document: 2 to 4 pages with different titles, one with a table."""
    count = int(rng.integers(_MIN_PAGES, _MAX_PAGES + 1))
    width, height = _SIZES[int(rng.integers(len(_SIZES)))]
    with_table = int(rng.integers(count))
    rows = tuple((item, int(rng.integers(2, 30))) for item in sample_names(rng, _ITEMS, int(rng.integers(3, 5))))
    table = (*rows, ("Total", sum(value for _, value in rows)))
    return tuple(
        Page(
            number=i + 1,
            title=f"{pick(rng, _ADJECTIVES)} {subject} {pick(rng, _DOCUMENTS)}",
            sentences=tuple(sample_names(rng, _SENTENCES, int(rng.integers(2, 5)))),
            table=table if i == with_table else (),
            width=width,
            height=height,
        )
        for i, subject in enumerate(sample_names(rng, _SUBJECTS, count))
    )


def ask_title(pages: Document, rng: np.random.Generator, wording: Wording) -> tuple[Exchange, ...]:
    """The title of some page, word for word, then that of another."""
    one, other = (pages[i] for i in rng.permutation(len(pages))[:2])
    question = wording.say(f"What is the title of page {one.number}?", f"第{one.number}页的标题是什么？")
    follow_up = wording.say(f"And of page {other.number}?", f"第{other.number}页呢？")
    return wording.ask(question, one.title), wording.ask(follow_up, other.title)


def ask_page_of_title(pages: Document, rng: np.random.Generator, wording: Wording) -> tuple[Exchange, ...]:
    """Which page has some title. Every page of a document of some length is the answer equally often."""
    page = pages[int(rng.integers(len(pages)))]
    question = wording.say(f'Which page is titled "{page.title}"?', f"哪一页的标题是“{page.title}”？")
    short = wording.say(f"page {page.number}", f"第{page.number}页")
    return (wording.ask(question, f"{page.number} of {len(pages)}", short=short),)


def ask_total(pages: Document, rng: np.random.Generator, wording: Wording) -> tuple[Exchange, ...]:
    """The total in the table."""
    (table,) = (page.table for page in pages if page.table)
    total = table[-1][1]
    sentence = wording.say(f"The total in the table is {total}.", f"表格中的总数是{total}。")
    question = wording.say("What is the total in the table?", "表格中的总数是多少？")
    return (wording.ask(question, total, sentence=sentence),)


_PAGES = tuple(f"{i} of {count}" for count in range(_MIN_PAGES, _MAX_PAGES + 1) for i in range(1, count + 1))

PAGE_KINDS: tuple[Kind[Page], ...] = (
    Kind(name="page/title", weight=4, sample=sample_document, ask=ask_title, needs_colour=False),
    Kind(name="page/total", weight=3, sample=sample_document, ask=ask_total, needs_colour=False),
    Kind(
        name="page/page_of", weight=5, sample=sample_document, ask=ask_page_of_title, answers=_PAGES, needs_colour=False
    ),
)
