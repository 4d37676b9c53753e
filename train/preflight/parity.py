"""Whether packed samples see nothing of one another: a running model and some bins -> differences that are too large.

Two ways. A bin is run packed, and each of its samples alone: their losses agree to rounding, whatever the reason that
they would not. Then the bin is run with other samples in every second place, of the same lengths: the losses of those
in between stay the same to the bit, also in half precision, where rounding hides a little of a neighbour. Where kernels
do not give the same twice, they stay the same to rounding.

Cost: five forward passes of a few cheap bins.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from schemas.bins import Bin, stored_bytes
from schemas.qwen import IMAGE_PAD, MERGED_PATCHES, VIDEO_PAD
from train.batches.batch import MicroBatch, build_micro_batch
from train.run.engine import Engine
from train.run.evaluation import sum_by_sample
from train.run.plan import Plan
from train.shards.index import ShardIndex
from train.shards.reader import BinReader

logger = logging.getLogger(__name__)

NUM_COMPARED = 4
"""Bins that are run packed and apart."""

TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far the mean losses of a sample, packed and alone, may be apart, in which other kernels and other orders of
summation differ. Half precision rounds to 3 or 2 digits."""

_NUM_OTHER_TOKENS = 1000
"""Tokens 1 to 1000 stand in for others; every vocabulary has them."""


def read_micro_batch(plan: Plan, reader: BinReader, bins: Sequence[int]) -> MicroBatch:
    """Read bins, and make a micro-batch of them, on the CPU."""
    loaded = [reader.read(number) for number in bins]
    return build_micro_batch(
        [one.bin for one in loaded],
        bin_ids=bins,
        where=[str(one.location) for one in loaded],
        window_size=plan.shape.window_size,
    )


def compare_packed(engine: Engine, plan: Plan, reader: BinReader) -> list[str]:
    """Run a few bins, their samples alone, and the bins with other neighbours; give what differs too much.

    All ranks call this together, and run the same.
    """
    tolerance, bins = TOLERANCES[plan.compute.dtype], bins_to_compare(plan.index)
    if not bins:
        logger.info("no bin holds several samples: there is nothing to compare")
        return []
    problems, num_samples, largest = [], 0, 0.0
    engine.eval()
    for number in bins:
        one = reader.read(number).bin
        micro = read_micro_batch(plan, reader, [number])
        packed = _losses(engine, plan, micro)
        apart = np.concatenate([_losses(engine, plan, sample) for sample in split_samples(one, micro, plan)])
        num_samples += packed.size
        for slot, difference in enumerate(np.abs(packed - apart).tolist()):
            largest = max(largest, difference)
            # A difference that is no number is too large.
            if not difference <= tolerance:
                problems.append(
                    f"sample {slot} of bin {number} has a loss of {packed[slot]:.6g} packed and {apart[slot]:.6g} "
                    f"alone, more than {tolerance:g} apart"
                )
        problems += _compare_neighbours(engine, plan, one, micro, packed)
    engine.train()
    logger.info(
        "%d samples of bins %s: mean losses packed and alone differ by %.2g at most, allowed in %s: %g",
        num_samples,
        bins,
        largest,
        str(plan.compute.dtype).removeprefix("torch."),
        tolerance,
    )
    return problems


def bins_to_compare(index: ShardIndex) -> list[int]:
    """The cheapest bins with several samples: of each kind one (text, pictures, clips, both), as far as there are."""
    order = np.argsort(index.cost(), kind="stable")
    chosen: dict[tuple[bool, bool], int] = {}
    for number in order[index.num_samples[order] > 1].tolist():
        chosen.setdefault((bool(index.num_images[number]), bool(index.num_videos[number])), number)
        if len(chosen) == NUM_COMPARED:
            break
    return list(chosen.values())


def split_samples(one: Bin, micro: MicroBatch, plan: Plan) -> list[MicroBatch]:
    """Micro-batches of a bin's samples, each alone.

    Args:
        one: the bin.
        micro: the micro-batch of this bin alone, on the CPU; planes of media are taken from it.
        plan: the run.
    """
    first_media, first_bytes = _borders_of_samples(one)
    planes = micro.vision.planes.numpy()
    samples = []
    for slot, (start, end) in enumerate(zip(one.cu_seqlens[:-1].tolist(), one.cu_seqlens[1:].tolist())):
        first, last = first_media[slot : slot + 2].tolist()
        alone = replace(
            one,
            input_ids=one.input_ids[start:end],
            labels=one.labels[start:end],
            position_ids=one.position_ids[:, start:end],
            cu_seqlens=np.array([0, end - start], dtype=np.int32),
            grid_thw=one.grid_thw[first:last],
            media_type=one.media_type[first:last],
            pixels=planes[first_bytes[slot] : first_bytes[slot + 1]],
            codec="raw",
        )
        built = build_micro_batch([alone], window_size=plan.shape.window_size)
        samples.append(replace(built, vision=replace(built.vision, residuals=micro.vision.residuals)))
    return samples


def change_samples(one: Bin, micro: MicroBatch, slots: Sequence[int]) -> MicroBatch:
    """The same micro-batch with other words and pictures in some samples; no length changes.

    Args:
        one: the bin.
        micro: the micro-batch of this bin alone, on the CPU.
        slots: places of the samples in the bin.
    """
    input_ids, planes = micro.input_ids.clone(), micro.vision.planes.clone()
    _, first_bytes = _borders_of_samples(one)
    for slot in slots:
        ids = input_ids[0, one.cu_seqlens[slot] : one.cu_seqlens[slot + 1]]
        is_pad = (ids == IMAGE_PAD) | (ids == VIDEO_PAD)
        ids.copy_(torch.where(is_pad, ids, 1 + ids % _NUM_OTHER_TOKENS))
        planes[first_bytes[slot] : first_bytes[slot + 1]].bitwise_not_()
    return replace(micro, input_ids=input_ids, vision=replace(micro.vision, planes=planes))


def _compare_neighbours(engine: Engine, plan: Plan, one: Bin, micro: MicroBatch, losses: Any) -> list[str]:
    """Change every second sample, then the others; give the samples that notice."""
    # Kernels that do not give the same twice would be told apart from a leak by their size only.
    again = _losses(engine, plan, micro)
    allowed = 0.0 if np.array_equal(again, losses) else TOLERANCES[plan.compute.dtype]
    problems, (number,) = [], micro.bins
    for kept in (0, 1):
        slots = [slot for slot in range(losses.size) if slot % 2 != kept]
        found = _losses(engine, plan, change_samples(one, micro, slots))
        problems += [
            f"sample {slot} of bin {number} has a loss of {losses[slot]:.6g}, but of {found[slot]:.6g} where its "
            "neighbours in the bin are others"
            for slot in range(kept, losses.size, 2)
            if not abs(found[slot] - losses[slot]) <= allowed
        ]
    return problems


def _borders_of_samples(one: Bin) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First medium of every sample, and first byte of its planes: (S+1,) int64 each, with their numbers at the end."""
    media = one.grids()
    is_pad = (one.input_ids == IMAGE_PAD) | (one.input_ids == VIDEO_PAD)
    # (M,): pad tokens before each medium, and the sample that its first one is in
    before = np.cumsum([0, *(grid.num_patches // MERGED_PATCHES for grid, _ in media)])[:-1].astype(np.int64)
    owner = np.searchsorted(one.cu_seqlens, np.flatnonzero(is_pad)[before], side="right") - 1
    first_media = np.searchsorted(owner, np.arange(one.cu_seqlens.size)).astype(np.int64)
    first_bytes = np.cumsum([0, *(stored_bytes(grid, kind) for grid, kind in media)]).astype(np.int64)
    return first_media, first_bytes[first_media]


def _losses(engine: Engine, plan: Plan, micro: MicroBatch) -> Any:
    """Mean loss of every sample of a micro-batch: (S,) float64."""
    with torch.no_grad():
        scores = engine(micro.to(plan.compute.device), scores=True).double().cpu().numpy()
    results = sum_by_sample(micro, scores)
    return results["loss"] / np.maximum(1, results["num_targets"])
