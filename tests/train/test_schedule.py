"""Learning rate schedules, against values computed by hand and the schedules of transformers."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from train.run.schedule import LearningRates, count_warmup_steps, schedule
from train.settings.declarations import SCHEDULES


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant_with_warmup", [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]),
        # cos of 0, 45, 90 and 135 degrees
        ("cosine", [0.5, 1.0, 1.0, 0.853553, 0.5, 0.146447]),
    ],
)
def test_the_factor_rises_for_two_steps_and_decays_over_four(kind: str, expected: list[float]) -> None:
    factor = schedule(kind, warmup_steps=2, total_steps=6)
    assert [factor(step) for step in range(6)] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_the_factor_is_positive_during_the_run_and_zero_after_it(kind: str) -> None:
    factor = schedule(kind, warmup_steps=3, total_steps=10)
    assert min(factor(step) for step in range(10)) > 0
    assert [factor(step) for step in (10, 11, 99)] == pytest.approx([0, 0, 0], abs=1e-12)


def factors_of_transformers(kind: str, *, warmup: int, total: int) -> list[float]:
    """Factors of ``total + 1`` steps."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    factors = []
    for _ in range(total + 1):
        factors += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    return factors


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize(("warmup", "total"), [(0, 9), (1, 9), (3, 10), (9, 10)])
def test_each_schedule_is_that_of_transformers_one_step_ahead_in_warmup(kind: str, warmup: int, total: int) -> None:
    """This skips the step at rate 0 that theirs start with. After warmup the same steps have the same factors."""
    theirs = factors_of_transformers(kind, warmup=warmup, total=total)
    if kind == "constant":
        warmup = 0
    factor = schedule(kind, warmup_steps=warmup, total_steps=total)
    expected = theirs[1 : warmup + 1] + theirs[warmup:total]
    assert [factor(step) for step in range(total)] == pytest.approx(expected, abs=1e-12)


def test_a_constant_schedule_has_no_warmup() -> None:
    factor = schedule("constant", warmup_steps=0, total_steps=4)
    assert [factor(step) for step in range(4)] == [1.0] * 4
    with pytest.raises(AssertionError, match="constant has no warmup"):
        schedule("constant", warmup_steps=1, total_steps=4)


def test_without_warmup_the_first_step_has_the_peak() -> None:
    assert schedule("cosine", warmup_steps=0, total_steps=4)(0) == 1.0


def test_a_run_of_warmup_only_ends_at_the_peak() -> None:
    factor = schedule("linear", warmup_steps=4, total_steps=4)
    assert [factor(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize(("ratio", "total", "expected"), [(0.03, 100, 3), (0.03, 101, 4), (0.0, 100, 0), (1.0, 7, 7)])
def test_the_number_of_warmup_steps_is_rounded_up(ratio: float, total: int, expected: int) -> None:
    assert count_warmup_steps(ratio, total) == expected


def test_the_rate_of_each_group_is_its_peak_times_the_factor() -> None:
    peaks = {"merger": 1e-3, "vision_tower": 4e-3}
    optimizer = torch.optim.SGD(
        [{"params": [torch.zeros(1)], "lr": peak, "part": part} for part, peak in peaks.items()]
    )
    rates = LearningRates(optimizer, schedule("linear", warmup_steps=0, total_steps=2))
    for step, expected in ((1, [5e-4, 2e-3]), (0, [1e-3, 4e-3])):
        assert rates.set(step) == dict(zip(peaks, expected))
        assert [group["lr"] for group in optimizer.param_groups] == expected
