"""Which rank is slow, and with which bins: the own time of every rank and step -> the slowest rank of a window.

The own time of a step is what a rank spends on its data and its forward passes, so other ranks do not add to it. The
backward passes are left out, because gradients are exchanged in them. ZeRO-3 gathers weights in the forward passes:
there a slow forward pass of one rank slows all of them, and only the waits for data tell ranks apart.

Cost: two events per forward pass on a GPU, which are read when they have completed, so nothing waits for the device;
and a few numbers in an exchange that every logged step has.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from schemas.wording import listed
from train.order.dealing import EMPTY

WORTH_TELLING = 0.2
"""Share of a step that the other ranks lose to the slowest one before it is logged."""


class OwnTime(NamedTuple):
    """Own time of a rank over some steps.

    Attributes:
        mean_s: seconds of a step; nan if no step was measured.
        longest_step: the step that took longest; -1 if none was measured.
    """

    mean_s: float
    longest_step: int


class StepClock:
    """Measures the own time of this rank in every step."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._passes: list[tuple[torch.Event, torch.Event]] = []
        self._passes_s = 0.0
        self._steps: list[_Step] = []

    @contextmanager
    def forward(self) -> Iterator[None]:
        """Measure a forward pass in the ``with`` block."""
        if self._device.type == "cpu":
            began = time.perf_counter()
            yield
            self._passes_s += time.perf_counter() - began
        else:
            begin, end = (torch.Event(self._device, enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._passes.append((begin, end))

    def end_step(self, step: int, data_wait_s: float) -> None:
        """End a step, counted from 0, for whose data the rank has waited."""
        self._steps.append(_Step(step, data_wait_s + self._passes_s, self._passes))
        self._passes, self._passes_s = [], 0.0

    def take(self) -> OwnTime:
        """Own time over the steps since the last call, except those that the device has yet to complete."""
        done = []
        while self._steps and self._steps[0].is_done():
            done.append(self._steps.pop(0))
        if not done:
            return OwnTime(float("nan"), -1)
        seconds = [step.seconds() for step in done]
        return OwnTime(statistics.fmean(seconds), done[int(np.argmax(seconds))].step)


class _Step(NamedTuple):
    """A step: seconds measured on the host, and the events around its forward passes on the device."""

    step: int
    host_s: float
    passes: list[tuple[torch.Event, torch.Event]]

    def is_done(self) -> bool:
        return all(end.query() for _, end in self.passes[-1:])

    def seconds(self) -> float:
        return self.host_s + sum(begin.elapsed_time(end) for begin, end in self.passes) / 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class Slowest:
    """The slowest rank of a window of steps.

    Attributes:
        rank: the rank.
        own_s: its own time of a step, on average, in seconds.
        median_s: that of the median rank.
        step: the step, counted from 1, that took it longest.
        bins: its bins in that step.
        median_bins: how many the median rank has in that step.
    """

    rank: int
    own_s: float
    median_s: float
    step: int
    bins: tuple[int, ...]
    median_bins: int

    def is_worth_logging(self, step_s: float) -> bool:
        """Whether the other ranks lose much of a step of ``step_s`` seconds to this one, which has no more bins."""
        return len(self.bins) <= self.median_bins and self.own_s - self.median_s > WORTH_TELLING * step_s

    def __str__(self) -> str:
        return (
            f"rank {self.rank} is slow: {self.own_s:.2f} s a step for its data and forward passes, the median rank "
            f"{self.median_s:.2f} s; it took longest in step {self.step}, with {listed('bin', self.bins)}"
        )


def find_slowest(own_times: Sequence[OwnTime], deal: Callable[[int], NDArray[np.int64]]) -> Slowest | None:
    """The slowest of several ranks.

    Args:
        own_times: of every rank.
        deal: the bins (A, W, P) of a step, see :meth:`DataOrder.bins_of_step`.

    Returns:
        The slowest rank; None if there is only one rank, or a rank has measured no step.
    """
    if len(own_times) == 1 or any(own.longest_step < 0 for own in own_times):
        return None
    rank = int(np.argmax([own.mean_s for own in own_times]))
    slow = own_times[rank]
    # (A, W, P), with empty positions
    dealt = deal(slow.longest_step)
    own_bins = dealt[:, rank]
    return Slowest(
        rank=rank,
        own_s=slow.mean_s,
        median_s=statistics.median_low(own.mean_s for own in own_times),
        step=slow.longest_step + 1,
        bins=tuple(own_bins[own_bins != EMPTY].tolist()),
        median_bins=statistics.median_low((dealt != EMPTY).sum(axis=(0, 2)).tolist()),
    )
