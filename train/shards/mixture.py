"""Several sources of bins in fixed proportions: what ``--shards a:0.7,b:0.3`` means.

An expression -> sources with weights or epochs; their sizes -> a :class:`Mixture`, which assigns every position of the
endless sequence of bins to a source, and counts the earlier positions of that source. The positions of a source are
spaced as evenly as integers allow, so proportions hold over every window of positions. Nothing is random.

Cost: a few integer operations, for any position.
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

_SHARE = re.compile(r"(?P<path>.+):(?P<share>\d+(\.\d*)?|\.\d+)(?P<unit>epochs?)?")
_HOST_ONLY = re.compile(r"[a-z0-9+.-]+://[^/]*", re.IGNORECASE)
_MAX_CYCLE = 1 << 31


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One part of ``--shards``: a folder or URL, and its share of the mixture.

    Attributes:
        path: the path or URL as written.
        weight: share of the positions, relative to the other sources; None if the sources have no weights.
        epochs: uses of each of its bins per epoch of the mixture; None if the sources have no epochs.
    """

    path: str
    weight: Fraction | None = None
    epochs: Fraction | None = None


def parse_sources(text: str) -> tuple[Source, ...]:
    """Parse ``a``, ``a,b`` (all bins equally), ``a:0.7,b:0.3`` (weights) or ``a:2epochs,b:0.5epochs``.

    If a folder with exactly this name exists, the text names that folder.

    Raises:
        ConfigError: a part is empty, a folder is named twice, a weight is 0, or weights and epochs are combined.
    """
    if _exists(text):
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


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except OSError:  # longer than a file name can be
        return False


def _parse_source(part: str, shown: str) -> Source:
    match = _SHARE.fullmatch(part)
    if match is None or (_HOST_ONLY.fullmatch(match["path"]) and not match["unit"]):  # http://host:8000 has a port
        if not part:
            raise ConfigError(f"--shards {shown!r} has an empty part. Separate folders by single commas.")
        return Source(path=part)
    share = Fraction(match["share"])
    if share <= 0:
        folder = without_secrets(match["path"])
        raise ConfigError(f"--shards {shown} gives {folder} the share 0. Leave that folder out.")
    if match["unit"]:
        return Source(path=match["path"], epochs=share)
    return Source(path=match["path"], weight=share)


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """Which source fills which position of the endless sequence of bins.

    The sequence repeats a cycle of ``sum(quotas)`` positions, in which each source has its quota. In any window of n
    positions, a source has its share of n, off by less than the number of sources.

    Attributes:
        sizes: bins of each source. Bin ids run through the sources in this order.
        quotas: positions of each source in a cycle, 1 or more.
        bins_per_epoch: positions that count as an epoch.
    """

    sizes: tuple[int, ...]
    quotas: tuple[int, ...]
    bins_per_epoch: int

    def __post_init__(self) -> None:
        if not self.sizes or len(self.sizes) != len(self.quotas) or min(*self.sizes, *self.quotas) < 1:
            raise ConfigError(
                f"a mixture of sources with {self.sizes} bins has the proportions {self.quotas}; allowed: 1 or more "
                "bins in each source, and a positive proportion for each."
            )
        if sum(self.quotas) > _MAX_CYCLE:
            raise ConfigError(
                f"proportions {self.quotas} of a mixture repeat only after {sum(self.quotas)} bins; allowed: "
                f"{_MAX_CYCLE}. Give weights of fewer digits."
            )

    @property
    def first_bins(self) -> NDArray[np.int64]:
        """(S,) int64, id of the first bin of every source."""
        return np.cumsum([0, *self.sizes[:-1]], dtype=np.int64)

    def draw(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Look up the sources of positions.

        Each source in turn takes its share of the positions that the previous sources left, spaced evenly over them
        (like the steps of J. Bresenham's line algorithm, 1965).

        Args:
            positions: (K,) int64, from 0 on.

        Returns:
            The source of every position, and how many earlier positions that source has: (K,) int64 each.
        """
        sources = np.zeros(positions.size, dtype=np.int64)
        num_earlier = np.zeros(positions.size, dtype=np.int64)
        num_left = sum(self.quotas)
        # (U,) each, for the positions without a source so far: their indices in positions, their cycle, and their
        # position among the num_left positions of the cycle that the previous sources left.
        unassigned = np.arange(positions.size)
        cycle, position = np.divmod(positions, num_left)
        for source, quota in enumerate(self.quotas):
            num_before = position * quota // num_left
            mask = (position + 1) * quota // num_left > num_before
            sources[unassigned[mask]] = source
            num_earlier[unassigned[mask]] = (cycle * quota + num_before)[mask]
            unassigned, cycle, position = unassigned[~mask], cycle[~mask], (position - num_before)[~mask]
            num_left -= quota
        return sources, num_earlier


def mix(sources: Sequence[Source], sizes: Sequence[int]) -> Mixture | None:
    """Create the mixture of sources; None without weights and epochs, so that an epoch uses each bin once.

    With weights, an epoch has as many positions as there are bins; with epochs, as many as all uses together.

    Args:
        sources: parsed sources. All have weights, all have epochs, or none has either.
        sizes: bins of each source.

    Raises:
        ConfigError: a source with a share has no bins, or the proportions have too many digits.
    """
    for source, size in zip(sources, sizes):
        if not size and (source.weight or source.epochs):
            folder = without_secrets(source.path)
            raise ConfigError(f"{folder} holds no bins and cannot have a share of the mixture. Leave it out.")
    if all(source.weight is not None for source in sources):
        weights = [Fraction(source.weight or 0) for source in sources]
        scale = math.lcm(*(weight.denominator for weight in weights))
        quotas = [int(weight * scale) for weight in weights]
        bins_per_epoch = sum(sizes)
    elif all(source.epochs is not None for source in sources):
        quotas = [max(1, round((source.epochs or 0) * size)) for source, size in zip(sources, sizes)]
        bins_per_epoch = sum(quotas)
    else:
        return None
    divisor = math.gcd(*quotas)
    return Mixture(
        sizes=tuple(sizes),
        quotas=tuple(quota // divisor for quota in quotas),
        bins_per_epoch=bins_per_epoch,
    )
