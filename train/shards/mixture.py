"""Several sources of bins in fixed proportions: what ``--shards a:0.7,b:0.3`` means.

An expression -> sources with weights or epochs; their sizes -> a :class:`Mixture`, which says for every place of the
endless sequence of bins which source fills it, and how many places that source had before. Places of a source lie as
evenly as whole numbers allow, so proportions hold exactly over every window of places; nothing is drawn.

Cost: a few integer operations a place, whatever the place.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from schemas.errors import ConfigError
from storage.urls import without_secrets

_SHARE = re.compile(r"(?P<path>.+):(?P<number>\d+(\.\d*)?|\.\d+)(?P<unit>epochs?)?")
_HOST_ONLY = re.compile(r"[a-z0-9+.-]+://[^/]*", re.IGNORECASE)
_MAX_CYCLE = 1 << 31


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One part of ``--shards``: a folder or URL, and how much of the mixture it is.

    Attributes:
        path: as written.
        weight: share of the places, relative to the other sources; None where none has one.
        epochs: how often each of its bins is used in an epoch of the mixture; None where no source says so.
    """

    path: str
    weight: Fraction | None = None
    epochs: Fraction | None = None


def parse_sources(text: str) -> tuple[Source, ...]:
    """Parse ``a``, ``a,b`` (all bins alike), ``a:0.7,b:0.3`` (weights) or ``a:2epochs,b:0.5epochs``.

    A folder whose name is the whole text is that folder, whatever the name looks like.

    Raises:
        ConfigError: an empty part, a folder named twice, a weight of 0, or a mixture of weights and epochs.
    """
    if _is_there(text):
        return (Source(path=text),)
    shown = without_secrets(text)
    sources = tuple(_parse_source(part.strip(), shown) for part in text.split(","))
    paths = [source.path.rstrip("/") for source in sources]
    for path in paths:
        if paths.count(path) > 1:
            raise ConfigError(
                f"--shards {shown} names {without_secrets(path)} twice. Name it once, with the weight or epochs you "
                "want."
            )
    kinds = {(source.weight is None, source.epochs is None) for source in sources}
    if len(kinds) > 1:
        raise ConfigError(
            f"--shards {shown} gives weights or epochs to a part of the folders. Give weights to all (a:0.7,b:0.3), "
            "epochs to all (a:2epochs,b:0.5epochs), or nothing to any."
        )
    return sources


def _is_there(text: str) -> bool:
    try:
        return Path(text).exists()
    except OSError:  # longer than the name of a file can be
        return False


def _parse_source(part: str, shown: str) -> Source:
    found = _SHARE.fullmatch(part)
    if found is None or (_HOST_ONLY.fullmatch(found["path"]) and not found["unit"]):  # http://host:8000 has a port
        if not part:
            raise ConfigError(f"--shards {shown!r} has an empty part. Separate folders by single commas.")
        return Source(path=part)
    number = Fraction(found["number"])
    if number <= 0:
        folder = without_secrets(found["path"])
        raise ConfigError(f"--shards {shown} gives {folder} the share 0. Leave that folder out.")
    if found["unit"]:
        return Source(path=found["path"], epochs=number)
    return Source(path=found["path"], weight=number)


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """Which source fills which place of the endless sequence of bins.

    The sequence repeats a cycle of ``sum(quotas)`` places, in which each source has its quota. In a window of n places
    a source has its share of n places, give or take fewer than the number of sources.

    Attributes:
        sizes: bins of each source; bins are numbered through in this order.
        quotas: places of each source in a cycle, 1 or more.
        places_per_epoch: places that count as an epoch.
    """

    sizes: tuple[int, ...]
    quotas: tuple[int, ...]
    places_per_epoch: int

    def __post_init__(self) -> None:
        if not self.sizes or len(self.sizes) != len(self.quotas) or min(*self.sizes, *self.quotas) < 1:
            raise ConfigError(f"a mixture of sources with {self.sizes} bins in the proportions {self.quotas}.")
        if sum(self.quotas) > _MAX_CYCLE:
            raise ConfigError(
                f"proportions {self.quotas} of a mixture repeat only after {sum(self.quotas)} places; allowed: "
                f"{_MAX_CYCLE}. Give weights of fewer digits."
            )

    @property
    def first_bins(self) -> NDArray[np.int64]:
        """(S,) int64, number of the first bin of every source."""
        return np.cumsum([0, *self.sizes[:-1]], dtype=np.int64)

    def draw(self, places: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Look places up.

        Each source in turn takes its share of the places that the sources before it left, spread evenly over them
        (as J. Bresenham's line, 1965, spreads its steps).

        Args:
            places: (K,) int64, from 0 on.

        Returns:
            Source of every place, and how many earlier places that source has: (K,) int64 each.
        """
        source = np.zeros(places.size, dtype=np.int64)
        earlier = np.zeros(places.size, dtype=np.int64)
        cycle, place = np.divmod(places, sum(self.quotas))
        open_places = np.arange(places.size)
        left = sum(self.quotas)
        for number, quota in enumerate(self.quotas):
            before = place * quota // left
            mine = (place + 1) * quota // left > before
            source[open_places[mine]] = number
            earlier[open_places[mine]] = (cycle * quota + before)[mine]
            open_places, cycle, place = open_places[~mine], cycle[~mine], (place - before)[~mine]
            left -= quota
        return source, earlier


def mix(sources: Sequence[Source], sizes: Sequence[int]) -> Mixture | None:
    """The mixture of some sources; None where all bins are alike, so that an epoch uses each of them once.

    With weights, an epoch has as many places as there are bins; with epochs, as many as all their uses together.

    Args:
        sources: as parsed: all have weights, all have epochs, or none has either.
        sizes: bins of each.

    Raises:
        ConfigError: a source without bins, or proportions of too many digits.
    """
    for source, size in zip(sources, sizes):
        if not size and (source.weight or source.epochs):
            folder = without_secrets(source.path)
            raise ConfigError(f"{folder} holds no bins and cannot have a share of the mixture. Leave it out.")
    if all(source.weight is not None for source in sources):
        weights = [Fraction(source.weight or 0) for source in sources]
        scale = math.lcm(*(weight.denominator for weight in weights))
        quotas = [int(weight * scale) for weight in weights]
        places_per_epoch = sum(sizes)
    elif all(source.epochs is not None for source in sources):
        quotas = [max(1, round((source.epochs or 0) * size)) for source, size in zip(sources, sizes)]
        places_per_epoch = sum(quotas)
    else:
        return None
    divisor = math.gcd(*quotas)
    return Mixture(
        sizes=tuple(sizes),
        quotas=tuple(quota // divisor for quota in quotas),
        places_per_epoch=places_per_epoch,
    )
