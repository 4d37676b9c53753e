"""Stored planes -> ``pixel_values``, on the device that holds the planes.

Undoes the residuals (two cumulative sums and two additions modulo 256), reorders frames into patches as the
processor does, and normalises. Values come from a table computed with the operations of the Pillow image processor,
so they equal its float32 values bit for bit on every device. In half precision the table is rounded, not the values:
the same, at half the memory.

Cost: media of equal frame size that follow one another are handled together in a dozen operations; each output value
is written once. On the way a run of media takes 4 bytes for each of its pixel values, and their own.
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

    Order of rows and columns, and values, are those of ``Qwen2VLImageProcessorPil`` (transformers 5.23); a clip is
    patchified in pairs of frames as ``Qwen2VLVideoProcessor.patchify`` does.

    Args:
        vision: N patches in ``media``.
        dtype: what the vision tower computes in; float32 values are rounded to it.

    Returns:
        (N, 1176) ``dtype`` on the device of ``vision.planes``.
    """
    table = _value_table(vision.planes.device, dtype)
    values = torch.empty((vision.num_patches, PATCH_DIM), dtype=dtype, device=vision.planes.device)
    byte, row = 0, 0
    for frames_shape, frames_per_step in _runs(vision.media):
        num_bytes = int(np.prod(frames_shape))
        frames = vision.planes[byte : byte + num_bytes].view(frames_shape)
        if vision.residuals:
            frames = undo_residuals(frames)
        codes = _patchify(frames, frames_per_step)
        # (rows, 3, 1 or 2, 14 * 14): the second frame of an image is the first once more
        lit = torch.index_select(table, 0, codes.view(-1)).view(codes.shape)
        rows = len(codes)
        values[row : row + rows].view(rows, 3, TEMPORAL_PATCH_SIZE, PATCH_SIZE * PATCH_SIZE).copy_(lit)
        byte, row = byte + num_bytes, row + rows
    return values


def undo_residuals(residuals: torch.Tensor) -> torch.Tensor:
    """Undo :func:`schemas.pixels.encode_residuals` for frames of one size: (F, 3, H, W) uint8 -> the same."""
    frames = torch.cumsum(residuals, dim=3, dtype=torch.uint8)
    frames = torch.cumsum(frames, dim=2, dtype=torch.uint8)
    frames[:, 0] += frames[:, 1]
    frames[:, 2] += frames[:, 1]
    return frames


def _runs(media: tuple[Medium, ...]) -> Iterator[tuple[tuple[int, int, int, int], int]]:
    """For media alike that follow one another: shape (F, 3, H, W) of their frames, and frames of a temporal step."""
    for (shape, _), run in groupby(media, key=lambda medium: (frame_shape(medium[0]), medium[1])):
        alike = list(run)
        num_frames = sum(stored_frames(grid, media_type) for grid, media_type in alike)
        yield (num_frames, *shape), num_frames // sum(grid.t for grid, _ in alike)


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
    codes = ordered.reshape(-1, channels, frames_per_step, PATCH_SIZE * PATCH_SIZE).to(torch.int32)
    codes += 256 * torch.arange(channels, dtype=torch.int32, device=frames.device).view(1, channels, 1, 1)
    return codes


@lru_cache(maxsize=16)
def _value_table(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Normalised value of every code of every channel: (3 * 256,) ``dtype``, channel after channel.

    The processor's own operations: scaled by 1/255 in float64 and rounded to float32 (``rescale``), then the mean
    subtracted and the result divided by the deviation in float32 (``normalize``).
    """
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    mean, std = (np.array(stats, dtype=np.float32)[:, None] for stats in (IMAGE_MEAN, IMAGE_STD))
    return torch.from_numpy(((scaled - mean) / std).ravel()).to(device, dtype)
