"""Seeded permutations that are computed, not stored.

A position -> its value under a pseudorandom permutation of ``range(size)``, in O(1) time and memory. It is a Feistel
network over integers modulo a and b, a * b >= size (J. Black and P. Rogaway, "Ciphers with Arbitrary Finite Domains",
2002), with the finaliser of SplitMix64 as its round function. Only integer arithmetic is used, so the permutation does
not change with the version of a library: it is part of the format of a checkpoint.

Cost: eight rounds of integer operations per value.
"""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import NDArray

_NUM_ROUNDS = 8

_SPLITMIX64 = (
    np.uint64(0x9E3779B97F4A7C15),
    (np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)),
    (np.uint64(27), np.uint64(0x94D049BB133111EB)),
    np.uint64(31),
)


def derive_keys(seed: int, purpose: str, index: int) -> NDArray[np.uint64]:
    """Derive the round keys (8,) uint64 of the ``index``-th permutation for a purpose."""
    digest = hashlib.blake2b(f"{seed} {purpose} {index}".encode(), digest_size=8 * _NUM_ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def permute(positions: NDArray[np.int64], size: int, *, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Evaluate a pseudorandom permutation of ``range(size)`` at some positions.

    Args:
        positions: (K,) int64, in ``range(size)``.
        size: number of elements permuted.
        keys: (R,) uint64, one per round, R even; they select the permutation.

    Returns:
        (K,) int64.
    """
    across = math.isqrt(size - 1) + 1
    down = -(-size // across)
    values = positions.astype(np.uint64)
    # Cycle walking: values in [size, across * down) are permuted again until they fall below size. They are fewer than
    # one in sqrt(size).
    out_of_range = np.arange(values.size)
    while out_of_range.size:
        values[out_of_range] = _feistel(values[out_of_range], across, down, keys)
        out_of_range = out_of_range[values[out_of_range] >= size]
    return values.astype(np.int64)


def shuffled(size: int, *, seed: int, purpose: str, index: int) -> NDArray[np.int64]:
    """Return a seeded shuffle of ``range(size)``, (size,) int64, for sizes small enough to sort."""
    order: NDArray[np.int64]
    (order,) = shuffles(size, seed=seed, purpose=purpose, indices=range(index, index + 1))
    return order


def shuffles(size: int, *, seed: int, purpose: str, indices: range) -> NDArray[np.int64]:
    """Return several such shuffles, (K, size) int64, one for each index."""
    # (K, 1) and (size,) -> (K, size)
    keys = np.array([derive_keys(seed, purpose, index)[0] for index in indices])[:, None]
    return np.argsort(_mix(np.arange(size, dtype=np.uint64) ^ keys), axis=1, kind="stable")


def _feistel(values: NDArray[np.uint64], across: int, down: int, keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    width, moduli = np.uint64(across), (np.uint64(across), np.uint64(down))
    left, right = values % width, values // width
    for round_, key in enumerate(keys):
        modulus = moduli[round_ % 2]
        left, right = right, (left + _mix(right ^ key) % modulus) % modulus
    return right * width + left


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64 (S. Vigna, ``splitmix64.c``): every output bit depends on every input bit."""
    increment, (shift_1, factor_1), (shift_2, factor_2), shift_3 = _SPLITMIX64
    values = values + increment
    values ^= values >> shift_1
    values *= factor_1
    values ^= values >> shift_2
    values *= factor_2
    values ^= values >> shift_3
    return values
