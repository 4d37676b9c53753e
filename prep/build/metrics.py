"""Times of a build: per sample and per stage, mergeable across workers, in bounded memory.

A :class:`Durations` is a histogram with bins of equal ratio (12 % wide), so that percentiles of a hundred million
samples take two kilobytes. Means are exact. :class:`BuildMetrics` is the content of ``build_metrics.json``: the counts
of the manifest, and times, which the manifest must not contain.
"""

from __future__ import annotations

import math
import time
from pathlib import Path

import msgspec

import storage
from schemas.errors import VlprepError
from schemas.manifest import METRICS_FILE, Counts, DatasetStatistics
from storage.urls import Location

_SHORTEST_S = 1e-6
_BINS_PER_DECADE = 20
_NUM_BINS = 9 * _BINS_PER_DECADE + 1


class DurationSummary(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds a sample: number of samples, exact mean, percentiles to within 12 %."""

    num: int
    mean_s: float
    p50_s: float
    p90_s: float
    p99_s: float
    max_s: float


class Durations(msgspec.Struct, kw_only=True):
    """A histogram of durations with bins of equal ratio, starting at a microsecond."""

    counts: list[int] = msgspec.field(default_factory=lambda: [0] * _NUM_BINS)
    total_s: float = 0.0
    max_s: float = 0.0

    def add(self, seconds: float, num: int = 1) -> None:
        """Count ``num`` samples that took ``seconds`` each."""
        index = math.ceil(math.log10(max(seconds, _SHORTEST_S) / _SHORTEST_S) * _BINS_PER_DECADE)
        self.counts[min(index, _NUM_BINS - 1)] += num
        self.total_s += seconds * num
        self.max_s = max(self.max_s, seconds)

    def merge(self, other: Durations) -> None:
        """Add the counts of ``other``."""
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts)]
        self.total_s += other.total_s
        self.max_s = max(self.max_s, other.max_s)

    def summary(self) -> DurationSummary:
        """Mean and percentiles."""
        num = sum(self.counts)
        return DurationSummary(
            num=num,
            mean_s=self.total_s / num if num else 0.0,
            p50_s=self._percentile(0.50),
            p90_s=self._percentile(0.90),
            p99_s=self._percentile(0.99),
            max_s=self.max_s,
        )

    def _percentile(self, share: float) -> float:
        rank, seen = share * sum(self.counts), 0
        for index, count in enumerate(self.counts):
            seen += count
            if count and seen >= rank:
                return min(_SHORTEST_S * 10 ** (index / _BINS_PER_DECADE), self.max_s)
        return 0.0


Timings = dict[str, Durations]
"""Name of a step -> its durations."""


class timed:
    """Time a block that handles ``num`` samples. Each counts with an equal share of the time."""

    __slots__ = ("_name", "_num", "_start", "_timings")

    def __init__(self, timings: Timings, name: str, num: int = 1) -> None:
        self._timings, self._name, self._num = timings, name, num

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self._num:
            seconds = (time.perf_counter() - self._start) / self._num
            durations = self._timings.get(self._name)
            if durations is None:
                durations = self._timings[self._name] = Durations()
            durations.add(seconds, self._num)


def merge_timings(into: Timings, other: Timings) -> None:
    """Add the durations of ``other``."""
    for name, durations in other.items():
        into.setdefault(name, Durations()).merge(durations)


class BuildMetrics(msgspec.Struct, frozen=True, kw_only=True):
    """Contents of ``build_metrics.json``.

    ``stages_s`` are the wall seconds of the stages of this run. ``samples`` are seconds per sample inside the workers,
    for the samples of this run: a resumed build does not process all samples.
    """

    num_workers: int
    stages_s: dict[str, float]
    samples: dict[str, DurationSummary]
    counts: Counts
    datasets: list[DatasetStatistics]


def read_metrics(out: Location) -> BuildMetrics | None:
    """Read the ``build_metrics.json`` of a finished build, or None if it is missing, unreadable or damaged."""
    try:
        path = out / METRICS_FILE
        data = path.read_bytes() if isinstance(path, Path) else storage.read(path)
        return msgspec.json.decode(data, type=BuildMetrics)
    except (OSError, VlprepError, msgspec.MsgspecError):
        return None
