"""Laws of the plan: what is packed, how shards are cut, and that datasets spread over them as chance would have it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from prep.build.columns import read_columns
from prep.build.parts import PART_SCHEMA, ScannedPart, table_path
from prep.build.plan import BYTES_PER_TOKEN, Plan, make_plan
from schemas.settings import BuildSettings
from tests.benchmarks.mixture import KINDS, draw_mixture

sizes = st.lists(st.tuples(st.integers(1, 80), st.integers(0, 30)), min_size=1, max_size=80)


def planned(samples: list[tuple[int, int]], shard_bytes: int, **changes: int) -> Plan:
    tokens, patches = (np.asarray(column, dtype=np.int32) for column in zip(*samples))
    return make_plan(tokens, patches, patches.astype(np.int64) * 588, build_settings(shard_bytes, **changes))


def build_settings(shard_bytes: int, **changes: int) -> BuildSettings:
    return BuildSettings(**{"max_length": 64, "shard_bytes": shard_bytes, **changes})  # type: ignore[arg-type]


@given(sizes, st.integers(1, 60_000), st.integers(0, 3))
@settings(deadline=None)
def test_every_sample_that_fits_is_packed_once(samples: list[tuple[int, int]], shard_bytes: int, seed: int) -> None:
    plan = planned(samples, shard_bytes, seed=seed)
    fitting = [index for index, (tokens, _) in enumerate(samples) if tokens <= 64]
    assert sorted(plan.order.tolist()) == fitting
    positions = plan.positions(len(samples))
    assert [index for index in range(len(samples)) if positions[index] >= 0] == fitting
    assert (plan.order[positions[fitting]] == fitting).all()
    assert plan.bin_starts[0] == 0 and plan.bin_starts[-1] == len(fitting)
    assert (np.diff(plan.bin_starts) > 0).all()


@given(sizes, st.integers(1, 60_000))
@settings(deadline=None)
def test_a_shard_ends_with_the_bin_that_fills_it(samples: list[tuple[int, int]], shard_bytes: int) -> None:
    plan = planned(samples, shard_bytes)
    bytes_of = [BYTES_PER_TOKEN * tokens + 588 * patches for tokens, patches in samples]
    of_bins = [
        sum(bytes_of[index] for index in plan.order[start:stop])
        for start, stop in zip(plan.bin_starts[:-1], plan.bin_starts[1:])
    ]
    assert plan.shard_starts[0] == 0 and plan.shard_starts[-1] == plan.num_bins
    for first, last in zip(plan.shard_starts[:-1], plan.shard_starts[1:]):
        assert last > first
        assert sum(of_bins[first : last - 1]) < shard_bytes
        assert sum(of_bins[first:last]) >= shard_bytes or last == plan.num_bins


@cache
def datasets_of_bins(max_patches: int | None) -> tuple[Plan, NDArray[np.int64], NDArray[np.int64]]:
    """A plan of a mixture with datasets of very different lengths, tokens of each in every bin (B, D), and shard of
    every bin.
    """
    drawn = draw_mixture(num_samples=60_000, max_length=4096, seed=4)
    changes = {} if max_patches is None else {"max_patches": max_patches}
    plan = make_plan(
        drawn.num_tokens.astype(np.int32),
        drawn.num_patches.astype(np.int32),
        drawn.num_patches * 588,
        build_settings(1 << 30, max_length=4096, **changes),
    )
    bins = np.repeat(np.arange(plan.num_bins), np.diff(plan.bin_starts))
    tokens = np.zeros((plan.num_bins, len(KINDS)), dtype=np.int64)
    np.add.at(tokens, (bins, drawn.kind[plan.order]), drawn.num_tokens[plan.order])
    shards = np.searchsorted(plan.shard_starts, np.arange(plan.num_bins), side="right") - 1
    return plan, tokens, shards


@pytest.mark.slow
@pytest.mark.parametrize("max_patches", [None, 12_288])
def test_datasets_are_spread_over_shards_as_at_random(max_patches: int | None) -> None:
    """The tokens of a dataset in a shard deviate from its share by what they would if the bins lay in random order.

    In random order the mean over n of B bins has the variance s^2 / n * (B - n) / (B - 1), s^2 being that of single
    bins. Five of its roots are exceeded once in 1.7 million shards; squares of the deviations, in units of the
    variance, average 1 (within 4 standard errors, each being sqrt(2 / number of them)).
    """
    plan, tokens, shards = datasets_of_bins(max_patches)
    full_shards = np.flatnonzero(np.bincount(shards) > 50)
    assert full_shards.size >= 10
    deviations = []
    for shard in full_shards.tolist():
        members = tokens[shards == shard]
        factor = (plan.num_bins - len(members)) / (plan.num_bins - 1) / len(members)
        deviations.append((members.mean(axis=0) - tokens.mean(axis=0)) / np.sqrt(tokens.var(axis=0) * factor))
    scores = np.asarray(deviations)
    assert np.abs(scores).max() < 5
    # The five shares of a shard add up to a whole: count each shard as four.
    assert abs((scores**2).mean() - 1) < 4 * np.sqrt(2 / (4 * full_shards.size))


@pytest.mark.slow
@pytest.mark.parametrize("max_patches", [None, 12_288])
def test_bins_of_similar_composition_are_not_neighbours(max_patches: int | None) -> None:
    """The correlation of neighbouring bins is within 5 / sqrt(bins) of none."""
    plan, tokens, _ = datasets_of_bins(max_patches)
    for dataset in tokens.T.astype(np.float64):
        correlation = np.corrcoef(dataset[:-1], dataset[1:])[0, 1]
        assert abs(correlation) < 5 / np.sqrt(plan.num_bins)


def test_samples_of_a_dataset_are_not_neighbours_in_their_bins() -> None:
    """Slots are shuffled: the first sample of a bin is as long as the last, on average."""
    drawn = draw_mixture(num_samples=20_000, max_length=4096, seed=5)
    plan = make_plan(
        drawn.num_tokens.astype(np.int32),
        drawn.num_patches.astype(np.int32),
        drawn.num_patches * 588,
        build_settings(1 << 30, max_length=4096),
    )
    lengths = drawn.num_tokens[plan.order].astype(np.float64)
    several = np.diff(plan.bin_starts) > 1
    first, last = lengths[plan.bin_starts[:-1]][several], lengths[plan.bin_starts[1:] - 1][several]
    error = np.std(first - last) / np.sqrt(first.size)
    assert abs((first - last).mean()) < 5 * error


def test_samples_above_the_patch_budget_cause_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    columns = (np.asarray([100, 100], np.int32), np.asarray([400, 2000], np.int32), np.zeros(2, np.int64))
    with caplog.at_level("WARNING"):
        make_plan(*columns, BuildSettings(max_patches=2000))
        assert not caplog.messages
        make_plan(*columns, BuildSettings(max_patches=1000))
    (message,) = caplog.messages
    assert message.startswith("1 sample has more than --max-patches 1,000 patches, the largest 2,000")


def test_columns_locate_every_copy(tmp_path: Path) -> None:
    """A record that is drawn twice has two samples at one offset; one that is rejected, or not drawn, has none."""
    rows = {
        "a": {"copies": [2, 1, 0], "sample_bytes": [10, 0, 0], "sample_offset": [0, 0, 0]},
        "b": {"copies": [1, 3], "sample_bytes": [7, 5], "sample_offset": [0, 7]},
    }
    for name, columns in rows.items():
        num = len(columns["copies"])
        measured = [size or None for size in columns["sample_bytes"]]
        full = {field.name: [None] * num for field in PART_SCHEMA} | columns
        full |= dict.fromkeys(("num_tokens", "num_patches", "pixel_bytes"), measured)
        pq.write_table(pa.table(full, schema=PART_SCHEMA), table_path(tmp_path / name))
    parts = [ScannedPart(path=tmp_path / name, source=0, file="f", record_base=0) for name in rows]
    samples = read_columns(parts)
    assert samples.num_drawn == 7
    assert samples.part_starts.tolist() == [0, 2, 6]
    assert samples.num_tokens.tolist() == [10, 10, 7, 5, 5, 5]
    assert samples.sample_offset.tolist() == [0, 0, 0, 7, 7, 7]
    used, positions = samples.parts_of(np.asarray([5, 2, 4]))
    assert (used, positions.tolist()) == ([1], [0, 0, 0])
    used, positions = samples.parts_of(np.asarray([3, 0]))
    assert (used, positions.tolist()) == ([0, 1], [1, 0])
