"""Packs by minimum bin slack: bin after bin is filled as nearly as the samples that are left allow.

Best-fit-decreasing puts like samples together, and where none is short there are none to fill the rest: six of 620
tokens in 4096, and no seventh. Here a bin begins with one sample, and the others are chosen together, by a subset-sum
over the histogram of what is left (J. Gupta and J. Ho, "A new heuristic algorithm for the one-dimensional bin-packing
problem", 1999; the first sample is fixed as in K. Fleszar and K. Hindi, 2002). A *pattern*, how many samples of which
sizes a bin holds, is used as often as samples last.

Input: sizes. Output: the bin of every sample. Pure functions, of integers alone. Cost: a pattern uses up a size or
nearly so, so there are some twice as many patterns as distinct sizes; each takes 0.1 to 1 ms for a few hundred distinct
sizes and bins of 4096, whatever the number of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Counts = dict[int, int]
"""Size -> number of samples of it that are left."""

Run = tuple[int, int, int]
"""First bin, number of bins, samples of one size in each."""

MAX_WORK = 1 << 24
"""Distinct sizes times capacity, up to which packing by slack is a matter of seconds: 4096 sizes in bins of 4096."""

_FEW = 64
"""Sizes that are tried before all are; nearly always enough to fill a bin to the last token."""


def min_bins(sizes: NDArray[np.int64], capacity: int) -> int:
    """A number of bins that no packing can do without.

    The bound L2 of S. Martello and P. Toth, "Knapsack Problems", 1990, chapter 8: for every threshold up to half a bin,
    samples that leave less room than the threshold need a bin each, as do all others larger than half a bin; what is
    between the threshold and half a bin fills the room in those first.

    Args:
        sizes: (N,) int64, each from 1 to ``capacity``.
        capacity: of a bin.
    """
    of_size = np.bincount(sizes)
    distinct = np.flatnonzero(of_size)
    num_upto = np.concatenate(([0], np.cumsum(of_size[distinct])))
    sum_upto = np.concatenate(([0], np.cumsum(of_size[distinct] * distinct)))
    half = int(np.searchsorted(distinct, capacity // 2, side="right"))
    # Sizes alone: a threshold between two of them proves no more than the larger one does.
    thresholds = distinct[:half]
    num_large = num_upto[-1] - num_upto[half]
    # Between half a bin and capacity - threshold, there is room for something between the threshold and half a bin.
    upto = np.searchsorted(distinct, capacity - thresholds, side="right")
    room = (num_upto[upto] - num_upto[half]) * capacity - (sum_upto[upto] - sum_upto[half])
    small = sum_upto[half] - sum_upto[:half]
    return int(num_large + (-(-(small - room) // capacity)).max(initial=0))


def largest_first(left: Counts) -> list[int]:
    """Sizes from the largest on: what is hard to place goes first."""
    return sorted(left, reverse=True)


def most_frequent_first(left: Counts) -> list[int]:
    """Sizes from the most frequent on: where no sample is large, rare sizes are worth more as what completes a bin."""
    return sorted(left, key=lambda size: (-left[size], -size))


def minimum_bin_slack(
    sizes: NDArray[np.int64], capacity: int, preferred: Callable[[Counts], list[int]]
) -> NDArray[np.int64]:
    """Fill bin after bin with the least slack, from the preferred sizes.

    Args:
        sizes: (N,) int64, each from 1 to ``capacity``.
        capacity: of a bin.
        preferred: puts the sizes that are left in order; the first begins the bin.

    Returns:
        (N,) int64 bin numbers from 0 without gaps; samples of equal size keep their order.
    """
    distinct, counts = np.unique(sizes, return_counts=True)
    left: Counts = dict(zip(distinct.tolist(), counts.tolist()))
    runs: dict[int, list[Run]] = {size: [] for size in reversed(left)}
    num_bins = 0
    while left:
        pattern = _pattern(left, preferred(left), capacity)
        times = min(left[size] // number for size, number in pattern.items())
        for size, number in pattern.items():
            runs[size].append((num_bins, times, number))
            left[size] -= times * number
            if not left[size]:
                del left[size]
        num_bins += times
    return spread(sizes, [run for of_size in runs.values() for run in of_size])


def _pattern(left: Counts, order: Sequence[int], capacity: int) -> Counts:
    """The fullest bin that begins with the first size: how many samples of which size."""
    first, room = order[0], capacity - order[0]
    fitting = [(size, left[size] - (size == first)) for size in order if size <= room]
    chosen = _subset_sum(fitting[:_FEW], room)
    if len(fitting) > _FEW and sum(size * number for size, number in chosen.items()) < room:
        chosen = _subset_sum(fitting, room)
    return {**chosen, first: chosen.get(first, 0) + 1}


def _subset_sum(available: Sequence[tuple[int, int]], room: int) -> Counts:
    """The choice with the highest sum up to ``room``; of several, the one with most of the first, then of the next."""
    within = (1 << (room + 1)) - 1
    sums = 1  # bit s: some choice adds up to s
    sums_without: list[int] = []  # the same before each size came in, the last size first
    for size, number in reversed(available):
        sums_without.append(sums)
        number, step = min(number, room // size), 1
        while number > 0:
            step = min(step, number)
            sums |= (sums << (size * step)) & within
            number -= step
            step *= 2
    rest = sums.bit_length() - 1
    chosen: Counts = {}
    for (size, number), without in zip(available, reversed(sums_without)):
        number = min(number, rest // size)
        while not (without >> (rest - number * size)) & 1:
            number -= 1
        if number:
            chosen[size] = number
            rest -= number * size
    return chosen


def spread(sizes: NDArray[np.int64], runs: Sequence[Run]) -> NDArray[np.int64]:
    """Deal samples out to runs of bins.

    Args:
        sizes: (N,) int64.
        runs: those of the largest size first, together as many samples of every size as there are.

    Returns:
        (N,) int64 bin numbers; samples of equal size keep their order.
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
