"""Looks before a run whether it will go well: flags -> what it needs of each rank, tried where that is quick.

All ranks do the same, in the same order:

1. settings, shards and checkpoint are compared, tokenizer and processor with the manifest (:mod:`train.run.plan`);
2. the memory of a rank is worked out and shown (:mod:`train.memory.budget`), and compared with what there is, as is
   what the run writes (:mod:`train.memory.capacity`);
3. the model is started as in training, and the largest micro-batch goes forward and backward, twice where gradients
   are accumulated: the second pass runs beside the gradients of the first;
4. the largest bins to evaluate on, if there are any, go forward once;
5. a few bins are run packed, and each of their samples alone: the losses must agree (:mod:`train.preflight.parity`).

No optimizer step is made and nothing is written to the folder of the run. What is wrong is told at the end, all of it.

Cost: loading the model, one or two micro-batches, as many bins to evaluate on, and five forward passes of the cheapest
bins.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from schemas.checkpoints import read_config
from schemas.errors import ConfigError, VlprepError
from storage.disk import nearest_existing
from train.memory import budget
from train.memory.capacity import check_device, check_disk, check_held, check_host, device_bytes, host_bytes, written
from train.memory.states import GIB, Memory
from train.model import optim
from train.model.attention import FLASH_ATTENTION
from train.model.sizes import Sizes, sizes_of
from train.preflight.parity import compare_packed, read_micro_batch
from train.run import process_group
from train.run.checks import read_settings
from train.run.engine import Engine, initialize, register_zero3_loading
from train.run.loop import build_model, describe
from train.run.metrics import peak_memory_bytes
from train.run.plan import Plan, check_same_plan, make_plan
from train.run.process_group import Ranks
from train.run.run_dir import check_files
from train.settings.arguments import TrainArguments
from train.shards.reader import BinReader

logger = logging.getLogger(__name__)

MAX_PROBLEMS_SHOWN = 8


def preflight(args: TrainArguments) -> None:
    """See whether a run would go well. All ranks call this together.

    Raises:
        ConfigError: settings, shards and checkpoint do not fit together, or there is not memory enough to look further.
        ShardError: shards are incomplete, or a bin is damaged.
        VlprepError: anything else that would go wrong: losses that are not finite, packed samples with other losses
            than the same samples alone, a step or checkpoints for which there is no room.
    """
    plan = make_plan(args)
    check_folder(args.run_dir)
    if plan.resume is not None and plan.ranks.is_first:
        check_files(plan.resume.folder)
    prints = plan.index.manifests[0].fingerprints
    logger.info("tokenizer and processor of %s are those of the shards (%s)", plan.source, prints.tokenizer)
    sizes = sizes_of(read_config(plan.source), args)
    bins = budget.largest_bins(
        plan.index,
        plan.recipe.per_device,
        sizes,
        checkpointed=args.gradient_checkpointing,
        dtype=plan.compute.dtype,
    )
    memory = show_memory(plan, sizes, bins)
    if plan.compute.device.type == "cuda" and plan.compute.attention != FLASH_ATTENTION:
        logger.info(
            "attention is %s: it is called for each sample and each window by itself, and the vision tower waits for "
            "the device in every layer; flash attention does neither (pip install flash-attn --no-build-isolation)",
            plan.compute.attention,
        )
    process_group.join(plan.compute.device)
    check_same_plan(plan)
    problems = check_host(memory, count_neighbours(plan.ranks), host_bytes())
    if plan.compute.device.type == "cuda":
        problems += check_held(memory, device_bytes(plan.compute.device))
    end_where_wrong(problems, plan.ranks, ConfigError)
    with room_for("the model with its optimizer"):
        zero3_loading = register_zero3_loading(plan.deepspeed)
        model, groups = build_model(plan)
        describe(plan, groups)
        optimizer = optim.build_optimizer(groups, weight_decay=args.weight_decay)
        engine = initialize(model, optimizer, plan.deepspeed)
    problems = check_disk(args.run_dir, written(plan, sizes)) if plan.ranks.is_first else []
    reader = BinReader(plan.index, read_settings(args, plan.index))
    try:
        problems += run_largest(engine, plan, reader, bins)
        problems += run_evaluation(engine, plan)
        with room_for("a bin with its samples apart"):
            problems += compare_packed(engine, plan, reader)
    finally:
        reader.close()
    if plan.compute.device.type == "cuda":
        problems += check_device(memory, peak_memory_bytes(plan.compute.device), device_bytes(plan.compute.device))
    del zero3_loading
    end_where_wrong(problems, plan.ranks, VlprepError)
    process_group.leave()
    logger.info("all is well: the same command without --dry-run trains %d steps", plan.num_steps - plan.start_step)


def check_folder(folder: Path) -> None:
    """Check that the folder of a run can be made or written to; it is left as it is.

    Raises:
        ConfigError: it cannot.
    """
    existing = nearest_existing(folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"--output_dir {folder} cannot be written ({existing} cannot). Give another one.")


def end_where_wrong(problems: list[str], ranks: Ranks, error: type[VlprepError]) -> None:
    """Go no further, on any rank, where some rank has problems. All ranks call this together.

    Args:
        problems: of this rank.
        ranks: place of this rank.
        error: what is raised.
    """
    problems = gather_problems(problems, ranks)
    if problems:
        process_group.leave()
        raise error(explain(problems, ranks))


@contextmanager
def room_for(what: str) -> Iterator[None]:
    """Do what takes memory of the device inside the ``with`` block.

    Raises:
        ConfigError: there is not enough.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).partition(". ")[0]
        raise ConfigError(
            f"{what} takes more memory than there is ({reason}): lower --per_device_train_batch_size and raise "
            "--gradient_accumulation_steps, or take a higher ZeRO stage, more ranks or offloading."
        ) from error


def show_memory(plan: Plan, sizes: Sizes, bins: list[int]) -> Memory:
    """Work out the memory of a rank; the first one shows it beside that of other sizes and strategies.

    Args:
        plan: the run.
        sizes: of its model, as it is trained.
        bins: of the largest micro-batch.
    """
    args, world, checkpointed = plan.args, plan.ranks.world, plan.args.gradient_checkpointing
    load = budget.load_of_bins(plan.index, bins, checkpointed=checkpointed)
    config = read_config(plan.source)
    memory = budget.budget(config, sizes, args, load, deepspeed=plan.deepspeed, world=world, dtype=plan.compute.dtype)
    if plan.ranks.is_first:
        logger.info("memory of a rank:\n%s", memory.format())
        load_of = budget.loads_of_shards(plan.index, checkpointed=checkpointed, dtype=plan.compute.dtype)
        table = budget.size_table(args, load_of, world=world, dtype=plan.compute.dtype)
        logger.info(f"{budget.TABLE_TITLE}\n%s", world, table)
    return memory


def count_neighbours(ranks: Ranks) -> int:
    """Ranks on this machine, whatever launched them. All ranks call this together."""
    names: list[Any] = [None] * ranks.world
    torch.distributed.all_gather_object(names, socket.gethostname())
    return names.count(names[ranks.rank])


def run_largest(engine: Engine, plan: Plan, reader: BinReader, bins: list[int]) -> list[str]:
    """Run the largest micro-batch forward and backward, on all ranks alike, and give the problems.

    Where a step has several micro-batches, it is run as the first and as the second of them.

    Raises:
        ConfigError: the device has not memory enough.
    """
    micro = read_micro_batch(plan, reader, bins)
    began = time.perf_counter()
    with room_for(f"the largest micro-batch, bins {bins},"):
        for number in range(min(2, plan.recipe.accumulation)):
            if number > 0:
                engine.step()  # within a step: it goes on to the next micro-batch, no weight changes
            loss = engine(micro.to(plan.compute.device))
            engine.backward(loss / max(1, micro.targets.numel()))
        mean = loss.item() / max(1, micro.targets.numel())
    logger.info(
        "largest micro-batch, bins %s: %d tokens, %d patches, %d targets; loss %.4f; %.1f s; %.2f GiB held at most",
        bins,
        micro.num_tokens,
        plan.index.num_patches[bins].sum(),
        micro.targets.numel(),
        mean,
        time.perf_counter() - began,
        peak_memory_bytes(plan.compute.device) / GIB,
    )
    return [] if np.isfinite(mean) else [f"the loss of the largest micro-batch, bins {bins}, is {mean}"]


def run_evaluation(engine: Engine, plan: Plan) -> list[str]:
    """Run the largest bins to evaluate on forward: that with most tokens, and that with most patches.

    Raises:
        ConfigError: the device has not memory enough.
    """
    if plan.held_out is None:
        return []
    index, problems = plan.held_out.index, []
    reader = BinReader(index, read_settings(plan.args, index))
    engine.eval()
    try:
        for number in dict.fromkeys([int(index.num_tokens.argmax()), int(index.num_patches.argmax())]):
            micro = read_micro_batch(plan, reader, [number])
            with room_for(f"bin {number} of --eval_shards"), torch.no_grad():
                scores = engine(micro.to(plan.compute.device), scores=True)
                mean = scores[0].sum().item() / max(1, micro.targets.numel())
            size = (micro.num_tokens, index.num_patches[number])
            logger.info("to evaluate on, bin %d: %d tokens, %d patches; loss %.4f", number, *size, mean)
            if not np.isfinite(mean):
                problems.append(f"the loss of bin {number} of --eval_shards is {mean}")
    finally:
        reader.close()
    engine.train()
    return problems


def gather_problems(problems: list[str], ranks: Ranks) -> list[str]:
    """Problems of all ranks, each once; those that only some ranks have name them. All ranks call this together."""
    of_ranks: list[Any] = [None] * ranks.world
    torch.distributed.all_gather_object(of_ranks, problems)
    found: dict[str, list[int]] = {}
    for rank, some in enumerate(of_ranks):
        for problem in some:
            found.setdefault(problem, []).append(rank)
    return [
        problem if len(having) == ranks.world else f"{problem} (rank {', '.join(map(str, having))})"
        for problem, having in found.items()
    ]


def explain(problems: list[str], ranks: Ranks) -> str:
    """What the first rank says for all, or what the others say of it."""
    if not ranks.is_first:
        return "the run would not go well. The first rank says why."
    rest = len(problems) - MAX_PROBLEMS_SHOWN
    shown = [*problems[:MAX_PROBLEMS_SHOWN], *([f"and {rest} more"] if rest > 0 else [])]
    return f"the run would not go well: {'; '.join(shown)}."
