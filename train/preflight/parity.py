"""Are packed samples isolated? A started model and some bins -> samples whose losses depend on their neighbours.

Each bin is compared in two ways:

- with each of its samples run alone. Losses agree to rounding.
- with every second sample replaced by another one of the same length. The losses of the samples in between stay the
  same to the bit, which finds leaks that rounding hides in half precision. If kernels are not deterministic, they stay
  the same to rounding.

Cost: five forward passes of a few cheap bins.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from schemas.bins import Bin, stored_bytes
from schemas.qwen import IMAGE_PAD, MERGED_PATCHES, VIDEO_PAD
from schemas.wording import counted, listed
from train.batches.batch import MicroBatch, build_micro_batch
from train.preflight.passes import read_micro_batch
from train.run.engine import Engine
from train.run.evaluation import sum_by_sample
from train.shards.index import ShardIndex
from train.shards.reader import BinReader

logger = logging.getLogger(__name__)

NUM_COMPARED = 4
"""Bins that are compared, at most."""

TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Tolerance between the mean losses of a sample packed and alone, which may use other kernels and orders of summation.
Half precision rounds to 2 or 3 digits."""

_NUM_REPLACEMENTS = 1000
"""Token ids 1 to 1000 replace others; every vocabulary has them."""


LossesOf = Callable[[MicroBatch], NDArray[np.float64]]
"""A micro-batch on the CPU -> (S,) float64, the mean loss of every sample."""


def compare_packed(
    engine: Engine,
    reader: BinReader,
    index: ShardIndex,
    *,
    dtype: torch.dtype,
    device: torch.device,
    window_size: int,
) -> list[str]:
    """Compare a few bins with their samples alone, and with other samples as neighbours. All ranks run the same bins.

    Args:
        engine: the DeepSpeed engine.
        reader: reads the bins.
        index: the bins.
        dtype: dtype of the computation.
        device: device of the model.
        window_size: ``vision_config.window_size`` of the model, in pixels.

    Returns:
        Problems: samples whose losses differ by more than the tolerance.
    """
    bins = bins_to_compare(index)
    if not bins:
        logger.info("no bin holds several samples: there is nothing to compare")
        return []

    losses_of = partial(_mean_losses, engine, device)
    problems, num_samples, largest = [], 0, 0.0
    engine.eval()
    for bin_id in bins:
        stored = reader.read(bin_id).bin
        micro = read_micro_batch(reader, [bin_id], window_size=window_size)
        packed = losses_of(micro)
        alone = np.concatenate([losses_of(sample) for sample in split_samples(stored, micro, window_size)])
        num_samples += packed.size
        largest = max(largest, float(np.abs(packed - alone).max()))
        problems += _compare_alone(bin_id, packed, alone, TOLERANCES[dtype])
        problems += _compare_neighbours(stored, micro, packed, losses_of, TOLERANCES[dtype])
    engine.train()
    logger.info(
        "%s of %s: mean losses packed and alone differ by at most %.2g; tolerance in %s: %g",
        counted(num_samples, "sample"),
        listed("bin", bins),
        largest,
        str(dtype).removeprefix("torch."),
        TOLERANCES[dtype],
    )
    return problems


def bins_to_compare(index: ShardIndex) -> list[int]:
    """The cheapest bin with several samples of each kind (text, images, videos, both) that exists."""
    order = np.argsort(index.cost(), kind="stable")
    chosen: dict[tuple[bool, bool], int] = {}
    for bin_id in order[index.num_samples[order] > 1].tolist():
        chosen.setdefault((bool(index.num_images[bin_id]), bool(index.num_videos[bin_id])), bin_id)
        if len(chosen) == NUM_COMPARED:
            break
    return list(chosen.values())


def split_samples(stored: Bin, micro: MicroBatch, window_size: int) -> list[MicroBatch]:
    """One micro-batch for each sample of a bin.

    Args:
        stored: the bin.
        micro: the micro-batch of this bin alone on the CPU, which provides the planes of the media.
        window_size: ``vision_config.window_size`` of the model, in pixels.
    """
    media_starts, byte_starts = _media_boundaries(stored)
    planes = micro.vision.planes.numpy()
    samples = []
    for slot, (start, end) in enumerate(zip(stored.cu_seqlens[:-1].tolist(), stored.cu_seqlens[1:].tolist())):
        first, last = media_starts[slot : slot + 2].tolist()
        alone = replace(
            stored,
            input_ids=stored.input_ids[start:end],
            labels=stored.labels[start:end],
            position_ids=stored.position_ids[:, start:end],
            cu_seqlens=np.array([0, end - start], dtype=np.int32),
            grid_thw=stored.grid_thw[first:last],
            media_type=stored.media_type[first:last],
            pixels=planes[byte_starts[slot] : byte_starts[slot + 1]],
            codec="raw",
        )
        built = build_micro_batch([alone], window_size=window_size)
        samples.append(replace(built, vision=replace(built.vision, residuals=micro.vision.residuals)))
    return samples


def change_samples(stored: Bin, micro: MicroBatch, slots: Sequence[int]) -> MicroBatch:
    """The same micro-batch with other text and images in some samples; all lengths stay the same.

    Args:
        stored: the bin.
        micro: the micro-batch of this bin alone, on the CPU.
        slots: positions of the samples in the bin.
    """
    input_ids, planes = micro.input_ids.clone(), micro.vision.planes.clone()
    _, byte_starts = _media_boundaries(stored)
    for slot in slots:
        ids = input_ids[0, stored.cu_seqlens[slot] : stored.cu_seqlens[slot + 1]]
        is_pad = (ids == IMAGE_PAD) | (ids == VIDEO_PAD)
        ids.copy_(torch.where(is_pad, ids, 1 + ids % _NUM_REPLACEMENTS))
        planes[byte_starts[slot] : byte_starts[slot + 1]].bitwise_not_()
    return replace(micro, input_ids=input_ids, vision=replace(micro.vision, planes=planes))


def _mean_losses(engine: Engine, device: torch.device, micro: MicroBatch) -> NDArray[np.float64]:
    """Mean loss of every sample: (S,) float64."""
    with torch.no_grad():
        scores = engine(micro.to(device), scores=True).double().cpu().numpy()
    results = sum_by_sample(micro, scores)
    means: NDArray[np.float64] = results["loss"] / np.maximum(1, results["num_targets"])
    return means


def _compare_alone(bin_id: int, packed: NDArray[np.float64], alone: NDArray[np.float64], tolerance: float) -> list[str]:
    return [
        f"sample {slot} of bin {bin_id} has a loss of {packed[slot]:.6g} packed and {alone[slot]:.6g} alone, more than "
        f"{tolerance:g} apart"
        for slot, difference in enumerate(np.abs(packed - alone).tolist())
        if not difference <= tolerance  # NaN is too large
    ]


def _compare_neighbours(
    stored: Bin, micro: MicroBatch, packed: NDArray[np.float64], losses_of: LossesOf, tolerance: float
) -> list[str]:
    """Change every second sample, then the others. The losses of those that are not changed must stay the same."""
    is_deterministic = np.array_equal(losses_of(micro), packed)
    allowed = 0.0 if is_deterministic else tolerance
    problems, (bin_id,) = [], micro.bins
    for unchanged in (0, 1):
        slots = [slot for slot in range(packed.size) if slot % 2 != unchanged]
        losses = losses_of(change_samples(stored, micro, slots))
        problems += [
            f"sample {slot} of bin {bin_id} has a loss of {packed[slot]:.6g}, but {losses[slot]:.6g} with other "
            "neighbours in the bin"
            for slot in range(unchanged, packed.size, 2)
            if not abs(losses[slot] - packed[slot]) <= allowed
        ]
    return problems


def _media_boundaries(stored: Bin) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First medium of every sample, and offset of its planes: (S+1,) int64 each, ending with the totals."""
    media = stored.grids()
    is_pad = (stored.input_ids == IMAGE_PAD) | (stored.input_ids == VIDEO_PAD)
    # (M,) pad tokens before each medium
    pads_before = np.cumsum([0, *(grid.num_patches // MERGED_PATCHES for grid, _ in media)])[:-1].astype(np.int64)
    # (M,) sample that holds the first pad token of each medium
    sample = np.searchsorted(stored.cu_seqlens, np.flatnonzero(is_pad)[pads_before], side="right") - 1
    # (S+1,) first medium of each sample; (M+1,) offset of each medium
    media_starts = np.searchsorted(sample, np.arange(stored.cu_seqlens.size)).astype(np.int64)
    offsets = np.cumsum([0, *(stored_bytes(grid, kind) for grid, kind in media)]).astype(np.int64)
    return media_starts, offsets[media_starts]
