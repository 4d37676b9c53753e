"""What one forward pass needs, built on the CPU from one or several bins.

Checked bins (arrays as stored) -> :class:`MicroBatch` (tensors, ready for the copy to the device). Everything that
would make the forward pass wait for the device is computed here: borders of the samples, target positions, inputs of
the vision tower. Pixels stay what they are on disk, uint8 planes or their residuals: one byte a value crosses to the
device. JPEG alone is decoded here, in the thread that builds the batch.

Cost: decompression of the pixels (1.1-1.8 GB/s of output on one core; 0.3 GB/s for JPEG, none for raw planes) and a few
passes over the tokens. Raw planes of a single bin are a view of the bytes read; all other planes go to a buffer that is
used again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

from schemas.bins import MEDIA_IMAGE, Bin, frame_shape, stored_bytes, stored_frames
from schemas.errors import ShardError
from schemas.pixels import encode_residuals
from schemas.qwen import IGNORE_INDEX, Grid
from train.batches.vision_inputs import WINDOW_SIZE, vision_inputs
from train.shards.buffers import Buffers
from train.shards.jpeg import decode_jpegs

Medium = tuple[Grid, int]
"""Grid and media type (0 image, 1 video)."""

DUMMY_MEDIUM: Medium = (Grid(1, 2, 2), MEDIA_IMAGE)
"""Stands in where a micro-batch has no media, so that every rank calls the vision tower exactly once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionBatch:
    """Media of a micro-batch, in sequence order. N patches, including those of a dummy image.

    Attributes:
        planes: (B,) uint8, all stored frames of all media, each frame planar (3, 14 h, 14 w).
        residuals: whether ``planes`` holds residuals that are still to be undone.
        media: grid and media type of every medium; one dummy image (1, 2, 2) of zeros where there are no media. Its
            output row has no place in the sequence and is not used.
        position_ids: (N, 2) int64, as are all that follow: see :class:`train.batches.vision_inputs.VisionInputs`.
        cu_seqlens: (F+1,) int32.
        max_seqlen: longest segment of full attention.
        window_index: (N/4,) int64.
        cu_window_seqlens: (W+1,) int32.
        max_window_seqlen: longest window.
        num_patches: N, rows of ``pixel_values``.
    """

    planes: torch.Tensor
    residuals: bool
    media: tuple[Medium, ...]
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    window_index: torch.Tensor
    cu_window_seqlens: torch.Tensor
    max_window_seqlen: int
    num_patches: int

    def map(self, move: Callable[[torch.Tensor], torch.Tensor]) -> VisionBatch:
        """The same batch with ``move`` applied to its tensors."""
        return replace(
            self,
            planes=move(self.planes),
            position_ids=move(self.position_ids),
            cu_seqlens=move(self.cu_seqlens),
            window_index=move(self.window_index),
            cu_window_seqlens=move(self.cu_window_seqlens),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Everything a forward pass needs. L tokens of S samples one after the other, T targets.

    Attributes:
        input_ids: (1, L) int64.
        position_ids: (3, 1, L) int64, mRoPE t, h, w.
        cu_seqlens: (S+1,) int32, borders of the samples.
        lengths: tokens of each sample, known without asking the device.
        max_seqlen: longest sample.
        target_positions: (T,) int64, positions whose next token is trained.
        targets: (T,) int64, those next tokens.
        most_targets: T of the rank that has most in this micro-step; all ranks take as many chunks of logits.
        vision: the media.
        bins: numbers of the bins in the set of shards; empty for an empty place of the order, which is one token
            without targets.
        num_tokens: tokens that come from bins: L, or 0 for an empty place.
        num_samples: samples that come from bins: S, or 0 for an empty place.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    lengths: tuple[int, ...]
    max_seqlen: int
    target_positions: torch.Tensor
    targets: torch.Tensor
    most_targets: int
    vision: VisionBatch
    bins: tuple[int, ...]
    num_tokens: int
    num_samples: int

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MicroBatch:
        """The same batch with its tensors on ``device``; copies from pinned memory can run ``non_blocking``."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> MicroBatch:
        """The same batch with its tensors in page-locked memory (needs an accelerator)."""
        return self.map(torch.Tensor.pin_memory)

    def map(self, move: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        """The same batch with ``move`` applied to its tensors, those of ``vision`` included."""
        return replace(
            self,
            input_ids=move(self.input_ids),
            position_ids=move(self.position_ids),
            cu_seqlens=move(self.cu_seqlens),
            target_positions=move(self.target_positions),
            targets=move(self.targets),
            vision=self.vision.map(move),
        )


def build_micro_batch(
    bins: Sequence[Bin],
    *,
    numbers: Sequence[int] | None = None,
    where: Sequence[str] | None = None,
    most_targets: int = 0,
    window_size: int = WINDOW_SIZE,
    memory: Sequence[torch.Tensor] | None = None,
    buffers: Buffers | None = None,
) -> MicroBatch:
    """Concatenate bins along the sequence.

    Args:
        bins: the bins (none for an empty place of the order); no sample's first label is trained.
        numbers: their numbers in a mixed set of shards; the numbers in their own folders if not given.
        where: how to name the place of each in messages; ``bin N`` if not given.
        most_targets: of the ranks that take part in the micro-step; no other rank if not given.
        window_size: ``vision_config.window_size`` of the model, in pixels.
        memory: the uint8 tensors that the arrays of the bins are views of, if they are: raw planes of a single bin are
            then a part of its tensor, and page-locked if that is.
        buffers: where other planes go; fresh memory if not given.

    Raises:
        ShardError: pixels do not decompress or decode, or have another size than the media need.
        ConfigError: ``window_size`` is not a positive multiple of 28.
    """
    places = where if where is not None else [f"bin {one.index}" for one in bins]
    if bins:
        input_ids = np.concatenate([one.input_ids for one in bins], dtype=np.int64)
        labels = np.concatenate([one.labels for one in bins], dtype=np.int64)
        mrope = [one.position_ids for one in bins]
        lengths = np.concatenate([np.diff(one.cu_seqlens) for one in bins])
    else:
        input_ids = np.zeros(1, dtype=np.int64)  # token 0 exists in every vocabulary
        labels = np.full(1, IGNORE_INDEX, dtype=np.int64)
        mrope = [np.zeros((3, 1), dtype=np.int32)]
        lengths = np.ones(1, dtype=np.int32)
    cu_seqlens = np.zeros(lengths.size + 1, dtype=np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    position_ids = np.concatenate(mrope, axis=1, dtype=np.int64)
    # The first label of a sample is never trained, so a position and its target are always of one sample.
    target_positions = np.flatnonzero(labels[1:] != IGNORE_INDEX)
    if numbers is None:
        numbers = [one.index for one in bins]
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids[None]),
        position_ids=torch.from_numpy(position_ids[:, None]),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        lengths=tuple(lengths.tolist()),
        max_seqlen=int(lengths.max()),
        target_positions=torch.from_numpy(target_positions),
        targets=torch.from_numpy(labels[target_positions + 1]),
        most_targets=max(most_targets, target_positions.size),
        vision=_vision_batch(bins, places, window_size, memory, buffers),
        bins=tuple(numbers),
        num_tokens=input_ids.size if bins else 0,
        num_samples=lengths.size if bins else 0,
    )


def _vision_batch(
    bins: Sequence[Bin],
    where: Sequence[str],
    window_size: int,
    memory: Sequence[torch.Tensor] | None,
    buffers: Buffers | None,
) -> VisionBatch:
    media = tuple(medium for one in bins for medium in one.grids())
    if media:
        planes, residuals = _planes(bins, where, memory, buffers)
    else:
        media = (DUMMY_MEDIUM,)
        planes, residuals = torch.zeros(stored_bytes(*DUMMY_MEDIUM), dtype=torch.uint8), False
    inputs = vision_inputs([grid for grid, _ in media], window_size=window_size)
    return VisionBatch(
        planes=planes,
        residuals=residuals,
        media=media,
        position_ids=torch.from_numpy(inputs.position_ids),
        cu_seqlens=torch.from_numpy(inputs.cu_seqlens),
        max_seqlen=inputs.max_seqlen,
        window_index=torch.from_numpy(inputs.window_index),
        cu_window_seqlens=torch.from_numpy(inputs.cu_window_seqlens),
        max_window_seqlen=inputs.max_window_seqlen,
        num_patches=sum(grid.num_patches for grid, _ in media),
    )


def _planes(
    bins: Sequence[Bin], where: Sequence[str], memory: Sequence[torch.Tensor] | None, buffers: Buffers | None
) -> tuple[torch.Tensor, bool]:
    """Planes of all bins, and whether they are residuals. Bins of several codecs meet as residuals, the cheaper way."""
    residuals = any(one.codec == "zstd" for one in bins)
    if len(bins) == 1 and bins[0].codec == "raw":
        pixels = bins[0].pixels
        _require_size(pixels.size, bins[0].num_pixel_bytes, where[0])
        if memory is not None:
            start = pixels.ctypes.data - memory[0].data_ptr()
            return memory[0][start : start + pixels.size], False
        if pixels.flags.writeable:
            return torch.from_numpy(pixels), False
    sizes = [one.num_pixel_bytes for one in bins]
    planes = torch.empty(sum(sizes), dtype=torch.uint8) if buffers is None else buffers.take(sum(sizes))
    parts = np.split(planes.numpy(), np.cumsum(sizes)[:-1])
    for one, place, part in zip(bins, where, parts):
        if one.codec == "zstd":
            _decompress(one.pixels, part, place)
            continue
        if one.codec == "jpeg":
            decode_jpegs(one, part, place)
        else:
            _require_size(one.pixels.size, part.size, place)
            part[:] = one.pixels
        if residuals:
            _encode_in_place(part, one.grids())
    return planes, residuals


def _decompress(pixels: NDArray[np.uint8], out: NDArray[np.uint8], where: str) -> None:
    target = out.data
    filled = 0
    try:
        with zstandard.ZstdDecompressor().stream_reader(pixels.data) as reader:
            while filled < out.size and (count := reader.readinto(target[filled:])):
                filled += count
            excess = len(reader.read(1))
    except zstandard.ZstdError as error:
        raise ShardError(f"{where}: its pixels do not decompress: {error}. Build the shards again.") from error
    _require_size(filled + excess, out.size, where)


def _require_size(found: int, expected: int, where: str) -> None:
    if found != expected:
        more = "at least " if found > expected else ""
        raise ShardError(
            f"{where}: its pixels have {more}{found} bytes, its media need {expected}. Build the shards again."
        )


def _encode_in_place(planes: NDArray[np.uint8], media: Sequence[Medium]) -> None:
    start = 0
    for grid, media_type in media:
        shape = frame_shape(grid)
        size = int(np.prod(shape))
        for _ in range(stored_frames(grid, media_type)):
            frame = planes[start : start + size].reshape(shape)
            encode_residuals(frame, frame)
            start += size
