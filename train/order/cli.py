"""``python -m train.order``: look at the order of a run without running it.

Shards and the numbers of a run -> a text: one step with bins, ranks and source samples, or what many steps ask of
ranks, storage and network.

Cost: that of :mod:`train.order.explain` or :mod:`train.order.simulate`.
"""

from __future__ import annotations

import math
from pathlib import Path

import click

from schemas.checkpoints import read_config
from schemas.errors import ConfigError, VlprepError
from train.arithmetic.cost import CostModel
from train.order.dealing import DataOrder, Grouping
from train.order.explain import explain_step
from train.order.simulate import NUM_STEPS, report, simulate
from train.shards.index import open_shards


@click.command(name="python -m train.order")
@click.option("--shards", required=True, help="Folder or URL, or several with weights, as the trainer takes them.")
@click.option("--step", type=click.IntRange(min=0), help="Print this step, counted from 0.")
@click.option("--simulate", "simulated", is_flag=True, help="Sum up many steps instead of printing one.")
@click.option("--global-batch", type=click.IntRange(min=1), required=True, help="Bins of a step over all ranks.")
@click.option("--world-size", type=click.IntRange(min=1), required=True, help="Number of ranks.")
@click.option("--accumulation", type=click.IntRange(min=1), help="Micro-steps of a step; by default one bin in each.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the run.")
@click.option("--epochs", type=click.FloatRange(min=0, min_open=True), help="Epochs of the run.  [default: no end]")
@click.option("--group-steps", type=click.IntRange(min=1), default=1, show_default=True, help="Window of the run.")
@click.option(
    "--model_name_or_path",
    "--model",
    "model",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder of the checkpoint of the run, by whose costs bins are dealt.  [default: Qwen2.5-VL-7B]",
)
@click.option(
    "--tune-llm/--freeze-llm", default=True, show_default=True, help="What the run trains; it decides the costs too."
)
@click.option("--tune-vision/--freeze-vision", default=False, show_default=True, help="What the run trains.")
@click.option("--lora/--no-lora", default=False, show_default=True, help="Whether it trains adapters.")
@click.option(
    "--gradient-checkpointing/--no-gradient-checkpointing",
    default=True,
    show_default=True,
    help="Whether the run recomputes activations.",
)
@click.option(
    "--num-steps", type=click.IntRange(1, 100_000), default=NUM_STEPS, show_default=True, help="With --simulate."
)
@click.option(
    "--tokens-per-s",
    type=float,
    default=100_000.0,
    show_default=True,
    help="With --simulate: speed of training over all ranks.",
)
def main(
    shards: str,
    step: int | None,
    simulated: bool,
    global_batch: int,
    world_size: int,
    accumulation: int | None,
    seed: int,
    epochs: float | None,
    group_steps: int,
    model: Path | None,
    tune_llm: bool,
    tune_vision: bool,
    lora: bool,
    gradient_checkpointing: bool,
    num_steps: int,
    tokens_per_s: float,
) -> None:
    """Print bins, ranks, costs and source samples of a training step, or sum up many steps (--simulate)."""
    try:
        if (step is None) == (not simulated):
            raise ConfigError("give either --step N or --simulate.")
        if not 0 < tokens_per_s < math.inf:
            raise ConfigError(f"--tokens-per-s is {tokens_per_s}; allowed: a positive number.")
        index = open_shards(shards)
        accumulation = accumulation or max(1, global_batch // world_size)
        trained = {
            "tune_llm": tune_llm,
            "tune_vision": tune_vision,
            "uses_adapters": lora,
            "gradient_checkpointing": gradient_checkpointing,
        }
        cost_model = (CostModel() if model is None else CostModel.of(read_config(model))).in_training(**trained)
        order = DataOrder(
            index.cost(cost_model),
            seed=seed,
            global_batch=global_batch,
            epochs=epochs,
            mixture=index.mixture,
            grouping=Grouping(steps=group_steps, runs=accumulation) if group_steps > 1 else None,
        )
        if step is not None:
            lines = explain_step(index, order, step, world_size=world_size, accumulation=accumulation)
        else:
            found = simulate(index, order, world_size=world_size, accumulation=accumulation, num_steps=num_steps)
            lines = report(
                index, order, found, world_size=world_size, accumulation=accumulation, tokens_per_s=tokens_per_s
            )
        for line in lines:
            click.echo(line)
    except VlprepError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from None
