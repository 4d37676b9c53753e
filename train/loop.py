"""The training loop: settings -> a trained model in ``<run>/final``, with metrics and checkpoints on the way.

Whatever can be wrong with settings, shards or checkpoint is found before the process group starts. Then, for each step,
the stream hands out the micro-batches, each goes forward and backward, and the optimizer steps after the last one.

The loss of a step is the mean over its target tokens, of all ranks and micro-steps. Their number is known from the
index beforehand, so every micro-step is weighted rightly without communication.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from schemas.errors import ConfigError
from train import checkpoint, engine, optim, pretrained
from train.arguments import TrainArguments
from train.checkpoint import RunState, Setting
from train.engine import Ranks
from train.index import ShardIndex, open_shards
from train.metrics import Window, open_log, require_reporter
from train.model import PackedQwen, checkpoint_activations
from train.order import DataOrder
from train.pretrained import ModelShape
from train.schedule import schedule, set_rates, warmup_steps
from train.stream import BinStream, StepBatch

logger = logging.getLogger(__name__)

FINAL_DIR = "final"
"""Folder of the trained model inside the folder of the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A run whose settings, shards and checkpoint were found to fit together; nothing is started yet.

    Attributes:
        args: the flags.
        ranks: place of this process.
        device: where this rank computes.
        bf16: whether it computes in bfloat16.
        attention: attention implementation.
        deepspeed: complete configuration of DeepSpeed.
        index: the bins.
        order: in which they are used.
        num_steps: optimizer steps of the whole run.
        source: folder of the checkpoint that the run starts from.
        shape: of its model.
        settings: what must be the same when the run goes on from one of its checkpoints.
        resume_from: the checkpoint to go on from, if any.
        start_step: steps done at that checkpoint; else 0.
    """

    args: TrainArguments
    ranks: Ranks
    device: torch.device
    bf16: bool
    attention: str
    deepspeed: dict[str, Any]
    index: ShardIndex
    order: DataOrder
    num_steps: int
    source: Path
    shape: ModelShape
    settings: dict[str, Setting]
    resume_from: Path | None
    start_step: int


def train(args: TrainArguments) -> None:
    """Run a training to its end. All ranks call this together.

    Raises:
        ConfigError: settings, shards and checkpoint do not fit together.
        ShardError: shards are incomplete, or a bin is damaged.
        VlprepError: the loss is not a number any more.
    """
    plan = make_plan(args)
    run_lock = checkpoint.hold(args.run_dir) if plan.ranks.is_first else None
    engine.start(plan.device)
    torch.manual_seed(args.seed)
    kept_for_loading = engine.keep_for_zero3(plan.deepspeed)
    model = build_model(plan)
    groups = optim.group_parameters(model, optim.learning_rates(args))
    if args.gradient_checkpointing:
        checkpoint_activations(model)
    describe(plan, groups)

    optimizer = optim.build_optimizer(groups, weight_decay=args.weight_decay)
    warmup = warmup_steps(args.warmup_ratio, plan.num_steps)
    factor = schedule(args.lr_scheduler_type, warmup_steps=warmup, total_steps=plan.num_steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    running = engine.initialize(model, optimizer, scheduler, plan.deepspeed)
    if plan.resume_from is not None:
        checkpoint.load(running, plan.resume_from, plan.ranks)
        # The saved rates are those of the schedule then; a run that was made longer has another one.
        set_rates(optimizer, scheduler.base_lrs, factor(plan.start_step))

    window = Window(plan.order, plan.device)
    opened = open_log(args, is_first=plan.ranks.is_first, start_step=plan.start_step, num_steps=plan.num_steps)
    with opened as log, open_stream(plan) as stream:
        for batch in stream:
            rates = {group["part"]: group["lr"] for group in optimizer.param_groups}
            loss_sum = run_step(running, batch, plan)
            step = batch.step + 1
            window.add(batch, num_samples=int(plan.index.num_samples[list(batch.bins)].sum()))
            log.advance()
            if step % args.logging_steps == 0 or step in (plan.start_step + 1, plan.num_steps):
                log.write(window.summarise(batch, loss_sum, rates, running.get_global_grad_norm()))
            if args.save_steps and step % args.save_steps == 0:
                with window.paused():
                    state = RunState(step=step, settings=plan.settings)
                    checkpoint.save(running, args.run_dir, state, plan.ranks, keep=args.save_total_limit)

    export(running, plan)
    del kept_for_loading
    engine.stop()
    if run_lock is not None:
        run_lock.close()


def run_step(running: Any, batch: StepBatch, plan: Plan) -> torch.Tensor:
    """One optimizer step: all its micro-steps forward and backward.

    DeepSpeed averages over ranks and micro-steps; the weight undoes that, so that what is differentiated is the mean
    over the target tokens of the step.

    Returns:
        Cross-entropy summed over the targets of this rank: float32 scalar on the device.
    """
    num_micro_steps = plan.ranks.world * len(batch.micro_batches)
    weight = num_micro_steps / max(1, batch.num_targets)
    total = torch.zeros((), dtype=torch.float32, device=plan.device)
    for micro in batch.micro_batches:
        loss_sum = running(micro.to(plan.device, non_blocking=True))
        running.backward(loss_sum * weight)
        running.step()
        total += loss_sum.detach()
    return total


def make_plan(args: TrainArguments) -> Plan:
    """Look at everything that a run depends on, before anything expensive starts.

    Raises:
        ConfigError: settings, shards and checkpoint do not fit together.
        ShardError: the shards are incomplete.
    """
    ranks = engine.read_ranks(args.local_rank)
    require_reporter(args.report_to)
    deepspeed = engine.read_deepspeed_config(args.deepspeed)
    index = open_shards(args.shards)
    source = pretrained.find_checkpoint(args.model_name_or_path)
    shape = pretrained.read_shape(source)
    pretrained.check_fingerprints(source, index.manifests[0].fingerprints, shards=args.shards)

    device = engine.choose_device(ranks)
    bf16 = engine.choose_bf16(args, deepspeed, device)
    attention = engine.choose_attention(args, device, bf16=bf16)
    deepspeed = engine.complete_config(deepspeed, args, world=ranks.world, bf16=bf16, hidden_size=shape.hidden_size)

    global_batch: int = deepspeed["train_batch_size"]
    order = DataOrder(
        index.cost(),
        seed=args.seed,
        global_batch=global_batch,
        epochs=args.epochs if args.max_steps is None else None,
        mixture=index.mixture,
    )
    num_steps = args.max_steps or order.num_steps
    assert num_steps is not None, "an order with a number of epochs has a number of steps"
    settings = run_settings(args, index, world=ranks.world, bf16=bf16, deepspeed=deepspeed)
    resume_from, start_step = find_start(args, settings, num_steps)
    return Plan(
        args=args,
        ranks=ranks,
        device=device,
        bf16=bf16,
        attention=attention,
        deepspeed=deepspeed,
        index=index,
        order=order,
        num_steps=num_steps,
        source=source,
        shape=shape,
        settings=settings,
        resume_from=resume_from,
        start_step=start_step,
    )


def run_settings(
    args: TrainArguments, index: ShardIndex, *, world: int, bf16: bool, deepspeed: dict[str, Any]
) -> dict[str, Setting]:
    """What must be the same when a run goes on. The number of steps is not among it: a run may be made longer."""
    return {
        "shards": index.fingerprint,
        "seed": args.seed,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "number of ranks": world,
        "ZeRO stage": deepspeed["zero_optimization"]["stage"],
        "bf16": bf16,
        **{f"learning rate of {part}": rate for part, rate in optim.learning_rates(args).items()},
        "lr_scheduler_type": args.lr_scheduler_type,
        "warmup_ratio": args.warmup_ratio,
        "weight_decay": args.weight_decay,
        "max_grad_norm": args.max_grad_norm,
    }


def find_start(args: TrainArguments, settings: dict[str, Setting], num_steps: int) -> tuple[Path | None, int]:
    """The checkpoint to go on from, and the steps done there; None and 0 for a new run.

    Raises:
        ConfigError: the checkpoint is of another run, or beyond the end of this one.
    """
    folder = checkpoint.choose_checkpoint(args.run_dir, args.resume)
    if folder is None:
        return None, 0
    state = checkpoint.read_state(folder)
    checkpoint.check_settings(folder, state, settings)
    if state.step > num_steps:
        raise ConfigError(
            f"{folder} has {state.step} steps done, but this run ends after {num_steps}: raise --max_steps or "
            "--num_train_epochs."
        )
    return folder, state.step


def build_model(plan: Plan) -> PackedQwen:
    """The model with the weights of the checkpoint that the run starts from, in training mode."""
    dtype = torch.bfloat16 if plan.bf16 else torch.float32
    hf = pretrained.load_model(plan.source, dtype=dtype, attn_implementation=plan.attention)
    model = PackedQwen(hf, attn_implementation=plan.attention)
    model.train()
    return model


def open_stream(plan: Plan) -> BinStream:
    """The steps of this rank, from where the run starts or goes on to its end."""
    return BinStream(
        plan.index,
        plan.order,
        rank=plan.ranks.rank,
        world_size=plan.ranks.world,
        accumulation=plan.args.gradient_accumulation_steps,
        per_device=plan.args.per_device_train_batch_size,
        start_step=plan.start_step,
        end_step=plan.num_steps,
        window_size=plan.shape.window_size,
        num_threads=plan.args.dataloader_num_workers,
        prefetch=2 * max(plan.args.gradient_accumulation_steps, plan.args.dataloader_num_workers),
        pin_device=plan.device if plan.device.type == "cuda" else None,
    )


def describe(plan: Plan, groups: list[optim.ParameterGroup]) -> None:
    """Say once what is going to happen."""
    index, ranks = plan.index, plan.ranks
    logger.info(
        "%d bins with %d tokens, %d of them targets", index.num_bins, index.num_tokens.sum(), index.num_targets.sum()
    )
    logger.info(
        "%d ranks on %s, %s, %s, ZeRO-%d; steps %d to %d of %d bins each",
        ranks.world,
        plan.device.type,
        "bfloat16" if plan.bf16 else "float32",
        plan.attention,
        plan.deepspeed["zero_optimization"]["stage"],
        plan.start_step + 1,
        plan.num_steps,
        plan.order.global_batch,
    )
    logger.info("parameters:\n%s", optim.format_table(groups, weight_decay=plan.args.weight_decay))
    if plan.resume_from is not None:
        logger.info("going on from %s", plan.resume_from)


def export(running: Any, plan: Plan) -> None:
    """Write the trained model to ``<run>/final``. All ranks gather, the first one writes."""
    model: PackedQwen = running.module
    weights = engine.gather_weights(model.hf, plan.ranks)
    if plan.ranks.is_first:
        pretrained.write_checkpoint(plan.args.run_dir / FINAL_DIR, model.hf, weights, source=plan.source)
