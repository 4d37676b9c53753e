"""Where a run resumes: the settings that must not change, and the checkpoint and step it continues from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from schemas.errors import ConfigError
from schemas.wording import counted
from storage.urls import without_secrets
from train.model import optim, pretrained
from train.model.adapters import Adapters
from train.order.dealing import DataOrder
from train.run.run_dir import (
    BINS_OF_A_STEP,
    ZERO_STAGE,
    RunState,
    Setting,
    check_settings,
    check_shards,
    choose_checkpoint,
    read_state,
)
from train.settings.arguments import TrainArguments
from train.settings.batch import Batch
from train.settings.recipe import Recipe
from train.shards.index import ShardIndex


@dataclass(frozen=True, kw_only=True, slots=True)
class ResumePoint:
    """The checkpoint that a run resumes from.

    Attributes:
        folder: its folder.
        step: optimizer steps done there.
        is_resharded: whether another number of ranks saved it, so that its state is resharded.
    """

    folder: Path
    step: int
    is_resharded: bool


def fixed_settings(
    args: TrainArguments,
    recipe: Recipe,
    batch: Batch,
    index: ShardIndex,
    adapters: Adapters | None,
    source: Path,
    *,
    dtype: torch.dtype,
    deepspeed: dict[str, Any],
) -> dict[str, Setting]:
    """The settings that must be the same when a run resumes, besides the order of the bins.

    Those from which others follow come first, since the first one that differs is reported.

    The number of steps is not among them, since a run may be made longer, nor is the number of ranks. Frozen weights
    are: checkpoints hold trained weights only.
    """
    rates = optim.learning_rates(args, recipe.learning_rate)
    has_frozen = adapters is not None or not (args.tune_mm_llm and args.tune_mm_mlp and args.tune_mm_vision)
    return {
        "shards": index.fingerprint,
        "seed": args.seed,
        "adapters": None if adapters is None else adapters.describe(),
        BINS_OF_A_STEP: batch.bins,
        "group_steps": args.group_steps,
        ZERO_STAGE: deepspeed["zero_optimization"]["stage"],
        "precision": str(dtype).removeprefix("torch."),
        **{f"learning rate of {part}": rate for part, rate in rates.items()},
        "lr_scheduler_type": args.lr_scheduler_type,
        "warmup_steps": args.warmup_steps,
        "warmup_ratio": args.warmup,
        "optim": args.optim,
        "adam_beta1": args.adam_beta1,
        "adam_beta2": args.adam_beta2,
        "adam_epsilon": args.adam_epsilon,
        "tf32": args.tf32,
        "weight_decay": args.weight_decay,
        "max_grad_norm": args.max_grad_norm,
        "frozen weights": pretrained.weights_fingerprint(source) if has_frozen else None,
    }


def find_saved_state(args: TrainArguments) -> tuple[Path, RunState] | None:
    """The checkpoint that ``--resume`` selects, with its state; None for a new run.

    Raises:
        ConfigError: there is no such checkpoint.
    """
    folder = choose_checkpoint(args.run_dir, args.resume)
    return None if folder is None else (folder, read_state(folder))


def check_saved_state(args: TrainArguments, saved: tuple[Path, RunState], settings: dict[str, Setting]) -> None:
    """Check that a checkpoint is of a run with the same shards and settings.

    Raises:
        ConfigError: it is not.
    """
    check_shards(*saved, settings["shards"], without_secrets(args.shards))
    check_settings(*saved, settings)


def choose_group_runs(args: TrainArguments, batch: Batch, state: RunState | None) -> int | None:
    """Runs of the windows of ``--group_steps``; None if steps are not grouped.

    A new run has one for each micro-step. A resumed run keeps the number it began with, however many micro-steps it
    has now.
    """
    if args.group_steps == 1:
        return None
    return batch.accumulation if state is None else state.stream["group_runs"]


def find_resume_point(folder: Path, state: RunState, order: DataOrder, *, num_steps: int, world: int) -> ResumePoint:
    """Find the step that a run resumes at.

    Args:
        folder: the checkpoint.
        state: its state.
        order: order of the run.
        num_steps: steps of the run.
        world: number of ranks of the run.

    Raises:
        ConfigError: the checkpoint is of a run with another order, or beyond the end of this one.
    """
    try:
        step = order.step_of(state.stream)
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from error
    if step > num_steps:
        raise ConfigError(
            f"{folder} has {counted(step, 'step')} done, but this run ends after {num_steps}: raise --max_steps or "
            "--num_train_epochs."
        )
    return ResumePoint(folder=folder, step=step, is_resharded=state.ranks != world)
