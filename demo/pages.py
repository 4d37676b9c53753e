"""Pages of small documents with a title and text, and questions about them.

``sample_document`` -> a tuple of ``Page`` (facts), each ``Page.draw`` -> RGB image. All pages of a document belong to
one annotation. Cost: 0.1 ms for the facts, 3 ms for a page.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from demo.drawing import INK, font
from demo.kinds import Exchange, Kind, Wording, pick, sample_names

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
)
_SIZES = ((336, 392), (364, 420), (392, 448))
_MARGIN, _TOP, _LINE_HEIGHT = 18, 50, 18
_TITLE_SIZE, _TEXT_SIZE = 20, 13


@dataclass(frozen=True, kw_only=True, slots=True)
class Page:
    """One page with its number printed at the foot."""

    number: int
    title: str
    sentences: tuple[str, ...]
    width: int
    height: int

    def draw(self) -> Image.Image:
        """Return the RGB image."""
        image = Image.new("RGB", (self.width, self.height), "white")
        draw = ImageDraw.Draw(image)
        draw.text((_MARGIN, 14), self.title, fill=INK, font=font(_TITLE_SIZE))
        draw.line((_MARGIN, _TOP - 8, self.width - _MARGIN, _TOP - 8), fill=INK)
        footer = f"Page {self.number}"
        draw.text((self.width / 2, self.height - 8), footer, fill=INK, font=font(_TEXT_SIZE), anchor="mb")
        for i, line in enumerate(textwrap.wrap(" ".join(self.sentences), self.width // 8)):
            draw.text((_MARGIN, _TOP + i * _LINE_HEIGHT), line, fill=INK, font=font(_TEXT_SIZE))
        return image


def sample_document(rng: np.random.Generator) -> tuple[Page, ...]:
    """Draw the facts of a document: 2 to 4 pages with different titles."""
    num_pages = int(rng.integers(2, 5))
    width, height = _SIZES[int(rng.integers(len(_SIZES)))]
    return tuple(
        Page(
            number=i,
            title=f"{pick(rng, _ADJECTIVES)} {subject} {pick(rng, _DOCUMENTS)}",
            sentences=tuple(sample_names(rng, _SENTENCES, int(rng.integers(3, 7)))),
            width=width,
            height=height,
        )
        for i, subject in enumerate(sample_names(rng, _SUBJECTS, num_pages), start=1)
    )


def _ask_title(pages: tuple[Page, ...], rng: np.random.Generator, wording: Wording) -> tuple[Exchange, ...]:
    """The title of some page, word for word, then that of another."""
    first, second = (pages[i] for i in rng.permutation(len(pages))[:2])
    question = wording.say(f"What is the title of page {first.number}?", f"第{first.number}页的标题是什么？")
    follow_up = wording.say(f"And of page {second.number}?", f"第{second.number}页呢？")
    return wording.ask(question, first.title), wording.ask(follow_up, second.title)


PAGE_KINDS = (Kind(name="page/title", weight=14, sample=sample_document, ask=_ask_title, needs_colour=False),)
