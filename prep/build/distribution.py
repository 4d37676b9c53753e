"""Exact totals and quantiles of small integers, in memory that does not grow with their count."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from schemas.manifest import Distribution


class ValueCounts:
    """A histogram of small integers: 8 bytes for each integer up to the largest."""

    def __init__(self) -> None:
        self._counts: NDArray[np.int64] = np.zeros(0, dtype=np.int64)

    def add(self, values: NDArray[np.integer]) -> None:
        """Count values, each 0 or more."""
        counts = np.bincount(values, minlength=self._counts.size)
        counts[: self._counts.size] += self._counts
        self._counts = counts

    def distribution(self) -> Distribution | None:
        """Exact totals and quantiles, or None without values."""
        ends = np.cumsum(self._counts)
        num_values = int(ends[-1]) if ends.size else 0
        if not num_values:
            return None
        # A quantile is the smallest value that at least this share of all values does not exceed.
        ranks = [max(1, math.ceil(num_values * share)) for share in (0, 0.5, 0.9, 0.99, 1)]
        low, p50, p90, p99, high = np.searchsorted(ends, ranks).tolist()
        total = int(np.dot(self._counts, np.arange(self._counts.size)))
        return Distribution(total=total, mean=total / num_values, min=low, p50=p50, p90=p90, p99=p99, max=high)
