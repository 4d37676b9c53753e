"""Laws of packing, and equality with a plain best-fit-decreasing that places one sample at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prep.packing import best_fit_decreasing, pack
from schemas.errors import ConfigError

problems = st.integers(1, 64).flatmap(
    lambda capacity: st.tuples(st.just(capacity), st.lists(st.integers(1, capacity), min_size=1, max_size=120))
)


def plain_best_fit_decreasing(sizes: list[int], capacity: int) -> list[int]:
    """Loads of the bins, one sample at a time."""
    loads: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [load for load in loads if load + size <= capacity]
        if fitting:
            loads[loads.index(max(fitting))] += size
        else:
            loads.append(size)
    return sorted(loads)


@given(problems)
def test_loads_equal_those_of_plain_best_fit_decreasing(problem: tuple[int, list[int]]) -> None:
    capacity, sizes = problem
    bins = best_fit_decreasing(np.asarray(sizes), capacity)
    assert sorted(np.bincount(bins, weights=sizes).astype(int).tolist()) == plain_best_fit_decreasing(sizes, capacity)


@pytest.mark.parametrize("packer", ["bfd", "binpacking"])
@given(problem=problems, seed=st.integers(0, 5))
@settings(deadline=None)
def test_every_sample_has_a_bin_and_no_bin_is_empty_or_too_full(
    packer: str, problem: tuple[int, list[int]], seed: int
) -> None:
    capacity, sizes = problem
    bins = pack(sizes, capacity, packer=packer, seed=seed)
    loads = np.bincount(bins, weights=sizes)
    assert bins.shape == (len(sizes),)
    assert bins.min() == 0
    assert loads.min() > 0
    assert loads.max() <= capacity
    assert (pack(sizes, capacity, packer=packer, seed=seed) == bins).all()


@given(problems, st.integers(1, 200), st.data())
def test_both_budgets_hold(problem: tuple[int, list[int]], max_patches: int, data: st.DataObject) -> None:
    capacity, sizes = problem
    patches = data.draw(st.lists(st.integers(0, 300), min_size=len(sizes), max_size=len(sizes)))
    bins = pack(sizes, capacity, num_patches=patches, max_patches=max_patches)
    assert np.bincount(bins, weights=sizes).max() <= capacity
    for number in range(bins.max() + 1):
        members = np.flatnonzero(bins == number)
        assert members.size == 1 or sum(patches[member] for member in members) <= max_patches


def test_fill_is_at_least_that_of_the_window_packer_and_above_99_percent() -> None:
    lengths = np.clip(np.random.default_rng(0).lognormal(6, 0.8, 20_000).astype(int), 20, 4096)

    def fill(packer: str) -> float:
        return float(lengths.sum() / (4096 * (pack(lengths, 4096, packer=packer).max() + 1)))

    assert fill("bfd") >= 0.995
    assert fill("bfd") > fill("binpacking")


def test_the_seed_decides_which_of_equal_samples_share_a_bin() -> None:
    lengths = [512] * 4000
    assert (pack(lengths, 4096, seed=1) != pack(lengths, 4096, seed=2)).any()


def test_nothing_to_pack_gives_no_bins() -> None:
    assert pack([], 4096).shape == (0,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tokens": [5000]}, "5000"),
        ({"num_tokens": [0]}, "allowed: 1 to"),
        ({"num_tokens": [[1]]}, "one dimension"),
        ({"num_tokens": [1], "packer": "magic"}, "magic"),
        ({"num_tokens": [1], "max_patches": 4}, "num_patches"),
        ({"num_tokens": [1], "max_patches": 4, "num_patches": [1, 2]}, "agree"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pack(max_length=4096, **arguments)  # type: ignore[arg-type]
