"""The data order: exact epochs, independence of the number of ranks, exact resume, balanced micro-steps."""

from __future__ import annotations

import hashlib
import itertools
import math
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.errors import ConfigError, ShardError
from tests.train.synthetic import make_bins, write_shards
from train.order.dealing import EMPTY, DataOrder, Grouping
from train.order.explain import deal_step, explain_step, source_samples
from train.shards.index import open_shards

sizes = st.integers(1, 60)
seeds = st.integers(0, 2**63)


def order_of(num_bins: int, *, seed: int = 0, global_batch: int = 8, epochs: float | None = None) -> DataOrder:
    cost = np.random.default_rng(num_bins).lognormal(size=num_bins)
    return DataOrder(cost, seed=seed, global_batch=global_batch, epochs=epochs)


def drawn(order: DataOrder, steps: range) -> list[int]:
    return [bin_id for step in steps for bin_id in order.global_bins(step).tolist()]


@settings(deadline=None)
@given(sizes, seeds, st.integers(1, 25))
def test_every_bin_is_used_exactly_once_per_epoch_even_if_steps_span_epochs(
    num_bins: int, seed: int, batch: int
) -> None:
    """The concatenated steps are permutations of all bins, one after the other."""
    order = order_of(num_bins, seed=seed, global_batch=batch)
    sequence = drawn(order, range(math.ceil(3 * num_bins / batch)))
    for epoch in range(3):
        assert sorted(sequence[epoch * num_bins : (epoch + 1) * num_bins]) == list(range(num_bins))


@settings(deadline=None, max_examples=50)
@given(
    sizes,
    seeds,
    st.integers(1, 600),
    st.integers(0, 40),
    st.sampled_from([None, 0.3, 2.5]),
    st.sampled_from([None, Grouping(steps=3, runs=2)]),
)
def test_consecutive_steps_are_dealt_as_each_step_alone(
    num_bins: int, seed: int, batch: int, start: int, epochs: float | None, grouping: Grouping | None
) -> None:
    """Up to a given step, and up to the end of the sequence."""
    order = DataOrder(
        np.arange(num_bins, dtype=np.float64), seed=seed, global_batch=batch, epochs=epochs, grouping=grouping
    )
    layout = {"world_size": 2, "accumulation": -(-batch // 2), "per_device": 1}
    end = start + 7
    dealt = list(order.deal(start, end, **layout))
    assert len(dealt) == max(0, min(end, order.num_steps or end) - start)
    for step, bins in enumerate(dealt, start):
        assert np.array_equal(bins, order.bins_of_step(step, **layout))
    endless = itertools.islice(order.deal(start, None, **layout), 7)
    assert all(np.array_equal(bins, again) for bins, again in zip(dealt, endless, strict=True))


@settings(deadline=None)
@given(sizes, seeds, st.integers(1, 4), st.integers(1, 4), st.integers(1, 3), st.integers(0, 9), st.integers(0, 40))
def test_the_bins_of_a_step_do_not_depend_on_the_number_of_ranks(
    num_bins: int, seed: int, world: int, accumulation: int, per_device: int, spare: int, step: int
) -> None:
    batch = max(1, world * accumulation * per_device - spare)
    order = order_of(num_bins, seed=seed, global_batch=batch)
    bins = order.bins_of_step(step, world_size=world, accumulation=accumulation, per_device=per_device)
    assert bins.shape == (accumulation, world, per_device)
    assert sorted(bins[bins != EMPTY].tolist()) == sorted(order.global_bins(step).tolist())
    alone = order.bins_of_step(step, world_size=1, accumulation=batch, per_device=1)
    assert Counter(bins[bins != EMPTY].tolist()) == Counter(alone.ravel().tolist())


@settings(deadline=None)
@given(sizes, seeds, st.lists(st.tuples(st.integers(1, 6), st.sampled_from([1, 2, 3, 4, 6, 12])), min_size=1))
def test_a_run_resumed_at_any_step_and_world_size_sees_the_same_bins(
    num_bins: int, seed: int, parts: list[tuple[int, int]]
) -> None:
    """Every part of the run has its own length and number of ranks, and starts from its step number only."""
    unbroken = order_of(num_bins, seed=seed, global_batch=12)
    step = 0
    for num_steps, world in parts:
        resumed = order_of(num_bins, seed=seed, global_batch=12)
        for _ in range(num_steps):
            bins = resumed.bins_of_step(step, world_size=world, accumulation=12 // world, per_device=1)
            assert sorted(bins.ravel().tolist()) == sorted(unbroken.global_bins(step).tolist())
            step += 1


@settings(deadline=None)
@given(sizes, seeds, st.integers(1, 25), st.sampled_from([0.1, 0.3, 0.5, 1.0, 1.5, 2.0, 3.0]))
def test_a_finite_order_ends_in_a_step_padded_with_empty_positions(
    num_bins: int, seed: int, batch: int, epochs: float
) -> None:
    order = order_of(num_bins, seed=seed, global_batch=batch, epochs=epochs)
    endless = order_of(num_bins, seed=seed, global_batch=batch)
    total = max(1, round(epochs * num_bins))
    assert order.num_steps == math.ceil(total / batch)
    assert endless.num_steps is None
    sequence = drawn(order, range(order.num_steps))
    assert sequence == drawn(endless, range(order.num_steps))[:total]
    uses = Counter(sequence)
    assert set(uses.values()) <= {math.floor(epochs), math.ceil(epochs)} | {1}
    last = order.bins_of_step(order.num_steps - 1, world_size=batch, accumulation=1, per_device=1)
    assert int((last == EMPTY).sum()) == order.num_steps * batch - total
    assert order.global_bins(order.num_steps).size == 0


@settings(deadline=None)
@given(st.integers(4, 60), seeds, st.integers(1, 4), st.integers(1, 4), st.integers(0, 20))
def test_the_ranks_of_a_micro_step_have_neighbours_in_cost(
    num_bins: int, seed: int, world: int, accumulation: int, step: int
) -> None:
    """The micro-steps cut the sorted global batch into runs."""
    order = order_of(num_bins, seed=seed, global_batch=world * accumulation)
    bins = order.bins_of_step(step, world_size=world, accumulation=accumulation, per_device=1)[..., 0]
    runs = sorted((sorted(order.cost[run].tolist()) for run in bins), key=lambda run: (run[0], run[-1]))
    assert [cost for run in runs for cost in run] == sorted(order.cost[order.global_bins(step)].tolist())


def test_bins_of_a_device_are_dealt_in_alternating_direction() -> None:
    """Costs 1..8 on two ranks, four bins each: 1+4+5+8 and 2+3+6+7, both 18."""
    order = DataOrder(np.arange(1.0, 9.0), seed=3, global_batch=8)
    bins = order.bins_of_step(0, world_size=2, accumulation=1, per_device=4)
    assert order.cost[bins].sum(axis=2).tolist() == [[18.0, 18.0]]
    assert (bins[0, 0] + 1).tolist() == [1, 4, 5, 8]


def test_efficiency_of_a_step_worked_out_by_hand() -> None:
    """Ranks with loads 3 and 5, then 2 and 0: means 4 and 1 of the maxima 5 and 2."""
    order = DataOrder(np.array([1.0, 2.0, 5.0]), seed=0, global_batch=4)
    bins = np.array([[[0, 1], [2, -1]], [[1, -1], [-1, -1]]])
    assert order.efficiency(bins) == pytest.approx((4 + 1) / (5 + 2))
    assert order.efficiency(np.full((2, 2, 1), -1)) == 1.0


def test_micro_steps_are_shuffled() -> None:
    """Sorting must not make every step start with its cheapest bins."""
    order = order_of(4096, global_batch=64)
    cheapest_at = Counter(
        int(order.cost[order.bins_of_step(step, world_size=16, accumulation=4, per_device=1)].sum(axis=(1, 2)).argmin())
        for step in range(64)
    )
    assert set(cheapest_at) == {0, 1, 2, 3}
    assert max(cheapest_at.values()) < 32


def test_sorted_micro_steps_are_better_balanced_than_a_random_deal() -> None:
    """Mean over highest cost of 64 ranks in 4 micro-steps, for costs with a standard deviation of a tenth."""
    cost = np.random.default_rng(0).normal(1.0, 0.1, 20_000).clip(0.5)
    order = DataOrder(cost, seed=0, global_batch=256)
    ours, random = [], []
    for step in range(40):
        load = cost[order.bins_of_step(step, world_size=64, accumulation=4, per_device=1)[..., 0]]
        ours.append(load.mean(axis=1) / load.max(axis=1))
        load = cost[order.global_bins(step).reshape(4, 64)]
        random.append(load.mean(axis=1) / load.max(axis=1))
    assert np.mean(random) < 0.83
    assert np.mean(ours) > 0.93


def reference_permutation(num_bins: int, seed: int, epoch: int) -> list[int]:
    """An independent implementation in plain Python integers."""
    mask = 2**64 - 1
    digest = hashlib.blake2b(f"{seed} bins {epoch}".encode(), digest_size=64).digest()
    keys = struct.unpack("<8Q", digest)
    across = math.ceil(math.sqrt(num_bins))
    down = math.ceil(num_bins / across)

    def mix(value: int) -> int:
        value = (value + 0x9E3779B97F4A7C15) & mask
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
        return value ^ (value >> 31)

    def network(value: int) -> int:
        left, right = value % across, value // across
        for round_, key in enumerate(keys):
            modulus = down if round_ % 2 else across
            left, right = right, (left + mix(right ^ key) % modulus) % modulus
        return right * across + left

    values = []
    for value in range(num_bins):
        value = network(value)
        while value >= num_bins:
            value = network(value)
        values.append(value)
    return values


@settings(deadline=None)
@given(sizes, seeds, st.integers(0, 5))
def test_permutations_equal_the_reference_implementation(num_bins: int, seed: int, epoch: int) -> None:
    order = order_of(num_bins, seed=seed, global_batch=num_bins)
    assert order.global_bins(epoch).tolist() == reference_permutation(num_bins, seed, epoch)


def test_the_order_never_changes_between_versions() -> None:
    """A run must be resumable with a later version, so these numbers are part of the format."""
    order = DataOrder(np.arange(10.0), seed=7, global_batch=10)
    assert order.global_bins(0).tolist() == [3, 1, 5, 2, 6, 8, 4, 9, 7, 0]
    assert order.global_bins(1).tolist() == [0, 5, 4, 7, 8, 2, 1, 3, 6, 9]
    bins = order.bins_of_step(0, world_size=2, accumulation=5, per_device=1)
    assert bins[..., 0].tolist() == [[6, 7], [4, 5], [0, 1], [2, 3], [8, 9]]


def test_all_permutations_are_equally_likely() -> None:
    """Chi-squared over the 24 permutations of four bins in 9600 epochs: 23 degrees of freedom, 0.001 quantile 49.7."""
    order = DataOrder(np.ones(4), seed=11, global_batch=4)
    counts = Counter(tuple(order.global_bins(epoch).tolist()) for epoch in range(9600))
    assert len(counts) == 24
    assert sum((count - 400) ** 2 / 400 for count in counts.values()) < 49.7


def test_neighbours_in_the_shards_are_rarely_neighbours_in_the_order() -> None:
    """A random permutation of 1000 has 2 adjacent pairs of successive numbers on average."""
    order = DataOrder(np.ones(1000), seed=5, global_batch=1000)
    pairs = [np.count_nonzero(np.abs(np.diff(order.global_bins(epoch))) == 1) for epoch in range(200)]
    assert 1.6 < np.mean(pairs) < 2.4


def test_any_step_of_ten_million_bins_is_computed_directly() -> None:
    order = DataOrder(np.zeros(10_000_000), seed=0, global_batch=64)
    far = order.global_bins(10**9)
    assert far.size == np.unique(far).size == 64
    assert far.max() > 5_000_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cost": np.empty(0)}, "one or more bins"),
        ({"seed": -1}, "seed is -1"),
        ({"global_batch": 0}, "global batch is 0"),
        ({"epochs": 0.0}, "number of epochs is 0"),
        ({"epochs": math.inf}, "number of epochs is inf"),
        ({"global_batch": 10**9}, "1000000000 bins are drawn at a time, .* Lower --samples_per_step"),
        ({"grouping": Grouping(steps=10**12, runs=1)}, "2000000000000 bins are drawn at a time, 2 for each step"),
    ],
)
def test_settings_out_of_range_are_a_config_error(changes: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"cost": np.ones(4), "seed": 0, "global_batch": 2, **changes}
    with pytest.raises(ConfigError, match=message):
        DataOrder(arguments.pop("cost"), **arguments)  # type: ignore[arg-type]


def test_a_global_batch_that_does_not_fit_the_ranks_is_a_config_error() -> None:
    order = order_of(10, global_batch=9)
    with pytest.raises(ConfigError, match=r"global batch of 9 bins does not fit 2 ranks x 4 micro-steps x 1 bin\."):
        order.bins_of_step(0, world_size=2, accumulation=4, per_device=1)
    with pytest.raises(ConfigError, match="step is -1"):
        order.global_bins(-1)
    with pytest.raises(ConfigError, match=r"step is 9{20}; allowed: up to "):
        order.global_bins(99999999999999999999)


def test_the_samples_of_a_bin_are_found_in_the_ledgers_of_a_mix(tmp_path: Path) -> None:
    """Records are numbered through each folder: bins of 3, 2, 1, 3 samples hold records 0-2, 3-4, 5, 6-8."""
    write_shards(tmp_path / "a", make_bins(seed=1, num_bins=2))
    write_shards(tmp_path / "b", make_bins(seed=2, num_bins=4))
    samples_by_bin = source_samples(open_shards(tmp_path), [5, 0, 3])
    assert {bin_id: [sample.record for sample in samples] for bin_id, samples in samples_by_bin.items()} == {
        5: [6, 7, 8],
        0: [0, 1, 2],
        3: [3, 4],
    }
    assert [(sample.slot, sample.file, sample.line, sample.id) for sample in samples_by_bin[3]] == [
        (0, "s.jsonl", 4, "s3"),
        (1, "s.jsonl", 5, "s4"),
    ]


def test_a_ledger_that_does_not_know_a_bin_stops(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "set", make_bins(num_bins=4))
    other = write_shards(tmp_path / "other", make_bins(num_bins=1))
    index = open_shards(folder)
    (other / "samples.parquet").rename(folder / "samples.parquet")
    with pytest.raises(ShardError, match="0 samples for bin 2, which holds 1"):
        source_samples(index, [2])
    (folder / "samples.parquet").unlink()
    with pytest.raises(ShardError, match=r"samples\.parquet is missing"):
        source_samples(index, [2])


def test_a_step_is_explained_bin_by_bin(tmp_path: Path) -> None:
    index = open_shards(write_shards(tmp_path / "set", make_bins(num_bins=8)))
    order = DataOrder(index.cost(), seed=0, global_batch=4)
    lines = list(explain_step(index, order, 1, deal_step(order, 1, world_size=2, accumulation=2)))
    bins = order.bins_of_step(1, world_size=2, accumulation=2, per_device=1)
    efficiency = f"efficiency {order.efficiency(bins):.3f}"
    assert lines[0] == f"step 1 (step 2 of the log), epoch 0.5000: 4 bins, 2 ranks, 2 micro-steps, seed 0, {efficiency}"
    rank_lines = [line for line in lines if line.startswith("  rank")]
    bin_lines = [line for line in lines if line.startswith("    bin")]
    assert [line.split(":")[0] for line in rank_lines] == ["  rank 0", "  rank 1"] * 2
    assert [int(line.split()[1]) for line in bin_lines] == bins.ravel().tolist()
    for rank_line, bin_line, cost in zip(rank_lines, bin_lines, order.cost[bins.ravel()].tolist()):
        assert float(bin_line.split()[-2]) == pytest.approx(cost / 1e12, rel=1e-3)
        assert rank_line.split(",")[0].endswith(bin_line.rpartition(", ")[2])
    assert sum("synthetic, s.jsonl:" in line for line in lines) == int(index.num_samples[bins.ravel()].sum())
    with pytest.raises(ConfigError, match="not a multiple of 3 ranks"):
        list(explain_step(index, order, 0, deal_step(order, 0, world_size=3, accumulation=1)))


def test_shares_of_the_ranks_worked_out_by_hand(tmp_path: Path) -> None:
    """Bins of 1, 2 and 5 TFLOP, of two ranks: nothing and 1, then 2 and 5 or, the other way round, 5 and 2."""
    index = open_shards(write_shards(tmp_path / "set", make_bins(num_bins=3)))
    order = DataOrder(np.array([1e12, 2e12, 5e12]), seed=0, global_batch=4, epochs=1)
    lines = list(explain_step(index, order, 0, deal_step(order, 0, world_size=2, accumulation=2)))
    assert lines[0].startswith("step 0 (step 1 of the log), epoch 0.0000: 3 bins, ")
    assert lines[0].endswith("efficiency 0.667")
    said = {line.strip().split(": ")[1] for line in lines if line.startswith("  rank")}
    assert said == {
        "cost 0.000 TFLOP, 0.000 of the mean",
        "cost 1.000 TFLOP, 2.000 of the mean",
        "cost 2.000 TFLOP, 0.571 of the mean",
        "cost 5.000 TFLOP, 1.429 of the mean",
    }
    assert [line.split(" (")[0].partition(": ")[2] for line in lines if line.startswith("micro-step")] in (
        ["efficiency 0.500", "efficiency 0.700"],
        ["efficiency 0.700", "efficiency 0.500"],
    )


def test_the_short_last_step_is_explained_with_its_empty_positions(tmp_path: Path) -> None:
    """Ten bins in steps of eight: the second has two, which one micro-step of two ranks takes."""
    index = open_shards(write_shards(tmp_path / "set", make_bins(num_bins=10)))
    order = DataOrder(index.cost(), seed=0, global_batch=8, epochs=1)
    lines = list(explain_step(index, order, 1, deal_step(order, 1, world_size=2, accumulation=4)))
    assert lines[0].startswith("step 1 (step 2 of the log), epoch 0.8000: 2 bins, 2 ranks, 4 micro-steps, seed 0, ")
    assert sum(line.endswith("empty position: one token with zero weight") for line in lines) == 6
    assert sum(line.startswith("micro-step") and line.endswith(": no bins") for line in lines) == 3
    named = sorted(int(line.split()[1]) for line in lines if line.startswith("    bin"))
    assert named == sorted(order.global_bins(1).tolist())
    with pytest.raises(ConfigError, match=r"step is 2, but the run ends after 2 steps: .* the last is 1"):
        list(explain_step(index, order, 2, deal_step(order, 2, world_size=2, accumulation=4)))


@pytest.mark.slow
def test_the_command_line_prints_a_step(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "set", make_bins(num_bins=8))
    command = [sys.executable, "-m", "train.order", "--global-batch", "8", "--world-size", "2", "--step", "0"]
    done = subprocess.run([*command, "--shards", str(folder)], capture_output=True, text=True, check=True)
    for line in range(1, 19):
        assert f"s.jsonl:{line} " in done.stdout, line
    failed = subprocess.run([*command, "--shards", str(tmp_path / "no")], capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert failed.stderr.startswith("error: ")
    assert "Traceback" not in failed.stderr
    ledger = folder / "samples.parquet"
    ledger.write_bytes(bytes(ledger.stat().st_size))
    failed = subprocess.run([*command, "--shards", str(folder)], capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert failed.stderr.startswith(f"error: {ledger} cannot be read as a Parquet table: ")
    assert failed.stderr.count("\n") == 1
