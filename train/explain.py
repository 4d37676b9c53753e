"""``python -m train.order``: which bins, ranks and source samples a step uses.

A folder of shards and a step -> a text: one line a place of the step with what it costs, and under it the annotations
that its bin was packed from. The answer is that of a run with the same seed, global batch, ranks and micro-steps.

Cost: the index, and one filtered pass over the ledger.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import click
import numpy as np
import pyarrow.parquet as pq

from schemas.errors import ConfigError, ShardError, VlprepError
from schemas.tables import SAMPLES_FILE
from train.index import ShardIndex, open_shards
from train.order import EMPTY, DataOrder


class SourceSample(NamedTuple):
    """An annotation that was packed into a bin: its place in the bin, and where it was read."""

    slot: int
    dataset: str
    file: str
    line: int
    record: int
    id: str | None
    num_tokens: int


def source_samples(index: ShardIndex, bins: list[int]) -> dict[int, list[SourceSample]]:
    """Look bins up in the ledgers.

    Args:
        index: the set of shards.
        bins: numbers of bins.

    Returns:
        For every bin its samples in order.

    Raises:
        ShardError: a ledger is missing, or does not know a bin.
    """
    found: dict[int, list[SourceSample]] = {number: [] for number in bins}
    for folder, first in zip(index.folders, index.first_bins.tolist()):
        local_bins = [number - first for number in bins if index.folders[index.folder_of(number)] == folder]
        if not local_bins:
            continue
        try:
            ledger = pq.read_table(
                folder / SAMPLES_FILE, columns=["bin", *SourceSample._fields], filters=[("bin", "in", local_bins)]
            )
        except FileNotFoundError:
            raise ShardError(f"{folder / SAMPLES_FILE} is missing. Copy the folder again or build it again.") from None
        for row in ledger.sort_by([("bin", "ascending"), ("slot", "ascending")]).to_pylist():
            found[first + row.pop("bin")].append(SourceSample(**row))
    for number, samples in found.items():
        if len(samples) != index.num_samples[number]:
            raise ShardError(
                f"{index.folders[index.folder_of(number)] / SAMPLES_FILE} has {len(samples)} samples for bin "
                f"{index.locate(number).local_bin}, which holds {index.num_samples[number]}. Build the shards again."
            )
    return found


def explain_step(
    index: ShardIndex, order: DataOrder, step: int, *, world_size: int, accumulation: int
) -> Iterator[str]:
    """Describe a step, line by line.

    Args:
        index: the set of shards.
        order: over its bins.
        step: counted from 0.
        world_size: number of ranks.
        accumulation: micro-steps of the step.

    Raises:
        ConfigError: the global batch is not a multiple of ranks times micro-steps, or the step is below 0.
        ShardError: a ledger is missing, or does not know a bin.
    """
    per_device, rest = divmod(order.global_batch, world_size * accumulation)
    if rest:
        raise ConfigError(
            f"a global batch of {order.global_batch} is not a multiple of {world_size} ranks x {accumulation} "
            "micro-steps. Give the numbers of the run."
        )
    places = order.bins_of_step(step, world_size=world_size, accumulation=accumulation, per_device=per_device)
    samples = source_samples(index, places[places != EMPTY].tolist())
    # (A, W): what a rank has to do in a micro-step, as a share of the mean over all
    load = np.where(places == EMPTY, 0.0, order.cost[places]).sum(axis=2)
    load /= load.mean()
    yield (
        f"step {step}, epoch {step / order.steps_per_epoch:.4f}: {order.global_batch} bins, {world_size} ranks, "
        f"{accumulation} micro-steps, seed {order.seed}"
    )
    for micro_step, of_ranks in enumerate(places):
        efficiency = load[micro_step].mean() / load[micro_step].max()
        yield f"micro-step {micro_step}: efficiency {efficiency:.3f} (mean cost over the ranks / highest)"
        for rank, mine in enumerate(of_ranks):
            for number in mine.tolist():
                yield f"  rank {rank}: {_describe(index, number)}, load of the rank {load[micro_step, rank]:.3f}"
                for sample in samples[number]:
                    yield (
                        f"    {sample.slot}: {sample.dataset} {sample.file}:{sample.line} record {sample.record} "
                        f"id {sample.id}, {sample.num_tokens} tokens"
                    )


def _describe(index: ShardIndex, number: int) -> str:
    return (
        f"bin {number} ({index.locate(number)}), {index.num_tokens[number]} tokens, {index.num_patches[number]} patches"
    )


@click.command(name="python -m train.order")
@click.option("--shards", required=True, help="Folder with a manifest, or one whose sub-folders have one.")
@click.option("--step", type=click.IntRange(min=0), required=True, help="The step to look at, counted from 0.")
@click.option("--global-batch", type=click.IntRange(min=1), required=True, help="Bins of a step over all ranks.")
@click.option("--world-size", type=click.IntRange(min=1), required=True, help="Number of ranks.")
@click.option("--accumulation", type=click.IntRange(min=1), help="Micro-steps of a step; by default one bin in each.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the run.")
def main(shards: str, step: int, global_batch: int, world_size: int, accumulation: int | None, seed: int) -> None:
    """Print bins, ranks, costs and source samples of a training step."""
    try:
        index = open_shards(shards)
        order = DataOrder(index.cost(), seed=seed, global_batch=global_batch)
        if accumulation is None:
            accumulation = max(1, global_batch // world_size)
        for line in explain_step(index, order, step, world_size=world_size, accumulation=accumulation):
            click.echo(line)
    except VlprepError as error:
        click.echo(f"error: {error}", err=True)
        raise SystemExit(error.exit_code) from None
