"""The training loop: settings -> a trained model in ``<run>/final``, with metrics and checkpoints on the way.

With LoRA the adapters are in ``<run>/adapter`` as well, and the model in ``final`` has them added in.

Whatever can be wrong with settings, shards or checkpoint is found before the process group starts
(:mod:`train.run.plan`). Then, for each step, the stream hands out the micro-batches, each goes forward and backward,
and the optimizer steps after the last one.

The loss of a step is the mean over its target tokens, of all ranks and micro-steps. Their number is known from the
index beforehand, so every micro-step is weighted rightly without communication.
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch

from train.batches.stream import BinStream, StepBatch
from train.model import adapters, kernels, optim, pretrained
from train.model.flops import ModelFlops
from train.model.packed import PackedQwen, checkpoint_activations
from train.run import checkpoint, engine
from train.run.checkpoint import RunState
from train.run.evaluation import Evaluation, format_evaluation, is_due
from train.run.interrupt import StopRequest
from train.run.metrics import Window, open_log
from train.run.nonfinite import SkippedSteps
from train.run.plan import ADAPTER_DIR, FINAL_DIR, Plan, check_same_plan, make_plan, read_settings
from train.run.record import record_run
from train.run.schedule import schedule, set_rates, warmup_steps
from train.settings.arguments import TrainArguments

logger = logging.getLogger(__name__)


def train(args: TrainArguments) -> bool:
    """Run a training. All ranks call this together.

    Returns:
        Whether it came to its end; False where it was told to stop before and has saved a checkpoint to go on from.

    Raises:
        ConfigError: settings, shards and checkpoint do not fit together.
        ShardError: shards are incomplete, or a bin is damaged.
        VlprepError: the loss or the gradient is not a finite number, step after step.
    """
    plan = make_plan(args)
    run_lock = checkpoint.hold(args.run_dir) if plan.ranks.is_first else None
    if plan.ranks.is_first:
        checkpoint.remove_unfinished(args.run_dir)
        if plan.resume_from is not None:
            checkpoint.check_files(plan.resume_from)
    engine.start(plan.device)
    check_same_plan(plan)
    if plan.ranks.is_first:
        record_run(plan)
    kept_for_loading = engine.keep_for_zero3(plan.deepspeed)
    model, groups = build_model(plan)
    describe(plan, groups)
    flops = ModelFlops.of(model)

    optimizer = optim.build_optimizer(groups, weight_decay=args.weight_decay)
    peak_rates = [group["lr"] for group in optimizer.param_groups]
    warmup = warmup_steps(args.warmup, plan.num_steps)
    factor = schedule(args.lr_scheduler_type, warmup_steps=warmup, total_steps=plan.num_steps)
    if plan.is_converted and plan.resume_from is not None:
        checkpoint.convert(plan.resume_from, plan.ranks)
    running = engine.initialize(model, optimizer, plan.deepspeed, is_converted=plan.is_converted)
    engine.seed_dropout(args.seed, plan.ranks, plan.start_step)
    if plan.resume_from is not None:
        checkpoint.load(running, optimizer, plan.resume_from, plan.ranks, is_converted=plan.is_converted)

    evaluation = None if plan.eval_index is None else Evaluation(plan)
    skipped = SkippedSteps(
        plan.index,
        max_in_a_row=args.max_skipped_steps,
        is_first=plan.ranks.is_first,
        order_command=plan.order_command,
    )
    window = Window(plan.order, plan.device, flops, peak_tflops=plan.peak_tflops)
    opened = open_log(args, is_first=plan.ranks.is_first, start_step=plan.start_step, num_steps=plan.num_steps)
    is_stopped = False
    # To the end of the export: what comes too late to stop a run must not end it before its model is written.
    with StopRequest() as stop:
        with opened as log, open_stream(plan) as stream:
            for batch in stream:
                set_rates(optimizer, peak_rates, factor(batch.step))
                rates = {group["part"]: group["lr"] for group in optimizer.param_groups}
                scales_loss = engine.can_lower_scale(running)
                losses = run_step(running, batch, plan)
                if running.optimizer.overflow:
                    skipped.note_skipped(batch, losses, scales_loss=scales_loss)
                else:
                    skipped.note_done()
                step = batch.step + 1
                window.add(batch)
                log.advance()
                is_stopped = stop.is_agreed(plan.device) and step < plan.num_steps
                evaluates = evaluation is not None and not is_stopped and is_due(plan, step)
                if step % args.logging_steps == 0 or step in (plan.start_step + 1, plan.num_steps) or evaluates:
                    record = window.summarise(batch, losses, rates, running.get_global_grad_norm(), skipped.total)
                    with window.paused():
                        if evaluation is not None and evaluates:
                            found = evaluation.run(running)
                            record.update(found)
                            logger.info("evaluation after step %d: %s", step, format_evaluation(found))
                    log.write(record)
                if evaluates:  # that may have taken minutes, and who asks to stop has few
                    is_stopped = stop.is_agreed(plan.device) and step < plan.num_steps
                if is_stopped or (args.save_steps and step % args.save_steps == 0):
                    with window.paused():
                        state = RunState(stream=stream.state_dict(), ranks=plan.ranks.world, settings=plan.settings)
                        checkpoint.save(running, args.run_dir, state, plan.ranks, keep=args.save_total_limit)
                if is_stopped:
                    logger.info(
                        "told to stop: saved after step %d of %d; the same command goes on", step, plan.num_steps
                    )
                    break
        if not is_stopped:
            export(running, plan)
    del kept_for_loading
    engine.stop()
    if run_lock is not None:
        run_lock.close()
    return not is_stopped


def run_step(running: Any, batch: StepBatch, plan: Plan) -> torch.Tensor:
    """One optimizer step: all its micro-steps forward and backward.

    DeepSpeed averages over ranks and micro-steps; the weight undoes that, so that what is differentiated is the mean
    over the target tokens of the step.

    Returns:
        (A,) float32 on the device, cross-entropy summed over the targets of each micro-batch of this rank.
    """
    num_micro_steps = plan.ranks.world * len(batch.micro_batches)
    weight = num_micro_steps / max(1, batch.num_targets)
    losses = []
    for micro in batch.micro_batches:
        loss_sum = running(micro.to(plan.device, non_blocking=True))
        running.backward(loss_sum * weight)
        running.step()
        losses.append(loss_sum.detach())
    return torch.stack(losses)


def build_model(plan: Plan) -> tuple[PackedQwen, list[optim.ParameterGroup]]:
    """The model with the weights of the checkpoint that the run starts from, in training mode, and what is trained."""
    hf = pretrained.load_model(plan.source, dtype=plan.dtype, attn_implementation=plan.attention)
    if plan.args.use_liger_kernel:
        kernels.use_liger(hf)
    if plan.adapters is not None:
        adapters.add_adapters(hf, plan.adapters, seed=plan.args.seed)
    if plan.args.torch_compile:
        kernels.compile_layers(hf, attn_implementation=plan.attention)
    model = PackedQwen(hf, attn_implementation=plan.attention)
    model.train()
    groups = optim.group_parameters(model, optim.learning_rates(plan.args, plan.recipe.learning_rate))
    if plan.args.gradient_checkpointing:
        checkpoint_activations(model)
    return model, groups


def open_stream(plan: Plan) -> BinStream:
    """The steps of this rank, from where the run starts or goes on to its end."""
    args, accumulation = plan.args, plan.recipe.accumulation
    num_threads, factor = args.dataloader_num_workers, args.dataloader_prefetch_factor
    return BinStream(
        plan.index,
        plan.order,
        rank=plan.ranks.rank,
        world_size=plan.ranks.world,
        accumulation=accumulation,
        per_device=plan.recipe.per_device,
        start_step=plan.start_step,
        end_step=plan.num_steps,
        window_size=plan.shape.window_size,
        num_threads=num_threads,
        prefetch=2 * max(accumulation, num_threads) if factor is None else factor * num_threads,
        read_timeout_s=args.read_timeout_s,
        pin_device=plan.device if plan.device.type == "cuda" else None,
        read=read_settings(args, plan.index),
    )


def describe(plan: Plan, groups: list[optim.ParameterGroup]) -> None:
    """Say once what is going to happen."""
    index, ranks = plan.index, plan.ranks
    for folder, num_bins, share in zip(index.folders, np.diff(index.first_bins).tolist(), index.shares()):
        logger.info("%s: %d bins, share %.4g %%", folder, num_bins, 100 * share)
    if (held_out := plan.eval_index) is not None:
        folders = ", ".join(map(str, held_out.folders))
        logger.info(
            "to evaluate on: %d bins with %d samples of %s", held_out.num_bins, held_out.num_samples.sum(), folders
        )
    logger.info(
        "%d bins with %d tokens, %d of them targets", index.num_bins, index.num_tokens.sum(), index.num_targets.sum()
    )
    logger.info(
        "%d ranks on %s, %s, %s, ZeRO-%d; steps %d to %d of %d bins each",
        ranks.world,
        plan.device.type,
        str(plan.dtype).removeprefix("torch."),
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
        if plan.adapters is not None:
            out, name = plan.args.run_dir / ADAPTER_DIR, plan.args.model_name_or_path
            weights, of_adapters = adapters.split_weights(weights)
            adapters.write_adapter(out, of_adapters, plan.adapters, model=name, source=plan.source)
            weights = adapters.merge_weights(weights, of_adapters, plan.adapters.scaling)
        pretrained.write_checkpoint(plan.args.run_dir / FINAL_DIR, model.hf, weights, source=plan.source)
