"""A recipe means the same with packed samples if samples are counted, and something else if bins are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.benchmarks.recipes import SHARES, Comparison, Run, Setup, compare, report

SHORT = Setup(num_samples=320, samples_per_pass=8, steps=40, learning_rate=5e-3)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Six runs of about a second each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return compare(SHORT, tmp_path_factory.mktemp("recipes") / "shards")
    finally:
        torch.set_num_threads(threads)


@pytest.mark.slow
def test_packed_steps_of_as_many_samples_learn_like_unpacked_ones(comparison: Comparison) -> None:
    """Their curves are no farther apart than those of two seeds."""
    assert comparison.samples_per_step["packed"] == pytest.approx(SHORT.samples_per_step, rel=0.05)
    assert np.mean(comparison.distances("packed")) <= comparison.spread


@pytest.mark.slow
def test_bins_counted_as_samples_do_not(comparison: Comparison) -> None:
    assert comparison.samples_per_step["bins counted as samples"] > 5 * SHORT.samples_per_step
    assert min(comparison.distances("bins counted as samples")) > 3 * comparison.spread


@pytest.mark.slow
def test_the_report_has_the_steps_and_distances_of_every_way(comparison: Comparison) -> None:
    text = "\n".join(report(comparison))
    for way, steps in comparison.steps.items():
        assert f"{way}: {steps} steps of " in text
    assert text.count("distance from unpacked, ") == 2


def test_a_step_that_spans_shares_counts_in_each_by_its_samples() -> None:
    """A step has a fifteenth of the samples, so the second share has a third of the first step and of the second."""
    run = Run(losses=tuple(range(15)), num_targets=(2,) * 15, num_samples=(4,) * 15)
    curve = run.curve(60)
    assert curve.shape == (SHARES,)
    assert curve[0] == 0.0
    assert curve[1] == pytest.approx((0 * 1 + 1 * 2) / 3 / 2)
