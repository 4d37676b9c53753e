"""Plan: which sample goes into which bin, which bin into which shard. One process, vectorised, a pure function.

Input: columns over all measured samples. Output: a :class:`Plan`. Cost: a few seconds and 1.3 GB for ten million
samples, with a budget of patches ten seconds and 2 GB.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prep.packing import pack
from schemas.seeds import seed_for
from schemas.settings import BuildSettings

logger = logging.getLogger(__name__)

BYTES_PER_TOKEN = 20
"""Bytes of a token in a shard: input_ids, labels and three rows of position_ids, four bytes each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Samples in the order in which they are written.

    Attributes:
        order: (K,) int64: indices of the packed samples, bin by bin, slot by slot.
        bin_starts: (B+1,) int64: bin ``b`` holds ``order[bin_starts[b]:bin_starts[b+1]]``.
        shard_starts: (S+1,) int64: shard ``s`` holds bins ``shard_starts[s]`` to ``shard_starts[s+1] - 1``.
    """

    order: NDArray[np.int64]
    bin_starts: NDArray[np.int64]
    shard_starts: NDArray[np.int64]

    @property
    def num_bins(self) -> int:
        """Number of bins."""
        return int(self.bin_starts.size) - 1

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return int(self.shard_starts.size) - 1

    def positions(self, num_samples: int) -> NDArray[np.int64]:
        """Position of every sample in ``order``, -1 if it is not packed: (num_samples,) int64."""
        positions = np.full(num_samples, -1, dtype=np.int64)
        positions[self.order] = np.arange(self.order.size)
        return positions


def make_plan(
    num_tokens: NDArray[np.int32],
    num_patches: NDArray[np.int32],
    pixel_bytes: NDArray[np.int64],
    settings: BuildSettings,
) -> Plan:
    """Pack samples into bins and bins into shards.

    Args:
        num_tokens: (N,) length of every measured sample. Those longer than ``max_length`` are left out.
        num_patches: (N,) vision patches.
        pixel_bytes: (N,) bytes of the stored frames.
        settings: budgets, packer and seed.
    """
    fitting = np.flatnonzero(num_tokens <= settings.max_length)
    _warn_oversized(num_patches[fitting], settings.max_patches)
    bin_of = pack(
        num_tokens[fitting],
        settings.max_length,
        num_patches=num_patches[fitting],
        max_patches=settings.max_patches,
        packer=settings.packer,
        seed=seed_for(settings.seed, "pack"),
    )
    # (K,) samples in random order, then sorted by bin: slots are random, where the packer's order is long to short.
    shuffled = np.random.Generator(np.random.PCG64(seed_for(settings.seed, "slots"))).permutation(fitting.size)
    by_bin = shuffled[np.argsort(bin_of[shuffled], kind="stable")]
    order = fitting[by_bin]
    num_bins = int(bin_of.max()) + 1 if bin_of.size else 0
    bin_starts = np.zeros(num_bins + 1, dtype=np.int64)
    np.cumsum(np.bincount(bin_of, minlength=num_bins), out=bin_starts[1:])
    sample_bytes = pixel_bytes[order] + num_tokens[order].astype(np.int64) * BYTES_PER_TOKEN
    total_bytes = np.concatenate([[0], np.cumsum(sample_bytes)])[bin_starts]
    return Plan(order=order, bin_starts=bin_starts, shard_starts=_shard_starts(total_bytes, settings.shard_bytes))


def _warn_oversized(num_patches: NDArray[np.int32], max_patches: int | None) -> None:
    """Warn about samples that exceed the patch budget, since users set it to bound memory."""
    oversized = num_patches[num_patches > max_patches] if max_patches is not None else num_patches[:0]
    if oversized.size:
        logger.warning(
            "%s more than --max-patches %s patches, the largest %s; each gets a bin of its own. Lower max_pixels, or "
            "the pixels and frames of videos, if such bins do not fit on the GPU.",
            f"{oversized.size:,} samples have" if oversized.size > 1 else "1 sample has",
            f"{max_patches:,}",
            f"{oversized.max():,}",
        )


def _shard_starts(total_bytes: NDArray[np.int64], shard_bytes: int) -> NDArray[np.int64]:
    """First bin of every shard: a shard ends with the bin that makes it reach ``shard_bytes``.

    Args:
        total_bytes: (B+1,) bytes of all bins before each bin, and of all.
        shard_bytes: size that closes a shard.
    """
    starts = [0]
    num_bins = int(total_bytes.size) - 1
    while starts[-1] < num_bins:
        target = total_bytes[starts[-1]] + shard_bytes
        starts.append(min(max(int(np.searchsorted(total_bytes, target)), starts[-1] + 1), num_bins))
    return np.asarray(starts, dtype=np.int64)
