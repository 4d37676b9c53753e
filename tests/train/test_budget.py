"""The largest micro-batch is the one that takes most memory, whatever is trained."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from tests.train.synthetic import Sample, make_medium, make_sample, write_shards
from train.arithmetic.dimensions import OFFICIAL
from train.memory.activations import Load, activation_terms
from train.memory.budget import size_table
from train.memory.loads import fullest_load, largest_bins, load_of_bins
from train.memory.terms import Memory
from train.model.sizes import Sizes, sizes_of
from train.settings.arguments import TrainArguments
from train.shards.index import ShardIndex, open_shards

LONG, LARGE, COSTLY = 0, 1, 2
"""Indices in :func:`bins`: most tokens, most patches, most FLOPs."""


def bins() -> list[list[Sample]]:
    """Two texts; an image; a text two tokens shorter than both together, whose attention costs more; and others."""
    rng = np.random.default_rng(0)
    return [
        [make_sample(rng, num_text=295, num_targets=2) for _ in range(2)],
        [make_sample(rng, [make_medium(rng, 32, 32)], num_text=10, num_targets=4)],
        [make_sample(rng, num_text=590, num_targets=4)],
        [make_sample(rng, [make_medium(rng, 20, 20)], num_text=200, num_targets=180)],
        [make_sample(rng, num_text=400, num_targets=390)],
        [make_sample(rng, num_text=40)],
    ]


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    return open_shards(write_shards(tmp_path_factory.mktemp("budget") / "shards", bins()))


@pytest.fixture(scope="module")
def few_targets(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """The first three bins, with four targets each."""
    return open_shards(write_shards(tmp_path_factory.mktemp("budget") / "few", bins()[:3]))


def sizes(*, vision: bool) -> Sizes:
    return sizes_of(OFFICIAL["3B"], TrainArguments(shards="shards", tune_mm_vision=vision))


def largest(index: ShardIndex, num_bins: int, of: Sizes, *, checkpointed: bool = True) -> list[int]:
    return largest_bins(index, num_bins, of, checkpointed=checkpointed, dtype=torch.bfloat16)


def test_the_bin_with_most_flops_is_not_the_largest(few_targets: ShardIndex) -> None:
    assert (int(few_targets.cost().argmax()), int(few_targets.num_tokens.argmax())) == (COSTLY, LONG)
    assert largest(few_targets, 1, sizes(vision=False)) == [LONG]


def test_patches_count_if_the_vision_tower_is_trained(few_targets: ShardIndex) -> None:
    assert int(few_targets.num_patches.argmax()) == LARGE
    assert largest(few_targets, 1, sizes(vision=True)) == [LARGE]


@pytest.mark.parametrize("num_bins", [1, 2, 3])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("vision", [False, True])
def test_no_other_bins_take_more(index: ShardIndex, vision: bool, checkpointed: bool, num_bins: int) -> None:
    of = sizes(vision=vision)

    def peak(chosen: tuple[int, ...]) -> int:
        load = load_of_bins(index, list(chosen), checkpointed=checkpointed)
        return Memory(tuple(activation_terms(of, load, torch.bfloat16))).peak()

    chosen = largest(index, num_bins, of, checkpointed=checkpointed)
    assert peak(tuple(chosen)) == max(map(peak, itertools.combinations(range(index.num_bins), num_bins)))


def test_a_micro_batch_of_more_bins_than_there_are_uses_some_twice(index: ShardIndex) -> None:
    chosen = largest(index, 7, sizes(vision=False))
    assert len(chosen) == 7
    assert sorted(set(chosen)) == list(range(6))


def test_the_table_uses_the_bins_of_a_forward_pass_for_every_size() -> None:
    requested: dict[int, int] = {}

    def load_of(num_bins: int, of: Sizes) -> Load:
        requested[of.dims.hidden_size] = num_bins
        return fullest_load(64, num_bins, checkpointed=True)

    args = TrainArguments(shards="shards")
    table = size_table(args, load_of, 3, world=8, dtype=torch.bfloat16)
    assert requested == dict.fromkeys((2048, 3584, 5120, 8192), 3)
    head, *rows = table.splitlines()
    assert head.split() == ["zero1", "zero2", "zero3", "zero3_offload"]
    assert [row.split()[0] for row in rows] == ["3B", "7B", "32B", "72B"]
