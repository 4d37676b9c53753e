"""The largest bins, tried: a started model and bins -> problems, if a pass runs out of memory or a loss is not finite.

Cost: one or two forward and backward passes of the largest micro-batch, two forward passes of evaluation bins.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence

import numpy as np
import torch

from schemas.wording import counted, listed
from train.batches.batch import MicroBatch, build_micro_batch
from train.memory.terms import GIB
from train.preflight.problems import room_for
from train.run.checks import read_settings
from train.run.engine import Engine
from train.run.metrics import peak_memory_bytes
from train.run.plan import Plan
from train.shards.reader import BinReader

logger = logging.getLogger(__name__)


def read_micro_batch(reader: BinReader, bins: Sequence[int], *, window_size: int) -> MicroBatch:
    """Read bins into a micro-batch on the CPU."""
    loaded = [reader.read(bin_id) for bin_id in bins]
    return build_micro_batch(
        [read.bin for read in loaded],
        bin_ids=bins,
        where=[str(read.location) for read in loaded],
        window_size=window_size,
    )


def run_largest(engine: Engine, plan: Plan, reader: BinReader, bins: list[int]) -> list[str]:
    """Run the largest micro-batch forward and backward; all ranks run the same one.

    If a step has several micro-batches, it runs twice: the second pass runs next to the gradients of the first.

    Returns:
        Problems.

    Raises:
        ConfigError: the device runs out of memory.
    """
    micro = read_micro_batch(reader, bins, window_size=plan.shape.window_size)
    began = time.perf_counter()
    with room_for(f"the largest micro-batch, {listed('bin', bins)}"):
        for micro_step in range(min(2, plan.batch.accumulation)):
            if micro_step > 0:
                engine.step()  # ends the micro-step; no weight changes
            loss = engine(micro.to(plan.compute.device))
            engine.backward(loss / max(1, micro.targets.numel()))
        mean = loss.item() / max(1, micro.targets.numel())
    logger.info(
        "largest micro-batch, %s: %s, %s, %s; loss %.4f; %.1f s; peak memory %.2f GiB",
        listed("bin", bins),
        counted(micro.num_tokens, "token"),
        counted(int(plan.index.num_patches[bins].sum()), "patch", "patches"),
        counted(micro.targets.numel(), "target"),
        mean,
        time.perf_counter() - began,
        peak_memory_bytes(plan.compute.device) / GIB,
    )
    return [] if np.isfinite(mean) else [f"the loss of the largest micro-batch, {listed('bin', bins)}, is {mean}"]


def run_evaluation(engine: Engine, plan: Plan) -> list[str]:
    """Run the evaluation bins with most tokens and with most patches forward, if there are any.

    Returns:
        Problems.

    Raises:
        ConfigError: the device runs out of memory.
    """
    if plan.held_out is None:
        return []
    index, problems = plan.held_out.index, []
    reader = BinReader(index, read_settings(plan.args, index))
    engine.eval()
    try:
        for bin_id in dict.fromkeys([int(index.num_tokens.argmax()), int(index.num_patches.argmax())]):
            micro = read_micro_batch(reader, [bin_id], window_size=plan.shape.window_size)
            with room_for(f"bin {bin_id} of --eval_shards"), torch.no_grad():
                scores = engine(micro.to(plan.compute.device), scores=True)
                mean = scores[0].sum().item() / max(1, micro.targets.numel())
            size = (micro.num_tokens, index.num_patches[bin_id])
            logger.info("evaluation, bin %d: %d tokens, %d patches; loss %.4f", bin_id, *size, mean)
            if not np.isfinite(mean):
                problems.append(f"the loss of bin {bin_id} of --eval_shards is {mean}")
    finally:
        reader.close()
    engine.train()
    return problems
