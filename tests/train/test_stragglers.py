"""The slowest rank is named, with the bins of its longest step, and measuring it waits for nothing."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.train.launching import as_flags, fingerprint_of, read_metrics, run_ranks
from tests.train.synthetic import make_bins, write_shards
from train.order.dealing import EMPTY, DataOrder
from train.run import stragglers
from train.run.stragglers import OwnTime, Slowest, StepClock, find_slowest


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> StepClock:
    """A clock of a rank on a CPU, which advances one second at each look."""
    ticks = iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    return StepClock(torch.device("cpu"))


def test_the_own_time_of_a_step_is_its_wait_for_data_and_its_forward_passes(clock: StepClock) -> None:
    for step, (num_passes, wait_s) in enumerate([(1, 0.5), (3, 0.25), (2, 0.0)]):
        for _ in range(num_passes):
            with clock.forward():
                pass
        clock.end_step(step, wait_s)
    assert clock.take() == OwnTime(mean_s=(1.5 + 3.25 + 2.0) / 3, longest_step=1)


def test_a_window_starts_without_the_steps_of_the_one_before(clock: StepClock) -> None:
    clock.end_step(0, 9.0)
    clock.take()
    clock.end_step(1, 1.0)
    assert clock.take() == (1.0, 1)
    mean_s, longest_step = clock.take()
    assert math.isnan(mean_s) and longest_step == -1


class FakeEvent:
    """An event of a device that completes what it is given when :attr:`completed` says so."""

    completed = 0
    recorded = 0

    def __init__(self, device: torch.device, *, enable_timing: bool) -> None:
        assert enable_timing
        self.time = -1

    def record(self) -> None:
        FakeEvent.recorded += 1
        self.time = FakeEvent.recorded

    def query(self) -> bool:
        return FakeEvent.completed >= self.time

    def elapsed_time(self, end: FakeEvent) -> float:
        assert self.query() and end.query(), "this would wait for the device"
        return 1000.0 * (end.time - self.time)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeEvent]]:
    monkeypatch.setattr(stragglers.torch, "Event", FakeEvent)
    FakeEvent.completed = FakeEvent.recorded = 0
    yield FakeEvent


def test_on_a_gpu_only_completed_steps_are_read(device: type[FakeEvent]) -> None:
    clock = StepClock(torch.device("cuda", 0))
    for step in range(2):
        for _ in range(2):
            with clock.forward():
                pass
        clock.end_step(step, 0.5)
    assert clock.take().longest_step == -1
    device.completed = 5  # the first step, and part of the second one
    assert clock.take() == (2.5, 0)
    device.completed = 8
    assert clock.take() == (2.5, 1)


def deal(order: DataOrder, world: int, step: int) -> Any:
    return order.bins_of_step(step, world_size=world, accumulation=2, per_device=2)


def test_the_slowest_rank_is_named_with_the_bins_of_its_longest_step() -> None:
    order = DataOrder(np.ones(40), seed=0, global_batch=11)
    dealt = deal(order, 3, 7)[:, 1]
    own_times = [OwnTime(1.0, 6), OwnTime(3.0, 7), OwnTime(1.5, 7)]
    slowest = find_slowest(own_times, partial(deal, order, 3))
    bins = tuple(dealt[dealt != EMPTY].tolist())
    # 11 bins on 3 ranks: 4, 4 and 3
    assert slowest == Slowest(rank=1, own_s=3.0, median_s=1.5, step=8, bins=bins, median_bins=4)
    assert slowest.is_worth_logging(7.4) and not slowest.is_worth_logging(7.6)


def test_a_rank_that_was_dealt_more_bins_is_not_slow() -> None:
    """3 bins on 2 ranks."""
    order = DataOrder(np.ones(40), seed=0, global_batch=3)
    busy = int((deal(order, 2, 7)[:, 1] != EMPTY).sum() == 2)
    own_times = [OwnTime(1.0 + 2.0 * (rank == busy), 7) for rank in range(2)]
    slowest = find_slowest(own_times, partial(deal, order, 2))
    assert slowest is not None
    assert (slowest.rank, len(slowest.bins), slowest.median_bins) == (busy, 2, 1)
    assert not slowest.is_worth_logging(3.0)


@pytest.mark.parametrize("own_times", [[OwnTime(1.0, 6)], [OwnTime(1.0, 6), OwnTime(math.nan, -1)]])
def test_no_rank_is_the_slowest_of_one_or_before_all_have_measured_a_step(own_times: list[OwnTime]) -> None:
    assert find_slowest(own_times, lambda step: pytest.fail(f"step {step} is not needed")) is None


def read_slowly_on_the_second() -> None:
    """The second rank waits for its data."""
    if os.environ["RANK"] == "1":
        end_step = StepClock.end_step
        pytest.MonkeyPatch().setattr(StepClock, "end_step", lambda clock, step, wait_s: end_step(clock, step, 60.0))


@pytest.mark.slow
def test_a_run_names_its_slowest_rank_in_the_metrics_and_once_in_the_log(tiny_checkpoint: Path, tmp_path: Path) -> None:
    shards = write_shards(tmp_path / "shards", make_bins(num_bins=4), tokenizer=fingerprint_of(tiny_checkpoint))
    settings = {
        "shards": shards,
        "model_name_or_path": tiny_checkpoint,
        "output_dir": tmp_path / "run",
        "max_steps": 2,
        "logging_steps": 1,
        "gradient_accumulation_steps": 1,
    }
    done = run_ranks(2, *as_flags(settings), prepare=read_slowly_on_the_second)
    assert done.returncode == 0, done.stderr
    for step, record in enumerate(read_metrics(tmp_path / "run"), start=1):
        slowest = record["slowest"]
        assert (slowest["rank"], slowest["step"]) == (1, step)
        assert slowest["own_s"] >= 60 > slowest["median_s"] > 0
        assert len(slowest["bins"]) == 1
    assert done.stderr.count("rank 1 is slow: 60.") == 1
