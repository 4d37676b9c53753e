"""Checks the positions of one sample against the definition, independently of the code that wrote them.

A clip's rate is not stored in a bin, so its temporal positions are checked to be those of some rate:
``floor(k * rate)`` for every step ``k``, with one ``rate`` above 0. Everything else is fixed by ids and grids.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from schemas.bins import MEDIA_VIDEO
from schemas.qwen import MERGE_SIZE, Grid

_ROUNDINGS = 4
"""Steps of float64 that the writer's products may lie above the exact ones."""


def position_problem(found: NDArray[np.int32], media: Sequence[tuple[int, Grid, int]]) -> str | None:
    """What is wrong with the positions of a sample, if anything.

    Args:
        found: (3, n) int32 of the sample: time, height, width.
        media: place of the first pad token in the sample, grid and type of every medium, in order. Places and sizes
            must fit the sample.

    Returns:
        A clause that names the first wrong token, or None.
    """
    length = found.shape[1]
    # Text counts on in all three axes; a medium of n tokens replaces n counts by its extent.
    expected = np.broadcast_to(np.arange(length, dtype=np.int64), (3, length)).copy()
    for start, grid, kind in media:
        end = start + grid.num_tokens
        base = int(expected[0, start])
        rows, columns = grid.h // MERGE_SIZE, grid.w // MERGE_SIZE
        steps = found[0, start : end : rows * columns].astype(np.int64) - base
        if kind == MEDIA_VIDEO:
            if not is_sampled_evenly(steps):
                return (
                    f"the temporal positions of the clip at token {start} of the sample are {steps[:8].tolist()} after "
                    "its first, which no constant rate gives"
                )
        else:
            steps = np.zeros(grid.t, dtype=np.int64)
        token = np.arange(grid.num_tokens)
        expected[0, start:end] = base + np.repeat(steps, rows * columns)
        expected[1, start:end] = base + token // columns % rows
        expected[2, start:end] = base + token % columns
        if end < length:
            expected[:, end:] += int(expected[:, start:end].max()) + 1 - int(expected[0, end])
    wrong = np.flatnonzero((found != expected).any(axis=0))
    if wrong.size:
        at = int(wrong[0])
        return (
            f"{wrong.size} tokens have wrong positions, the first at token {at} of the sample: "
            f"{found[:, at].tolist()}, expected {expected[:, at].tolist()} (time, height, width)"
        )
    return None


def is_sampled_evenly(steps: NDArray[np.int64]) -> bool:
    """Whether ``steps[k]`` is ``floor(k * rate)`` for one ``rate`` of at least 0."""
    if steps[0] != 0:
        return False
    k = np.arange(1, steps.size)
    if not k.size:
        return True
    if steps.min() < 0:
        return False
    rate, below = float((steps[1:] / k).max()), float(((steps[1:] + 1) / k).min())
    if rate < below:
        return True
    # A rate slightly too small can still give these steps where its product is rounded up to a whole number.
    for _ in range(_ROUNDINGS):
        rate = float(np.nextafter(rate, 0))
        if np.array_equal(np.floor(k * rate), steps[1:]):
            return True
    return False
