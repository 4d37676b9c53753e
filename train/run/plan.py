"""What a run is going to be: flags -> a :class:`Plan`, whose settings, shards and checkpoints match.

Everything that can be wrong is detected here, before the process group starts and weights are loaded. Every rank plans
for itself from the same files and, if devices differ, for the smallest (:func:`agree_on_capacity`). So all ranks have
the same plan; :func:`check_same_plan` compares them.

Cost: opening the shards, the ledgers of those to evaluate on, and parsing ``tokenizer.json`` (0.3 s).
"""

from __future__ import annotations

import dataclasses
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from schemas.checkpoints import read_config
from schemas.errors import ConfigError
from train.model import pretrained
from train.model.adapters import Adapters, choose_adapters
from train.model.attention import check_window
from train.model.kernels import check_kernels
from train.model.pretrained import ModelShape
from train.model.sizes import sizes_of
from train.order.dealing import DataOrder
from train.order.run_order import order_of_run
from train.run.checks import check_outputs, check_read_flags, check_tokenizers, open_eval_shards
from train.run.device import Compute, choose_compute
from train.run.metrics import require_reporter
from train.run.process_group import Ranks, read_ranks
from train.run.resume import (
    ResumePoint,
    check_saved_state,
    choose_group_runs,
    find_resume_point,
    find_saved_state,
    fixed_settings,
)
from train.run.run_dir import Setting, shown
from train.run.strategy import choose_strategy
from train.settings.arguments import TrainArguments
from train.settings.batch import Batch, describe_batch
from train.settings.deepspeed_file import complete_config, read_deepspeed_config
from train.settings.recipe import Recipe, choose_recipe
from train.shards.index import ShardIndex, open_shards
from train.shards.ledger import SampleDatasets, sample_datasets


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """The bins to evaluate on, and the datasets of their samples."""

    index: ShardIndex
    datasets: SampleDatasets


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A run that can start. Nothing is started yet.

    Attributes:
        args: the flags, with the DeepSpeed file that the run takes.
        recipe: rate and length, with recommended values for flags left out.
        batch: bins of a step, and their forward passes.
        ranks: this process among the ranks.
        compute: how this rank computes.
        deepspeed: complete DeepSpeed configuration.
        strategy_note: why the run takes a DeepSpeed file that neither a flag names nor is the default, if so.
        index: the bins to train on.
        order: their order.
        num_steps: optimizer steps of the run.
        held_out: the bins to evaluate on, if any.
        source: folder of the checkpoint that the run starts from.
        shape: shape of its model.
        adapters: the adapters of LoRA, if enabled.
        settings: the settings that must be the same when the run resumes.
        resume: the checkpoint that the run resumes from, if any.
    """

    args: TrainArguments
    recipe: Recipe
    batch: Batch
    ranks: Ranks
    compute: Compute
    deepspeed: dict[str, Any]
    strategy_note: str | None
    index: ShardIndex
    order: DataOrder
    num_steps: int
    held_out: HeldOut | None
    source: Path
    shape: ModelShape
    adapters: Adapters | None
    settings: dict[str, Setting]
    resume: ResumePoint | None

    @property
    def start_step(self) -> int:
        """Optimizer steps done before this run starts or resumes."""
        return 0 if self.resume is None else self.resume.step

    @property
    def batch_line(self) -> str:
        """Samples, bins and forward passes of a step, in one line."""
        aim, world = self.batch.aim, self.ranks.world
        if aim is not None and not aim.is_recommended:
            reference = f"--samples_per_step {aim.samples:,}"
        else:
            reference = f"{self.recipe.origin}: {self.recipe.samples * world if aim is None else aim.samples:,}"
        return describe_batch(
            self.batch,
            samples_per_bin=self.index.samples_per_bin,
            world=world,
            device=self.compute.device.type,
            steps_per_epoch=self.order.steps_per_epoch,
            reference=reference,
        )

    @property
    def order_command(self) -> str:
        """Command that shows a step of this run, without ``--step``."""
        return shlex.join(["python", "-m", "train.order", "--run", str(self.args.run_dir)])


def make_plan(args: TrainArguments, *, capacity: int | None = None) -> Plan:
    """Plan a run, before anything expensive starts.

    Args:
        args: the flags.
        capacity: bytes of the smallest device of all ranks, where it is not that of this rank.

    Raises:
        ConfigError: settings, shards and checkpoints do not match.
        ShardError: shards are incomplete.
    """
    ranks = read_ranks(args.local_rank)
    require_reporter(args.report_to)
    index = open_shards(args.shards)
    eval_index = None if args.eval_shards is None else open_eval_shards(args.eval_shards)
    check_read_flags(args, [index] if eval_index is None else [index, eval_index])
    source = pretrained.find_checkpoint(args.model_name_or_path)
    check_outputs(args.run_dir, source)
    shape = pretrained.read_shape(source)
    check_tokenizers(source, args, index, eval_index)

    config = read_config(source)
    recipe = choose_recipe(args, config)
    saved = find_saved_state(args)
    adapters = choose_adapters(args, config)
    compute = choose_compute(args, read_deepspeed_config(args.deepspeed_file), ranks)
    if capacity is not None:
        compute = dataclasses.replace(compute, capacity=capacity)
    check_window(shape.sliding_window, compute.attention)
    strategy = choose_strategy(args, recipe, index, config, saved, compute=compute, world=ranks.world)
    args, batch = strategy.args, strategy.batch
    deepspeed = complete_config(
        strategy.deepspeed,
        args,
        batch,
        world=ranks.world,
        dtype=compute.dtype,
        hidden_size=shape.hidden_size,
        num_trained=sizes_of(config, args).num_trained,
    )
    check_kernels(args, compute.device, deepspeed)

    settings = fixed_settings(args, recipe, batch, index, adapters, source, dtype=compute.dtype, deepspeed=deepspeed)
    if saved is not None:
        check_saved_state(args, saved, settings)
    order = order_of_run(
        args,
        index,
        config,
        global_batch=batch.bins,
        epochs=recipe.epochs if args.max_steps is None else None,
        group_runs=choose_group_runs(args, batch, None if saved is None else saved[1]),
    )
    num_steps = args.max_steps or order.num_steps
    assert num_steps is not None, "an order with a number of epochs has a number of steps"
    resume = None if saved is None else find_resume_point(*saved, order, num_steps=num_steps, world=ranks.world)
    held_out = None if eval_index is None else HeldOut(index=eval_index, datasets=sample_datasets(eval_index))
    return Plan(
        args=args,
        recipe=recipe,
        batch=batch,
        ranks=ranks,
        compute=compute,
        deepspeed=deepspeed,
        strategy_note=strategy.note,
        index=index,
        order=order,
        num_steps=num_steps,
        held_out=held_out,
        source=source,
        shape=shape,
        adapters=adapters,
        settings=settings,
        resume=resume,
    )


def agree_on_capacity(plan: Plan, args: TrainArguments) -> Plan:
    """Plan for the smallest device of all ranks, so that all plan alike. Collective.

    Args:
        plan: the plan for the device of this rank.
        args: the flags that it was made of.

    Raises:
        ConfigError: settings, shards and checkpoints do not match.
        ShardError: shards are incomplete.
    """
    capacities: list[int | None] = [None] * plan.ranks.world
    torch.distributed.all_gather_object(capacities, plan.compute.capacity)
    smallest = min((capacity for capacity in capacities if capacity is not None), default=None)
    return plan if plan.compute.capacity == smallest else make_plan(args, capacity=smallest)


def check_same_plan(plan: Plan) -> None:
    """Compare the plans of the ranks. All ranks call this together.

    Raises:
        ConfigError: the plans differ, on all ranks.
    """
    mine: dict[str, object] = {
        **plan.settings,
        "first step": plan.start_step + 1,
        "checkpoint to resume from": None if plan.resume is None else plan.resume.folder.name,
        "steps": plan.num_steps,
        "bins of a forward pass (--max_tokens_per_forward)": plan.batch.per_device,
        "attention": plan.compute.attention,
    }
    if plan.resume is None:
        mine["weights to start from (fingerprint)"] = pretrained.weights_fingerprint(plan.source)
    of_ranks: list[dict[str, object]] = [mine] * plan.ranks.world
    torch.distributed.all_gather_object(of_ranks, mine)
    for rank, other in enumerate(of_ranks):
        for name, value in of_ranks[0].items():
            if other.get(name) != value:
                raise ConfigError(
                    f"rank {rank} would train with {name} = {shown(other.get(name))}, but rank 0 with "
                    f"{shown(value)}: let all machines see the same --output_dir, shards and checkpoint, with the same "
                    "packages."
                )
