"""Describes a step: its bins, the ranks that compute them, and the annotations they were packed from.

A set of shards, an order and a step -> lines of text. They are those of a run with the same seed, global batch, ranks,
micro-steps and model.

Cost: the index, and a filtered pass over the ledger.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from schemas.errors import ConfigError, ShardError
from schemas.tables import SAMPLES_FILE
from schemas.wording import counted, source_name
from storage.shard_set import read_packed
from storage.urls import Url
from train.order.dealing import EMPTY, DataOrder
from train.shards.index import ShardIndex


class SourceSample(NamedTuple):
    """An annotation that was packed into a bin: its slot in the bin, and where it was read from."""

    slot: int
    dataset: str
    file: str
    line: int
    record: int
    id: str | None
    num_tokens: int

    @property
    def name(self) -> str:
        """How messages name it."""
        return source_name(dataset=self.dataset, file=self.file, line=self.line, record=self.record, id=self.id)


def source_samples(index: ShardIndex, bins: Sequence[int]) -> dict[int, list[SourceSample]]:
    """Look up the samples of bins in the ledgers.

    Args:
        index: the set of shards.
        bins: ids of bins.

    Returns:
        The samples of every bin, in order.

    Raises:
        ShardError: a ledger is missing, or does not know a bin.
    """
    samples: dict[int, list[SourceSample]] = {bin_id: [] for bin_id in bins}
    for position, folder in enumerate(index.folders):
        bin_ids = {int(index.local_bin[bin_id]): bin_id for bin_id in bins if index.folder_of(bin_id) == position}
        if not bin_ids:
            continue
        ledger = read_packed(folder, names=["bin", *SourceSample._fields], filters=[("bin", "in", list(bin_ids))])
        bin_column = ledger["bin"].to_numpy()
        for local_bin, bin_id in bin_ids.items():
            num_rows = int(np.count_nonzero(bin_column == local_bin))
            if num_rows != index.num_samples[bin_id]:
                raise ShardError(
                    f"{folder / SAMPLES_FILE} has {counted(num_rows, 'sample')} for bin {local_bin}, which holds "
                    f"{index.num_samples[bin_id]}. Build the shards again."
                )
        for row in ledger.sort_by([("bin", "ascending"), ("slot", "ascending")]).to_pylist():
            samples[bin_ids[row.pop("bin")]].append(SourceSample(**row))
    return samples


def bins_per_device(order: DataOrder, *, world_size: int, accumulation: int) -> int:
    """Bins of a rank in a micro-step of a planned run.

    Raises:
        ConfigError: the global batch is not a multiple of ranks times micro-steps.
    """
    per_device, rest = divmod(order.global_batch, world_size * accumulation)
    if rest:
        raise ConfigError(
            f"a global batch of {order.global_batch} is not a multiple of {counted(world_size, 'rank')} x "
            f"{counted(accumulation, 'micro-step')}: change one of them."
        )
    return per_device


def deal_step(
    order: DataOrder,
    step: int,
    *,
    world_size: int,
    accumulation: int,
    per_device: int | None = None,
    num_steps: int | None = None,
) -> NDArray[np.int64]:
    """The bins of a step, (A, W, P) int64: micro-steps, ranks, bins of a rank.

    Args:
        order: the order of the bins.
        step: counted from 0.
        world_size: number of ranks.
        accumulation: micro-steps of the step.
        per_device: bins of a rank in a micro-step; None if they share the global batch equally.
        num_steps: steps of the run; None if it ends with the order.

    Raises:
        ConfigError: the global batch is not a multiple of ranks times micro-steps, or the run has no such step.
    """
    if per_device is None:
        per_device = bins_per_device(order, world_size=world_size, accumulation=accumulation)
    end = num_steps or order.num_steps
    if end is not None and step >= end:
        raise ConfigError(
            f"step is {step}, but the run ends after {counted(end, 'step')}: steps count from 0, so the last is "
            f"{end - 1}."
        )
    return order.bins_of_step(step, world_size=world_size, accumulation=accumulation, per_device=per_device)


def step_json(index: ShardIndex, dealt: NDArray[np.int64]) -> str:
    """The bins of a step for another program: a JSON list of ``{micro_step, rank, folder, bin}``.

    Args:
        index: the set of shards.
        dealt: (A, W, P) int64 as of :func:`deal_step`. Empty positions are left out.
    """
    bins = []
    for (micro_step, rank, _), bin_id in np.ndenumerate(dealt):
        if bin_id != EMPTY:
            folder = index.folders[index.folder_of(int(bin_id))]
            location = folder.url if isinstance(folder, Url) else str(folder)
            row = {"micro_step": micro_step, "rank": rank, "folder": location, "bin": int(index.local_bin[bin_id])}
            bins.append(row)
    return json.dumps(bins)


def explain_step(index: ShardIndex, order: DataOrder, step: int, dealt: NDArray[np.int64]) -> Iterator[str]:
    """Describe a step, line by line.

    Args:
        index: the set of shards.
        order: order of its bins, with costs in floating-point operations.
        step: counted from 0.
        dealt: (A, W, P) int64 as of :func:`deal_step`.

    Raises:
        ShardError: a ledger is missing, or does not know a bin.
    """
    num_micro_steps, num_ranks, _ = dealt.shape
    samples = source_samples(index, dealt[dealt != EMPTY].tolist())
    # (A, W): cost of a rank in a micro-step
    load = np.where(dealt == EMPTY, 0.0, order.cost[dealt]).sum(axis=2)
    yield (
        f"step {step} (step {step + 1} of the log), epoch {step / order.steps_per_epoch:.4f}: "
        f"{counted(int((dealt != EMPTY).sum()), 'bin')}, "
        f"{counted(num_ranks, 'rank')}, {counted(num_micro_steps, 'micro-step')}, seed {order.seed}, "
        f"efficiency {order.efficiency(dealt):.3f}"
    )
    for micro_step, (bins, costs) in enumerate(zip(dealt, load)):
        mean, highest = costs.mean(), costs.max()
        yield (
            f"micro-step {micro_step}: efficiency {mean / highest:.3f} (mean cost over the ranks / highest)"
            if highest
            else f"micro-step {micro_step}: no bins"
        )
        for rank, cost in enumerate(costs):
            share = f", {cost / mean:.3f} of the mean" if highest else ""
            yield f"  rank {rank}: cost {_tflop(cost)}{share}"
            yield from _describe_bins(index, order, bins[rank], samples)


def _describe_bins(
    index: ShardIndex, order: DataOrder, bins: NDArray[np.int64], samples: dict[int, list[SourceSample]]
) -> Iterator[str]:
    """Describe the bins of a rank in a micro-step, (P,) int64, each with its samples."""
    for bin_id in bins.tolist():
        if bin_id == EMPTY:
            yield "    empty position: one token with zero weight"
            continue
        tokens = counted(int(index.num_tokens[bin_id]), "token")
        patches = counted(int(index.num_patches[bin_id]), "patch", "patches")
        yield f"    bin {bin_id} ({index.locate(bin_id)}): {tokens}, {patches}, cost {_tflop(order.cost[bin_id])}"
        for sample in samples[bin_id]:
            yield f"      {sample.slot}: {sample.name}, {counted(sample.num_tokens, 'token')}"


def _tflop(cost: float) -> str:
    """Format operations with at least four digits, for small models too."""
    return f"{cost / 1e12:,.3f} TFLOP" if cost >= 1e12 or not cost else f"{cost / 1e12:.4g} TFLOP"
