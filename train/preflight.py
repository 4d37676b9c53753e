"""Looks before a run whether it will go well: flags -> what it needs of each rank, tried where that is quick.

All ranks do the same, in the same order:

1. settings, shards and checkpoint are compared, tokenizer and processor with the manifest (:mod:`train.plan`);
2. the memory of a rank is worked out and shown (:mod:`train.budget`);
3. the model is started as in training, and the largest micro-batch goes forward and backward once;
4. a few bins are run packed, and each of their samples alone: the losses must agree.

No optimizer step is made and nothing is written to the folder of the run. What is wrong is told at the end, all of it.

Cost: loading the model, one micro-batch, and two forward passes of the cheapest bins.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from schemas.bins import Bin, stored_bytes
from schemas.errors import ConfigError, VlprepError
from schemas.qwen import IMAGE_PAD, MERGED_PATCHES, VIDEO_PAD
from train import budget, engine, optim
from train.arguments import TrainArguments
from train.batch import MicroBatch, build_micro_batch
from train.cost import read_config
from train.evaluation import sum_by_sample
from train.index import ShardIndex
from train.loop import build_model, describe
from train.memory import DEVICE, GIB, MOMENTS, Memory, Phase
from train.metrics import peak_memory_bytes
from train.plan import Plan, make_plan, read_settings
from train.reader import BinReader
from train.sizes import sizes_of

logger = logging.getLogger(__name__)

NUM_COMPARED = 4
"""Bins that are run packed and apart."""

MAX_PROBLEMS_SHOWN = 8

TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""How far the mean losses of a sample, packed and alone, may be apart, in which other kernels and other orders of
summation differ. Half precision rounds to 3 or 2 digits, so there only a sample that sees much of its neighbour is
found; in float32 any is."""


def preflight(args: TrainArguments) -> None:
    """See whether a run would go well. All ranks call this together.

    Raises:
        ConfigError: settings, shards and checkpoint do not fit together, or the largest micro-batch takes more memory
            than there is.
        ShardError: shards are incomplete, or a bin is damaged.
        VlprepError: losses are not finite, or packed samples have others than the same samples alone.
    """
    plan = make_plan(args)
    check_folder(args.run_dir)
    prints = plan.index.manifests[0].fingerprints
    logger.info("tokenizer and processor of %s are those of the shards (%s)", plan.source, prints.tokenizer)
    memory = show_memory(plan)
    engine.start(plan.device)
    kept_for_loading = engine.keep_for_zero3(plan.deepspeed)
    model, groups = build_model(plan)
    describe(plan, groups)
    optimizer = optim.build_optimizer(groups, weight_decay=args.weight_decay)
    running = engine.initialize(model, optimizer, plan.deepspeed)
    reader = BinReader(plan.index, read_settings(args, plan.index))
    try:
        problems = [*run_largest(running, plan, reader, memory), *compare_packed(running, plan, reader)]
    finally:
        reader.close()
    del kept_for_loading
    engine.stop()
    if problems:
        rest = len(problems) - MAX_PROBLEMS_SHOWN
        shown = [*problems[:MAX_PROBLEMS_SHOWN], *([f"and {rest} more"] if rest > 0 else [])]
        raise VlprepError(f"the run would not go well: {'; '.join(shown)}.")
    logger.info("all is well: the same command without --dry-run trains %d steps", plan.num_steps - plan.start_step)


def check_folder(folder: Path) -> None:
    """Check that the folder of a run can be made or written to; it is left as it is.

    Raises:
        ConfigError: it cannot.
    """
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"--output_dir {folder} cannot be written ({existing} cannot). Give another one.")


def show_memory(plan: Plan) -> Memory:
    """Work out the memory of a rank; the first one shows it beside that of other sizes and strategies."""
    args, world = plan.args, plan.ranks.world
    bins = budget.largest_bins(plan.index, plan.recipe.per_device)
    load = budget.load_of_bins(plan.index, bins, attention=plan.attention, checkpointed=args.gradient_checkpointing)
    config = read_config(plan.source)
    memory = budget.budget(
        config, sizes_of(config, args), args, load, deepspeed=plan.deepspeed, world=world, dtype=plan.dtype
    )
    if plan.ranks.is_first:
        logger.info("memory of a rank:\n%s", memory.format())
        loads = budget.loads_by_size(args, plan.index, attention=plan.attention)
        table = budget.size_table(args, loads, world=world, dtype=plan.dtype)
        logger.info(f"{budget.TABLE_TITLE}\n%s", world, table)
    return memory


def run_largest(running: Any, plan: Plan, reader: BinReader, memory: Memory) -> list[str]:
    """Run the largest micro-batch forward and backward, on all ranks alike, and give the problems.

    Raises:
        ConfigError: the device has not memory enough.
    """
    bins = budget.largest_bins(plan.index, plan.recipe.per_device)
    micro = _read(plan, reader, bins)
    began = time.perf_counter()
    try:
        loss = running(micro.to(plan.device))
        running.backward(loss / max(1, micro.targets.numel()))
        mean = loss.item() / max(1, micro.targets.numel())
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        raise ConfigError(
            f"the largest micro-batch, bins {bins}, takes more memory than there is ({reason}): lower "
            "--per_device_train_batch_size and raise --gradient_accumulation_steps, or take a higher ZeRO stage, more "
            "ranks or offloading."
        ) from error
    peak = peak_memory_bytes(plan.device)
    logger.info(
        "largest micro-batch, bins %s: %d tokens, %d patches, %d targets; loss %.4f; %.1f s; %.2f GiB held at most",
        bins,
        micro.num_tokens,
        micro.vision.num_patches if plan.index.num_patches[bins].sum() else 0,
        micro.targets.numel(),
        mean,
        time.perf_counter() - began,
        peak / GIB,
    )
    problems = [] if np.isfinite(mean) else [f"the loss of the largest micro-batch, bins {bins}, is {mean}"]
    if plan.device.type == "cuda":
        problems += check_device(memory, peak, torch.cuda.get_device_properties(plan.device).total_memory)
    return problems


def check_device(memory: Memory, peak: int, total: int) -> list[str]:
    """Whether a step fits the device, by what was seen of its backward pass and what was worked out of the rest.

    Args:
        memory: as worked out.
        peak: bytes that a forward and a backward pass took at most. The moments of the optimizer are not there yet:
            its first step makes them.
        total: bytes of the device.
    """
    terms = [term for term in memory.terms if term.place == DEVICE]
    moments = sum(term.num_bytes for term in terms if term.name == MOMENTS)
    step = memory.held() + sum(term.num_bytes for term in terms if term.phase == Phase.STEP)
    needed = max(peak + moments, step)
    logger.info(
        "of %.1f GiB a step takes %.1f GiB: %.1f GiB were seen, moments of AdamW add %.1f GiB; worked out: %.1f GiB",
        *(size / GIB for size in (total, needed, peak, moments, memory.peak())),
    )
    if needed <= total:
        return []
    return [f"a step takes {needed / GIB:.1f} GiB of a device that has {total / GIB:.1f} GiB"]


def compare_packed(running: Any, plan: Plan, reader: BinReader) -> list[str]:
    """Run a few bins, and their samples alone, and give the differences that are too large."""
    tolerance = TOLERANCES[plan.dtype]
    bins = bins_to_compare(plan.index)
    problems, num_samples, largest = [], 0, 0.0
    running.eval()
    for number in bins:
        micro = _read(plan, reader, [number])
        packed = _losses(running, plan, micro)
        one = reader.read(number).bin
        apart = np.concatenate([_losses(running, plan, sample) for sample in split_samples(one, micro, plan)])
        for slot, difference in enumerate(np.abs(packed - apart).tolist()):
            num_samples += 1
            largest = max(largest, difference)
            # A difference that is no number is too large.
            if not difference <= tolerance:
                problems.append(
                    f"sample {slot} of bin {number} has a loss of {packed[slot]:.6g} packed and {apart[slot]:.6g} "
                    f"alone, more than {tolerance:g} apart"
                )
    running.train()
    logger.info(
        "%d samples of bins %s: mean losses packed and alone differ by %.2g at most, allowed in %s: %g",
        num_samples,
        bins,
        largest,
        str(plan.dtype).removeprefix("torch."),
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
    media = one.grids()
    is_pad = (one.input_ids == IMAGE_PAD) | (one.input_ids == VIDEO_PAD)
    # (M,): pad tokens before each medium, and the sample that its first one is in
    before = np.cumsum([0, *(grid.num_patches // MERGED_PATCHES for grid, _ in media)])[:-1].astype(np.int64)
    owner = np.searchsorted(one.cu_seqlens, np.flatnonzero(is_pad)[before], side="right") - 1
    borders = np.cumsum([0, *(stored_bytes(grid, kind) for grid, kind in media)])
    planes = micro.vision.planes.numpy()
    samples = []
    for slot, (start, end) in enumerate(zip(one.cu_seqlens[:-1].tolist(), one.cu_seqlens[1:].tolist())):
        first, last = np.searchsorted(owner, [slot, slot + 1]).tolist()
        alone = replace(
            one,
            input_ids=one.input_ids[start:end],
            labels=one.labels[start:end],
            position_ids=one.position_ids[:, start:end],
            cu_seqlens=np.array([0, end - start], dtype=np.int32),
            grid_thw=one.grid_thw[first:last],
            media_type=one.media_type[first:last],
            pixels=planes[borders[first] : borders[last]],
            codec="raw",
        )
        built = build_micro_batch([alone], window_size=plan.shape.window_size)
        samples.append(replace(built, vision=replace(built.vision, residuals=micro.vision.residuals)))
    return samples


def _read(plan: Plan, reader: BinReader, bins: Sequence[int]) -> MicroBatch:
    loaded = [reader.read(number) for number in bins]
    return build_micro_batch(
        [one.bin for one in loaded],
        numbers=bins,
        where=[str(one.location) for one in loaded],
        window_size=plan.shape.window_size,
    )


def _losses(running: Any, plan: Plan, micro: MicroBatch) -> Any:
    """Mean loss of every sample of a micro-batch: (S,) float64."""
    with torch.no_grad():
        scores = running(micro.to(plan.device), scores=True).double().cpu().numpy()
    results = sum_by_sample(micro, scores)
    return results["loss"] / np.maximum(1, results["num_targets"])
