"""What a run is going to be: flags -> a :class:`Plan`, in which settings, shards and checkpoints were found to agree.

Everything that can be wrong is found here, before the process group starts and weights are loaded: by every rank for
itself, from the same files, so all ranks come to the same plan; :func:`check_same_plan` sees that they have.

Cost: opening the shards, the ledgers of those to evaluate on, and parsing ``tokenizer.json`` (0.3 s).
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from schemas.checkpoints import read_config
from schemas.errors import ConfigError
from train.model import optim, pretrained
from train.model.adapters import Adapters, choose_adapters
from train.model.attention import check_window
from train.model.flops import peak_tflops
from train.model.kernels import check_kernels
from train.model.pretrained import ModelShape
from train.order.dealing import DataOrder
from train.order.run_order import order_of_run
from train.run.device import choose_attention, choose_device, choose_dtype
from train.run.metrics import require_reporter
from train.run.process_group import Ranks, read_ranks
from train.run.run_dir import RunState, Setting, check_settings, choose_checkpoint, read_state
from train.settings.arguments import TrainArguments
from train.settings.deepspeed_file import complete_config, read_deepspeed_config
from train.settings.recipe import Recipe, choose_recipe
from train.shards.index import ShardIndex, open_shards
from train.shards.ledger import SampleDatasets, sample_datasets
from train.shards.reader import ReadSettings

FINAL_DIR, ADAPTER_DIR = "final", "adapter"
"""Folders of the trained model, and of its adapters alone, inside the folder of the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A run that can start; nothing is started yet.

    Attributes:
        args: the flags.
        recipe: settings that the flags leave to the size of the model.
        ranks: place of this process.
        device: where this rank computes.
        dtype: what it computes in: bfloat16, float16 or float32.
        attention: attention implementation.
        peak_tflops: what the device can do at most, in 10^12 operations a second, where that is known.
        deepspeed: complete configuration of DeepSpeed.
        index: the bins.
        order: in which they are used.
        num_steps: optimizer steps of the whole run.
        eval_index: the bins to evaluate on, if any.
        eval_datasets: which datasets their samples are of.
        source: folder of the checkpoint that the run starts from.
        shape: of its model.
        adapters: what LoRA puts into it, if asked for.
        settings: what must be the same when the run goes on from one of its checkpoints.
        resume_from: the checkpoint to go on from, if any.
        is_converted: whether that checkpoint is of another number of ranks, so that its state is dealt out anew.
        start_step: steps done at that checkpoint; else 0.
    """

    args: TrainArguments
    recipe: Recipe
    ranks: Ranks
    device: torch.device
    dtype: torch.dtype
    attention: str
    peak_tflops: float | None
    deepspeed: dict[str, Any]
    index: ShardIndex
    order: DataOrder
    num_steps: int
    eval_index: ShardIndex | None
    eval_datasets: SampleDatasets | None
    source: Path
    shape: ModelShape
    adapters: Adapters | None
    settings: dict[str, Setting]
    resume_from: Path | None
    is_converted: bool
    start_step: int

    @property
    def order_command(self) -> str:
        """Command that shows a step of this run, without ``--step``."""
        return shlex.join(["python", "-m", "train.order", "--run", str(self.args.run_dir)])


def check_outputs(run_dir: Path, source: Path) -> None:
    """See that the trained model can be written, and replaces nothing that it is made from.

    Raises:
        ConfigError: it cannot, or would.
    """
    for out in (run_dir / FINAL_DIR, run_dir / ADAPTER_DIR):
        if out.is_symlink() or (out.exists() and not out.is_dir()):
            found = "a link" if out.is_symlink() else "a file"
            raise ConfigError(
                f"{out} is {found}, and the trained model is to lie there: remove it, or give another --output_dir."
            )
        if source.resolve().is_relative_to(out.resolve()):
            raise ConfigError(
                f"--model_name_or_path {source} is what this run would replace in the end: give another --output_dir."
            )


def check_same_plan(plan: Plan) -> None:
    """Compare the plans of the ranks, each of which has looked at shards and checkpoints for itself. All call this.

    Raises:
        ConfigError: they differ, on all ranks.
    """
    mine: dict[str, object] = {
        **plan.settings,
        "first step": plan.start_step + 1,
        "checkpoint to go on from": None if plan.resume_from is None else plan.resume_from.name,
        "steps": plan.num_steps,
        "attention": plan.attention,
    }
    if plan.resume_from is None:
        mine["weights to start from (fingerprint)"] = pretrained.weights_fingerprint(plan.source)
    of_ranks: list[dict[str, object]] = [mine] * plan.ranks.world
    torch.distributed.all_gather_object(of_ranks, mine)
    for rank, other in enumerate(of_ranks):
        for name, value in of_ranks[0].items():
            if other.get(name) != value:
                raise ConfigError(
                    f"rank {rank} would train with {name} = {other.get(name)}, but rank 0 with {value}: let all "
                    "machines see the same --output_dir, shards and checkpoint, with the same packages."
                )


def make_plan(args: TrainArguments) -> Plan:
    """Look at everything that a run depends on, before anything expensive starts.

    Raises:
        ConfigError: settings, shards and checkpoints do not fit together.
        ShardError: shards are incomplete.
    """
    ranks = read_ranks(args.local_rank)
    require_reporter(args.report_to)
    deepspeed = read_deepspeed_config(args.deepspeed)
    index = open_shards(args.shards)
    eval_index = None if args.eval_shards is None else open_eval_shards(args.eval_shards)
    check_read_flags(args, [index] if eval_index is None else [index, eval_index])
    source = pretrained.find_checkpoint(args.model_name_or_path)
    check_outputs(args.run_dir, source)
    shape = pretrained.read_shape(source)
    prints = index.manifests[0].fingerprints
    pretrained.check_fingerprints(source, prints, shards=str(args.shards))
    # Reading a tokenizer takes a second: the same fingerprints are not compared twice.
    if eval_index is not None and (eval_prints := eval_index.manifests[0].fingerprints) != prints:
        pretrained.check_fingerprints(source, eval_prints, shards=str(args.eval_shards))

    model_config = read_config(source)
    recipe = choose_recipe(args, model_config)
    adapters = choose_adapters(args, model_config)
    device = choose_device(ranks)
    dtype = choose_dtype(args, deepspeed, device)
    attention = choose_attention(args, device, dtype)
    check_window(shape.sliding_window, attention)
    deepspeed = complete_config(deepspeed, args, recipe, world=ranks.world, dtype=dtype, hidden_size=shape.hidden_size)
    check_kernels(args, device, deepspeed)

    settings = run_settings(args, recipe, index, dtype=dtype, deepspeed=deepspeed)
    settings.update(frozen_settings(args, adapters, source))
    resume_from = choose_checkpoint(args.run_dir, args.resume)
    state = None if resume_from is None else read_state(resume_from)
    if resume_from is not None and state is not None:
        check_settings(resume_from, state, settings)
    order = order_of_run(
        args,
        index,
        model_config,
        global_batch=deepspeed["train_batch_size"],
        epochs=recipe.epochs if args.max_steps is None else None,
        group_runs=choose_group_runs(args, recipe, state),
    )
    num_steps = args.max_steps or order.num_steps
    assert num_steps is not None, "an order with a number of epochs has a number of steps"
    start_step = 0
    if resume_from is not None and state is not None:
        start_step = find_start(resume_from, state, order, num_steps)
    return Plan(
        args=args,
        recipe=recipe,
        ranks=ranks,
        device=device,
        dtype=dtype,
        attention=attention,
        peak_tflops=args.peak_tflops or peak_tflops(device, dtype),
        deepspeed=deepspeed,
        index=index,
        order=order,
        num_steps=num_steps,
        eval_index=eval_index,
        eval_datasets=None if eval_index is None else sample_datasets(eval_index),
        source=source,
        shape=shape,
        adapters=adapters,
        settings=settings,
        resume_from=resume_from,
        is_converted=state is not None and state.ranks != ranks.world,
        start_step=start_step,
    )


def open_eval_shards(shards: str) -> ShardIndex:
    """The bins to evaluate on, each of which is used once.

    Raises:
        ConfigError: they are given weights or epochs.
        ShardError: they are incomplete.
    """
    index = open_shards(shards)
    if index.mixture is not None:
        raise ConfigError(
            f"--eval_shards {shards} gives weights or epochs, but every bin is used once: leave them out."
        )
    return index


def check_read_flags(args: TrainArguments, indexes: list[ShardIndex]) -> None:
    """Check how shards are to be read, and compare flags for remote ones with where they lie.

    Raises:
        ConfigError: a value makes no sense, or such a flag would have no effect.
    """
    for index in indexes:
        read_settings(args, index)
    if any(index.is_remote for index in indexes):
        return
    for name in ("read_connections", "cache_dir"):
        if (value := getattr(args, name)) is not None:
            raise ConfigError(
                f"--{name} {value} has no effect: all shards lie on a file system. Leave it out, or give a URL."
            )


def read_settings(args: TrainArguments, index: ShardIndex) -> ReadSettings:
    """How the bins of an index are read.

    Raises:
        ConfigError: a value that makes no sense.
    """
    remote: dict[str, Any] = {}
    if index.is_remote:
        flags = {"connections": args.read_connections, "cache_dir": args.cache_dir, "cache_bytes": args.cache_bytes}
        remote = {name: value for name, value in flags.items() if value is not None}
    return ReadSettings(verify=args.verify, **remote)


def run_settings(
    args: TrainArguments, recipe: Recipe, index: ShardIndex, *, dtype: torch.dtype, deepspeed: dict[str, Any]
) -> dict[str, Setting]:
    """What must be the same when a run goes on, beside the order of the bins.

    The number of steps is not among it, since a run may be made longer; nor is the number of ranks.
    """
    rates = optim.learning_rates(args, recipe.learning_rate)
    return {
        "shards": index.fingerprint,
        "seed": args.seed,
        "bins of a step": deepspeed["train_batch_size"],
        "group_steps": args.group_steps,
        "ZeRO stage": deepspeed["zero_optimization"]["stage"],
        "precision": str(dtype).removeprefix("torch."),
        **{f"learning rate of {part}": rate for part, rate in rates.items()},
        "lr_scheduler_type": args.lr_scheduler_type,
        "warmup_ratio": args.warmup,
        "weight_decay": args.weight_decay,
        "max_grad_norm": args.max_grad_norm,
    }


def frozen_settings(args: TrainArguments, adapters: Adapters | None, source: Path) -> dict[str, Setting]:
    """What must be the same, too, since checkpoints hold trained weights only: adapters, and what is frozen."""
    is_frozen = adapters is not None or not (args.tune_mm_llm and args.tune_mm_mlp and args.tune_mm_vision)
    return {
        "adapters": None if adapters is None else adapters.describe(),
        "frozen weights": pretrained.weights_fingerprint(source) if is_frozen else None,
    }


def choose_group_runs(args: TrainArguments, recipe: Recipe, state: RunState | None) -> int | None:
    """Runs of the windows of ``--group_steps``; None if steps are not grouped.

    A new run has one for each micro-step. A resumed run keeps the number it began with, however many micro-steps it
    has now.
    """
    if args.group_steps == 1:
        return None
    return recipe.accumulation if state is None else state.stream["group_runs"]


def find_start(folder: Path, state: RunState, order: DataOrder, num_steps: int) -> int:
    """Steps done at the checkpoint that a run goes on from.

    Raises:
        ConfigError: the checkpoint is of a run with another order, or beyond the end of this one.
    """
    try:
        step = order.step_of(state.stream)
    except ConfigError as error:
        raise ConfigError(f"{folder}: {error}") from error
    if step > num_steps:
        raise ConfigError(
            f"{folder} has {step} steps done, but this run ends after {num_steps}: raise --max_steps or "
            "--num_train_epochs."
        )
    return step
