"""Times steps: a contender and a number of seconds -> :class:`Turn`; a few steps under the profiler -> ``Activity``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from schemas.qwen import MERGED_PATCHES
from tests.benchmarks.gpu.contenders import Contender, content_of
from tests.benchmarks.gpu.models import Arrangement
from tests.benchmarks.gpu.online import Content
from train.batches.vision_inputs import vision_inputs
from train.model.flops import ModelFlops

MAX_AHEAD = 2
"""Steps that may be queued on the device."""

MIN_STEPS = 2
NUM_WARMUP = 1

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
"""Functions of CUDA in which the host waits for the device."""

PROFILED = "profiled steps"


@dataclass(frozen=True, kw_only=True, slots=True)
class Turn:
    """Consecutive steps of a contender.

    Attributes:
        contents: what the steps computed.
        step_s: seconds of every step.
        wait_s: seconds of every step in which it waited for data.
        peak_bytes: of the device; None on a CPU.
    """

    contents: tuple[Content, ...]
    step_s: tuple[float, ...]
    wait_s: tuple[float, ...]
    peak_bytes: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Activity:
    """What the device did during some steps.

    Attributes:
        busy: share of the time from the first to the last operation in which at least one ran.
        longest_gap_s: longest time without an operation.
        waits_per_step: times that the host waited for the device.
    """

    busy: float
    longest_gap_s: float
    waits_per_step: float


class Clock:
    """Times of steps on a device, without waiting for it after each."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._events: list[torch.cuda.Event] = []
        self._times_s: list[float] = []

    def mark(self) -> None:
        """Mark the end of a step. Wait until at most :data:`MAX_AHEAD` steps are queued, as a real loop does."""
        if not self._is_cuda:
            self._times_s.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)
        if len(self._events) > MAX_AHEAD:
            self._events[-1 - MAX_AHEAD].synchronize()

    def intervals_s(self) -> list[float]:
        """Seconds between consecutive marks."""
        if not self._is_cuda:
            return np.diff(self._times_s).tolist()
        torch.cuda.synchronize()
        return [first.elapsed_time(second) / 1000 for first, second in zip(self._events, self._events[1:])]


class Runner:
    """Runs steps of contenders on one arrangement of a model."""

    def __init__(self, arrangement: Arrangement, device: torch.device) -> None:
        self._arrangement, self._device = arrangement, device

    def step(self, contender: Contender) -> tuple[Content, float]:
        """Run a step; return what it computed, and for how many seconds it waited for data."""
        start_s = time.perf_counter()
        batch = contender.feed.next()
        wait_s = time.perf_counter() - start_s
        contender.loss(self._arrangement, batch.to(self._device, non_blocking=True)).backward()
        optimizer = self._arrangement.optimizer
        if optimizer is not None:
            optimizer.step()
        self._arrangement.hf.zero_grad(set_to_none=True)
        return content_of(batch), wait_s

    def turn(self, contender: Contender, seconds: float) -> Turn:
        """Run steps for some seconds, after a first one that does not count."""
        contender.arrange(self._arrangement)
        contender.feed.start()
        try:
            for _ in range(NUM_WARMUP):
                self.step(contender)
            if self._device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            clock = Clock(self._device)
            contents: list[Content] = []
            waits: list[float] = []
            end_s = time.perf_counter() + seconds
            clock.mark()
            while len(contents) < MIN_STEPS or time.perf_counter() < end_s:
                content, wait_s = self.step(contender)
                clock.mark()
                contents.append(content)
                waits.append(wait_s)
            step_s = clock.intervals_s()
        finally:
            contender.feed.stop()
        peak = torch.cuda.max_memory_allocated() if self._device.type == "cuda" else None
        return Turn(contents=tuple(contents), step_s=tuple(step_s), wait_s=tuple(waits), peak_bytes=peak)

    def activity(self, contender: Contender, num_steps: int) -> Activity:
        """Run some steps under the profiler."""
        contender.arrange(self._arrangement)
        contender.feed.start()
        try:
            self.step(contender)
            return profiled(lambda: self.step(contender), num_steps, self._device)
        finally:
            contender.feed.stop()

    def losses(self, contender: Contender, bins: Sequence[int]) -> list[float]:
        """Mean loss of each of some bins, without a backward pass."""
        contender.arrange(self._arrangement)
        results = []
        for bin_id in bins:
            with torch.no_grad():
                batch = contender.feed.batch_of(bin_id).to(self._device)
                results.append(contender.loss(self._arrangement, batch).item())
        return results


def profiled(step: Callable[[], object], num_steps: int, device: torch.device) -> Activity:
    """Profile some steps. On a CPU, its own operations stand for those of a device."""
    is_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with profile(activities=activities) as profiler:
        with record_function(PROFILED):
            for _ in range(num_steps):
                step()
        if is_cuda:
            torch.cuda.synchronize()
    results = profiler.profiler
    assert results is not None and results.kineto_results is not None
    events = results.kineto_results.events()
    (profiled,) = (event for event in events if event.name() == PROFILED and event.device_type() == DeviceType.CPU)
    end_ns = profiled.start_ns() + profiled.duration_ns()
    kind = DeviceType.CUDA if is_cuda else DeviceType.CPU
    spans = [
        (event.start_ns(), event.start_ns() + event.duration_ns())
        for event in events
        if event.device_type() == kind and not event.is_user_annotation()
    ]
    waits = sum(event.name() in WAITS and profiled.start_ns() <= event.start_ns() < end_ns for event in events)
    busy, gap_ns = busy_and_gap(spans)
    return Activity(busy=busy, longest_gap_s=gap_ns / 1e9, waits_per_step=waits / num_steps)


def busy_and_gap(spans: Iterable[tuple[int, int]]) -> tuple[float, int]:
    """Share of the time that is covered by spans (start, end), from the first start on; and the longest gap."""
    ordered = sorted(spans)
    if not ordered:
        return 0.0, 0
    first, reached = ordered[0][0], ordered[0][0]
    covered = longest = 0
    for start, end in ordered:
        longest = max(longest, start - reached)
        covered += max(0, end - max(start, reached))
        reached = max(reached, end)
    return covered / max(1, reached - first), longest


def flops_of(flops: ModelFlops, content: Content) -> float:
    """FLOPs of the samples of a batch: the formula of :class:`ModelFlops`, the same for all contenders."""
    inputs = vision_inputs(content.grids)
    num_patches = sum(grid.num_patches for grid in content.grids)
    return (
        flops.per_patch * num_patches
        + flops.per_merged_patch * (num_patches // MERGED_PATCHES)
        + flops.per_token * content.num_tokens
        + flops.per_target * content.num_targets
        + flops.per_squared_length * sum(length**2 for length in content.lengths)
        + flops.per_squared_window * int((np.diff(inputs.cu_window_seqlens.astype(np.int64)) ** 2).sum())
        + flops.per_squared_frame * int((np.diff(inputs.cu_seqlens.astype(np.int64)) ** 2).sum())
    )
