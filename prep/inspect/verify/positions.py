"""Checks the mRoPE positions of one sample against the definition, independently of the code that wrote them.

Input: the positions of a sample, and its media. Output: a clause about the first wrong token, or None. A bin does not
store the rate of a video, so its temporal positions must only be ``floor(k * rate)`` for every step ``k`` and some
``rate`` above 0. Everything else follows from ids and grids.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from schemas.bins import MEDIA_VIDEO
from schemas.qwen import MERGE_SIZE, Grid
from schemas.wording import counted

_ROUNDINGS = 4
"""Float64 steps by which the writer's products may exceed the exact ones."""


def position_problem(positions: NDArray[np.int32], media: Sequence[tuple[int, Grid, int]]) -> str | None:
    """Check the positions of a sample.

    Args:
        positions: (3, n) int32: time, height, width.
        media: index of the first pad token in the sample, grid and media type of every medium, in order. Indices and
            sizes must fit the sample.

    Returns:
        A clause that names the first wrong token, or None.
    """
    length = positions.shape[1]
    # (3, n): text counts on in all three axes. A medium replaces the counts of its tokens by its extent.
    expected = np.broadcast_to(np.arange(length, dtype=np.int64), (3, length)).copy()
    for start, grid, kind in media:
        end = start + grid.num_tokens
        base = int(expected[0, start])
        rows, columns = grid.h // MERGE_SIZE, grid.w // MERGE_SIZE
        steps = np.zeros(grid.t, dtype=np.int64)
        if kind == MEDIA_VIDEO:
            # (t,): temporal position of the first token of every step, relative to the video's first.
            steps = positions[0, start : end : rows * columns].astype(np.int64) - base
            if not is_sampled_evenly(steps):
                return (
                    f"the temporal positions of the video at token {start} of the sample are {steps[:8].tolist()} "
                    "after its first, which no constant rate gives"
                )
        # Tokens of a medium run over t, then rows, then columns.
        token = np.arange(grid.num_tokens)
        expected[0, start:end] = base + np.repeat(steps, rows * columns)
        expected[1, start:end] = base + token // columns % rows
        expected[2, start:end] = base + token % columns
        if end < length:
            expected[:, end:] += int(expected[:, start:end].max()) + 1 - int(expected[0, end])
    return _difference(positions, expected)


def _difference(positions: NDArray[np.int32], expected: NDArray[np.int64]) -> str | None:
    wrong = np.flatnonzero((positions != expected).any(axis=0))
    if not wrong.size:
        return None
    first = int(wrong[0])
    return (
        f"wrong positions of {counted(wrong.size, 'token')}, the first at token {first} of the sample: "
        f"{positions[:, first].tolist()}, expected {expected[:, first].tolist()} (time, height, width)"
    )


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
    # A slightly smaller rate can still give these steps if its products are rounded up to whole numbers.
    for _ in range(_ROUNDINGS):
        rate = float(np.nextafter(rate, 0))
        if np.array_equal(np.floor(k * rate), steps[1:]):
            return True
    return False
