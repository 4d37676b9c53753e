"""Inputs of the vision tower that depend on the grids alone, computed on the CPU ahead of the forward pass.

Grids of all media in sequence order -> rotary positions, attention boundaries and window order of the patches.
transformers computes the same from ``grid_thw``, with a Python loop and several synchronisations with the device; it
skips both when given these tensors (``Qwen2_5_VisionTransformerPretrainedModel.forward`` of transformers 5.23 with
``grid_thw=None``).

Cost: one concatenation per output. The layout of a frame depends on its rows and columns only and is cached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from schemas.errors import ConfigError
from schemas.qwen import FACTOR, MERGE_SIZE, MERGED_PATCHES, Grid

WINDOW_SIZE = 112
"""Side of an attention window in pixels: ``vision_config.window_size`` of every Qwen2.5-VL checkpoint."""


_ZERO = np.zeros(1, dtype=np.int32)


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionInputs:
    """What the vision tower needs besides pixels, for N patches in the processor's merge-block order.

    Attributes:
        position_ids: (N, 2) int64, row and column of every patch.
        cu_seqlens: (F+1,) int32, boundaries of full attention: one segment per temporal step of each medium.
        max_seqlen: patches of the longest such segment.
        window_index: (N/4,) int64, merged patches in the order of their windows.
        cu_window_seqlens: (W+1,) int32, boundaries of window attention in patches; no window is empty.
        max_window_seqlen: patches of the longest window.
    """

    position_ids: NDArray[np.int64]
    cu_seqlens: NDArray[np.int32]
    max_seqlen: int
    window_index: NDArray[np.int64]
    cu_window_seqlens: NDArray[np.int32]
    max_window_seqlen: int


def vision_inputs(grids: Sequence[Grid], *, window_size: int = WINDOW_SIZE) -> VisionInputs:
    """Compute the inputs of the vision tower for concatenated media.

    They equal ``get_vision_position_ids``, ``get_vision_cu_seqlens`` and ``get_vision_window_index`` of
    ``transformers.vision_utils`` (5.23).

    Args:
        grids: one or more grids, in patches; rows and columns are even.
        window_size: side of an attention window in pixels, a multiple of 28.

    Raises:
        ConfigError: ``window_size`` is not a positive multiple of 28.
    """
    if window_size < FACTOR or window_size % FACTOR:
        raise ConfigError(f"vision_config.window_size is {window_size}; allowed: positive multiples of {FACTOR}.")
    frames = [_frame_layout(grid.h, grid.w, window_size // FACTOR) for grid in grids for _ in range(grid.t)]
    # Window order (N/4,) and ends of windows (W+1,), which count from the start of each frame at first.
    window_index = np.concatenate([frame.window_index for frame in frames])
    cu_window_seqlens = np.concatenate([_ZERO, *[frame.window_ends for frame in frames]])
    cu_seqlens, first_window = [0], 1
    for frame in frames:
        start, num_windows = cu_seqlens[-1], frame.window_ends.size
        end = start + MERGED_PATCHES * frame.window_index.size
        if start:
            window_index[start // MERGED_PATCHES : end // MERGED_PATCHES] += start // MERGED_PATCHES
            cu_window_seqlens[first_window : first_window + num_windows] += start
        cu_seqlens.append(end)
        first_window += num_windows
    return VisionInputs(
        position_ids=np.concatenate([frame.position_ids for frame in frames]),
        cu_seqlens=np.array(cu_seqlens, dtype=np.int32),
        max_seqlen=max([grid.h * grid.w for grid in grids]),
        window_index=window_index,
        cu_window_seqlens=cu_window_seqlens,
        max_window_seqlen=max([frame.max_window_seqlen for frame in frames]),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _FrameLayout:
    """One temporal step of h x w patches.

    Positions (h*w, 2), window order (h*w/4,), ends of windows in patches (W,), patches of the largest window.
    """

    position_ids: NDArray[np.int64]
    window_index: NDArray[np.int64]
    window_ends: NDArray[np.int32]
    max_window_seqlen: int


@lru_cache(maxsize=1024)
def _frame_layout(height: int, width: int, window: int) -> _FrameLayout:
    """Lay out one temporal step; sizes in patches, ``window`` in merged patches."""
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    blocks = (height // MERGE_SIZE, MERGE_SIZE, width // MERGE_SIZE, MERGE_SIZE)
    # (h, w) -> (block row, row in block, block column, column in block)
    #        -> (block row, block column, row in block, column in block) -> (h * w,)
    merge_block_order = [axis.reshape(blocks).transpose(0, 2, 1, 3).ravel() for axis in (rows, columns)]

    # (h/2, w/2): row and column of every merged patch
    merged_rows, merged_columns = np.meshgrid(
        np.arange(height // MERGE_SIZE), np.arange(width // MERGE_SIZE), indexing="ij"
    )
    windows_across = -(-(width // MERGE_SIZE) // window)
    # (h/2 * w/2,): window of every merged patch
    window_of_patch = (merged_rows // window * windows_across + merged_columns // window).ravel()
    window_lengths = np.bincount(window_of_patch) * MERGED_PATCHES
    layout = _FrameLayout(
        position_ids=np.stack(merge_block_order, axis=-1).astype(np.int64),
        window_index=np.argsort(window_of_patch, kind="stable").astype(np.int64),
        window_ends=np.cumsum(window_lengths).astype(np.int32),
        max_window_seqlen=int(window_lengths.max()),
    )
    for array in (layout.position_ids, layout.window_index, layout.window_ends):
        array.flags.writeable = False  # shared by all callers of the cache
    return layout
