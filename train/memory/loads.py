"""The largest micro-batch of a run: bins -> :class:`~train.memory.activations.Load`.

Cost: a few passes over all bins for each size of model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from schemas.qwen import MERGED_PATCHES
from train.memory.activations import Load, activation_terms
from train.memory.terms import Memory, Phase
from train.model.head import CHUNK
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

    Memory grows with tokens, patches, targets and, up to a chunk, logits. The rates depend on which transient term is
    the largest. For each transient term, find the bins that take most; return the largest of these.

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

    candidates = (_most_expensive(index, num_bins, rates) for rates in _byte_rates(sizes, checkpointed, dtype))
    return max(candidates, key=peak)


class _Rates(NamedTuple):
    """Bytes per token, patch and target, and on top of it per target of the first chunk of logits."""

    token: int
    patch: int
    target: int
    logits: int


def _byte_rates(sizes: Sizes, checkpointed: bool, dtype: torch.dtype) -> list[_Rates]:
    """What grows with the contents of a micro-batch while a transient term is held, for each of the terms."""

    def held(*, num_tokens: int = 0, num_patches: int = 0, num_targets: int = 0) -> list[int]:
        load = Load(
            num_tokens=num_tokens, num_patches=num_patches, num_targets=num_targets, is_checkpointed=checkpointed
        )
        terms = activation_terms(sizes, load, dtype)
        kept = sum(term.num_bytes for term in terms if term.phase == Phase.BACKWARD)
        return [kept + term.num_bytes for term in terms if term.phase == Phase.TRANSIENT]

    tokens, patches, first_targets = held(num_tokens=1), held(num_patches=1), held(num_targets=1)
    targets = [more - less for less, more in zip(held(num_targets=CHUNK), held(num_targets=CHUNK + 1))]
    logits = [first - later for first, later in zip(first_targets, targets)]
    return list(dict.fromkeys(map(_Rates, tokens, patches, targets, logits)))


def _most_expensive(index: ShardIndex, num_bins: int, rates: _Rates) -> list[int]:
    """The bins that together take most at these rates, chosen greedily; logits count up to a chunk."""
    num_tokens, num_patches, num_targets = (
        counts.astype(np.int64) for counts in (index.num_tokens, index.num_patches, index.num_targets)
    )
    fixed = rates.token * num_tokens + rates.patch * num_patches + rates.target * num_targets
    rows = np.minimum(num_targets, CHUNK)
    num_distinct = min(num_bins, index.num_bins)
    # Only bins that are among the first with or without their logits can be chosen.
    pool = np.unique(
        np.concatenate([_largest(fixed, num_distinct), _largest(fixed + rates.logits * rows, num_distinct)])
    )
    chosen: list[int] = []
    num_rows = 0
    for _ in range(num_distinct):
        costs = fixed[pool] + rates.logits * np.minimum(rows[pool] + num_rows, CHUNK)
        best = int(costs.argmax())
        num_rows += int(rows[pool[best]])
        chosen.append(int(pool[best]))
        pool = np.delete(pool, best)
    return [chosen[i % num_distinct] for i in range(num_bins)]


def _largest(values: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Indices of the largest values; equal ones stay in order, so that every machine gets the same."""
    threshold = np.partition(values, -count)[-count]
    indices = np.flatnonzero(values >= threshold)
    return indices[np.argsort(-values[indices], kind="stable")[:count]]
