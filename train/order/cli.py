"""``python -m train.order``: look at the order of a run without running it.

The folder of a run, or shards and the numbers of a planned one -> text: either a step with its bins, ranks and source
samples, or what many steps demand of ranks, storage and network.

Cost: that of :mod:`train.order.explain` or :mod:`train.order.simulate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from schemas.checkpoints import read_config
from schemas.errors import ConfigError
from schemas.setting import setting_fields
from storage.urls import without_secrets
from train.exits import guarded
from train.order.dealing import DataOrder
from train.order.explain import deal_step, explain_step, step_json
from train.order.run_order import order_of_run
from train.order.simulate import NUM_STEPS, report, simulate
from train.settings.arguments import TrainArguments
from train.settings.batch import choose_bins
from train.settings.record import read_record
from train.shards.index import ShardIndex, open_shards

_PLANNED = "Without --run: "


def _run_setting(name: str, flag: str, *, unset: str = "") -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Option of a planned run that is a setting of the trainer: type, help and bounds are those of its declaration.

    ``unset`` says what applies without the option where that differs from the trainer.
    """
    field = setting_fields(TrainArguments)[name]
    if unset:
        field = replace(field, setting=replace(field.setting, unset=unset))
    return click.option(flag, name, type=field.kind, help=_PLANNED + field.help_text())


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownOrder:
    """An order of bins, and the ranks and micro-steps that they are dealt to.

    ``per_device`` is None if these share the global batch equally, ``num_steps`` if the run ends with the order.
    """

    index: ShardIndex
    order: DataOrder
    world_size: int
    accumulation: int
    per_device: int | None = None
    num_steps: int | None = None


@click.command(
    name="python -m train.order",
    epilog="\b\nExamples:\n"
    "  python -m train.order --run runs/mine --step 12\n"
    "  python -m train.order --run runs/mine --step 12 --json\n"
    "  python -m train.order --shards shards/ --world-size 8 --samples-per-step 128 --simulate",
)
@click.option("--run", type=click.Path(file_okay=False, path_type=Path), help="Folder of a run, with settings.toml.")
@click.option("--shards", help=_PLANNED + "folders or URLs, with weights if need be, as the trainer takes them.")
@click.option("--step", type=click.IntRange(min=0), help="Print this step, counted from 0. Step 12 of the log is 11.")
@click.option("--json", "as_json", is_flag=True, help="With --step: print only its bins, as a JSON list.")
@click.option("--simulate", "simulated", is_flag=True, help="Summarize many steps instead of printing a step.")
@click.option("--global-batch", type=click.IntRange(min=1), help=_PLANNED + "bins of a step over all ranks.")
@_run_setting("samples_per_step", "--samples-per-step", unset="--global-batch bins")
@click.option("--world-size", type=click.IntRange(min=1), help=_PLANNED + "number of ranks.")
@click.option(
    "--accumulation",
    type=click.IntRange(min=1),
    help=_PLANNED + "micro-steps of a step.  [default: as many as give each rank one bin in a micro-step]",
)
@_run_setting("seed", "--seed")
@_run_setting("num_train_epochs", "--epochs", unset="no end")
@_run_setting("group_steps", "--group-steps")
@click.option(
    "--model_name_or_path",
    "--model",
    "model",
    type=click.Path(file_okay=False, path_type=Path),
    help=_PLANNED + "checkpoint folder, from whose sizes the costs of bins follow.  [default: sizes of the 7B]",
)
@click.option(
    "--num-steps",
    type=click.IntRange(1, 100_000),
    default=NUM_STEPS,
    show_default=True,
    help="With --simulate: number of steps, fewer if the run ends before.",
)
@click.option(
    "--tokens-per-s",
    type=float,
    default=100_000.0,
    show_default=True,
    help="With --simulate: training speed over all ranks.",
)
@guarded
def main(
    run: Path | None,
    step: int | None,
    as_json: bool,
    simulated: bool,
    num_steps: int,
    tokens_per_s: float,
    **planned: Any,
) -> None:
    """Print bins, ranks, costs and source samples of a training step, or summarize many steps (--simulate).

    Give the folder of a run (--run), or the numbers of a planned one: --shards, --world-size, --global-batch or
    --samples-per-step, and more.
    """
    if (step is None) == (not simulated):
        raise ConfigError("give either --step N or --simulate.")
    if as_json and step is None:
        raise ConfigError("--json has no effect with --simulate. Leave it out, or give --step N.")
    if not 0 < tokens_per_s < math.inf:
        raise ConfigError(f"--tokens-per-s is {tokens_per_s}; allowed: a positive number.")
    shown = open_order(run, planned)
    ranks = {"world_size": shown.world_size, "accumulation": shown.accumulation}
    dealing: dict[str, Any] = {**ranks, "per_device": shown.per_device}
    lines: Iterable[str]
    if step is not None:
        dealt = deal_step(shown.order, step, **dealing, num_steps=shown.num_steps)
        lines = [step_json(shown.index, dealt)] if as_json else explain_step(shown.index, shown.order, step, dealt)
    else:
        simulation = simulate(shown.index, shown.order, num_steps=num_steps, end=shown.num_steps, **dealing)
        lines = report(shown.index, shown.order, simulation, tokens_per_s=tokens_per_s, **ranks)
    for line in lines:
        click.echo(line)


def open_order(run: Path | None, planned: dict[str, Any]) -> ShownOrder:
    """The order of a run, or of a planned one.

    Args:
        run: folder of the run.
        planned: options of a planned run by name; None where the command line has none.

    Raises:
        ConfigError: both are given, or too little, or the run has no record.
        ShardError: the shards are incomplete.
    """
    options = {name: value for name, value in planned.items() if value is not None}
    if run is not None:
        if options:
            names = ", ".join(sorted(f"--{name.replace('_', '-')}" for name in options))
            raise ConfigError(f"--run {run} has settings of its own: leave out {names}.")
        return open_run(run)
    if not options.keys() >= {"shards", "world_size"} or ("global_batch" in options) == ("samples_per_step" in options):
        raise ConfigError(
            "give --run FOLDER, or all of --shards, --world-size and either --global-batch or --samples-per-step."
        )
    return open_planned(**options)


def open_run(run_dir: Path) -> ShownOrder:
    """The order of a run, from the settings that it recorded when it last started or resumed.

    Raises:
        ConfigError: the folder has no such record, its checkpoint no longer exists, or the shards were built again.
        ShardError: the shards are incomplete.
    """
    args, facts = read_record(run_dir)
    index = open_shards(args.shards)
    if facts.shards_fingerprint not in (None, index.fingerprint):
        raise ConfigError(
            f"{run_dir} was started with --shards {without_secrets(args.shards)}, but they were built again since, "
            "with other bins: they no longer say what its steps were. Build the same shards again to look at them."
        )
    order = order_of_run(
        args,
        index,
        read_config(Path(facts.checkpoint)),
        global_batch=facts.global_batch,
        epochs=args.num_train_epochs,
        group_runs=facts.group_runs,
    )
    return ShownOrder(
        index=index,
        order=order,
        world_size=facts.world_size,
        accumulation=facts.accumulation,
        per_device=facts.per_device,
        num_steps=facts.num_steps,
    )


def open_planned(
    *,
    shards: str,
    world_size: int,
    global_batch: int | None = None,
    samples_per_step: int | None = None,
    accumulation: int | None = None,
    model: Path | None = None,
    **settings: Any,
) -> ShownOrder:
    """The order of a planned run that trains the language model and the merger.

    Args:
        shards: as the trainer takes them.
        world_size: number of ranks.
        global_batch: bins of a step; None for as many as hold ``samples_per_step``.
        samples_per_step: samples of a step.
        accumulation: micro-steps of a step; None for one bin of each rank in a micro-step.
        model: folder of the checkpoint; None for the sizes of the 7B.
        settings: further fields of :class:`TrainArguments`.
    """
    args = TrainArguments(shards=shards, **settings)
    index = open_shards(shards)
    per_device = None
    if samples_per_step is not None:
        global_batch = choose_bins(samples_per_step, samples_per_bin=index.samples_per_bin, world=world_size)
        accumulation = accumulation or math.ceil(global_batch / world_size)
        per_device = math.ceil(global_batch / (world_size * accumulation))
    assert global_batch is not None, "the command line gives one of them"
    accumulation = accumulation or max(1, global_batch // world_size)
    order = order_of_run(
        args,
        index,
        None if model is None else read_config(model),
        global_batch=global_batch,
        epochs=args.num_train_epochs,
        group_runs=accumulation if args.group_steps > 1 else None,
    )
    return ShownOrder(index=index, order=order, world_size=world_size, accumulation=accumulation, per_device=per_device)
