"""Which bins a step takes, and which rank gets which: a pure function of (bins, seed, global batch, step).

Every epoch is a permutation of all bins; the epochs follow one another as one endless sequence, and step s takes its
next ``global_batch`` bins. So each bin is used exactly once an epoch, borders of epochs included, the bins of a step do
not depend on the number of ranks, and the state of a run is one integer.

Inside a step the bins are sorted by cost and cut into one run of neighbours for each micro-step, where ranks wait for
each other: sorting a batch that was drawn at random costs no randomness.

Permutations are computed, not stored: a Feistel network over integers modulo a and b, a * b >= num_bins (J. Black and
P. Rogaway, "Ciphers with Arbitrary Finite Domains", 2002), with the finaliser of SplitMix64 as its round function. It
uses integer arithmetic only, so that the order does not change with the version of a library.

Cost: under a millisecond a step, whatever the step and the number of bins; 8 bytes a bin for the costs.

``python -m train.order --help`` explains how to look at a step.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import KW_ONLY, dataclass

import numpy as np
from numpy.typing import NDArray

from schemas.errors import ConfigError

EMPTY = -1
"""Marks an empty place: the rank runs the micro-step with one token, no target and zero weight."""

_NUM_ROUNDS = 8


@dataclass(frozen=True, slots=True, eq=False)
class DataOrder:
    """The order in which a run uses the bins.

    Attributes:
        cost: (num_bins,) float64, what a bin costs to train on, in any unit.
        seed: of all permutations; 0 or more.
        global_batch: bins of a step, over all ranks and micro-steps.
        epochs: how often each bin is used before the sequence ends (0.5 is half of them), or None for no end.
    """

    cost: NDArray[np.float64]
    _: KW_ONLY
    seed: int
    global_batch: int
    epochs: float | None = None

    def __post_init__(self) -> None:
        if self.cost.ndim != 1 or self.cost.size < 1:
            raise ConfigError(
                f"the order needs the costs of one or more bins, got an array of shape {self.cost.shape}."
            )
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; allowed: 0 or more.")
        if self.global_batch < 1:
            raise ConfigError(f"global batch is {self.global_batch}; allowed: 1 bin or more.")
        if self.epochs is not None and not (0 < self.epochs < math.inf):
            raise ConfigError(f"number of epochs is {self.epochs}; allowed: a positive number.")

    @property
    def num_bins(self) -> int:
        """Bins of an epoch."""
        return self.cost.size

    @property
    def steps_per_epoch(self) -> float:
        """Steps that an epoch takes; not a whole number where steps span epochs."""
        return self.num_bins / self.global_batch

    @property
    def num_steps(self) -> int | None:
        """Steps until the sequence ends, the last of which may have empty places; None without an end."""
        return None if self.epochs is None else -(-self._num_places(self.epochs) // self.global_batch)

    def global_bins(self, step: int) -> NDArray[np.int64]:
        """Bins of a step as they are drawn: (global_batch,) int64, fewer or none at the end of the sequence."""
        if step < 0:
            raise ConfigError(f"step is {step}; steps count from 0.")
        end = (step + 1) * self.global_batch
        if self.epochs is not None:
            end = min(end, self._num_places(self.epochs))
        positions = np.arange(step * self.global_batch, max(end, step * self.global_batch), dtype=np.int64)
        bins = np.empty_like(positions)
        epochs = positions // self.num_bins
        for epoch in np.unique(epochs).tolist():
            mine = epochs == epoch
            bins[mine] = permute(positions[mine] % self.num_bins, self.num_bins, keys=_keys(self.seed, "bins", epoch))
        return bins

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
        scores = _mix(np.arange(accumulation, dtype=np.uint64) ^ _keys(self.seed, "micro-steps", step)[0])
        return dealt.transpose(0, 2, 1)[np.argsort(scores, kind="stable")]

    def _num_places(self, epochs: float) -> int:
        return max(1, round(epochs * self.num_bins))


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
    left, right = values % np.uint64(across), values // np.uint64(across)
    for number, key in enumerate(keys):
        modulus = np.uint64(down if number % 2 else across)
        left, right = right, (left + _mix(right ^ key) % modulus) % modulus
    return right * np.uint64(across) + left


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64 (S. Vigna, ``splitmix64.c``): every bit of the result depends on every bit of the value."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _keys(seed: int, purpose: str, number: int) -> NDArray[np.uint64]:
    digest = hashlib.blake2b(f"{seed} {purpose} {number}".encode(), digest_size=8 * _NUM_ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _main() -> None:
    from train.explain import main

    main()


if __name__ == "__main__":
    _main()
