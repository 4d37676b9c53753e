"""Stored planes -> ``pixel_values``, on the device that holds the planes.

Undoes the residuals (two cumulative sums and two additions modulo 256), reorders frames into patches like the
processor, and normalises. Normalised values come from a lookup table computed with the operations of the Pillow image
processor, so they equal its float32 values bit for bit on every device. For half precision the table is rounded, which
gives the same values as rounding the result, at half the memory.

Cost: consecutive media of equal frame size are processed together in a dozen operations; each output value is written
once. The temporary memory is 4 bytes per pixel value of such a run, plus the values themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby

import numpy as np
import torch

from schemas.bins import frame_shape, stored_frames
from schemas.qwen import (
    IMAGE_MEAN,
    IMAGE_STD,
    MERGE_SIZE,
    PATCH_DIM,
    PATCH_SIZE,
    TEMPORAL_PATCH_SIZE,
)
from train.batches.batch import Medium, VisionBatch


def pixel_values(vision: VisionBatch, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rebuild the processor's ``pixel_values``.

    Values and their order equal those of ``Qwen2VLImageProcessorPil`` (transformers 5.23). Pairs of video frames are
    patchified as in ``Qwen2VLVideoProcessor.patchify``.

    Args:
        vision: N patches in ``media``.
        dtype: compute dtype of the vision tower; float32 values are rounded to it.

    Returns:
        (N, 1176) ``dtype`` on the device of ``vision.planes``.
    """
    table = _value_table(vision.planes.device, dtype)
    values = torch.empty((vision.num_patches, PATCH_DIM), dtype=dtype, device=vision.planes.device)
    byte, row = 0, 0
    for frames_shape, frames_per_step in _runs(vision.media):
        num_bytes = int(np.prod(frames_shape))
        # planes (B,) -> frames (F, 3, H, W)
        frames = vision.planes[byte : byte + num_bytes].view(frames_shape)
        if vision.residuals:
            frames = undo_residuals(frames)
        # codes, looked_up: (R, 3, frames_per_step, 14 * 14)
        codes = _patchify(frames, frames_per_step)
        looked_up = torch.index_select(table, 0, codes.view(-1)).view(codes.shape)
        num_rows = len(codes)
        # (R, 1176) = (R, 3, 2, 14 * 14); an image broadcasts its only frame to both temporal positions.
        rows = values[row : row + num_rows].view(num_rows, 3, TEMPORAL_PATCH_SIZE, PATCH_SIZE * PATCH_SIZE)
        rows.copy_(looked_up)
        byte, row = byte + num_bytes, row + num_rows
    return values


def undo_residuals(residuals: torch.Tensor) -> torch.Tensor:
    """Invert :func:`schemas.pixels.encode_residuals` for frames of one size: (F, 3, H, W) uint8 -> same shape."""
    frames = torch.cumsum(residuals, dim=3, dtype=torch.uint8)
    frames = torch.cumsum(frames, dim=2, dtype=torch.uint8)
    frames[:, 0] += frames[:, 1]
    frames[:, 2] += frames[:, 1]
    return frames


def _runs(media: tuple[Medium, ...]) -> Iterator[tuple[tuple[int, int, int, int], int]]:
    """Group consecutive media of one type and frame size; yield the shape (F, 3, H, W) and frames per temporal step."""
    for (shape, _), group in groupby(media, key=lambda medium: (frame_shape(medium[0]), medium[1])):
        run = list(group)
        num_frames = sum(stored_frames(grid, media_type) for grid, media_type in run)
        yield (num_frames, *shape), num_frames // sum(grid.t for grid, _ in run)


def _patchify(frames: torch.Tensor, frames_per_step: int) -> torch.Tensor:
    """Frames (F, 3, H, W) uint8 -> rows of the value table (R, 3, frames_per_step, 196) int32, in merge-block order."""
    num_frames, channels, height, width = frames.shape
    block = MERGE_SIZE * PATCH_SIZE
    # (step, frame, channel, block row, row in block, y, block column, column in block, x)
    split = frames.view(
        num_frames // frames_per_step,
        frames_per_step,
        channels,
        height // block,
        MERGE_SIZE,
        PATCH_SIZE,
        width // block,
        MERGE_SIZE,
        PATCH_SIZE,
    )
    # (step, block row, block column, row in block, column in block, channel, frame, y, x)
    ordered = split.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    # (R, channel, frame, y * x), with R = steps * rows * columns of patches
    codes = ordered.reshape(-1, channels, frames_per_step, PATCH_SIZE * PATCH_SIZE).to(torch.int32)
    # The table holds 256 values per channel, one channel after the other.
    codes += 256 * torch.arange(channels, dtype=torch.int32, device=frames.device).view(1, channels, 1, 1)
    return codes


@lru_cache(maxsize=16)
def _value_table(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Normalised value of every code of every channel: (3 * 256,) ``dtype``, channel by channel.

    The operations are the processor's: ``rescale`` multiplies by 1/255 in float64 and rounds to float32, ``normalize``
    subtracts the mean and divides by the standard deviation in float32.
    """
    # (256,) - (3, 1) -> (3, 256)
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    mean, std = (np.array(stats, dtype=np.float32)[:, None] for stats in (IMAGE_MEAN, IMAGE_STD))
    return torch.from_numpy(((scaled - mean) / std).ravel()).to(device, dtype)
