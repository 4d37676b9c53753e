"""The largest micro-batch of a run: bins -> :class:`~train.memory.activations.Load`.

Cost: a few passes over all bins for each size of model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from schemas.qwen import MERGED_PATCHES
from train.memory.activations import Load, activation_terms
from train.memory.terms import Memory, Phase
from train.model.packed import CHUNK
from train.model.sizes import Sizes
from train.shards.index import ShardIndex

LoadOf = Callable[[int, Sizes], Load]
"""Number of bins and parameter counts of a model -> the largest micro-batch of that many bins."""


def loads_of_shards(index: ShardIndex, *, checkpointed: bool, dtype: torch.dtype) -> LoadOf:
    """The largest micro-batches of a set of shards."""

    def load_of(num_bins: int, sizes: Sizes) -> Load:
        bins = largest_bins(index, num_bins, sizes, checkpointed=checkpointed, dtype=dtype)
        return load_of_bins(index, bins, checkpointed=checkpointed)

    return load_of


def loads_of_length(max_length: int, *, checkpointed: bool) -> LoadOf:
    """The largest micro-batches possible with bins of ``max_length`` tokens."""
    return lambda num_bins, _: fullest_load(max_length, num_bins, checkpointed=checkpointed)


def fullest_load(max_length: int, num_bins: int, *, checkpointed: bool) -> Load:
    """The upper bound of a micro-batch of ``num_bins`` bins: every token is a target and comes from an image."""
    num_tokens = max_length * num_bins
    return Load(
        num_tokens=num_tokens,
        num_targets=num_tokens,
        num_patches=num_tokens * MERGED_PATCHES,
        is_checkpointed=checkpointed,
    )


def load_of_bins(index: ShardIndex, bins: list[int], *, checkpointed: bool) -> Load:
    """Contents of a micro-batch of these bins."""
    return Load(
        num_tokens=int(index.num_tokens[bins].sum()),
        num_targets=int(index.num_targets[bins].sum()),
        num_patches=int(index.num_patches[bins].sum()),
        is_checkpointed=checkpointed,
    )


def largest_bins(
    index: ShardIndex, num_bins: int, sizes: Sizes, *, checkpointed: bool, dtype: torch.dtype
) -> list[int]:
    """The bins whose micro-batch takes most memory.

    Memory grows with tokens and patches, and with targets up to a chunk of logits, at rates that depend on which
    transient term is the largest. For each transient term, find the bins that take most; return the largest of these.

    Args:
        index: the bins.
        num_bins: bins of a micro-batch; if there are fewer, some are used twice.
        sizes: parameter counts of the model.
        checkpointed: whether activations are recomputed.
        dtype: dtype of the computation.
    """

    def peak(bins: list[int]) -> int:
        load = load_of_bins(index, bins, checkpointed=checkpointed)
        return Memory(tuple(activation_terms(sizes, load, dtype))).peak()

    candidates = (_most_expensive(index, num_bins, *rates) for rates in _byte_rates(sizes, checkpointed, dtype))
    return max(candidates, key=peak)


def _byte_rates(sizes: Sizes, checkpointed: bool, dtype: torch.dtype) -> list[tuple[int, int, int]]:
    """Bytes per token, patch and target while a transient term is held, for each of the terms."""
    nothing = Load(num_tokens=0, num_targets=0, num_patches=0, is_checkpointed=checkpointed)
    units = (replace(nothing, num_tokens=1), replace(nothing, num_patches=1), replace(nothing, num_targets=1))
    per_token, per_patch, per_target = (activation_terms(sizes, unit, dtype) for unit in units)
    kept = [
        sum(t.num_bytes for t in terms if t.phase == Phase.BACKWARD) for terms in (per_token, per_patch, per_target)
    ]
    rates = [
        (kept[0] + token.num_bytes, kept[1] + patch.num_bytes, kept[2] + target.num_bytes)
        for token, patch, target in zip(per_token, per_patch, per_target)
        if token.phase == Phase.TRANSIENT
    ]
    return list(dict.fromkeys(rates))


def _most_expensive(index: ShardIndex, num_bins: int, per_token: int, per_patch: int, per_target: int) -> list[int]:
    """The bins that together take most at these rates, chosen greedily; targets count up to a chunk."""
    targets = np.minimum(index.num_targets, CHUNK).astype(np.int64)
    fixed = per_token * index.num_tokens.astype(np.int64) + per_patch * index.num_patches.astype(np.int64)
    num_distinct = min(num_bins, index.num_bins)
    # Only bins that are among the first with or without their targets can be chosen.
    pool = np.unique(
        np.concatenate([_largest(fixed, num_distinct), _largest(fixed + per_target * targets, num_distinct)])
    )
    chosen: list[int] = []
    num_targets = 0
    for _ in range(num_distinct):
        costs = fixed[pool] + per_target * np.minimum(targets[pool] + num_targets, CHUNK)
        best = int(costs.argmax())
        num_targets += int(targets[pool[best]])
        chosen.append(int(pool[best]))
        pool = np.delete(pool, best)
    return [chosen[i % num_distinct] for i in range(num_bins)]


def _largest(values: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Indices of the largest values; equal ones stay in order, so that every machine gets the same."""
    threshold = np.partition(values, -count)[-count]
    indices = np.flatnonzero(values >= threshold)
    return indices[np.argsort(-values[indices], kind="stable")[:count]]
