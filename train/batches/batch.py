"""The input of one forward pass, built on the CPU from one or several bins.

Checked bins (arrays as stored) -> :class:`MicroBatch` (tensors, ready to copy to the device). Everything that would
make the forward pass wait for the device is computed here: sample boundaries, target positions, inputs of the vision
tower. Pixels stay as stored, uint8 planes or their residuals, so one byte per value is copied to the device. Only JPEG
is decoded here, in the thread that builds the batch.

Cost: decompressing the pixels (1.1-1.8 GB/s of output on one core; 0.3 GB/s for JPEG, nothing for raw planes) and a
few passes over the tokens. Raw planes of a single bin are a view of the bytes read; all other planes go to a reused
buffer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
import zstandard
from numpy.typing import NDArray

from schemas.bins import MEDIA_IMAGE, Bin, frame_shape, stored_bytes, stored_frames
from schemas.errors import ShardError
from schemas.jpeg import split_streams
from schemas.pixels import encode_residuals
from schemas.qwen import IGNORE_INDEX, IMAGE_PAD, VIDEO_PAD, Grid
from storage.pixels import decode_jpegs
from train.batches.vision_inputs import WINDOW_SIZE, vision_inputs
from train.shards.buffers import Buffers

Medium = tuple[Grid, int]
"""Grid and media type (0 image, 1 video)."""

DUMMY_MEDIUM: Medium = (Grid(1, 2, 2), MEDIA_IMAGE)
"""The medium of a micro-batch without media, so that every rank calls the vision tower exactly once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionBatch:
    """Media of a micro-batch in sequence order: N patches, including those of a dummy image.

    Attributes:
        planes: (B,) uint8, all stored frames of all media, each frame planar (3, 14 h, 14 w).
        residuals: whether ``planes`` holds residuals that are still to be undone.
        media: grid and media type of every medium. Without media, one dummy image (1, 2, 2) of zeros, whose output row
            is not used by the sequence.
        position_ids: (N, 2) int64. This and the following: see :class:`train.batches.vision_inputs.VisionInputs`.
        cu_seqlens: (F+1,) int32.
        max_seqlen: patches of the longest segment of full attention.
        window_index: (N/4,) int64.
        cu_window_seqlens: (W+1,) int32.
        max_window_seqlen: patches of the longest window.
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

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> VisionBatch:
        """Return the batch with ``function`` applied to its tensors."""
        return replace(
            self,
            planes=function(self.planes),
            position_ids=function(self.position_ids),
            cu_seqlens=function(self.cu_seqlens),
            window_index=function(self.window_index),
            cu_window_seqlens=function(self.cu_window_seqlens),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Everything a forward pass needs: L tokens of S concatenated samples, T targets.

    Attributes:
        input_ids: (1, L) int64.
        position_ids: (3, 1, L) int64, mRoPE t, h, w.
        cu_seqlens: (S+1,) int32, sample boundaries.
        lengths: tokens of each sample, known without asking the device.
        max_seqlen: tokens of the longest sample.
        media_positions: (P,) int64, positions of the image and video pad tokens.
        target_positions: (T,) int64, positions whose next token is trained.
        targets: (T,) int64, those next tokens.
        vision: the media.
        bins: ids of the bins in the shard index. Empty for an empty position of the order, which is one token without
            targets.
        num_tokens: tokens that come from bins: L, or 0 for an empty position.
        num_samples: samples that come from bins: S, or 0 for an empty position.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    lengths: tuple[int, ...]
    max_seqlen: int
    media_positions: torch.Tensor
    target_positions: torch.Tensor
    targets: torch.Tensor
    vision: VisionBatch
    bins: tuple[int, ...]
    num_tokens: int
    num_samples: int

    def to(self, device: torch.device | str, non_blocking: bool = False) -> MicroBatch:
        """Return the batch with its tensors on ``device``; copies from pinned memory can be ``non_blocking``."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> MicroBatch:
        """Return the batch with its tensors in page-locked memory (needs an accelerator)."""
        return self.map(torch.Tensor.pin_memory)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
        """Return the batch with ``function`` applied to its tensors, including those of ``vision``."""
        return replace(
            self,
            input_ids=function(self.input_ids),
            position_ids=function(self.position_ids),
            cu_seqlens=function(self.cu_seqlens),
            media_positions=function(self.media_positions),
            target_positions=function(self.target_positions),
            targets=function(self.targets),
            vision=self.vision.map(function),
        )


def build_micro_batch(
    bins: Sequence[Bin],
    *,
    bin_ids: Sequence[int] | None = None,
    where: Sequence[object] | None = None,
    window_size: int = WINDOW_SIZE,
    memory: Sequence[torch.Tensor] | None = None,
    buffers: Buffers | None = None,
) -> MicroBatch:
    """Concatenate bins along the sequence.

    Args:
        bins: the bins; none for an empty position of the order. The first label of every sample is untrained.
        bin_ids: ids of the bins in the shard index; default: their ids in their own folders.
        where: location of each bin for error messages; default ``bin N``.
        window_size: ``vision_config.window_size`` of the model, in pixels.
        memory: the uint8 tensors of which the arrays of the bins are views, if any. Raw planes of a single bin are then
            a slice of its tensor, page-locked if the tensor is.
        buffers: source of memory for all other planes; default: fresh memory.

    Raises:
        ShardError: pixels do not decompress or decode, or their size does not match the media.
        ConfigError: ``window_size`` is not a positive multiple of 28.
    """
    tokens = _concatenate(bins) if bins else _empty_position()
    # lengths (S,) -> cu_seqlens (S+1,)
    cu_seqlens = np.zeros(tokens.lengths.size + 1, dtype=np.int32)
    tokens.lengths.cumsum(out=cu_seqlens[1:])
    # labels (L,) -> next_labels (L-1,) -> target_positions (T,). Position p predicts token p + 1. The first label of a
    # sample is never trained, so p and p + 1 always belong to the same sample.
    next_labels = tokens.labels[1:]
    target_positions = (next_labels != IGNORE_INDEX).nonzero()[0]
    media_positions = ((tokens.input_ids == IMAGE_PAD) | (tokens.input_ids == VIDEO_PAD)).nonzero()[0]
    lengths = tuple(tokens.lengths.tolist())
    return MicroBatch(
        input_ids=torch.from_numpy(tokens.input_ids[None].astype(np.int64)),
        position_ids=torch.from_numpy(tokens.position_ids[:, None].astype(np.int64)),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        lengths=lengths,
        max_seqlen=max(lengths),
        media_positions=torch.from_numpy(media_positions),
        target_positions=torch.from_numpy(target_positions),
        targets=torch.from_numpy(next_labels[target_positions].astype(np.int64)),
        vision=_vision_batch(bins, where, window_size, memory, buffers),
        bins=tuple(bin_ids) if bin_ids is not None else tuple(bin_.index for bin_ in bins),
        num_tokens=tokens.input_ids.size if bins else 0,
        num_samples=len(lengths) if bins else 0,
    )


class _Tokens(NamedTuple):
    """Concatenated tokens: input_ids (L,), labels (L,), position_ids (3, L), tokens of each sample (S,)."""

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    position_ids: NDArray[np.int32]
    lengths: NDArray[np.int32]


def _concatenate(bins: Sequence[Bin]) -> _Tokens:
    lengths = [bin_.cu_seqlens[1:] - bin_.cu_seqlens[:-1] for bin_ in bins]
    if len(bins) == 1:
        return _Tokens(bins[0].input_ids, bins[0].labels, bins[0].position_ids, lengths[0])
    return _Tokens(
        input_ids=np.concatenate([bin_.input_ids for bin_ in bins]),
        labels=np.concatenate([bin_.labels for bin_ in bins]),
        position_ids=np.concatenate([bin_.position_ids for bin_ in bins], axis=1),
        lengths=np.concatenate(lengths),
    )


def _empty_position() -> _Tokens:
    """One token without a target; token 0 exists in every vocabulary."""
    return _Tokens(
        input_ids=np.zeros(1, dtype=np.int32),
        labels=np.full(1, IGNORE_INDEX, dtype=np.int32),
        position_ids=np.zeros((3, 1), dtype=np.int32),
        lengths=np.ones(1, dtype=np.int32),
    )


def _vision_batch(
    bins: Sequence[Bin],
    where: Sequence[object] | None,
    window_size: int,
    memory: Sequence[torch.Tensor] | None,
    buffers: Buffers | None,
) -> VisionBatch:
    media_of_bins = [bin_.grids() for bin_ in bins]
    media = tuple(itertools.chain.from_iterable(media_of_bins))
    if media:
        where = where or [f"bin {bin_.index}" for bin_ in bins]
        planes, residuals = _planes(bins, media_of_bins, where, memory, buffers)
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
        num_patches=inputs.position_ids.shape[0],
    )


def _planes(
    bins: Sequence[Bin],
    media: Sequence[Sequence[Medium]],
    where: Sequence[object],
    memory: Sequence[torch.Tensor] | None,
    buffers: Buffers | None,
) -> tuple[torch.Tensor, bool]:
    """Planes of all bins (B,) uint8, and whether they are residuals.

    Bins of mixed codecs are all brought to residuals: encoding planes is cheaper on the CPU than undoing residuals.
    """
    sizes = [sum(itertools.starmap(stored_bytes, of_bin)) for of_bin in media]
    if len(bins) == 1 and bins[0].codec == "raw":
        pixels = bins[0].pixels
        _require_size(pixels.size, sizes[0], where[0])
        if memory is not None:
            start = pixels.__array_interface__["data"][0] - memory[0].data_ptr()
            return memory[0].narrow(0, start, pixels.size), False
        if pixels.flags.writeable:
            return torch.from_numpy(pixels), False
    residuals = any(bin_.codec == "zstd" for bin_ in bins)
    planes = torch.empty(sum(sizes), dtype=torch.uint8) if buffers is None else buffers.take(sum(sizes))
    parts = np.split(planes.numpy(), np.cumsum(sizes)[:-1])
    for bin_, of_bin, location, part in zip(bins, media, where, parts):
        if bin_.codec == "zstd":
            _decompress(bin_.pixels, part, location)
            continue
        if bin_.codec == "jpeg":
            decode_jpegs(split_streams(bin_, where=str(location)), part, str(location))
        else:
            _require_size(bin_.pixels.size, part.size, location)
            part[:] = bin_.pixels
        if residuals:
            _encode_in_place(part, of_bin)
    return planes, residuals


def _decompress(pixels: NDArray[np.uint8], out: NDArray[np.uint8], where: object) -> None:
    """Decompress one zstd frame into ``out``, which it must fill exactly."""
    target = out.data
    num_bytes = 0
    try:
        with zstandard.ZstdDecompressor().stream_reader(pixels.data) as reader:
            while num_bytes < out.size and (count := reader.readinto(target[num_bytes:])):
                num_bytes += count
            num_excess = len(reader.read(1))
    except zstandard.ZstdError as error:
        raise ShardError(f"{where}: its pixels do not decompress: {error}. Build the shards again.") from error
    _require_size(num_bytes + num_excess, out.size, where)


def _require_size(num_bytes: int, expected: int, where: object) -> None:
    if num_bytes != expected:
        at_least = "at least " if num_bytes > expected else ""
        raise ShardError(
            f"{where}: its pixels have {at_least}{num_bytes} bytes, its media need {expected}. Build the shards again."
        )


def _encode_in_place(planes: NDArray[np.uint8], media: Sequence[Medium]) -> None:
    """Replace the planes (B,) of all frames by their residuals."""
    start = 0
    for grid, media_type in media:
        shape = frame_shape(grid)
        size = int(np.prod(shape))
        for _ in range(stored_frames(grid, media_type)):
            frame = planes[start : start + size].reshape(shape)
            encode_residuals(frame, frame)
            start += size
