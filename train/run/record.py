"""Records what a run resolved: plan -> ``<run>/settings.toml``.

Cost: a few calls of git if shards are in one of its work trees, else none.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import shlex
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from schemas.manifest import MANIFEST_FILE
from storage.urls import Location
from train.model.disk import writing
from train.run.plan import Plan
from train.settings.arguments import TrainArguments
from train.settings.record import RunFacts, write_record

PACKAGES = ("vlprep", "torch", "transformers", "deepspeed")
"""Packages whose versions are recorded."""


def record_run(plan: Plan, argv: Sequence[str] = ()) -> None:
    """Write the resolved settings of a run. A run that resumes replaces them by its own.

    Args:
        plan: the run.
        argv: flags of its command line.

    Raises:
        VlprepError: the folder of the run cannot be written.
    """
    grouping = plan.order.grouping
    facts = RunFacts(
        checkpoint=str(plan.source.absolute()),
        world_size=plan.ranks.world,
        global_batch=plan.order.global_batch,
        num_steps=plan.num_steps,
        accumulation=plan.batch.accumulation,
        per_device=plan.batch.per_device,
        shards_fingerprint=plan.index.fingerprint,
        group_runs=None if grouping is None else grouping.runs,
        command=shlex.join(["train/main.py", *(word for word in argv if not word.startswith("--local_rank"))]),
        shards_commit=_commits(plan.index.folders),
    )
    with writing(plan.args.run_dir):
        write_record(plan.args.run_dir, resolved_arguments(plan), facts, _versions())


def resolved_arguments(plan: Plan) -> TrainArguments:
    """The settings of a run with nothing left to the size of the model, the accelerator or what is installed.

    A run with these settings on the same ranks is the same run.
    """
    args, recipe, adapters = plan.args, plan.recipe, plan.adapters
    batch, aim = plan.batch, plan.batch.aim
    budget = args.max_tokens_per_forward or batch.per_device * int(plan.index.num_tokens.max())
    return dataclasses.replace(
        args,
        output_dir=args.run_dir,
        # Beside --output_dir, nothing but wandb reads the name.
        run_name=args.run_name if args.report_to == "wandb" else None,
        num_train_epochs=recipe.epochs if args.max_steps is None else None,
        samples_per_step=None if aim is None else aim.samples,
        max_tokens_per_forward=None if aim is None else budget,
        per_device_train_batch_size=batch.per_device if aim is None else None,
        gradient_accumulation_steps=batch.accumulation if aim is None else None,
        learning_rate=recipe.learning_rate if args.uses_base_rate else None,
        warmup_ratio=args.warmup if args.warmup_steps is None else None,
        lora_r=None if adapters is None else adapters.rank,
        lora_alpha=None if adapters is None else adapters.alpha,
        lora_dropout=None if adapters is None else adapters.dropout,
        bf16={torch.bfloat16: True, torch.float32: False}.get(plan.compute.dtype, args.bf16),
        fp16=True if plan.compute.dtype == torch.float16 else args.fp16,
        attn_implementation=plan.compute.attention,
    )


def _commits(folders: Sequence[Location]) -> str | None:
    """The commits of the manifests that git has, as they are on disk."""
    commits = [f"{folder}@{commit}" for folder in folders if (commit := _commit(folder))]
    return ", ".join(commits) or None


def _commit(folder: Location) -> str:
    """The last commit of a manifest; empty if it is in none, or changed since."""
    if not isinstance(folder, Path):
        return ""
    with suppress(OSError, subprocess.SubprocessError):
        git = ("git", "-C", str(folder))
        subprocess.run([*git, "diff", "--quiet", "HEAD", "--", MANIFEST_FILE], check=True, capture_output=True)
        shown = [*git, "log", "-1", "--format=%H", "--", MANIFEST_FILE]
        return subprocess.run(shown, check=True, capture_output=True, text=True).stdout.strip()
    return ""


def _versions() -> dict[str, str]:
    """Versions of the packages; those of a checkout that is not installed are unknown and left out."""
    versions = {}
    for name in PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
