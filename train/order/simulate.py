"""What a run will demand of ranks, storage and network, computed from the index before it starts.

An index and an order -> a :class:`Simulation`, which has

- how evenly ranks are loaded in the micro-steps, compared with dealing the same bins at random,
- bytes, pixels and tokens per step,
- how much the composition of a step in datasets varies, compared with steps drawn at random.

No bin is read.

Cost: the order of the simulated steps, a fraction of a millisecond each, and one pass over the ledgers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from schemas.errors import ShardError
from schemas.qwen import PATCH_DIM, TEMPORAL_PATCH_SIZE
from schemas.tables import SAMPLES_FILE
from schemas.wording import counted
from storage.shard_set import read_packed
from train.order.dealing import EMPTY, DataOrder
from train.order.explain import bins_per_device
from train.shards.index import ShardIndex

NUM_STEPS = 200
"""Default number of simulated steps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepMeans:
    """Sizes of a full step over all ranks, averaged over the simulated steps.

    Attributes:
        num_bytes: bytes read.
        plane_bytes: bytes of decoded pixels, an upper bound: the index does not separate the patches of images from
            those of videos in a bin that has both.
        num_tokens: tokens.
        num_targets: targets.
    """

    num_bytes: float
    plane_bytes: float
    num_tokens: float
    num_targets: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulation:
    """The result. Efficiency is the mean cost of the ranks in a micro-step relative to the highest.

    Attributes:
        num_steps: simulated steps.
        end: steps until the run ends; None if it has no end.
        efficiency: mean over their micro-steps.
        min_efficiency: lowest of a micro-step.
        random_efficiency: mean, had the same bins been dealt at random.
        step: mean sizes of a step.
        max_bytes: bytes of the largest step.
        mixture_variance: variance, from step to step, of the datasets' shares of the tokens, summed over datasets.
        random_mixture_variance: the same for steps whose bins are drawn at random in the same proportions.
    """

    num_steps: int
    end: int | None
    efficiency: float
    min_efficiency: float
    random_efficiency: float
    step: StepMeans
    max_bytes: int
    mixture_variance: float
    random_mixture_variance: float


def simulate(
    index: ShardIndex,
    order: DataOrder,
    *,
    world_size: int,
    accumulation: int,
    per_device: int | None = None,
    num_steps: int = NUM_STEPS,
    end: int | None = None,
) -> Simulation:
    """Simulate the first steps of a run.

    Args:
        index: the set of shards.
        order: an order of its bins.
        world_size: number of ranks.
        accumulation: micro-steps per step.
        per_device: bins of a rank in a micro-step; None if they share the global batch equally.
        num_steps: steps to simulate, fewer if the run ends earlier.
        end: steps until the run ends; None if it ends with the order.

    Raises:
        ConfigError: the global batch is not a multiple of ranks times micro-steps.
        ShardError: a ledger is missing or damaged.
    """
    if per_device is None:
        per_device = bins_per_device(order, world_size=world_size, accumulation=accumulation)
    layout = {"world_size": world_size, "accumulation": accumulation, "per_device": per_device}
    end = end or order.num_steps
    num_steps = min(num_steps, end or num_steps)
    rng = np.random.Generator(np.random.PCG64(order.seed))
    # (S, A, W, P), and the same bins per step as (S, K)
    dealt = np.stack([order.bins_of_step(step, **layout) for step in range(num_steps)])
    steps = dealt.reshape(num_steps, -1)
    dealt_at_random = rng.permuted(steps, axis=1).reshape(dealt.shape)
    efficiency = _efficiency(order, dealt)
    composition = dataset_tokens(index)
    step_means, max_bytes = _step_sizes(index, order, steps)
    return Simulation(
        num_steps=num_steps,
        end=end,
        efficiency=float(efficiency.mean()),
        min_efficiency=float(efficiency.min()),
        random_efficiency=float(_efficiency(order, dealt_at_random).mean()),
        step=step_means,
        max_bytes=max_bytes,
        mixture_variance=mixture_variance(composition, steps),
        random_mixture_variance=mixture_variance(composition, _draw_at_random(order, rng, max(num_steps, NUM_STEPS))),
    )


def _step_sizes(index: ShardIndex, order: DataOrder, steps: NDArray[np.int64]) -> tuple[StepMeans, int]:
    """Mean sizes of steps (S, K), and the bytes of the largest.

    A short step at the end of an order is not representative, so it counts only if there is no full one.
    """
    is_full = (steps != EMPTY).sum(axis=1) == order.global_batch
    if is_full.any():
        steps = steps[is_full]
    # (S, K) -> (S,)
    totals = {
        name: np.where(steps != EMPTY, column[steps], 0).sum(axis=1)
        for name, column in (
            ("num_bytes", index.num_bytes),
            ("plane_bytes", _plane_bytes(index)),
            ("num_tokens", index.num_tokens),
            ("num_targets", index.num_targets),
        )
    }
    means = StepMeans(**{name: float(total.mean()) for name, total in totals.items()})
    return means, int(totals["num_bytes"].max())


def _plane_bytes(index: ShardIndex) -> NDArray[np.int64]:
    """Upper bound (num_bins,) of decoded bytes: an image patch is one frame of 14 x 14 pixels, a video patch two."""
    frames = np.where(index.num_videos > 0, TEMPORAL_PATCH_SIZE, 1)
    return index.num_patches.astype(np.int64) * frames * (PATCH_DIM // TEMPORAL_PATCH_SIZE)


def dataset_tokens(index: ShardIndex) -> NDArray[np.int64]:
    """Count the tokens of every dataset in every bin from the ledgers: (num_bins, num_datasets) int64.

    Raises:
        ShardError: a ledger is missing or names a bin that does not exist.
    """
    tables: list[tuple[NDArray[np.int64], list[str], NDArray[np.int64]]] = []
    for folder, first, end in zip(index.folders, index.first_bins.tolist(), index.first_bins.tolist()[1:]):
        ledger = read_packed(folder, names=["bin", "dataset", "num_tokens"])
        summed = ledger.group_by(["bin", "dataset"]).aggregate([("num_tokens", "sum")])
        bins, known = summed["bin"].to_numpy(), index.local_bin[first:end]
        unknown = np.setdiff1d(bins, known)
        if unknown.size:
            raise ShardError(
                f"{folder / SAMPLES_FILE} names bin {unknown[0]}, which does not exist. Copy the folder again."
            )
        bin_ids = first + np.searchsorted(known, bins)
        tables.append((bin_ids, summed["dataset"].to_pylist(), summed["num_tokens_sum"].to_numpy()))
    datasets = sorted({dataset for _, column, _ in tables for dataset in column})
    column_of = {dataset: column for column, dataset in enumerate(datasets)}
    tokens = np.zeros((index.num_bins, max(1, len(datasets))), dtype=np.int64)
    for bin_ids, names, counts in tables:
        tokens[bin_ids, [column_of[name] for name in names]] = counts
    return tokens


def mixture_variance(composition: NDArray[np.int64], steps: NDArray[np.int64]) -> float:
    """Variance of the datasets' shares of the tokens of a step, summed over datasets.

    Args:
        composition: (num_bins, D) int64, tokens of every dataset in every bin.
        steps: (S, K) int64, the bins of steps. Steps with fewer bins than others are left out.
    """
    num_bins = (steps != EMPTY).sum(axis=1)
    full = steps[num_bins == num_bins.max()]
    if len(full) < 2:
        return 0.0
    # (S, K, D) -> (S, D)
    tokens = np.where((full != EMPTY)[..., None], composition[full], 0).sum(axis=1)
    shares = tokens / np.maximum(tokens.sum(axis=1, keepdims=True), 1)
    return float(shares.var(axis=0, ddof=1).sum())


def report(
    index: ShardIndex, order: DataOrder, result: Simulation, *, world_size: int, accumulation: int, tokens_per_s: float
) -> Iterator[str]:
    """Describe a simulation, line by line, for a run that trains ``tokens_per_s`` over all ranks."""
    yield (
        f"{_simulated(result)} of {counted(order.global_batch, 'bin')}, {counted(world_size, 'rank')}, "
        f"{counted(accumulation, 'micro-step')}, seed {order.seed}"
    )
    yield (
        f"efficiency: mean {result.efficiency:.4f}, lowest {result.min_efficiency:.4f} (mean cost of the ranks / "
        f"highest, per micro-step); bins dealt at random {result.random_efficiency:.4f}"
    )
    if result.random_mixture_variance:
        yield (
            "mixture of datasets: its variance from step to step is "
            f"{result.mixture_variance / result.random_mixture_variance:.2f} of that of bins drawn at random (standard "
            f"deviations {result.mixture_variance**0.5:.4f} and {result.random_mixture_variance**0.5:.4f})"
        )
    else:
        yield "mixture of datasets: constant, there is only one dataset"
    yield from _report_sizes(index, result, world_size=world_size, tokens_per_s=tokens_per_s)
    end = "no end" if result.end is None else f"{counted(result.end, 'step')} in all"
    epoch_tokens = _epoch_tokens(index, order)
    yield (
        f"an epoch: {counted(order.bins_per_epoch, 'bin')} of {index.num_bins:,} in the shards, "
        f"{order.steps_per_epoch:,.2f} steps, {epoch_tokens:,.0f} tokens, "
        f"{_duration(epoch_tokens / tokens_per_s)}; {end}"
    )


def _simulated(result: Simulation) -> str:
    """The simulated steps, and whether they are all of the run."""
    steps = counted(result.num_steps, "step")
    return f"all {steps} of the run, each" if result.num_steps == result.end else steps


def _report_sizes(index: ShardIndex, result: Simulation, *, world_size: int, tokens_per_s: float) -> Iterator[str]:
    step = result.step
    steps_per_s = tokens_per_s / step.num_tokens
    yield (
        f"a step: {step.num_tokens:,.0f} tokens, {step.num_targets:,.0f} of them targets, "
        f"{_mb(step.num_bytes)} on average and {_mb(result.max_bytes)} at most"
    )
    codecs = ", ".join(sorted({manifest.settings.pixels for manifest in index.manifests}))
    yield (
        f"pixels ({codecs}): at most {_mb(step.plane_bytes)} per step when decoded, "
        f"{_mb(step.plane_bytes * steps_per_s / world_size)}/s per rank"
    )
    bandwidth = step.num_bytes * steps_per_s
    yield (
        f"bandwidth at {tokens_per_s:,.0f} tokens/s: {_mb(bandwidth)}/s, {_mb(bandwidth / world_size)}/s per rank; "
        f"a step every {1 / steps_per_s:.2f} s"
    )


def _epoch_tokens(index: ShardIndex, order: DataOrder) -> float:
    """Tokens of an epoch; for a mixture, computed from the mean bin of each source."""
    return index.mean(index.num_tokens) * order.bins_per_epoch


def _efficiency(order: DataOrder, dealt: NDArray[np.int64]) -> NDArray[np.float64]:
    """Bins (S, A, W, P) -> (S, A), mean cost of the ranks relative to the highest; 1 if no rank has a bin."""
    # (S, A, W, P) -> (S, A, W)
    load = np.where(dealt == EMPTY, 0.0, order.cost[dealt]).sum(axis=3)
    highest: NDArray[np.float64] = load.max(axis=2)
    efficiency = np.ones_like(highest)
    np.divide(load.mean(axis=2), highest, out=efficiency, where=highest > 0)
    return efficiency


def _draw_at_random(order: DataOrder, rng: np.random.Generator, num_steps: int) -> NDArray[np.int64]:
    """Draw the bins of steps (S, K) independently, in the proportions of the mixture."""
    shape = (num_steps, order.global_batch)
    if order.mixture is None:
        return rng.integers(0, order.num_bins, shape)
    quotas = np.array(order.mixture.quotas, dtype=np.float64)
    sources = rng.choice(quotas.size, size=shape, p=quotas / quotas.sum())
    sizes = np.array(order.mixture.sizes)[sources]
    drawn: NDArray[np.int64] = order.mixture.first_bins[sources] + rng.integers(0, sizes)
    return drawn


def _duration(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds < 1000 else f"{seconds / 3600:,.2f} hours"


def _mb(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
