"""The training loop: settings -> a trained model in ``<run>/final``, with metrics and checkpoints on the way.

With LoRA the adapters are also written to ``<run>/adapter``, and the model in ``final`` has them merged.

:func:`train.run.plan.make_plan` rejects settings, shards and checkpoints that do not fit together before the process
group starts. Then, for each step, the stream yields the micro-batches, each goes forward and backward, and the
optimizer steps after the last one.

The loss of a step is the mean over its target tokens, of all ranks and micro-steps. The index knows their number
beforehand, so every micro-step is weighted correctly without communication.
"""

from __future__ import annotations

import logging
import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from schemas.wording import counted
from storage.urls import without_secrets
from train.batches.stream import BinStream, StepBatch
from train.model import adapters, kernels, optim, pretrained
from train.model.attention import loadable
from train.model.flops import ModelFlops
from train.model.packed import PackedQwen, checkpoint_activations
from train.model.processors import compare_processors, shard_media
from train.run import checkpoint, process_group
from train.run.checks import read_settings, trained_folders
from train.run.engine import (
    Engine,
    can_lower_scale,
    gather_weights,
    initialize,
    register_zero3_loading,
    seed_dropout,
)
from train.run.evaluation import Evaluation, format_evaluation, is_due
from train.run.interrupt import StopRequest
from train.run.metrics import Record, Window, open_log
from train.run.nonfinite import SkippedSteps
from train.run.plan import Plan, agree_on_capacity, check_same_plan, make_plan
from train.run.record import record_run
from train.run.run_dir import ADAPTER_DIR, FINAL_DIR, RunState, check_files, lock_run_dir, remove_unfinished
from train.run.saving import Saver
from train.run.schedule import LearningRates, count_warmup_steps, schedule
from train.run.stragglers import Slowest, StepClock
from train.settings.arguments import TrainArguments
from train.settings.recipe import doubts, steps_to_do

logger = logging.getLogger(__name__)


def train(args: TrainArguments, argv: Sequence[str] = ()) -> bool:
    """Run a training. Collective.

    Args:
        args: settings of the run.
        argv: flags of its command line, for the record.

    Returns:
        Whether the run is complete. False if it stopped on request, with a checkpoint to resume from.

    Raises:
        ConfigError: settings, shards and checkpoint do not fit together.
        ShardError: shards are incomplete, or a bin is damaged.
        VlprepError: the loss or the gradient is not finite in too many consecutive steps.
    """
    plan = make_plan(args)
    with lock_run_dir(args.run_dir) if plan.ranks.is_first else nullcontext():
        if plan.ranks.is_first:
            prepare_run_dir(plan)
        with process_group.joined(plan.compute.device, plan.args.rendezvous_timeout_s):
            plan = agree_on_capacity(plan, args)
            agree_on_run(plan, argv)
            zero3_loading = register_zero3_loading(plan.deepspeed)
            trainer = Trainer(plan)
            # The request is caught until the export is done: one that comes too late must not cost the model.
            with StopRequest(is_first=plan.ranks.is_first) as stop:
                is_complete = run_steps(trainer, plan, stop)
                if is_complete:
                    export(trainer.engine, plan)
                process_group.leave()
                stop.finish()
            del zero3_loading
    return is_complete


def run_steps(trainer: Trainer, plan: Plan, stop: StopRequest) -> bool:
    """Train until the last step or a request to stop. Collective.

    Returns:
        Whether the last step is done.
    """
    log = open_log(plan.args, is_first=plan.ranks.is_first, start_step=plan.start_step, num_steps=plan.num_steps)
    with log as metrics, open_stream(plan) as stream:
        for batch in stream:
            result = trainer.run_step(batch)
            metrics.advance()
            is_stopped = trainer.should_stop(stop)
            evaluates = not is_stopped and trainer.should_evaluate()
            if evaluates or trainer.should_log():
                metrics.write(trainer.summarise(result, evaluates=evaluates))
            if evaluates:  # an evaluation takes minutes, and a scheduler waits only a few
                is_stopped = trainer.should_stop(stop)
            if is_stopped or trainer.should_save():
                trainer.save(stream, is_stopped=is_stopped)
            if is_stopped:
                return False
            del batch, result  # their memory takes the next step
    return True


class StepResult(NamedTuple):
    """An optimizer step that is done.

    Attributes:
        batch: its micro-batches and counts.
        losses: (A,) float32 on the device, cross-entropy summed over the targets of each micro-batch of this rank.
        learning_rates: of every trained part of the model.
    """

    batch: StepBatch
    losses: torch.Tensor
    learning_rates: dict[str, float]


class Trainer:
    """Engine, schedule and counters of a run, after ``step`` steps."""

    def __init__(self, plan: Plan) -> None:
        """Build the model and its engine, and restore the checkpoint to resume from. Collective."""
        args = plan.args
        model, groups = build_model(plan)
        describe(plan, groups)
        flops = ModelFlops.of(model)  # before the engine partitions the weights
        optimizer = optim.build_optimizer(groups, args)
        self._rates = LearningRates(
            optimizer,
            schedule(
                args.lr_scheduler_type,
                warmup_steps=(
                    count_warmup_steps(args.warmup, plan.num_steps) if args.warmup_steps is None else args.warmup_steps
                ),
                total_steps=plan.num_steps,
            ),
        )
        self.engine = start_engine(model, optimizer, plan)
        self.step = plan.start_step
        self._plan = plan
        self._saver = Saver(args.run_dir, plan.ranks, max_checkpoints=args.save_total_limit)
        self._evaluation = None if plan.held_out is None else Evaluation(plan)
        self._skipped = SkippedSteps(
            plan.index,
            max_consecutive=args.max_skipped_steps,
            is_first=plan.ranks.is_first,
            order_command=plan.order_command,
        )
        self._window = Window(
            plan.order,
            plan.compute.device,
            flops,
            deal=partial(
                plan.order.bins_of_step,
                world_size=plan.ranks.world,
                accumulation=plan.batch.accumulation,
                per_device=plan.batch.per_device,
            ),
            peak_tflops=plan.compute.peak_tflops,
        )
        self._slow_rank: int | None = None

    def run_step(self, batch: StepBatch) -> StepResult:
        """Make one optimizer step, or skip it if its gradient is not finite. Collective."""
        self._saver.check()
        learning_rates = self._rates.set(batch.step)
        scales_loss = can_lower_scale(self.engine)
        losses = forward_backward(self.engine, batch, self._plan, self._window.clock)
        if self.engine.optimizer.overflow:
            self._skipped.note_skipped(batch, losses, scales_loss=scales_loss)
        else:
            self._skipped.note_done()
        self.step = batch.step + 1
        self._window.add(batch)
        return StepResult(batch, losses, learning_rates)

    def should_stop(self, stop: StopRequest) -> bool:
        """Whether any rank was asked to stop and there are steps left. Collective."""
        return stop.is_agreed(self._plan.compute.device) and self.step < self._plan.num_steps

    def should_evaluate(self) -> bool:
        """Whether an evaluation follows this step."""
        return self._evaluation is not None and is_due(self._plan, self.step)

    def should_log(self) -> bool:
        """Whether this step is logged: the first and the last of the run, and every ``--logging_steps``."""
        plan = self._plan
        return self.step % plan.args.logging_steps == 0 or self.step in (plan.start_step + 1, plan.num_steps)

    def should_save(self) -> bool:
        """Whether a checkpoint follows this step: the last one, and as ``--save_steps`` says."""
        num_steps = self._plan.num_steps
        return self.step == num_steps or self.step % self._plan.args.save_interval(num_steps) == 0

    def summarise(self, result: StepResult, *, evaluates: bool) -> Record:
        """Make the record of the last step, with the metrics of an evaluation if one is due. Collective."""
        record = self._window.summarise(*result, self.engine.get_global_grad_norm(), self._skipped.total)
        if "slowest" in record:
            slowest = Slowest(**record["slowest"])
            if slowest.is_worth_logging(record["step_s"]) and slowest.rank != self._slow_rank:
                logger.info("%s", slowest)
                self._slow_rank = slowest.rank
        if evaluates and self._evaluation is not None:
            with self._window.paused():
                metrics = self._evaluation.run(self.engine)
            record.update(metrics)
            logger.info("evaluation after step %d: %s", self.step, format_evaluation(metrics))
        return record

    def save(self, stream: BinStream, *, is_stopped: bool) -> None:
        """Write a checkpoint. Collective."""
        plan = self._plan
        state = RunState(
            stream=stream.state_dict(),
            ranks=plan.ranks.world,
            settings=plan.settings,
            shards=without_secrets(plan.args.shards),
            aim=plan.batch.aim,
        )
        continues = not is_stopped and self.step < plan.num_steps
        with self._window.paused():
            self._saver.save(self.engine, state, in_background=plan.args.save_in_background and continues)
        if is_stopped:
            logger.info(
                "stop requested: checkpoint saved at step %d/%d; rerun the same command to resume",
                self.step,
                plan.num_steps,
            )


def prepare_run_dir(plan: Plan) -> None:
    """Remove unfinished checkpoints, and check the files of the one to resume from before other ranks wait for that."""
    remove_unfinished(plan.args.run_dir)
    if plan.resume is not None:
        check_files(plan.resume.folder)


def agree_on_run(plan: Plan, argv: Sequence[str]) -> None:
    """Check that all ranks have the same plan. Collective. The first rank then records the settings."""
    check_same_plan(plan)
    if plan.ranks.is_first:
        record_run(plan, argv)


def build_model(plan: Plan) -> tuple[PackedQwen, list[optim.ParameterGroup]]:
    """The model in training mode, with the weights that the run starts from, and its parameter groups."""
    hf = pretrained.load_model(
        plan.source, dtype=plan.compute.dtype, attn_implementation=loadable(plan.compute.attention)
    )
    if plan.args.use_liger_kernel:
        kernels.use_liger(hf)
    if plan.adapters is not None:
        adapters.add_adapters(hf, plan.adapters, seed=plan.args.seed)
    if plan.args.torch_compile:
        kernels.compile_layers(hf, attn_implementation=plan.compute.attention)
    model = PackedQwen(hf, attn_implementation=plan.compute.attention)
    model.train()
    groups = optim.group_parameters(model, optim.learning_rates(plan.args, plan.recipe.learning_rate))
    if plan.args.gradient_checkpointing:
        checkpoint_activations(model)
    return model, groups


def start_engine(model: PackedQwen, optimizer: torch.optim.Optimizer, plan: Plan) -> Engine:
    """Wrap the model into an engine, in the state of the checkpoint to resume from if there is one. Collective."""
    is_resharded = plan.resume is not None and plan.resume.is_resharded
    if plan.resume is not None and plan.resume.is_resharded:
        checkpoint.reshard(plan.resume.folder, plan.ranks)
    engine = initialize(model, optimizer, plan.deepspeed, is_resharded=is_resharded)
    seed_dropout(plan.args.seed, plan.ranks, plan.start_step)
    if plan.resume is not None:
        checkpoint.load(engine, optimizer, plan.resume.folder, plan.ranks, is_resharded=is_resharded)
    return engine


def open_stream(plan: Plan) -> BinStream:
    """The steps of this rank, from the start or resume of the run to its end."""
    args, accumulation = plan.args, plan.batch.accumulation
    num_threads, factor = args.dataloader_num_workers, args.dataloader_prefetch_factor
    return BinStream(
        plan.index,
        plan.order,
        rank=plan.ranks.rank,
        world_size=plan.ranks.world,
        accumulation=accumulation,
        per_device=plan.batch.per_device,
        start_step=plan.start_step,
        end_step=plan.num_steps,
        window_size=plan.shape.window_size,
        num_threads=num_threads,
        prefetch=2 * max(accumulation, num_threads) if factor is None else factor * num_threads,
        read_timeout_s=args.read_timeout_s,
        pin_device=plan.compute.device if plan.compute.device.type == "cuda" else None,
        read=read_settings(args, plan.index),
    )


def forward_backward(engine: Engine, batch: StepBatch, plan: Plan, clock: StepClock) -> torch.Tensor:
    """Run all micro-steps of an optimizer step, the last of which updates the weights. Collective.

    DeepSpeed averages over ranks and micro-steps. The weight undoes that, so that the differentiated loss is the mean
    over the target tokens of the step.

    Returns:
        (A,) float32 on the device, cross-entropy summed over the targets of each micro-batch of this rank.
    """
    num_micro_steps = plan.ranks.world * len(batch.micro_batches)
    weight = num_micro_steps / max(1, batch.num_targets)
    losses = []
    for micro in batch.micro_batches:
        with clock.forward():
            loss_sum = engine(micro.to(plan.compute.device, non_blocking=True))
        engine.backward(loss_sum * weight)
        engine.step()
        losses.append(loss_sum.detach())
    return torch.stack(losses)


def export(engine: Engine, plan: Plan) -> None:
    """Write the trained model to ``<run>/final``. Collective: all ranks gather, the first one writes."""
    hf = engine.module.hf
    weights = gather_weights(hf, plan.ranks)
    if plan.ranks.is_first:
        media = shard_media(plan.index.manifests)
        if plan.adapters is not None:
            out, name = plan.args.run_dir / ADAPTER_DIR, plan.args.model_name_or_path
            weights, of_adapters = adapters.split_weights(weights)
            adapters.write_adapter(out, of_adapters, plan.adapters, model=name, source=plan.source, media=media)
            adapters.merge_weights(weights, of_adapters, plan.adapters.scaling)
        final = plan.args.run_dir / FINAL_DIR
        pretrained.write_checkpoint(final, hf, weights, source=plan.source, media=media)
        shards = without_secrets(plan.args.shards)
        ask = ["python", "-m", "train.generate", "--model", str(final), "--shards", shards, "--limit", "10"]
        logger.info("next: %s", shlex.join(ask))


def describe(plan: Plan, groups: list[optim.ParameterGroup]) -> None:
    """Log what the run trains on, how, and which parameters."""
    index, ranks = plan.index, plan.ranks
    for folder, num_bins, share in zip(index.folders, np.diff(index.first_bins).tolist(), index.shares()):
        logger.info("%s: %s, share %.4g %%", folder, counted(num_bins, "bin"), 100 * share)
    if plan.held_out is not None:
        held_out = plan.held_out.index
        folders = ", ".join(map(str, held_out.folders))
        logger.info(
            "evaluating on %s with %s of %s",
            counted(held_out.num_bins, "bin"),
            counted(int(held_out.num_samples.sum()), "sample"),
            folders,
        )
        if ranks.is_first and (trained := trained_folders(index, held_out)):
            logger.warning("%s: trained on as well, so eval_loss says nothing about other data", ", ".join(trained))
    logger.info(
        "%s with %s, %s of them targets",
        counted(index.num_bins, "bin"),
        counted(int(index.num_tokens.sum()), "token"),
        f"{int(index.num_targets.sum()):,}",
    )
    logger.info(plan.batch_line)
    if plan.strategy_note is not None:
        logger.info(plan.strategy_note)
    rates = [group.learning_rate for group in groups if group.learning_rate is not None]
    if ranks.is_first and plan.resume is None and (doubt := doubts(plan.args, plan.num_steps, rates)):
        logger.warning(doubt)
    logger.info(
        "%s on %s, %s, %s, ZeRO-%d; %s",
        counted(ranks.world, "rank"),
        plan.compute.device.type,
        str(plan.compute.dtype).removeprefix("torch."),
        plan.compute.attention,
        plan.deepspeed["zero_optimization"]["stage"],
        steps_to_do(plan.start_step, plan.num_steps),
    )
    logger.info("parameters:\n%s", optim.format_table(groups, weight_decay=plan.args.weight_decay))
    if ranks.is_first and ranks.world > 1:
        process_group.warn_of_long_reads(plan.args.read_timeout_s)
    for note in compare_processors(plan.source, shard_media(index.manifests)):
        logger.info("%s/: %s", FINAL_DIR, note)
    if plan.resume is not None:
        logger.info("resuming from %s", plan.resume.folder)
