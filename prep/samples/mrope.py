"""Multimodal rotary positions, as the model was trained with them.

Source: ``get_rope_index`` of transformers 4.49 (``modeling_qwen2_5_vl.py``) and the Qwen2.5-VL report, section 2.1.3:
the temporal index of a video step is ``floor(k * second_per_grid_t * tokens_per_second)``, that of an image 0. Text
after a medium continues at the maximum over all three axes plus 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from schemas.qwen import IMAGE_PAD, MERGE_SIZE, TOKENS_PER_SECOND, VIDEO_PAD, Grid


def position_ids(
    input_ids: NDArray[np.int32], grids: Sequence[Grid], second_per_grid_t: Sequence[float]
) -> NDArray[np.int32]:
    """Positions (3, L) int32 of one sample: rows are time, height, width.

    Args:
        input_ids: (L,) int32 with all pad tokens of every medium.
        grids: size of every medium in sequence order, in patches.
        second_per_grid_t: seconds of a temporal step of each medium; ignored for images.

    Raises:
        ValueError: the runs of pad tokens do not match ``grids``.
    """
    length = input_ids.size
    is_pad = (input_ids == IMAGE_PAD) | (input_ids == VIDEO_PAD)
    positions = np.empty((3, length), dtype=np.int32)
    at, following = 0, 0
    for grid, seconds in zip(grids, second_per_grid_t, strict=True):
        start = at + int(np.argmax(is_pad[at:])) if at < length else length
        if start >= length or not is_pad[start : start + grid.num_tokens].all():
            raise ValueError(f"no run of {grid.num_tokens} pad tokens from position {at} on")
        positions[:, at:start] = np.arange(following, following + start - at, dtype=np.int32)
        following += start - at
        rows, columns = grid.h // MERGE_SIZE, grid.w // MERGE_SIZE
        seconds_per_step = seconds if input_ids[start] == VIDEO_PAD else 0.0
        # (3, t, rows, columns): one position per merged patch, in the order of the pad tokens.
        steps = np.floor(np.arange(grid.t) * seconds_per_step * TOKENS_PER_SECOND)
        medium = np.empty((3, grid.t, rows, columns), dtype=np.int32)
        medium[0] = steps.astype(np.int32)[:, None, None]
        medium[1] = np.arange(rows, dtype=np.int32)[None, :, None]
        medium[2] = np.arange(columns, dtype=np.int32)[None, None, :]
        at = start + grid.num_tokens
        positions[:, start:at] = following + medium.reshape(3, -1)
        following += int(medium.max()) + 1
    if is_pad[at:].any():
        raise ValueError(f"pad tokens without a medium after position {at}")
    positions[:, at:] = np.arange(following, following + length - at, dtype=np.int32)
    return positions
