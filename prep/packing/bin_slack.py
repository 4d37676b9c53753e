"""Packs by minimum bin slack: each bin is filled as full as the remaining samples allow.

Best-fit-decreasing puts similar samples together. If none is short, gaps remain: six samples of 620 tokens fit into
4096, and no seventh. Here a bin begins with one sample, and the others are chosen together, by a subset sum over the
histogram of the remaining samples (J. Gupta and J. Ho, "A new heuristic algorithm for the one-dimensional bin-packing
problem", 1999; the first sample is fixed as in K. Fleszar and K. Hindi, 2002). A *pattern*, how many samples of which
sizes a bin holds, is used as long as samples last.

Input: sizes. Output: the bin of every sample. Pure functions, of integers alone. Cost: a
pattern uses up a size, or nearly so, so there are about twice as many patterns as distinct sizes. Each takes 0.1 to
1 ms for a few hundred distinct sizes and bins of 4096, whatever the number of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Counts = dict[int, int]
"""Size -> number of remaining samples."""

Run = tuple[int, int, int]
"""First bin, number of bins, samples of one size in each."""

MAX_WORK = 1 << 24
"""Up to this product of distinct sizes and capacity, packing by slack takes seconds: 4096 sizes in bins of 4096."""

_FEW = 64
"""Sizes that are tried first. They nearly always suffice to fill a bin to the last token."""


def min_bins(sizes: NDArray[np.int64], capacity: int) -> int:
    """A lower bound on the number of bins of any packing.

    The bound L2 of S. Martello and P. Toth, "Knapsack Problems", 1990, chapter 8: for every threshold up to half a bin,
    samples that leave less room than the threshold need a bin each, as do all others larger than half a bin. Samples
    between the threshold and half a bin fill the room in the latter first.

    Args:
        sizes: (N,) int64, each from 1 to ``capacity``.
        capacity: of a bin.
    """
    of_size = np.bincount(sizes)
    distinct = np.flatnonzero(of_size)
    num_upto = np.concatenate(([0], np.cumsum(of_size[distinct])))
    sum_upto = np.concatenate(([0], np.cumsum(of_size[distinct] * distinct)))
    half = int(np.searchsorted(distinct, capacity // 2, side="right"))
    # Sizes suffice as thresholds: one between two sizes proves no more than the larger size.
    thresholds = distinct[:half]
    num_large = num_upto[-1] - num_upto[half]
    # Samples from half a bin to capacity - threshold leave room for samples from the threshold to half a bin.
    upto = np.searchsorted(distinct, capacity - thresholds, side="right")
    room = (num_upto[upto] - num_upto[half]) * capacity - (sum_upto[upto] - sum_upto[half])
    small = sum_upto[half] - sum_upto[:half]
    return int(num_large + (-(-(small - room) // capacity)).max(initial=0))


def largest_first(remaining: Counts) -> list[int]:
    """Sizes in descending order: those that are hard to place go first."""
    return sorted(remaining, reverse=True)


def most_frequent_first(remaining: Counts) -> list[int]:
    """Sizes by descending frequency: if no sample is large, rare sizes are more useful to complete bins."""
    return sorted(remaining, key=lambda size: (-remaining[size], -size))


def minimum_bin_slack(
    sizes: NDArray[np.int64], capacity: int, preferred: Callable[[Counts], list[int]]
) -> NDArray[np.int64]:
    """Fill one bin after another with the least slack, starting with the preferred sizes.

    Args:
        sizes: (N,) int64, each from 1 to ``capacity``.
        capacity: of a bin.
        preferred: orders the remaining sizes. The first one begins the bin.

    Returns:
        (N,) int64 bin numbers from 0 without gaps; samples of equal size keep their order.
    """
    distinct, counts = np.unique(sizes, return_counts=True)
    remaining: Counts = dict(zip(distinct.tolist(), counts.tolist()))
    runs: dict[int, list[Run]] = {size: [] for size in reversed(remaining)}
    num_bins = 0
    while remaining:
        pattern = _pattern(remaining, preferred(remaining), capacity)
        times = min(remaining[size] // count for size, count in pattern.items())
        for size, count in pattern.items():
            runs[size].append((num_bins, times, count))
            remaining[size] -= times * count
            if not remaining[size]:
                del remaining[size]
        num_bins += times
    return spread(sizes, [run for of_size in runs.values() for run in of_size])


def _pattern(remaining: Counts, order: Sequence[int], capacity: int) -> Counts:
    """The fullest bin that begins with the first size: size -> count of samples."""
    first, room = order[0], capacity - order[0]
    fitting = [(size, remaining[size] - (size == first)) for size in order if size <= room]
    chosen = _subset_sum(fitting[:_FEW], room)
    if len(fitting) > _FEW and sum(size * count for size, count in chosen.items()) < room:
        chosen = _subset_sum(fitting, room)
    return {**chosen, first: chosen.get(first, 0) + 1}


def _subset_sum(available: Sequence[tuple[int, int]], room: int) -> Counts:
    """The choice with the highest sum up to ``room``. Of several, that with most of the first size, then the next."""
    within = (1 << (room + 1)) - 1
    sums = 1  # bit s is set if some choice adds up to s
    sums_without: list[int] = []  # `sums` before each size was added, the last size first
    for size, count in reversed(available):
        sums_without.append(sums)
        count, step = min(count, room // size), 1
        while count > 0:
            step = min(step, count)
            sums |= (sums << (size * step)) & within
            count -= step
            step *= 2
    rest = sums.bit_length() - 1
    chosen: Counts = {}
    for (size, count), without in zip(available, reversed(sums_without)):
        count = min(count, rest // size)
        while not (without >> (rest - count * size)) & 1:
            count -= 1
        if count:
            chosen[size] = count
            rest -= count * size
    return chosen


def spread(sizes: NDArray[np.int64], runs: Sequence[Run]) -> NDArray[np.int64]:
    """Assign samples to runs of bins.

    Args:
        sizes: (N,) int64.
        runs: those of the largest size first. Together they hold all samples of every size.

    Returns:
        (N,) int64 bin numbers. Samples of equal size keep their order.
    """
    first_bins, num, each_of = (np.asarray(column, dtype=np.int64) for column in zip(*runs))
    bin_of_run = np.repeat(first_bins, num) + _ramp(num)
    bins = np.empty(sizes.size, dtype=np.int64)
    bins[np.argsort(-sizes, kind="stable")] = np.repeat(bin_of_run, np.repeat(each_of, num))
    return bins


def _ramp(counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """[0..counts[0]), [0..counts[1]), … in one array."""
    ends = np.cumsum(counts)
    ramp: NDArray[np.int64] = np.arange(int(ends[-1]), dtype=np.int64) - np.repeat(ends - counts, counts)
    return ramp
