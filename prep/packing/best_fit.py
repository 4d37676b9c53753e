"""Packs samples into bins with a token budget, and optionally a patch budget.

Input: the sizes of every sample. Output: the bin of every sample. Pure functions.

One budget: best-fit-decreasing over the histogram of lengths. Samples of equal length are interchangeable, so groups of
equal bins are filled at once. The cost depends on the number of distinct lengths, not of samples, plus one stable sort.
If this needs over 0.1 % more bins than a lower bound, :mod:`prep.packing.bin_slack` packs too and the better packing
wins. This happens when lengths are narrow, as for images of one size.

Two budgets: :mod:`prep.packing.two_budgets`.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
from binpacking.to_constant_volume import to_constant_volume
from numpy.typing import ArrayLike, NDArray

from prep.packing.bin_slack import (
    MAX_WORK,
    Run,
    largest_first,
    min_bins,
    minimum_bin_slack,
    most_frequent_first,
    spread,
)
from prep.packing.two_budgets import FEW_SAMPLES, pack_two_budgets
from schemas.errors import ConfigError

WINDOW = 256
"""Samples that the ``binpacking`` package packs at a time. Its cost is quadratic in this number."""


def pack(
    num_tokens: ArrayLike,
    max_length: int,
    *,
    num_patches: ArrayLike | None = None,
    max_patches: int | None = None,
    packer: str = "bfd",
    seed: int = 0,
) -> NDArray[np.int64]:
    """Assign every sample to a bin.

    Args:
        num_tokens: (N,) length of every sample, from 1 to ``max_length``.
        max_length: token budget of a bin.
        num_patches: (N,) vision patches of every sample. Required with ``max_patches``.
        max_patches: patch budget of a bin. A sample that exceeds it gets its own bin.
        packer: ``bfd`` or ``binpacking`` (the package's ``to_constant_volume`` over windows of 256 samples). The latter
            has a single size, so with two budgets the size of a sample is the larger of its two shares.
        seed: decides which samples of equal length go where, and the order of the bins.

    Returns:
        (N,) int64, the bin of every sample. Bins are numbered from 0 without gaps, in random order.

    Raises:
        ConfigError: a length is out of range, or an argument is invalid or missing.
    """
    if packer not in _PACKERS:
        raise ConfigError(f"unknown packer {packer!r}; allowed: {', '.join(_PACKERS)}")
    lengths = _checked_lengths(num_tokens, max_length)
    if lengths.size == 0:
        return lengths
    # Packers treat samples of equal length alike, so shuffling first decides at random which of them go where.
    generator = np.random.Generator(np.random.PCG64(seed))
    shuffled = generator.permutation(lengths.size)
    lengths = lengths[shuffled]
    if max_patches is None:
        packed = _PACKERS[packer](lengths, max_length)
    else:
        patches = _checked_patches(num_patches, lengths.size)[shuffled]
        packed = _pack_two_budgets(lengths, max_length, patches, max_patches, packer)
    bins = np.empty(lengths.size, dtype=np.int64)
    bins[shuffled] = generator.permutation(int(packed.max()) + 1)[packed]
    return bins


def _pack_one_budget(sizes: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """Best-fit-decreasing, or minimum bin slack if that needs fewer bins."""
    packed, least = best_fit_decreasing(sizes, capacity), min_bins(sizes, capacity)
    if np.count_nonzero(np.bincount(sizes)) * capacity <= MAX_WORK:
        for preferred in (largest_first, most_frequent_first):
            if int(packed.max()) + 1 - least > max(1, least // 1000):
                packed = min(packed, minimum_bin_slack(sizes, capacity, preferred), key=np.max)
    return packed


def best_fit_decreasing(sizes: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """Best-fit-decreasing: each sample, largest first, goes into the fullest bin that has room for it.

    Bins with equal room are one group, stored as runs of consecutive bin numbers. Samples of one size are placed
    together.

    Args:
        sizes: (N,) int64, each from 1 to ``capacity``.
        capacity: of a bin.

    Returns:
        (N,) int64 bin numbers from 0 without gaps. Samples of equal size keep their order.
    """
    distinct, counts = np.unique(sizes, return_counts=True)
    rooms = _Rooms()
    num_bins = 0
    runs: list[Run] = []
    for size, remaining in zip(distinct[::-1].tolist(), counts[::-1].tolist()):
        while remaining:
            tightest = rooms.take_tightest(size)
            if tightest is None:
                room, first, available = capacity, num_bins, -(-remaining // (capacity // size))
                num_bins += available
            else:
                room, first, available = tightest
            each = room // size
            # `num` bins take `each` samples. If bins are left, one more takes the rest, which are fewer.
            num = min(available, remaining // each)
            rest = remaining - num * each if num < available else 0
            for at, num_filled, num_samples in ((first, num, each), (first + num, min(1, rest), rest)):
                if num_filled:
                    runs.append((at, num_filled, num_samples))
                    rooms.put(room - num_samples * size, at, num_filled)
            remaining -= num * each + rest
            num += min(1, rest)
            rooms.put(room, first + num, available - num)
    return spread(sizes, runs)


class _Rooms:
    """Open bins by the room they have left: for each room, runs of (first bin, number of bins)."""

    def __init__(self) -> None:
        self._rooms: list[int] = []
        self._runs: dict[int, list[tuple[int, int]]] = {}

    def put(self, room: int, first: int, num: int) -> None:
        """Add ``num`` bins from ``first`` on that have ``room`` left. Full bins, and no bins, are ignored."""
        if not room or not num:
            return
        if room not in self._runs:
            insort(self._rooms, room)
            self._runs[room] = []
        self._runs[room].append((first, num))

    def take_tightest(self, size: int) -> tuple[int, int, int] | None:
        """Remove and return a run (room, first bin, number of bins) with the least room that holds ``size``."""
        at = bisect_left(self._rooms, size)
        if at == len(self._rooms):
            return None
        room = self._rooms[at]
        first, num = self._runs[room].pop()
        if not self._runs[room]:
            del self._runs[room]
            del self._rooms[at]
        return room, first, num


def constant_volume(sizes: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """``binpacking.to_constant_volume`` over consecutive windows, as the upstream tool packs samples."""
    bins = np.empty(sizes.size, dtype=np.int64)
    num_bins = 0
    for start in range(0, sizes.size, WINDOW):
        window = {start + index: size for index, size in enumerate(sizes[start : start + WINDOW].tolist())}
        for members in to_constant_volume(window, capacity):
            if members:
                bins[list(members)] = num_bins
                num_bins += 1
    return bins


def _checked_lengths(num_tokens: ArrayLike, max_length: int) -> NDArray[np.int64]:
    lengths = np.asarray(num_tokens, dtype=np.int64)
    if lengths.ndim != 1:
        raise ConfigError(f"num_tokens has shape {lengths.shape}; expected one dimension")
    if lengths.size and (lengths.min() < 1 or lengths.max() > max_length):
        raise ConfigError(f"lengths range from {lengths.min()} to {lengths.max()}; allowed: 1 to {max_length}")
    return lengths


def _checked_patches(num_patches: ArrayLike | None, num_samples: int) -> NDArray[np.int64]:
    if num_patches is None:
        raise ConfigError("max_patches is set but num_patches is missing; pass the patches of every sample")
    patches = np.asarray(num_patches, dtype=np.int64)
    if patches.shape != (num_samples,):
        raise ConfigError(f"num_patches has shape {patches.shape}, num_tokens {(num_samples,)}; they must agree")
    if patches.size and patches.min() < 0:
        raise ConfigError(f"num_patches has {patches.min()}; allowed: 0 or more")
    return patches


def _larger_shares(
    lengths: NDArray[np.int64], max_length: int, patches: NDArray[np.int64], max_patches: int
) -> NDArray[np.int64]:
    """One size for both budgets: the larger of the two shares of a sample, in tokens, rounded up.

    If these add up to at most ``max_length``, both budgets hold, since no share of a sample is larger.
    """
    return np.minimum(np.maximum(lengths, -(-patches * max_length // max_patches)), max_length)


def _pack_two_budgets(
    lengths: NDArray[np.int64], max_length: int, patches: NDArray[np.int64], max_patches: int, packer: str
) -> NDArray[np.int64]:
    """Assign samples to bins within both budgets."""
    sizes = _larger_shares(lengths, max_length, patches, max_patches)
    if packer != "bfd" or (sizes == lengths).all():
        return _PACKERS[packer](sizes, max_length)
    is_alone = patches > max_patches
    together = np.flatnonzero(~is_alone)
    packed = pack_two_budgets((lengths[together], patches[together]), (max_length, max_patches))
    bins = np.empty(lengths.size, dtype=np.int64)
    bins[together] = packed
    # Oversized samples come last, each in its own bin.
    num_bins = int(packed.max()) + 1 if packed.size else 0
    bins[is_alone] = num_bins + np.arange(lengths.size - together.size)
    if lengths.size > FEW_SAMPLES:
        return bins
    return min(bins, best_fit_decreasing(sizes, max_length), key=np.max)


_PACKERS = {"bfd": _pack_one_budget, "binpacking": constant_volume}
