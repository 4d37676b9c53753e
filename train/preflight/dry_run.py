"""``--dry_run``: would a run succeed? Flags -> what it needs of each rank, and a trial of what is quick to try.

All ranks do the same, in the same order:

1. compare settings, shards and checkpoint, tokenizer and processor included (:mod:`train.run.plan`);
2. estimate the memory of a rank (:mod:`train.memory.budget`), and compare it and the files of the run with what device,
   host and disk have (:mod:`train.preflight.capacity`);
3. start the model as in training, and run the largest micro-batch forward and backward (:mod:`.passes`);
4. run the largest evaluation bins forward;
5. run a few bins packed, and each of their samples alone: the losses must agree (:mod:`.parity`).

The optimizer does not step, and nothing is written to the folder of the run. One error at the end names all problems.

Cost: loading the model, one or two micro-batches, up to two evaluation bins, and five forward passes of the cheapest
bins.
"""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path
from typing import Any

import torch

from schemas.checkpoints import read_config
from schemas.errors import ConfigError, VlprepError
from schemas.wording import counted
from train.memory.budget import TABLE_TITLE, rank_memory, size_table
from train.memory.loads import largest_bins, load_of_bins, loads_of_shards
from train.memory.terms import Memory
from train.model import optim
from train.model.attention import SDPA
from train.model.disk import nearest_existing
from train.model.sizes import Sizes, sizes_of
from train.preflight.capacity import (
    check_device,
    check_disk,
    check_held,
    check_host,
    device_bytes,
    disk_usage,
    export_bytes,
    host_bytes,
    snapshot_bytes,
)
from train.preflight.parity import compare_packed
from train.preflight.passes import run_evaluation, run_largest
from train.preflight.problems import room_for, stop_on_problems
from train.run import process_group
from train.run.checks import read_settings
from train.run.engine import Engine, initialize, register_zero3_loading
from train.run.loop import build_model, describe
from train.run.metrics import peak_memory_bytes
from train.run.plan import Plan, agree_on_capacity, check_same_plan, make_plan
from train.run.process_group import Ranks
from train.run.run_dir import check_files
from train.settings.arguments import TrainArguments
from train.shards.reader import BinReader

logger = logging.getLogger(__name__)


def preflight(args: TrainArguments) -> None:
    """Check whether a run would succeed. All ranks call this together.

    Raises:
        ConfigError: settings, shards and checkpoint do not fit together, or the device runs out of memory.
        ShardError: shards are incomplete, or a bin is damaged.
        VlprepError: any other problem: losses that are not finite, packed samples whose losses differ from those of the
            same samples alone, too little memory for a step, too little disk for the checkpoints.
    """
    plan = make_plan(args)
    check_paths(plan)
    with process_group.joined(plan.compute.device, plan.args.rendezvous_timeout_s):
        plan = agree_on_capacity(plan, args)
        check_same_plan(plan)
        sizes = sizes_of(read_config(plan.source), args)
        bins = largest_bins(
            plan.index,
            plan.batch.per_device,
            sizes,
            checkpointed=args.gradient_checkpointing,
            dtype=plan.compute.dtype,
        )
        memory = estimate_memory(plan, sizes, bins)
        stop_on_problems(check_estimate(plan, sizes, memory), plan.ranks, ConfigError)
        with room_for("the model and its optimizer"):
            zero3_loading = register_zero3_loading(plan.deepspeed)
            engine = start_model(plan)
        problems = check_disk(args.run_dir, disk_usage(plan, sizes)) if plan.ranks.is_first else []
        problems += try_bins(engine, plan, bins)
        if plan.compute.device.type == "cuda":
            problems += check_device(memory, peak_memory_bytes(plan.compute.device), device_bytes(plan.compute.device))
        del zero3_loading
        stop_on_problems(problems, plan.ranks, VlprepError)
    num_steps = counted(plan.num_steps - plan.start_step, "step")
    logger.info("dry run passed: the same command without --dry-run trains %s", num_steps)


def check_paths(plan: Plan) -> None:
    """Check the folder of a run and the checkpoint to resume from; log what was compared.

    Raises:
        ConfigError: the folder cannot be written, or the checkpoint is incomplete.
    """
    check_folder(plan.args.run_dir)
    if plan.resume is not None and plan.ranks.is_first:
        check_files(plan.resume.folder)
    fingerprint = plan.index.manifests[0].fingerprints.tokenizer
    logger.info("tokenizer and processor of %s match the shards (%s)", plan.source, fingerprint)
    if plan.compute.device.type == "cuda" and plan.compute.attention == SDPA:
        logger.info(
            "attention is %s: it is called for each sample and window separately, and the vision tower waits for the "
            "device in every layer; varlen (part of torch) and flash_attention_2 avoid both",
            plan.compute.attention,
        )


def check_folder(folder: Path) -> None:
    """Check that the folder of a run can be created or written, without touching it.

    Raises:
        ConfigError: it cannot.
    """
    existing = nearest_existing(folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(
            f"--output_dir {folder} is not writable, because {existing} is not: use another --output_dir, or change "
            "the permissions."
        )


def estimate_memory(plan: Plan, sizes: Sizes, bins: list[int]) -> Memory:
    """Estimate the memory of a rank; the first rank logs it next to that of other sizes and strategies.

    Args:
        plan: the run.
        sizes: parameter counts of its model.
        bins: bins of the largest micro-batch.
    """
    args, world, checkpointed = plan.args, plan.ranks.world, plan.args.gradient_checkpointing
    load = load_of_bins(plan.index, bins, checkpointed=checkpointed)
    memory = rank_memory(sizes, args, load, deepspeed=plan.deepspeed, world=world, dtype=plan.compute.dtype)
    if plan.ranks.is_first:
        logger.info("memory of a rank:\n%s", memory.format())
        load_of = loads_of_shards(plan.index, checkpointed=checkpointed, dtype=plan.compute.dtype)
        table = size_table(args, load_of, plan.batch.per_device, world=world, dtype=plan.compute.dtype)
        logger.info(f"{TABLE_TITLE}\n%s", counted(world, "rank"), table)
    return memory


def check_estimate(plan: Plan, sizes: Sizes, memory: Memory) -> list[str]:
    """Compare the estimate with the memory of host and device. All ranks call this together."""
    ranks = ranks_of_host(plan.ranks)
    problems = check_host(
        memory,
        len(ranks),
        host_bytes(),
        snapshots=snapshot_bytes(plan, sizes, ranks),
        export=export_bytes(plan, sizes) if 0 in ranks else 0,
    )
    if plan.compute.device.type == "cuda":
        problems += check_held(memory, device_bytes(plan.compute.device))
    return problems


def ranks_of_host(ranks: Ranks) -> list[int]:
    """Ranks on this machine, whatever launched them. All ranks call this together."""
    hosts: list[Any] = [None] * ranks.world
    torch.distributed.all_gather_object(hosts, socket.gethostname())
    return [rank for rank, host in enumerate(hosts) if host == hosts[ranks.rank]]


def start_model(plan: Plan) -> Engine:
    """Load the model and wrap it into an engine with its optimizer, as training does."""
    model, groups = build_model(plan)
    describe(plan, groups)
    optimizer = optim.build_optimizer(groups, plan.args)
    return initialize(model, optimizer, plan.deepspeed)


def try_bins(engine: Engine, plan: Plan, bins: list[int]) -> list[str]:
    """Run the largest micro-batch, evaluation bins, and a few bins with their samples apart; return the problems."""
    reader = BinReader(plan.index, read_settings(plan.args, plan.index))
    try:
        problems = run_largest(engine, plan, reader, bins)
        problems += run_evaluation(engine, plan)
        with room_for("a bin with its samples apart"):
            problems += compare_packed(
                engine,
                reader,
                plan.index,
                dtype=plan.compute.dtype,
                device=plan.compute.device,
                window_size=plan.shape.window_size,
            )
    finally:
        reader.close()
    return problems
