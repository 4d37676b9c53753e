"""Which bins, ranks and source samples a step uses.

A set of shards and a step -> a text: what every rank has to compute in every micro-step, the bins it does that with,
and under each bin the annotations that it was packed from. The answer is that of a run with the same seed, global
batch, ranks, micro-steps and model.

Cost: the index, and one filtered pass over the ledger.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from schemas.errors import ConfigError, ShardError
from schemas.tables import SAMPLES_FILE
from train.order.dealing import EMPTY, DataOrder
from train.shards.index import ShardIndex
from train.shards.ledger import read_ledger


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
    for place, folder in enumerate(index.folders):
        number_of = {int(index.local_bin[number]): number for number in bins if index.folder_of(number) == place}
        if not number_of:
            continue
        ledger = read_ledger(folder, ["bin", *SourceSample._fields], [("bin", "in", list(number_of))])
        for row in ledger.sort_by([("bin", "ascending"), ("slot", "ascending")]).to_pylist():
            found[number_of[row.pop("bin")]].append(SourceSample(**row))
    for number, samples in found.items():
        if len(samples) != index.num_samples[number]:
            raise ShardError(
                f"{index.folders[index.folder_of(number)] / SAMPLES_FILE} has {len(samples)} samples for bin "
                f"{index.locate(number).local_bin}, which holds {index.num_samples[number]}. Build the shards again."
            )
    return found


def bins_per_device(order: DataOrder, *, world_size: int, accumulation: int) -> int:
    """Bins of a rank in a micro-step.

    Raises:
        ConfigError: the global batch is not a multiple of ranks times micro-steps.
    """
    per_device, rest = divmod(order.global_batch, world_size * accumulation)
    if rest:
        raise ConfigError(
            f"a global batch of {order.global_batch} is not a multiple of {world_size} ranks x {accumulation} "
            "micro-steps. Give the numbers of the run."
        )
    return per_device


def explain_step(
    index: ShardIndex, order: DataOrder, step: int, *, world_size: int, accumulation: int
) -> Iterator[str]:
    """Describe a step, line by line.

    Args:
        index: the set of shards.
        order: over its bins, by costs in floating-point operations.
        step: counted from 0.
        world_size: number of ranks.
        accumulation: micro-steps of the step.

    Raises:
        ConfigError: the global batch is not a multiple of ranks times micro-steps, or the order has no such step.
        ShardError: a ledger is missing, or does not know a bin.
    """
    per_device = bins_per_device(order, world_size=world_size, accumulation=accumulation)
    if order.num_steps is not None and step >= order.num_steps:
        raise ConfigError(f"step is {step}, but the order ends after {order.num_steps} steps, which count from 0.")
    places = order.bins_of_step(step, world_size=world_size, accumulation=accumulation, per_device=per_device)
    samples = source_samples(index, places[places != EMPTY].tolist())
    # (A, W): what a rank has to do in a micro-step
    load = np.where(places == EMPTY, 0.0, order.cost[places]).sum(axis=2)
    yield (
        f"step {step}, epoch {step / order.steps_per_epoch:.4f}: {(places != EMPTY).sum()} bins, {world_size} ranks, "
        f"{accumulation} micro-steps, seed {order.seed}, efficiency {order.efficiency(places):.3f}"
    )
    for micro_step, of_ranks in enumerate(places):
        mean, highest = load[micro_step].mean(), load[micro_step].max()
        yield (
            f"micro-step {micro_step}: efficiency {mean / highest:.3f} (mean cost over the ranks / highest)"
            if highest
            else f"micro-step {micro_step}: no bins"
        )
        for rank, mine in enumerate(of_ranks):
            share = f", {load[micro_step, rank] / mean:.3f} of the mean" if highest else ""
            yield f"  rank {rank}: cost {_tflop(load[micro_step, rank])}{share}"
            for number in mine.tolist():
                if number == EMPTY:
                    yield "    an empty place: one token without weight"
                    continue
                yield f"    {_describe(index, order, number)}"
                for sample in samples[number]:
                    yield (
                        f"      {sample.slot}: {sample.dataset} {sample.file}:{sample.line} record {sample.record} "
                        f"id {sample.id}, {sample.num_tokens} tokens"
                    )


def _describe(index: ShardIndex, order: DataOrder, number: int) -> str:
    return (
        f"bin {number} ({index.locate(number)}): {index.num_tokens[number]} tokens, {index.num_patches[number]} "
        f"patches, cost {_tflop(order.cost[number])}"
    )


def _tflop(cost: float) -> str:
    """With four digits or more, for small models too."""
    return f"{cost / 1e12:,.3f} TFLOP" if cost >= 1e12 or not cost else f"{cost / 1e12:.4g} TFLOP"
