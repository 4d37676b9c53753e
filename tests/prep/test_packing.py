"""Laws of packing, under one budget and two, and comparison with plain packers that place one sample at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

import prep.packing.best_fit
import prep.packing.two_budgets
from prep.packing.best_fit import best_fit_decreasing, constant_volume, pack
from prep.packing.bin_slack import MAX_WORK, largest_first, min_bins, minimum_bin_slack, most_frequent_first
from prep.packing.two_budgets import pack_two_budgets
from schemas.errors import ConfigError
from tests.benchmarks.mixture import draw_mixture
from tests.benchmarks.packing import DISTRIBUTIONS, MAX_LENGTH, best_fit_in_windows

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


two_budget_problems = st.tuples(st.integers(1, 64), st.integers(1, 200)).flatmap(
    lambda capacities: st.tuples(
        st.just(capacities),
        st.lists(st.tuples(st.integers(1, capacities[0]), st.integers(0, 250)), min_size=1, max_size=120),
    )
)

TwoBudgetProblem = tuple[tuple[int, int], list[tuple[int, int]]]


def plain_two_budgets(sizes: list[tuple[int, int]], capacities: tuple[int, int]) -> int:
    """Bins of best-fit-decreasing under two budgets, one sample at a time: the largest share of a budget first, each
    into the bin that has least left of both together.
    """
    capacity = capacities[0] * capacities[1]
    shares = [(tokens * capacities[1], patches * capacities[0]) for tokens, patches in sizes]
    rooms: list[list[int]] = []
    for share in sorted(shares, key=lambda pair: (-max(pair), -sum(pair), -pair[0])):
        fitting = [room for room in rooms if room[0] >= share[0] and room[1] >= share[1]]
        if not fitting:
            fitting = [[capacity, capacity]]
            rooms.extend(fitting)
        tightest = min(fitting, key=sum)
        tightest[0] -= share[0]
        tightest[1] -= share[1]
    return len(rooms)


def check_two_budgets(problem: TwoBudgetProblem, seed: int) -> int:
    """Assert what holds for every packing under two budgets; returns the number of bins."""
    (max_length, max_patches), sizes = problem
    tokens, patches = (np.asarray(column) for column in zip(*sizes))
    bins = pack(tokens, max_length, num_patches=patches, max_patches=max_patches, seed=seed)
    num_bins = int(bins.max()) + 1
    alone = patches > max_patches
    of_bin = np.bincount(bins)
    assert bins.shape == tokens.shape
    assert bins.min() == 0
    assert of_bin.min() > 0
    assert np.bincount(bins, weights=tokens).max() <= max_length
    assert (of_bin[bins[alone]] == 1).all()
    assert np.bincount(bins, weights=np.where(alone, 0, patches)).max() <= max_patches
    least = max(-(-int(size[~alone].sum()) // most) for size, most in ((tokens, max_length), (patches, max_patches)))
    assert num_bins >= least + int(alone.sum())
    assert (pack(tokens, max_length, num_patches=patches, max_patches=max_patches, seed=seed) == bins).all()
    return num_bins


@given(two_budget_problems, st.integers(0, 5))
@settings(deadline=None)
def test_both_budgets_hold_and_oversized_samples_get_their_own_bin(problem: TwoBudgetProblem, seed: int) -> None:
    check_two_budgets(problem, seed)


@given(two_budget_problems, st.integers(0, 5))
@settings(deadline=None)
def test_both_budgets_hold_in_batches_too(problem: TwoBudgetProblem, seed: int) -> None:
    """What packs millions of samples, which small numbers would not reach."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (prep.packing.best_fit, prep.packing.two_budgets):
            patch.setattr(module, "FEW_SAMPLES", 4)
        check_two_budgets(problem, seed)


@given(two_budget_problems)
@settings(deadline=None)
def test_two_budgets_need_no_more_bins_than_single_samples_or_one_size_for_both(problem: TwoBudgetProblem) -> None:
    capacities, sizes = problem
    num_bins = check_two_budgets(problem, 0)
    together = [size for size in sizes if size[1] <= capacities[1]]
    assert num_bins <= plain_two_budgets(together, capacities) + len(sizes) - len(together)
    larger = [
        min(max(tokens, -(-patches * capacities[0] // capacities[1])), capacities[0]) for tokens, patches in sizes
    ]
    assert num_bins <= len(plain_best_fit_decreasing(larger, capacities[0]))


@given(problem=problems, seed=st.integers(0, 5))
@settings(deadline=None)
def test_bins_are_no_fewer_than_possible_and_no_more_than_best_fit_needs(
    problem: tuple[int, list[int]], seed: int
) -> None:
    capacity, sizes = problem
    num_bins = int(pack(sizes, capacity, seed=seed).max()) + 1
    assert num_bins >= -(-sum(sizes) // capacity)
    assert num_bins <= len(plain_best_fit_decreasing(sizes, capacity))


def fewest_bins(sizes: list[int], capacity: int) -> int:
    """By trying everything: the first sample with every choice of the others that leaves no room for one more."""
    if not sizes:
        return 0
    first, *others = sorted(sizes, reverse=True)
    fewest = len(sizes)
    for chosen in range(1 << len(others)):
        inside = [size for at, size in enumerate(others) if chosen >> at & 1]
        outside = [size for at, size in enumerate(others) if not chosen >> at & 1]
        room = capacity - first - sum(inside)
        if room >= 0 and all(size > room for size in outside):
            fewest = min(fewest, 1 + fewest_bins(outside, capacity))
    return fewest


@given(st.integers(1, 30).flatmap(lambda most: st.tuples(st.just(most), st.lists(st.integers(1, most), max_size=7))))
@settings(deadline=None)
def test_the_lower_bound_is_at_most_the_fewest_bins(problem: tuple[int, list[int]]) -> None:
    capacity, sizes = problem
    if sizes:
        bound = min_bins(np.asarray(sizes), capacity)
        assert -(-sum(sizes) // capacity) <= bound <= fewest_bins(sizes, capacity)
        assert bound >= sum(2 * size > capacity for size in sizes)


def test_the_lower_bound_counts_samples_that_fit_beside_no_other() -> None:
    """Three samples of 6 in bins of 10 take one each, and none of the three of 5 fits beside one of them."""
    assert min_bins(np.asarray([6, 6, 6, 5, 5, 5]), 10) == 5
    assert min_bins(np.asarray([6, 6, 6, 4, 4, 4]), 10) == 3


@pytest.mark.parametrize("preferred", [largest_first, most_frequent_first])
@given(problem=problems)
@settings(deadline=None)
def test_bins_of_least_slack_hold_every_sample_and_begin_as_full_as_can_be(
    preferred: Callable[[dict[int, int]], list[int]], problem: tuple[int, list[int]]
) -> None:
    capacity, sizes = problem
    bins = minimum_bin_slack(np.asarray(sizes), capacity, preferred)
    loads = np.bincount(bins, weights=sizes).astype(int)
    assert bins.shape == (len(sizes),)
    assert loads.min() > 0
    assert loads.max() <= capacity
    begin = preferred(dict(Counter(sizes)))[0]
    others = sizes.copy()
    others.remove(begin)
    sums = {begin}
    for size in others:
        sums |= {total + size for total in sums if total + size <= capacity}
    assert loads[0] == max(sums)


def test_samples_of_one_size_keep_their_order_in_bins_of_least_slack() -> None:
    bins = minimum_bin_slack(np.asarray([4, 3, 4, 3, 4, 3]), 7, largest_first)
    assert bins.tolist() == [0, 0, 1, 1, 2, 2]


def test_narrow_lengths_fill_bins_too() -> None:
    """Six samples of 600 fill 3600 of 4096, and so best-fit-decreasing packs them; mixed sizes fill all of it."""
    rng = np.random.default_rng(0)
    for mean, spread in ((420, 90), (620, 60)):
        lengths = rng.normal(mean, spread, 40_000).astype(np.int64).clip(60, 900)
        least = min_bins(lengths, 4096)
        assert least / (pack(lengths, 4096).max() + 1) >= 0.995
        assert least / (best_fit_decreasing(lengths, 4096).max() + 1) < 0.995


def test_an_enormous_bin_takes_no_memory_of_its_size() -> None:
    assert pack([5, 6, 7, 1_000_000], 10**12).tolist() == [0, 0, 0, 0]
    assert min_bins(np.asarray([3, 4]), 10**12) == 1


def test_sets_that_would_take_long_are_left_to_best_fit_decreasing() -> None:
    lengths = np.random.default_rng(0).integers(20_000, 22_000, 3000)
    assert np.unique(lengths).size * 131_072 > MAX_WORK
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prep.packing.best_fit, "minimum_bin_slack", None)
        assert min_bins(lengths, 131_072) < 0.99 * (pack(lengths, 131_072).max() + 1)
        with pytest.raises(TypeError):
            pack(lengths // 32, 4096)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("num", [100, 300, 1000, 3000])
def test_no_window_packer_needs_fewer_bins(name: str, num: int) -> None:
    """Lengths of the benchmark, in sets of one window to three."""
    lengths, _ = DISTRIBUTIONS[name](3 * num)
    for start in range(0, lengths.size, num):
        subset = lengths[start : start + num]
        num_bins = pack(subset, MAX_LENGTH).max() + 1
        assert num_bins <= pack(subset, MAX_LENGTH, packer="binpacking").max() + 1
        assert num_bins <= best_fit_in_windows(subset, MAX_LENGTH).max() + 1


LENGTHS = {
    "chats, lognormal": lambda rng, num: np.clip(rng.lognormal(5.8, 1.0, num), 20, 4096),
    "uniform": lambda rng, num: rng.integers(1, 4097, num),
    "half short, half long": lambda rng, num: np.where(
        rng.random(num) < 0.5, rng.normal(150, 40, num).clip(20), rng.normal(2300, 500, num).clip(20, 4096)
    ),
    "mixture of kinds": lambda rng, num: draw_mixture(num_samples=num, max_length=4096, seed=1).num_tokens,
}


@pytest.mark.parametrize("name", LENGTHS)
def test_realistic_lengths_fill_bins(name: str) -> None:
    """At least 99.5 % of the tokens, or of what can be proved possible; and more than any window packer."""
    lengths = LENGTHS[name](np.random.default_rng(0), 40_000).astype(np.int64)
    num_bins = int(pack(lengths, 4096).max()) + 1
    least = max(lengths.sum() / 4096, np.count_nonzero(lengths > 2048))
    assert least / num_bins >= 0.995
    for window_packer in (constant_volume, best_fit_in_windows):
        assert num_bins <= window_packer(lengths, 4096).max() + 1


@pytest.mark.slow
@pytest.mark.parametrize("max_patches", [12_900, 14_000, 16_384])
def test_a_realistic_mixture_fills_the_scarcer_budget(max_patches: int) -> None:
    """From 10 % above the 11,700 patches that 4096 tokens of this mixture have on average."""
    drawn = draw_mixture(num_samples=12_000, max_length=4096, seed=2)
    together = drawn.num_patches <= max_patches
    sizes = (drawn.num_tokens[together], drawn.num_patches[together])
    num_bins = int(pack_two_budgets(sizes, (4096, max_patches)).max()) + 1
    assert max(sizes[0].sum() / 4096, sizes[1].sum() / max_patches) / num_bins >= 0.995


@pytest.mark.slow
@pytest.mark.parametrize("max_patches", [8192, 11_700, 12_288, 13_000])
def test_a_realistic_mixture_needs_no_more_bins_than_windows(max_patches: int) -> None:
    drawn = draw_mixture(num_samples=10_000, max_length=4096, seed=3)
    together = drawn.num_patches <= max_patches
    sizes = (drawn.num_tokens[together], drawn.num_patches[together])
    pairs = list(zip(*(size.tolist() for size in sizes)))
    windows = (pairs[start : start + 1000] for start in range(0, len(pairs), 1000))
    capacities = (4096, max_patches)
    assert pack_two_budgets(sizes, capacities).max() < sum(plain_two_budgets(each, capacities) for each in windows)


@pytest.mark.parametrize(
    ("max_patches", "num_bins", "digest"), [(None, 16402, "0be5acfc58de6f8c"), (8000, 17664, "a248ee84723e4f8d")]
)
def test_a_packing_is_the_same_on_every_machine(max_patches: int | None, num_bins: int, digest: str) -> None:
    """The bytes of shards rest on it; sizes come from whole numbers alone, and more of them than are packed singly."""
    rng = np.random.default_rng(5)
    patches = rng.integers(0, 2000, 70_000) * 4 * rng.integers(0, 2, 70_000)
    lengths = patches // 4 + rng.integers(20, 900, 70_000)
    bins = pack(lengths, 4096, num_patches=patches, max_patches=max_patches, seed=3)
    assert int(bins.max()) + 1 == num_bins
    assert xxhash.xxh3_64_hexdigest(bins.astype("<i8").tobytes()) == digest


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
        ({"num_tokens": [1], "max_patches": 4, "num_patches": [-1]}, "0 or more"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pack(max_length=4096, **arguments)  # type: ignore[arg-type]
