"""Document pages as they are rendered for training: text, a table and a bar chart on A4 at 150 dots per inch.

A seed -> PNG files of 1240×1754 pixels. Letters are antialiased, as in a rendered PDF, and every page is
different. Most of a page is blank and compresses to nothing. The default settings keep a fifth of its pixels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from tests.benchmarks.photographs import WORDS

WIDTH, HEIGHT = 1240, 1754
_MARGIN = 120
_TEXT_SIZE = 22
_LINE_HEIGHT = 33
_ROW_HEIGHT = 40
_LETTERS_IN_A_LINE = 95
_CHART_HEIGHT = 300


def write_pages(folder: Path, num_pages: int, seed: int = 0) -> list[Path]:
    """Write ``num_pages`` pages and return their paths in order."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index}.png" for index in range(num_pages)]
    for path in paths:
        page(rng).save(path)
    return paths


def page(rng: np.random.Generator) -> Image.Image:
    """One page: paragraphs, then a table or a chart, then paragraphs to its foot."""
    image = Image.new("RGB", (WIDTH, HEIGHT), (255, 255, 255))
    pen = ImageDraw.Draw(image)
    y = _paragraphs(rng, pen, _MARGIN, _MARGIN + 16 * _LINE_HEIGHT)
    y = _table(rng, pen, y) if rng.random() < 0.5 else _chart(rng, pen, y)
    _paragraphs(rng, pen, y, HEIGHT - _MARGIN)
    return image


def _paragraphs(rng: np.random.Generator, pen: ImageDraw.ImageDraw, y: int, bottom: int) -> int:
    font = ImageFont.load_default(_TEXT_SIZE)
    while y + _LINE_HEIGHT <= bottom:
        line = ""
        while len(line) < _LETTERS_IN_A_LINE * (0.4 if rng.random() < 0.15 else 1):
            line += str(rng.choice(WORDS)) + " "
        pen.text((_MARGIN, y), line[:_LETTERS_IN_A_LINE], fill=(20, 20, 20), font=font)
        y += _LINE_HEIGHT
    return y + _LINE_HEIGHT // 2


def _table(rng: np.random.Generator, pen: ImageDraw.ImageDraw, y: int) -> int:
    font = ImageFont.load_default(_TEXT_SIZE)
    for _ in range(int(rng.integers(6, 12))):
        pen.line((_MARGIN, y, WIDTH - _MARGIN, y), fill=(120, 120, 120), width=2)
        for column in range(4):
            cell = str(rng.choice(WORDS)) if column == 0 else f"{rng.integers(0, 100_000):,}"
            pen.text((_MARGIN + 250 * column, y + 8), cell, fill=(20, 20, 20), font=font)
        y += _ROW_HEIGHT
    return y + _LINE_HEIGHT


def _chart(rng: np.random.Generator, pen: ImageDraw.ImageDraw, y: int) -> int:
    for index in range(10):
        left, height = _MARGIN + 100 * index, int(rng.integers(20, _CHART_HEIGHT))
        colour = tuple(int(value) for value in rng.integers(40, 220, 3))
        pen.rectangle((left, y + _CHART_HEIGHT - height, left + 60, y + _CHART_HEIGHT), fill=colour)
    return y + _CHART_HEIGHT + _LINE_HEIGHT
