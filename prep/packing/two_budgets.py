"""Packs samples under two budgets at once: tokens and vision patches.

Input: two sizes of every sample and the two capacities of a bin. Output: the bin of every sample. The algorithm is
best-fit-decreasing in two dimensions, for batches instead of single samples. Sizes are grouped on a grid (rounded up),
and open bins by their two rooms on the same grid (rounded down), so a batch goes into groups of bins at once. Sizes and
rooms stay exact: the grid only decides which batch meets which bins.

A batch prefers bins whose rooms have the same proportion as its sizes: samples with many patches go where patches are
left, text goes where they are not. Batches are ordered from large to small, mainly by their share of the scarcer budget
and a little by that of the other. The best resolution of the grid in either budget depends on how scarce the other one
is. Several strategies are tried on the first samples, and the best one is used.

Cost: about ten thousand batches, whatever the number of samples, a few passes over the samples, and at most 170 bytes a
sample. Ten million samples take seven to ten seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FEW_SAMPLES = 1 << 16
"""Up to this many samples, every strategy packs all of them, as do single samples in windows, and the best one wins."""

_TRIAL_SAMPLES = 1 << 13
"""Larger sets try the strategies on this many samples."""

WINDOW = 1000
"""Samples in a window of :func:`singly_in_windows`."""

_DIRECTIONS = 1.5
"""Weight of a mismatch in proportions; it is reached by a bin with room in one budget only, for the other one only."""

_LARGE = 1 / 16
"""A bin takes only one sample of a batch at a time if the samples take more than this share of a budget."""

Ints = NDArray[np.int64]
Sizes = tuple[Ints, Ints]
Capacities = tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Strategy:
    """Parameters of a packing.

    Attributes:
        fineness: steps of the grid are at most ``1 / fineness`` of a size; the scarcer budget first.
        other_weight: weight of the other budget in the order of the batches.
        room_weight: weight of the room left in a bin, against a mismatch in proportions.
    """

    fineness: tuple[int, int]
    other_weight: float
    room_weight: float


_STRATEGIES = (
    _Strategy((60, 28), 0.3, 0.05),
    _Strategy((30, 120), 0.1, 1.0),
    _Strategy((60, 28), 1.0, 0.05),
    _Strategy((512, 4), 0.3, 0.05),
)
"""These are best, in this order, if both budgets are scarce; if they cannot both be filled; if most samples take more
of one than of the other; and if one is plentiful. Found by trial on mixtures of text, images, documents and videos."""


def pack_two_budgets(sizes: Sizes, capacities: Capacities) -> Ints:
    """Assign every sample to a bin.

    Args:
        sizes: (N,) int64 each, from 0 to its capacity, not both 0. The first samples should resemble the others.
        capacities: of a bin.

    Returns:
        (N,) int64 bin numbers from 0 without gaps.
    """
    if not sizes[0].size:
        return np.empty(0, dtype=np.int64)
    loads = [int(size.sum()) / capacity for size, capacity in zip(sizes, capacities)]
    if loads[1] > loads[0]:
        sizes, capacities = sizes[::-1], capacities[::-1]
    if sizes[0].size <= FEW_SAMPLES:
        packings = [_in_batches(sizes, capacities, strategy) for strategy in _STRATEGIES]
        return min(*packings, singly_in_windows(sizes, capacities), key=np.max)
    first = (sizes[0][:_TRIAL_SAMPLES], sizes[1][:_TRIAL_SAMPLES])
    best = min(_STRATEGIES, key=lambda strategy: int(_in_batches(first, capacities, strategy).max()))
    return _in_batches(sizes, capacities, best)


def singly_in_windows(sizes: Sizes, capacities: Capacities) -> Ints:
    """Best-fit-decreasing of single samples in consecutive windows. Cost: 15 microseconds a sample."""
    bins = np.empty(sizes[0].size, dtype=np.int64)
    num_bins = 0
    for start in range(0, bins.size, WINDOW):
        window = _one_by_one((sizes[0][start : start + WINDOW], sizes[1][start : start + WINDOW]), capacities)
        bins[start : start + WINDOW] = num_bins + window
        num_bins += int(window.max()) + 1
    return bins


def _one_by_one(sizes: Sizes, capacities: Capacities) -> Ints:
    """Best-fit-decreasing of single samples, the largest share of a budget first. Each goes into the bin that has the
    least room, summed over both budgets.
    """
    # (N,) both sizes as integers in one unit, in which a bin has the same capacity for either.
    shares = (sizes[0] * capacities[1], sizes[1] * capacities[0])
    rooms = np.full((2, sizes[0].size), capacities[0] * capacities[1])
    bins = np.empty(sizes[0].size, dtype=np.int64)
    num_bins = 0
    order = np.lexsort((-shares[0], -(shares[0] + shares[1]), -np.maximum(*shares)))
    for sample in order.tolist():
        share = np.asarray([[shares[0][sample]], [shares[1][sample]]])
        fitting = np.flatnonzero((rooms[:, :num_bins] >= share).all(axis=0))
        tightest = int(fitting[np.argmin(rooms[:, fitting].sum(axis=0))]) if fitting.size else num_bins
        num_bins = max(num_bins, tightest + 1)
        rooms[:, tightest] -= share[:, 0]
        bins[sample] = tightest
    return bins


def _in_batches(sizes: Sizes, capacities: Capacities, strategy: _Strategy) -> Ints:
    """Pack all samples in batches, as the module describes."""
    rasters = (_Raster.of(capacities[0], strategy.fineness[0]), _Raster.of(capacities[1], strategy.fineness[1]))
    width = rasters[1].levels.size
    # 16-bit cells, if sufficient, sort ten times as fast.
    dtype = np.min_scalar_type(rasters[0].levels.size * width)
    cells = (rasters[0].up(sizes[0]) * width + rasters[1].up(sizes[1])).astype(dtype)
    order = np.argsort(cells, kind="stable")
    cells = cells[order]
    sizes = (sizes[0][order], sizes[1][order])
    placed = np.empty(order.size, dtype=np.int64)
    open_bins = _OpenBins(rasters, order.size, strategy.room_weight)
    for batch in _batches(cells, sizes, rasters, strategy.other_weight):
        at = batch.start
        while at < batch.stop:
            candidates = open_bins.take(batch, batch.stop - at)
            if not candidates.size:
                open_bins.open(-(-(batch.stop - at) // batch.copies(capacities)))
                continue
            ends = at + np.cumsum(open_bins.copies(candidates, batch))
            # The last bin may be needed in part only, and those after it not at all.
            ends = np.minimum(ends[: int(np.searchsorted(ends, batch.stop)) + 1], batch.stop)
            starts = np.append(at, ends[:-1])
            at = int(ends[-1])
            filled = candidates[: ends.size]
            placed[starts[0] : at] = np.repeat(filled, ends - starts)
            open_bins.fill(filled, [np.add.reduceat(size[:at], starts) for size in sizes])
            open_bins.put(candidates)
    bins = np.empty(order.size, dtype=np.int64)
    bins[order] = placed
    return bins


@dataclass(frozen=True, slots=True, eq=False)
class _Raster:
    """Levels (K,) int64 from 0 to a capacity: first every integer, then steps of equal ratio."""

    levels: Ints

    @staticmethod
    def of(capacity: int, fineness: int) -> _Raster:
        levels = [0]
        while levels[-1] < capacity:
            levels.append(min(capacity, levels[-1] + max(1, levels[-1] // fineness)))
        return _Raster(np.asarray(levels, dtype=np.int64))

    @property
    def capacity(self) -> int:
        return int(self.levels[-1])

    def up(self, sizes: Ints) -> Ints:
        """Index of the lowest level that is not below each size."""
        largest = int(sizes.max())
        if sizes.size <= largest:
            return np.searchsorted(self.levels, sizes)
        # A lookup table is ten times as fast as a search.
        levels: Ints = np.searchsorted(self.levels, np.arange(largest + 1))[sizes]
        return levels

    def down(self, rooms: Ints) -> Ints:
        """Index of the highest level that is not above each room."""
        return np.searchsorted(self.levels, rooms, side="right") - 1


@dataclass(frozen=True, slots=True)
class _Batch:
    """The samples of one grid cell: their range in the sorted order, the row and column of the cell, and the largest of
    their sizes.
    """

    start: int
    stop: int
    cell: tuple[int, int]
    sizes: tuple[int, int]

    def copies(self, capacities: Capacities) -> int:
        """Number of samples that fit into an empty bin."""
        return min(capacity // size for capacity, size in zip(capacities, self.sizes) if size)


def _batches(
    cells: NDArray[np.unsignedinteger], sizes: Sizes, rasters: tuple[_Raster, _Raster], other_weight: float
) -> Iterator[_Batch]:
    """Batches of all samples, in the order in which they are placed. ``cells`` must ascend."""
    starts = _run_starts(cells)
    stops = np.append(starts[1:], cells.size)
    rows, columns = np.divmod(cells[starts].astype(np.int64), rasters[1].levels.size)
    shares = [raster.levels[at] / raster.capacity for raster, at in zip(rasters, (rows, columns))]
    largest = [np.maximum.reduceat(size, starts) for size in sizes]
    for at in np.argsort(-(shares[0] + other_weight * shares[1]), kind="stable").tolist():
        yield _Batch(
            int(starts[at]),
            int(stops[at]),
            (int(rows[at]), int(columns[at])),
            (int(largest[0][at]), int(largest[1][at])),
        )


def _run_starts(values: NDArray[np.integer]) -> Ints:
    """Start of every run of equal values. Expects at least one value."""
    is_first = np.ones(values.size, dtype=np.bool_)
    np.not_equal(values[1:], values[:-1], out=is_first[1:])
    return np.flatnonzero(is_first)


class _OpenBins:
    """Bins by their rooms: for each grid cell, the indices of its bins."""

    def __init__(self, rasters: tuple[_Raster, _Raster], max_bins: int, room_weight: float) -> None:
        self._rasters = rasters
        self._rooms = [np.zeros(max_bins, dtype=np.int64) for _ in rasters]
        self._num_bins = 0
        self._bins: dict[int, list[Ints]] = {}
        self._width = rasters[1].levels.size
        # For every cell, row by row:
        shares = np.meshgrid(*(raster.levels / raster.capacity for raster in rasters), indexing="ij")
        both = shares[0] + shares[1]
        # An angle would do too, but its last digit differs between processors, and then the bins would.
        self._directions = (_DIRECTIONS * shares[1] / np.maximum(both, np.finfo(np.float64).tiny)).reshape(-1)
        self._rooms_left = room_weight * both.reshape(-1)
        self._columns = np.tile(np.arange(self._width), rasters[0].levels.size)
        self._counts = np.zeros(self._columns.size, dtype=np.int64)
        self._occupied = np.zeros(self._columns.size, dtype=np.bool_)

    def open(self, num: int) -> None:
        """Add empty bins."""
        new = np.arange(self._num_bins, self._num_bins + num)
        for room, raster in zip(self._rooms, self._rasters):
            room[new] = raster.capacity
        self._num_bins += num
        self.put(new)

    def put(self, bins: Ints) -> None:
        """Sort bins into their cells."""
        rows, columns = (raster.down(room[bins]) for raster, room in zip(self._rasters, self._rooms))
        cells = rows * self._width + columns
        order = np.argsort(cells, kind="stable")
        bins, cells = bins[order], cells[order]
        starts = _run_starts(cells)
        cells = cells[starts]
        ends = np.append(starts[1:], bins.size)
        self._counts[cells] += ends - starts
        self._occupied[cells] = True
        for cell, start, end in zip(cells.tolist(), starts.tolist(), ends.tolist()):
            self._bins.setdefault(cell, []).append(bins[start:end])

    def take(self, batch: _Batch, num: int) -> Ints:
        """Remove and return the bins of the best cells for a batch, at least ``num`` bins if there are as many."""
        row, column = batch.cell
        cells = row * self._width + np.flatnonzero(self._occupied[row * self._width :])
        cells = cells[self._columns[cells] >= column]
        if not cells.size:
            return cells
        direction = self._directions[row * self._width + column]
        misfit = np.abs(self._directions[cells] - direction) + self._rooms_left[cells]
        cells = cells[np.argsort(misfit, kind="stable")]
        cells = cells[: int(np.searchsorted(np.cumsum(self._counts[cells]), num)) + 1]
        self._counts[cells] = 0
        self._occupied[cells] = False
        return np.concatenate([bins for cell in cells.tolist() for bins in self._bins.pop(cell)])

    def copies(self, bins: Ints, batch: _Batch) -> Ints:
        """Number of samples of a batch that each bin takes now, at least 1."""
        pairs = [(raster, room, size) for raster, room, size in zip(self._rasters, self._rooms, batch.sizes) if size]
        if any(size > _LARGE * raster.capacity for raster, _, size in pairs):
            return np.ones(bins.size, dtype=np.int64)
        copies: Ints = np.minimum.reduce([room[bins] // size for _, room, size in pairs])
        return copies

    def fill(self, bins: Ints, sizes: list[Ints]) -> None:
        """Reduce the rooms of bins by the sizes of their new samples."""
        for room, size in zip(self._rooms, sizes):
            room[bins] -= size
