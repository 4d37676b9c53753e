"""Durations: exact means, percentiles to within a bin, merging as if counted together."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prep.build.metrics import Durations, Timings, merge_timings, timed

seconds = st.floats(1e-6, 500.0)


def counted(values: list[float]) -> Durations:
    durations = Durations()
    for value in values:
        durations.add(value)
    return durations


@given(st.lists(seconds, min_size=1, max_size=60))
def test_means_are_exact_and_percentiles_within_a_bin(values: list[float]) -> None:
    summary = counted(values).summary()
    assert summary.num == len(values)
    assert summary.mean_s == pytest.approx(sum(values) / len(values))
    assert summary.max_s == max(values)
    for share, measured in ((0.5, summary.p50_s), (0.9, summary.p90_s), (0.99, summary.p99_s)):
        exact = float(np.quantile(values, share, method="inverted_cdf"))
        assert exact * (1 - 1e-9) <= measured <= exact * 10 ** (1 / 20) * (1 + 1e-9)


@given(st.lists(seconds, max_size=20), st.lists(seconds, max_size=20))
def test_merging_counts_as_if_counted_together(first: list[float], second: list[float]) -> None:
    merged = counted(first)
    merged.merge(counted(second))
    together = counted(first + second)
    assert merged.counts == together.counts
    assert merged.total_s == pytest.approx(together.total_s)


def test_a_block_counts_once_for_each_of_its_samples_and_never_without() -> None:
    timings: Timings = {}
    with timed(timings, "a", 3):
        pass
    with timed(timings, "b", 0):
        pass
    other: Timings = {"a": counted([1.0]), "c": counted([2.0])}
    merge_timings(timings, other)
    assert {name: sum(durations.counts) for name, durations in timings.items()} == {"a": 4, "c": 1}
