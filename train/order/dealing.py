"""Which bins a step takes, and which rank gets which: a pure function of (bins, seed, global batch, step).

Every epoch is a permutation of all bins. The epochs form one endless sequence, and step s takes its next
``global_batch`` bins. Hence each bin is used exactly once per epoch, even if steps span epochs. The bins of a step do
not depend on the number of ranks, and the state of a run is a few integers. With a
:class:`~train.shards.mixture.Mixture` the same holds for each source, at the positions that the mixture assigns to it.

Ranks wait for one another in every micro-step, so their bins should cost about the same. The bins of a step are sorted
by cost and cut into one run of neighbours per micro-step; sorting a batch that was drawn at random costs no randomness.
:class:`Grouping` goes further and also moves similar bins into the same step. The composition of a step then varies
more, so it is off by default. ``docs/benchmarks.md`` has measurements of both.

Cost: under a millisecond per step, for any step and any number of bins (a grouping draws a window of steps, and
passes over the costs for a state); 8 bytes per bin for the costs.

``python -m train.order --help`` explains how to inspect a step.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from schemas.errors import ConfigError
from schemas.wording import counted
from train.order.permutation import derive_keys, permute, shuffled, shuffles
from train.shards.mixture import Mixture

EMPTY = -1
"""Marks an empty position: the rank runs the micro-step with one token, no targets and zero weight."""

_MAX_WINDOW = 1 << 26
"""Largest number of bins drawn at a time: half a GiB of ids."""
_DRAWN_AT_ONCE = 1 << 10
"""Bins that consecutive steps draw together: a draw takes a tenth of a millisecond, for one bin or for so many."""
_MAX_STEP = 1 << 36
"""Keeps positions within 63 bits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Grouping:
    """Puts bins of similar cost, within a window of steps, into the same steps.

    The bins of a window are sorted by cost and cut into ``runs`` bands of ``steps`` blocks. Each step takes one block
    of every band, by a seeded choice. The bins of a step do not depend on the number of ranks.

    Attributes:
        steps: steps per window, 2 or more.
        runs: blocks per step, ideally the number of its micro-steps.
    """

    steps: int
    runs: int

    def __post_init__(self) -> None:
        if self.steps < 2 or self.runs < 1:
            raise ConfigError(
                f"grouping over {counted(self.steps, 'step')} in {counted(self.runs, 'run')}; "
                "allowed: 2 or more steps, 1 or more runs."
            )


@dataclass(frozen=True, slots=True, eq=False)
class DataOrder:
    """The order in which a run uses the bins.

    Attributes:
        cost: (num_bins,) float64, training cost of every bin, in any unit.
        seed: seed of all permutations; 0 or more.
        global_batch: bins per step, over all ranks and micro-steps.
        epochs: length of the sequence in epochs (0.5 is half of one), or None for an endless one.
        mixture: proportions of sources, or None if an epoch uses every bin once.
        grouping: puts similar bins into the same steps, at a cost in randomness.
    """

    cost: NDArray[np.float64]
    _: KW_ONLY
    seed: int
    global_batch: int
    epochs: float | None = None
    mixture: Mixture | None = None
    grouping: Grouping | None = None

    def __post_init__(self) -> None:
        if self.cost.ndim != 1 or self.cost.size < 1:
            raise ConfigError(
                f"the order needs the costs of one or more bins, got an array of shape {self.cost.shape}."
            )
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; allowed: 0 or more.")
        if self.global_batch < 1:
            raise ConfigError(f"global batch is {self.global_batch}; allowed: 1 bin or more.")
        window = self.global_batch * (1 if self.grouping is None else self.grouping.steps)
        if window > _MAX_WINDOW:
            raise ConfigError(
                f"{window} bins are drawn at a time, {self.global_batch} for each step of a window; allowed: up to "
                f"{_MAX_WINDOW}. Lower --samples_per_step, the bins of a step, or --group_steps."
            )
        if self.epochs is not None and not (0 < self.epochs < math.inf):
            raise ConfigError(f"number of epochs is {self.epochs}; allowed: a positive number.")
        if self.mixture is not None and sum(self.mixture.sizes) != self.num_bins:
            raise ConfigError(
                f"the mixture covers {sum(self.mixture.sizes)} bins, but there are costs of {self.num_bins}."
            )

    @property
    def num_bins(self) -> int:
        """Bins of all sources."""
        return self.cost.size

    @property
    def bins_per_epoch(self) -> int:
        """Positions in an epoch: each bin once, or as many as the mixture defines."""
        return self.num_bins if self.mixture is None else self.mixture.bins_per_epoch

    @property
    def steps_per_epoch(self) -> float:
        """Steps in an epoch; a fraction if steps span epochs."""
        return self.bins_per_epoch / self.global_batch

    @property
    def num_steps(self) -> int | None:
        """Steps until the sequence ends, the last possibly with empty positions; None for an endless sequence."""
        length = self._length
        return None if length is None else -(-length // self.global_batch)

    def global_bins(self, step: int) -> NDArray[np.int64]:
        """Return the bins of a step: (global_batch,) int64, fewer or none at the end of the sequence."""
        _check_step(step)
        if self.grouping is None or not self._is_grouped(step, self._length):
            return self._draw(step, 1)
        window, step_in_window = divmod(step, self.grouping.steps)
        drawn = self._draw(window * self.grouping.steps, self.grouping.steps)
        return self._share_of_window(drawn[np.argsort(self.cost[drawn], kind="stable")], window, step_in_window)

    def bins_of_step(self, step: int, *, world_size: int, accumulation: int, per_device: int) -> NDArray[np.int64]:
        """Deal the bins of a step to ranks and micro-steps.

        Args:
            step: counted from 0.
            world_size: number of ranks W.
            accumulation: micro-steps A per step.
            per_device: bins P per rank and micro-step.

        Returns:
            (A, W, P) int64, ids of bins. ``EMPTY`` marks an empty position; there are ``A * W * P - global_batch`` of
            them, and more in the last step.

        Raises:
            ConfigError: the global batch does not fit in ``A * W * P`` positions, or one of them is less than 1.
        """
        self._check_positions(accumulation, world_size, per_device)
        (micro_steps,) = self._shuffles(accumulation, range(step, step + 1))
        return self._dealt(self.global_bins(step), micro_steps, world_size, per_device)

    def deal(
        self, start: int, end: int | None, *, world_size: int, accumulation: int, per_device: int
    ) -> Iterator[NDArray[np.int64]]:
        """Deal consecutive steps as :meth:`bins_of_step` does, at a tenth of its cost for small steps.

        Args:
            start: first step.
            end: step before which to stop, unless the sequence ends earlier.
            world_size: as in :meth:`bins_of_step`.
            accumulation: as in :meth:`bins_of_step`.
            per_device: as in :meth:`bins_of_step`.

        Yields:
            (A, W, P) int64, as :meth:`bins_of_step` returns them.

        Raises:
            ConfigError: as :meth:`bins_of_step`.
        """
        self._check_positions(accumulation, world_size, per_device)
        _check_step(start)
        ends = [step for step in (end, self.num_steps) if step is not None]
        # A grouping draws a window for each step.
        at_once = max(1, _DRAWN_AT_ONCE // self.global_batch) if self.grouping is None else 1
        for first in range(start, min(ends), at_once) if ends else itertools.count(start, at_once):
            stop = min([*ends, first + at_once])
            drawn = self._draw(first, stop - first) if self.grouping is None else self.global_bins(first)
            for at, micro_steps in enumerate(self._shuffles(accumulation, range(first, stop))):
                # Only the last step of the sequence has fewer bins than the global batch.
                bins = drawn[at * self.global_batch : (at + 1) * self.global_batch]
                yield self._dealt(bins, micro_steps, world_size, per_device)

    def _check_positions(self, accumulation: int, world_size: int, per_device: int) -> None:
        """Check that the bins of a step fit its positions."""
        if min(world_size, accumulation, per_device) < 1 or world_size * accumulation * per_device < self.global_batch:
            raise ConfigError(
                f"a global batch of {counted(self.global_batch, 'bin')} does not fit {counted(world_size, 'rank')} x "
                f"{counted(accumulation, 'micro-step')} x {counted(per_device, 'bin')}. "
                "Raise the accumulation or the bins per device."
            )

    def _shuffles(self, accumulation: int, steps: range) -> NDArray[np.int64]:
        """The order of the micro-steps (A,) of every step."""
        return shuffles(accumulation, seed=self.seed, purpose="micro-steps", indices=steps)

    def _dealt(
        self, drawn: NDArray[np.int64], micro_steps: NDArray[np.int64], world_size: int, per_device: int
    ) -> NDArray[np.int64]:
        """Deal the bins of a step to positions (A, W, P); ``micro_steps`` (A,) orders its micro-steps."""
        by_cost = np.full(micro_steps.size * world_size * per_device, EMPTY, dtype=np.int64)
        # Empty positions are the cheapest, so they come first.
        by_cost[by_cost.size - drawn.size :] = drawn[np.argsort(self.cost[drawn], kind="stable")]
        # (A * P * W,) -> (A, P, W): a micro-step is a run of neighbours. Every other row of W is reversed, so that the
        # sums over P are alike.
        dealt = by_cost.reshape(micro_steps.size, per_device, world_size)
        dealt[:, 1::2] = dealt[:, 1::2, ::-1].copy()
        # (A, P, W) -> (A, W, P), micro-steps in a seeded order
        return dealt.transpose(0, 2, 1)[micro_steps]

    def efficiency(self, dealt: NDArray[np.int64]) -> float:
        """Share of a step that ranks compute; for the rest they wait for the slowest rank of each micro-step.

        Args:
            dealt: (A, W, P) int64, the bins of a step as returned by :meth:`bins_of_step`.
        """
        if dealt.shape[1] == 1:  # a rank alone waits for nobody
            return 1.0
        # (A, W, P) -> (A, W)
        load = np.where(dealt == EMPTY, 0.0, self.cost[dealt]).sum(axis=2)
        highest = float(load.max(axis=1).sum())
        return float(load.mean(axis=1).sum()) / highest if highest else 1.0

    def state_dict(self, step: int) -> dict[str, int]:
        """Return everything needed to resume at ``step``: a few integers, independent of the number of ranks."""
        grouping = self.grouping
        return {
            "step": step,
            "seed": self.seed,
            "global_batch": self.global_batch,
            "num_bins": self.num_bins,
            "mixture": 0 if self.mixture is None else _hash(f"{self.mixture.sizes} {self.mixture.quotas}".encode()),
            "group_steps": 1 if grouping is None else grouping.steps,
            "group_runs": 1 if grouping is None else grouping.runs,
            "group_costs": 0 if grouping is None else _hash_of_costs(self.cost),
            "num_places": 0 if self._length is None else self._length,
        }

    def step_of(self, state: Mapping[str, int]) -> int:
        """Return the step at which to resume from a state saved with :meth:`state_dict`.

        The end of the sequence and the number of ranks may have changed since.

        Raises:
            ConfigError: the state belongs to another order, so that resuming would skip or repeat bins.
        """
        current = self.state_dict(int(state.get("step", -1)))
        may_differ = ("step", "num_places")
        mismatches = [
            f"{name} {state.get(name)}, now {value}"
            for name, value in current.items()
            if name not in may_differ and state.get(name) != value
        ]
        step, saved_length = current["step"], int(state.get("num_places", 0)) or None
        is_inside_window = not mismatches and self.grouping is not None and step % self.grouping.steps > 0
        if is_inside_window and self._is_grouped(step, saved_length) != self._is_grouped(step, self._length):
            mismatches = [
                f"an end after {saved_length or 'no number of'} bins, now {self._length}, in this window of steps"
            ]
        if mismatches or step < 0:
            raise ConfigError(
                f"the saved stream belongs to another order ({', '.join(mismatches) or 'it has no step'}): bins would "
                "be skipped or repeated. Resume with the shards and settings of the run."
            )
        return step

    @property
    def _length(self) -> int | None:
        """Positions until the sequence ends; None for an endless sequence."""
        return None if self.epochs is None else max(1, round(self.epochs * self.bins_per_epoch))

    def _is_grouped(self, step: int, length: int | None) -> bool:
        """Whether the window of a step is complete. The last one, if cut short by the end, keeps its steps as drawn."""
        assert self.grouping is not None
        end = (step // self.grouping.steps + 1) * self.grouping.steps * self.global_batch
        return length is None or end <= length

    def _draw(self, step: int, num_steps: int) -> NDArray[np.int64]:
        """Bins (K,) of consecutive steps in the order of the sequence."""
        start, end = step * self.global_batch, (step + num_steps) * self.global_batch
        if self._length is not None:
            end = min(end, self._length)
        positions = np.arange(start, max(end, start), dtype=np.int64)
        if self.mixture is None:
            return self._bins_at(positions, 0, self.num_bins, "bins")
        bins = np.empty_like(positions)
        # (K,) each: the source of a position, and how many earlier positions the source has
        sources, positions_in_source = self.mixture.draw(positions)
        first_bins = self.mixture.first_bins.tolist()
        for source in np.unique(sources).tolist():
            mask = sources == source
            size = self.mixture.sizes[source]
            bins[mask] = self._bins_at(positions_in_source[mask], first_bins[source], size, f"bins of source {source}")
        return bins

    def _bins_at(self, positions: NDArray[np.int64], first: int, size: int, purpose: str) -> NDArray[np.int64]:
        """Positions (K,) in the epochs of a source, whose ``size`` bins start at ``first`` -> bins (K,)."""
        bins = np.empty_like(positions)
        epochs = positions // size
        for epoch in np.unique(epochs).tolist():
            mask = epochs == epoch
            bins[mask] = first + permute(positions[mask] % size, size, keys=derive_keys(self.seed, purpose, epoch))
        return bins

    def _share_of_window(self, bins: NDArray[np.int64], window: int, step_in_window: int) -> NDArray[np.int64]:
        """Pick the blocks of a step, one per band, from the bins of its window, which are sorted by cost."""
        assert self.grouping is not None
        steps, runs = self.grouping.steps, self.grouping.runs
        # A step takes run r of length boundaries[r + 1] - boundaries[r]; a band holds one such block per step.
        boundaries = [self.global_batch * run // runs for run in range(runs + 1)]
        blocks = []
        for run, (start, end) in enumerate(itertools.pairwise(boundaries)):
            # (steps * length,) -> (steps, length)
            band = bins[steps * start : steps * end].reshape(steps, end - start)
            block_of_step = shuffled(steps, seed=self.seed, purpose=f"window {window} band", index=run)
            blocks.append(band[block_of_step[step_in_window]])
        return np.concatenate(blocks)


def _check_step(step: int) -> None:
    if step < 0:
        raise ConfigError(f"step is {step}; steps count from 0.")
    if step > _MAX_STEP:
        raise ConfigError(f"step is {step}; allowed: up to {_MAX_STEP}.")


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=7).digest(), "little")


def _hash_of_costs(cost: NDArray[np.float64]) -> int:
    """Hash all costs without a copy: 3 to 7 ms for ten million of them."""
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(cost, dtype="<f8").data) >> 1
