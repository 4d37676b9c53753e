"""Which bins a step takes, and which rank gets which: a pure function of (bins, seed, global batch, step).

Every epoch is a permutation of all bins; the epochs follow one another as one endless sequence, and step s takes its
next ``global_batch`` bins. So each bin is used exactly once an epoch, borders of epochs included, the bins of a step
do not depend on the number of ranks, and the state of a run is a few integers. In a
:class:`~train.shards.mixture.Mixture` the same holds for each source, at the places that the mixture gives it.

Ranks wait for each other in every micro-step, so they should have bins of similar cost there. Inside a step the bins
are sorted by cost and cut into one run of neighbours for each micro-step: sorting a batch that was drawn at random
costs no randomness. :class:`Grouping` goes further and also moves similar bins into the same step; that makes the
mixture of a step vary more, and is off unless asked for. ``docs/benchmarks.md`` has both, measured.

Permutations are computed, not stored: a Feistel network over integers modulo a and b, a * b >= num_bins (J. Black and
P. Rogaway, "Ciphers with Arbitrary Finite Domains", 2002), with the finaliser of SplitMix64 as its round function. It
uses integer arithmetic only, so that the order does not change with the version of a library.

Cost: under a millisecond a step, whatever the step and the number of bins (with a grouping: a window of steps, and a
pass over the costs for a state); 8 bytes a bin for the costs.

``python -m train.order --help`` explains how to look at a step.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

import numpy as np
import xxhash
from numpy.typing import NDArray

from schemas.errors import ConfigError
from train.shards.mixture import Mixture

EMPTY = -1
"""Marks an empty place: the rank runs the micro-step with one token, no target and zero weight."""

_NUM_ROUNDS = 8

_MAX_WINDOW = 1 << 26
"""Bins that are drawn at once at most: half a GiB of numbers."""
_MAX_STEP = 1 << 36
"""So that all places have numbers of 63 bits."""

_SPLITMIX64 = (
    np.uint64(0x9E3779B97F4A7C15),
    (np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)),
    (np.uint64(27), np.uint64(0x94D049BB133111EB)),
    np.uint64(31),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Grouping:
    """Similar bins of a window of steps meet in the same steps.

    The bins of a window are sorted by cost and cut into ``runs`` bands of ``steps`` blocks; each step takes one block
    of every band, a seeded choice. The bins of a step do not depend on the number of ranks.

    Attributes:
        steps: of a window, 2 or more.
        runs: blocks of a step, best the number of its micro-steps.
    """

    steps: int
    runs: int

    def __post_init__(self) -> None:
        if self.steps < 2 or self.runs < 1:
            raise ConfigError(
                f"grouping over {self.steps} steps in {self.runs} runs; allowed: 2 or more steps, 1 or more runs."
            )


@dataclass(frozen=True, slots=True, eq=False)
class DataOrder:
    """The order in which a run uses the bins.

    Attributes:
        cost: (num_bins,) float64, what a bin costs to train on, in any unit.
        seed: of all permutations; 0 or more.
        global_batch: bins of a step, over all ranks and micro-steps.
        epochs: how many epochs the sequence has before it ends (0.5 is half of one), or None for no end.
        mixture: proportions of sources, or None where an epoch uses every bin once.
        grouping: whether similar bins meet in the same steps, at a price in randomness.
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
                f"{window} bins are drawn at once, {self.global_batch} for each step of a window; allowed: up to "
                f"{_MAX_WINDOW}. Lower group_steps or the global batch."
            )
        if self.epochs is not None and not (0 < self.epochs < math.inf):
            raise ConfigError(f"number of epochs is {self.epochs}; allowed: a positive number.")
        if self.mixture is not None and sum(self.mixture.sizes) != self.num_bins:
            raise ConfigError(f"the mixture is of {sum(self.mixture.sizes)} bins, the costs of {self.num_bins}.")

    @property
    def num_bins(self) -> int:
        """Bins of all sources."""
        return self.cost.size

    @property
    def places_per_epoch(self) -> int:
        """Uses of bins in an epoch: each bin once, or what the mixture says."""
        return self.num_bins if self.mixture is None else self.mixture.places_per_epoch

    @property
    def steps_per_epoch(self) -> float:
        """Steps that an epoch takes; not a whole number where steps span epochs."""
        return self.places_per_epoch / self.global_batch

    @property
    def num_steps(self) -> int | None:
        """Steps until the sequence ends, the last of which may have empty places; None without an end."""
        num_places = self._num_places
        return None if num_places is None else -(-num_places // self.global_batch)

    def global_bins(self, step: int) -> NDArray[np.int64]:
        """Bins of a step: (global_batch,) int64, fewer or none at the end of the sequence."""
        if step < 0:
            raise ConfigError(f"step is {step}; steps count from 0.")
        if step > _MAX_STEP:
            raise ConfigError(f"step is {step}; allowed: up to {_MAX_STEP}.")
        if self.grouping is None or not self._is_grouped(step, self._num_places):
            return self._drawn(step, 1)
        window, number = divmod(step, self.grouping.steps)
        drawn = self._drawn(window * self.grouping.steps, self.grouping.steps)
        return self._share_of_window(drawn[np.argsort(self.cost[drawn], kind="stable")], window, number)

    def bins_of_step(self, step: int, *, world_size: int, accumulation: int, per_device: int) -> NDArray[np.int64]:
        """Deal the bins of a step to ranks and micro-steps.

        Args:
            step: counted from 0.
            world_size: number of ranks W.
            accumulation: micro-steps A of the step.
            per_device: bins P that a rank takes in a micro-step.

        Returns:
            (A, W, P) int64, numbers of bins. -1 marks an empty place; there are ``A * W * P - global_batch`` of them,
            and more in the last step.

        Raises:
            ConfigError: the global batch does not fit in ``A * W * P`` places, or one of them is less than 1.
        """
        if min(world_size, accumulation, per_device) < 1 or world_size * accumulation * per_device < self.global_batch:
            raise ConfigError(
                f"a global batch of {self.global_batch} bins does not fit {world_size} ranks x {accumulation} "
                f"micro-steps x {per_device} bins. Raise the accumulation or the bins per device."
            )
        drawn = self.global_bins(step)
        places = np.full(accumulation * world_size * per_device, EMPTY, dtype=np.int64)
        # Empty places are the cheapest, so they come first.
        places[places.size - drawn.size :] = drawn[np.argsort(self.cost[drawn], kind="stable")]
        # (A, P, W): a micro-step is a run of neighbours, dealt there and back again so that sums over P are alike
        dealt = places.reshape(accumulation, per_device, world_size)
        dealt[:, 1::2] = dealt[:, 1::2, ::-1].copy()
        return dealt.transpose(0, 2, 1)[_shuffled(accumulation, self.seed, "micro-steps", step)]

    def efficiency(self, places: NDArray[np.int64]) -> float:
        """Share of the time of a step that ranks compute; the rest they wait for the slowest one of each micro-step.

        Args:
            places: (A, W, P) int64, the bins of a step as :meth:`bins_of_step` deals them.
        """
        load = np.where(places == EMPTY, 0.0, self.cost[places]).sum(axis=2)
        highest = float(load.max(axis=1).sum())
        return float(load.mean(axis=1).sum()) / highest if highest else 1.0

    def state_dict(self, step: int) -> dict[str, int]:
        """Everything needed to go on at ``step``: a few integers. The number of ranks is not among them."""
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
            "num_places": 0 if self._num_places is None else self._num_places,
        }

    def step_of(self, state: Mapping[str, int]) -> int:
        """The step at which a run goes on that was saved with :meth:`state_dict`.

        The sequence may have been given another end since, and the run another number of ranks.

        Raises:
            ConfigError: the state is of another order, so that going on would skip or repeat bins.
        """
        own = self.state_dict(int(state.get("step", -1)))
        may_differ = ("step", "num_places")
        wrong = [
            f"{name} {state.get(name)}, now {value}"
            for name, value in own.items()
            if name not in may_differ and state.get(name) != value
        ]
        step, then = own["step"], int(state.get("num_places", 0)) or None
        inside_a_window = not wrong and self.grouping is not None and step % self.grouping.steps > 0
        if inside_a_window and self._is_grouped(step, then) != self._is_grouped(step, self._num_places):
            wrong = [f"an end after {then or 'no number of'} bins, now {self._num_places}, in this window of steps"]
        if wrong or step < 0:
            raise ConfigError(
                f"the state of the stream is of another order ({', '.join(wrong) or 'it has no step'}): bins would be "
                "skipped or repeated. Resume with the shards and settings of the run."
            )
        return step

    @property
    def _num_places(self) -> int | None:
        return None if self.epochs is None else max(1, round(self.epochs * self.places_per_epoch))

    def _is_grouped(self, step: int, num_places: int | None) -> bool:
        """Whether the window of a step is complete; the last one, cut short by the end, keeps its steps as drawn."""
        assert self.grouping is not None
        end = (step // self.grouping.steps + 1) * self.grouping.steps * self.global_batch
        return num_places is None or end <= num_places

    def _drawn(self, step: int, num_steps: int) -> NDArray[np.int64]:
        """Bins of some steps as they come in the sequence."""
        first, end = step * self.global_batch, (step + num_steps) * self.global_batch
        if self._num_places is not None:
            end = min(end, self._num_places)
        places = np.arange(first, max(end, first), dtype=np.int64)
        if self.mixture is None:
            return self._uses(places, 0, self.num_bins, "bins")
        bins = np.empty_like(places)
        sources, earlier = self.mixture.draw(places)
        starts = self.mixture.first_bins.tolist()
        for source in np.unique(sources).tolist():
            mine = sources == source
            size = self.mixture.sizes[source]
            bins[mine] = self._uses(earlier[mine], starts[source], size, f"bins of source {source}")
        return bins

    def _uses(self, numbers: NDArray[np.int64], first: int, size: int, purpose: str) -> NDArray[np.int64]:
        """Uses of a source, counted from 0 over its epochs -> its bins, ``size`` of them from ``first`` on."""
        bins = np.empty_like(numbers)
        epochs = numbers // size
        for epoch in np.unique(epochs).tolist():
            mine = epochs == epoch
            bins[mine] = first + permute(numbers[mine] % size, size, keys=_keys(self.seed, purpose, epoch))
        return bins

    def _share_of_window(self, bins: NDArray[np.int64], window: int, number: int) -> NDArray[np.int64]:
        """Blocks that a step takes of its window: one of every band; ``bins`` are those of the window, sorted."""
        assert self.grouping is not None
        steps, runs = self.grouping.steps, self.grouping.runs
        # A step has runs of these lengths; a band has as many for every step of the window.
        borders = [self.global_batch * run // runs for run in range(runs + 1)]
        blocks = []
        for run, (start, end) in enumerate(itertools.pairwise(borders)):
            band = bins[steps * start : steps * end].reshape(steps, end - start)
            blocks.append(band[_shuffled(steps, self.seed, f"window {window} band", run)[number]])
        return np.concatenate(blocks)


def permute(positions: NDArray[np.int64], size: int, *, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Values of a pseudorandom permutation of ``range(size)`` at some positions.

    Args:
        positions: (K,) int64, in ``range(size)``.
        size: number of things permuted.
        keys: (R,) uint64, one for each round, an even number of rounds; they choose the permutation.

    Returns:
        (K,) int64.
    """
    across = math.isqrt(size - 1) + 1
    down = -(-size // across)
    values = positions.astype(np.uint64)
    walking = np.arange(values.size)
    # Values from size to across * down are permuted again until they fall below size: fewer than one in sqrt(size).
    while walking.size:
        values[walking] = _feistel(values[walking], across, down, keys)
        walking = walking[values[walking] >= size]
    return values.astype(np.int64)


def _feistel(values: NDArray[np.uint64], across: int, down: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    width, moduli = np.uint64(across), (np.uint64(across), np.uint64(down))
    left, right = values % width, values // width
    for number, key in enumerate(keys):
        modulus = moduli[number % 2]
        left, right = right, (left + _mix(right ^ key) % modulus) % modulus
    return right * width + left


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64 (S. Vigna, ``splitmix64.c``): every bit of the result depends on every bit of the value."""
    increment, (shift_1, factor_1), (shift_2, factor_2), shift_3 = _SPLITMIX64
    values = values + increment
    values ^= values >> shift_1
    values *= factor_1
    values ^= values >> shift_2
    values *= factor_2
    values ^= values >> shift_3
    return values


def _keys(seed: int, purpose: str, number: int) -> NDArray[np.uint64]:
    digest = hashlib.blake2b(f"{seed} {purpose} {number}".encode(), digest_size=8 * _NUM_ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _shuffled(size: int, seed: int, purpose: str, number: int) -> NDArray[np.int64]:
    """A seeded order of ``size`` things, few enough to sort."""
    return np.argsort(_mix(np.arange(size, dtype=np.uint64) ^ _keys(seed, purpose, number)[0]), kind="stable")


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=7).digest(), "little")


def _hash_of_costs(cost: NDArray[np.float64]) -> int:
    """Over all costs where they lie: 3 to 7 ms and no memory for ten million of them."""
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(cost, dtype="<f8").data) >> 1
