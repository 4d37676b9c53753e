"""Packs samples into bins of a token budget, and of a patch budget where one is set.

Input: the sizes of every sample. Output: the bin of every sample. The default is best-fit-decreasing. Under one budget
it works on the histogram of lengths: samples of equal length are interchangeable, so whole groups of equal bins are
filled at once and the cost depends on the number of distinct lengths, not on the number of samples; what remains is
one stable sort. Two budgets: :mod:`prep.packing.two_budgets`. Pure functions.

Where it needs more bins than can be proved necessary, by more than one in a thousand, :mod:`prep.packing.bin_slack`
packs too, and the better packing is taken: that is so for narrow lengths, of pictures of one size, say.

No window packer gets by with fewer bins: where the number of bins does not prove it (the shares of a budget that the
samples of a window take, summed and rounded up, are a lower bound for every packer that looks at windows), window
packings are made too and the best is taken. That holds for up to 65,536 samples, and for more wherever the bound does,
as it does for all real lengths; ``docs/benchmarks.md`` has the figures.
"""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np
from binpacking.to_constant_volume import to_constant_volume
from numpy.typing import ArrayLike, NDArray

from prep.packing.bin_slack import (
    MOST_WORK,
    Run,
    largest_first,
    least_bins,
    minimum_bin_slack,
    most_frequent_first,
    spread,
)
from prep.packing.two_budgets import FEW_SAMPLES, pack_two_budgets
from schemas.errors import ConfigError

WINDOW = 256
"""Samples that the ``binpacking`` packer looks at together; the package is quadratic in this number."""

LARGE_WINDOW = 1000
"""Samples in a window of best-fit-decreasing, which is compared with that of all samples."""


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
        num_tokens: (N,) length of every sample, each at least 1 and at most ``max_length``.
        max_length: tokens that a bin holds at most.
        num_patches: (N,) vision patches of every sample; needed with ``max_patches``.
        max_patches: patches that a bin holds at most. A sample that alone has more gets a bin of its own.
        packer: ``bfd`` or ``binpacking`` (the package's ``to_constant_volume`` over windows of 256 samples; it knows
            one size only, so under two budgets a sample counts as the larger of its shares of them).
        seed: decides which of the samples of equal length fill which place, and the order of the bins.

    Returns:
        (N,) int64: the bin of every sample, numbered from 0 without gaps, in random order.

    Raises:
        ConfigError: a length is out of range, or an argument is unknown or missing.
    """
    lengths = np.asarray(num_tokens, dtype=np.int64)
    if lengths.ndim != 1:
        raise ConfigError(f"num_tokens has shape {lengths.shape}; expected one dimension")
    if packer not in _PACKERS:
        raise ConfigError(f"unknown packer {packer!r}; allowed: {', '.join(_PACKERS)}")
    if lengths.size == 0:
        return np.empty(0, dtype=np.int64)
    if lengths.min() < 1 or lengths.max() > max_length:
        raise ConfigError(
            f"lengths run from {lengths.min()} to {lengths.max()}; allowed: 1 to max_length, {max_length}"
        )
    generator = np.random.Generator(np.random.PCG64(seed))
    shuffled = generator.permutation(lengths.size)
    lengths = lengths[shuffled]
    if max_patches is None:
        packed = _PACKERS[packer](lengths, max_length)
    else:
        patches = _checked_patches(num_patches, lengths.size)[shuffled]
        packed = _under_two_budgets(lengths, max_length, patches, max_patches, packer)
    bins = np.empty(lengths.size, dtype=np.int64)
    bins[shuffled] = generator.permutation(int(packed.max()) + 1)[packed]
    return bins


def _best_of_all(sizes: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """Best-fit-decreasing over all samples, or another packing where that needs fewer bins."""
    packed, least = best_fit_decreasing(sizes, capacity), least_bins(sizes, capacity)
    if np.count_nonzero(np.bincount(sizes)) * capacity <= MOST_WORK:
        for preferred in (largest_first, most_frequent_first):
            if int(packed.max()) + 1 - least > max(1, least // 1000):
                packed = min(packed, minimum_bin_slack(sizes, capacity, preferred), key=np.max)
    num_bins = int(packed.max()) + 1
    if sizes.size > FEW_SAMPLES or num_bins == least:
        return packed
    others = []
    if num_bins > _least_bins(sizes, capacity, WINDOW):
        others.append(constant_volume(sizes, capacity))
    if sizes.size > LARGE_WINDOW and num_bins > _least_bins(sizes, capacity, LARGE_WINDOW):
        others.append(best_fit_in_windows(sizes, capacity))
    return min([packed, *others], key=np.max)


def _least_bins(sizes: NDArray[np.int64], capacity: int, window: int) -> int:
    """No packer that looks at windows for themselves needs fewer bins."""
    loads = np.add.reduceat(sizes, np.arange(0, sizes.size, window))
    return int((-(-loads // capacity)).sum())


def best_fit_in_windows(sizes: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """Best-fit-decreasing over consecutive windows."""
    bins = np.empty(sizes.size, dtype=np.int64)
    num_bins = 0
    for start in range(0, sizes.size, LARGE_WINDOW):
        found = best_fit_decreasing(sizes[start : start + LARGE_WINDOW], capacity)
        bins[start : start + LARGE_WINDOW] = num_bins + found
        num_bins += int(found.max()) + 1
    return bins


def best_fit_decreasing(sizes: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """Best-fit-decreasing: each sample, largest first, goes to the fullest bin that still has room for it.

    All bins that have the same room left are one group, held as runs of consecutive bin numbers; all samples of one
    size are placed together.

    Args:
        sizes: (N,) int64, each from 1 to ``capacity``.
        capacity: of a bin.

    Returns:
        (N,) int64 bin numbers from 0 without gaps; samples of equal size keep their order.
    """
    distinct, counts = np.unique(sizes, return_counts=True)
    rooms = _Rooms()
    num_bins = 0
    runs: list[Run] = []
    for size, remaining in zip(distinct[::-1].tolist(), counts[::-1].tolist()):
        while remaining:
            found = rooms.take_tightest(size)
            if found is None:
                each = capacity // size
                room, first, available = capacity, num_bins, -(-remaining // each)
                num_bins += available
            else:
                room, first, available = found
                each = room // size
            full = min(available, remaining // each)
            if full:
                runs.append((first, full, each))
                if room > each * size:
                    rooms.put(room - each * size, first, full)
                remaining -= full * each
            if full < available and 0 < remaining < each:
                runs.append((first + full, 1, remaining))
                if room > remaining * size:
                    rooms.put(room - remaining * size, first + full, 1)
                full, remaining = full + 1, 0
            if full < available:
                rooms.put(room, first + full, available - full)
    return spread(sizes, runs)


class _Rooms:
    """Open bins by the room they have left: for each room, runs (first bin, number of bins)."""

    def __init__(self) -> None:
        self._rooms: list[int] = []
        self._runs: dict[int, list[tuple[int, int]]] = {}

    def put(self, room: int, first: int, num: int) -> None:
        """Add ``num`` bins from ``first`` on that have ``room`` left."""
        if room not in self._runs:
            insort(self._rooms, room)
            self._runs[room] = []
        self._runs[room].append((first, num))

    def take_tightest(self, size: int) -> tuple[int, int, int] | None:
        """Remove and return (room, first bin, number of bins) of the least room that holds ``size``."""
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
    """``binpacking.to_constant_volume`` over consecutive windows, as the upstream tool packs."""
    bins = np.empty(sizes.size, dtype=np.int64)
    num_bins = 0
    for start in range(0, sizes.size, WINDOW):
        window = {start + place: size for place, size in enumerate(sizes[start : start + WINDOW].tolist())}
        for members in to_constant_volume(window, capacity):
            if members:
                bins[list(members)] = num_bins
                num_bins += 1
    return bins


def _checked_patches(num_patches: ArrayLike | None, num_samples: int) -> NDArray[np.int64]:
    if num_patches is None:
        raise ConfigError("max_patches is set but num_patches is not given")
    patches = np.asarray(num_patches, dtype=np.int64)
    if patches.shape != (num_samples,):
        raise ConfigError(f"num_patches has shape {patches.shape}, num_tokens {(num_samples,)}; they must agree")
    if patches.size and patches.min() < 0:
        raise ConfigError(f"num_patches has {patches.min()}; allowed: 0 or more")
    return patches


def _larger_shares(
    lengths: NDArray[np.int64], max_length: int, patches: NDArray[np.int64], max_patches: int
) -> NDArray[np.int64]:
    """One size for both budgets: the larger of the shares that a sample takes of them, in tokens, rounded up.

    Shares that add up to at most 1 keep both budgets, since each share is at least the sample's part of each budget.
    """
    return np.minimum(np.maximum(lengths, -(-patches * max_length // max_patches)), max_length)


def _under_two_budgets(
    lengths: NDArray[np.int64], max_length: int, patches: NDArray[np.int64], max_patches: int, packer: str
) -> NDArray[np.int64]:
    """Bins that keep both budgets."""
    sizes = _larger_shares(lengths, max_length, patches, max_patches)
    if packer != "bfd" or (sizes == lengths).all():
        return _PACKERS[packer](sizes, max_length)
    is_alone = patches > max_patches
    together = np.flatnonzero(~is_alone)
    packed = pack_two_budgets((lengths[together], patches[together]), (max_length, max_patches))
    bins = np.empty(lengths.size, dtype=np.int64)
    bins[together] = packed
    # Samples that alone have more patches than a bin holds come last, each in its own.
    num_bins = int(packed.max()) + 1 if packed.size else 0
    bins[is_alone] = num_bins + np.arange(lengths.size - together.size)
    if lengths.size > FEW_SAMPLES:
        return bins
    return min(bins, best_fit_decreasing(sizes, max_length), key=np.max)


_PACKERS = {"bfd": _best_of_all, "binpacking": constant_volume}
