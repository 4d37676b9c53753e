"""Shares of datasets: ``name%50`` -> a rate, and a rate -> how often each annotation is drawn.

A share is drawn by a seeded permutation, the same on every machine. Cost: one permutation per dataset.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from schemas.annotation import ANNOTATION_SUFFIXES
from schemas.errors import ConfigError
from schemas.seeds import seed_for

_TERM = re.compile(r"(?P<name>[^%]+?)(?:%(?P<percent>[0-9]+(?:\.[0-9]+)?))?")
_FILE_TERM = re.compile(
    rf"(?P<name>.+({'|'.join(map(re.escape, ANNOTATION_SUFFIXES))}))%(?P<percent>[0-9]+(?:\.[0-9]+)?)", re.DOTALL
)
MAX_PERCENT = 1000


def parse_expression(expression: str) -> list[tuple[str, Fraction]]:
    """Split ``a%50,b`` into names and shares: [("a", 1/2), ("b", 1)].

    Raises:
        ConfigError: an empty or repeated name, or a percentage that is not from above 0 to 1000.
    """
    terms: list[tuple[str, Fraction]] = []
    for text in expression.split(","):
        match = _TERM.fullmatch(text.strip())
        if match is None:
            raise ConfigError(f"{text.strip()!r} in {expression!r} is not name or name%percent, such as mp_doc%50.")
        share = _share(match["percent"] or "100", text.strip())
        if match["name"] in [name for name, _ in terms]:
            raise ConfigError(
                f"dataset {match['name']!r} appears twice in {expression!r}; name it once, with one share."
            )
        terms.append((match["name"], share))
    return terms


def split_share(argument: str) -> tuple[str, Fraction]:
    """Split ``file.jsonl%50`` into the file and its share. Any other argument has the share 1.

    Raises:
        ConfigError: the percentage is not from above 0 to 1000.
    """
    match = _FILE_TERM.fullmatch(argument)
    if match is None or Path(argument).is_file():
        return argument, Fraction(1)
    return match["name"], _share(match["percent"], argument)


def draw(num_annotations: int, rate: Fraction, *, seed: int, dataset: str) -> NDArray[np.uint16]:
    """How often each annotation of a dataset is drawn.

    Exactly ``floor(num_annotations * rate)`` in all. The integer part of the rate draws every annotation; the rest goes
    to the first indices of a permutation that depends on seed and dataset alone, so that a smaller share is always a
    subset.

    Returns:
        (num_annotations,) uint16.
    """
    base = math.floor(rate)
    copies = np.full(num_annotations, base, dtype=np.uint16)
    extra = math.floor(num_annotations * rate) - base * num_annotations
    if extra:
        generator = np.random.Generator(np.random.PCG64(seed_for(seed, dataset, "draw")))
        copies[generator.permutation(num_annotations)[:extra]] += 1
    return copies


def _share(percent: str, term: str) -> Fraction:
    value = Fraction(percent)
    if not 0 < value <= MAX_PERCENT:
        raise ConfigError(f"{term!r} takes {percent} %; allowed: above 0, at most {MAX_PERCENT}.")
    return value / 100
