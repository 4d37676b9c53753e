"""What a run will ask of ranks, storage and network, told from the index before it starts.

An index and an order -> a :class:`Simulation`: how evenly ranks are loaded in the micro-steps, beside a random deal of
the same bins; bytes, pixels and tokens of a step; how much the mixture of datasets varies from step to step, beside
steps drawn at random. No bin is read.

Cost: the order of the simulated steps, a fraction of a millisecond each, and one pass over the ledgers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from schemas.errors import ShardError
from schemas.qwen import PATCH_DIM, TEMPORAL_PATCH_SIZE
from schemas.tables import SAMPLES_FILE, STATUS_PACKED
from train.order.dealing import EMPTY, DataOrder
from train.order.explain import bins_per_device
from train.shards.index import ShardIndex
from train.shards.ledger import read_ledger

NUM_STEPS = 200
"""Steps simulated unless told otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulation:
    """What was found. Efficiency is mean cost over highest cost of the ranks in a micro-step.

    Attributes:
        num_steps: steps looked at.
        efficiency: mean over their micro-steps.
        lowest_efficiency: of a micro-step.
        random_efficiency: mean, had the same bins been dealt at random.
        bytes_per_step: mean over whole steps, of all ranks.
        most_bytes: of a step.
        planes_per_step: bytes of decoded pixels, mean over whole steps, of all ranks; at most so many: the index does
            not tell the pictures of a bin from its videos.
        tokens_per_step: mean over whole steps, of all ranks.
        targets_per_step: mean over whole steps, of all ranks.
        mixture_variance: variance, from step to step, of the datasets' shares of the tokens, summed over datasets.
        random_mixture_variance: the same for steps whose bins are drawn at random in the same proportions.
    """

    num_steps: int
    efficiency: float
    lowest_efficiency: float
    random_efficiency: float
    bytes_per_step: float
    most_bytes: int
    planes_per_step: float
    tokens_per_step: float
    targets_per_step: float
    mixture_variance: float
    random_mixture_variance: float


def simulate(
    index: ShardIndex, order: DataOrder, *, world_size: int, accumulation: int, num_steps: int = NUM_STEPS
) -> Simulation:
    """Look at the first steps of a run.

    Args:
        index: the set of shards.
        order: over its bins.
        world_size: number of ranks.
        accumulation: micro-steps of a step.
        num_steps: steps to look at, fewer where the order ends before.

    Raises:
        ConfigError: the global batch is not a multiple of ranks times micro-steps.
        ShardError: a ledger is missing or damaged.
    """
    per_device = bins_per_device(order, world_size=world_size, accumulation=accumulation)
    num_steps = min(num_steps, order.num_steps or num_steps)
    rng = np.random.Generator(np.random.PCG64(order.seed))
    # (steps, A, W, P)
    places = np.stack(
        [
            order.bins_of_step(step, world_size=world_size, accumulation=accumulation, per_device=per_device)
            for step in range(num_steps)
        ]
    )
    flat = places.reshape(num_steps, -1)
    at_random = rng.permuted(flat, axis=1).reshape(places.shape)
    efficiency = _efficiency(order, places)
    # Sizes are those of whole steps; the short one at the end of an order is no example, unless it is the only one.
    whole = (flat != EMPTY).sum(axis=1) == order.global_batch
    steps = flat[whole] if whole.any() else flat
    in_steps = steps != EMPTY
    num_bytes = (index.num_bytes[steps] * in_steps).sum(axis=1)
    composition = dataset_tokens(index)
    return Simulation(
        num_steps=num_steps,
        efficiency=float(efficiency.mean()),
        lowest_efficiency=float(efficiency.min()),
        random_efficiency=float(_efficiency(order, at_random).mean()),
        bytes_per_step=float(num_bytes.mean()),
        most_bytes=int(num_bytes.max()),
        planes_per_step=float((_plane_bytes(index)[steps] * in_steps).sum(axis=1).mean()),
        tokens_per_step=float((index.num_tokens[steps] * in_steps).sum(axis=1).mean()),
        targets_per_step=float((index.num_targets[steps] * in_steps).sum(axis=1).mean()),
        mixture_variance=mixture_variance(composition, flat),
        random_mixture_variance=mixture_variance(composition, _drawn_at_random(order, rng, max(num_steps, NUM_STEPS))),
    )


def _plane_bytes(index: ShardIndex) -> NDArray[np.int64]:
    """(bins,) bytes of decoded pixels at most: a patch of a picture is one frame of 14 by 14 pixels, of a video two."""
    frames = np.where(index.num_videos > 0, TEMPORAL_PATCH_SIZE, 1)
    return index.num_patches.astype(np.int64) * frames * (PATCH_DIM // TEMPORAL_PATCH_SIZE)


def dataset_tokens(index: ShardIndex) -> NDArray[np.int64]:
    """Tokens of every dataset in every bin, from the ledgers: (bins, datasets) int64.

    Raises:
        ShardError: a ledger is missing or names a bin that is not there.
    """
    parts: list[tuple[NDArray[np.int64], list[str], NDArray[np.int64]]] = []
    for folder, first, end in zip(index.folders, index.first_bins.tolist(), index.first_bins.tolist()[1:]):
        ledger = read_ledger(folder, ["bin", "dataset", "num_tokens"], [("status", "=", STATUS_PACKED)])
        summed = ledger.group_by(["bin", "dataset"]).aggregate([("num_tokens", "sum")])
        bins, known = summed["bin"].to_numpy(), index.local_bin[first:end]
        unknown = np.setdiff1d(bins, known)
        if unknown.size:
            raise ShardError(
                f"{folder / SAMPLES_FILE} names bin {unknown[0]}, which is not there. Copy the folder again."
            )
        numbers = first + np.searchsorted(known, bins)
        parts.append((numbers, summed["dataset"].to_pylist(), summed["num_tokens_sum"].to_numpy()))
    names = sorted({name for _, of_rows, _ in parts for name in of_rows})
    columns = {name: number for number, name in enumerate(names)}
    tokens = np.zeros((index.num_bins, max(1, len(names))), dtype=np.int64)
    for bins, of_rows, counts in parts:
        tokens[bins, [columns[name] for name in of_rows]] = counts
    return tokens


def mixture_variance(composition: NDArray[np.int64], steps: NDArray[np.int64]) -> float:
    """Variance of the datasets' shares of the tokens of a step, summed over datasets.

    Args:
        composition: (bins, D) int64, tokens of every dataset in every bin.
        steps: (S, K) int64, the bins of steps; -1 marks an empty place.
    """
    whole = steps[(steps != EMPTY).all(axis=1)]
    if len(whole) < 2:
        return 0.0
    tokens = composition[whole].sum(axis=1)
    shares = tokens / np.maximum(tokens.sum(axis=1, keepdims=True), 1)
    return float(shares.var(axis=0, ddof=1).sum())


def report(
    index: ShardIndex, order: DataOrder, found: Simulation, *, world_size: int, accumulation: int, tokens_per_s: float
) -> Iterator[str]:
    """Describe a simulation, line by line, for a run that trains ``tokens_per_s`` over all ranks."""
    steps = f"{order.num_steps:,} steps in all" if order.num_steps else "no end"
    bandwidth = found.bytes_per_step / found.tokens_per_step * tokens_per_s
    epoch_tokens = _epoch_tokens(index, order)
    yield (
        f"{found.num_steps} steps of {order.global_batch} bins, {world_size} ranks, {accumulation} micro-steps, "
        f"seed {order.seed}"
    )
    yield (
        f"efficiency: mean {found.efficiency:.4f}, lowest {found.lowest_efficiency:.4f} (mean cost over the ranks / "
        f"highest, in each micro-step); bins dealt at random {found.random_efficiency:.4f}"
    )
    if found.random_mixture_variance:
        yield (
            "mixture of datasets: its variance from step to step is "
            f"{found.mixture_variance / found.random_mixture_variance:.2f} of that of bins drawn at random (standard "
            f"deviations {found.mixture_variance**0.5:.4f} and {found.random_mixture_variance**0.5:.4f})"
        )
    else:
        yield "mixture of datasets: there is one dataset, so it never varies"
    yield (
        f"a step: {found.tokens_per_step:,.0f} tokens, {found.targets_per_step:,.0f} of them targets, "
        f"{_mb(found.bytes_per_step)} on average and {_mb(found.most_bytes)} at most"
    )
    codecs = ", ".join(sorted({manifest.settings.pixels for manifest in index.manifests}))
    planes = found.planes_per_step / found.tokens_per_step * tokens_per_s
    yield (
        f"pixels ({codecs}): at most {_mb(found.planes_per_step)} a step when decoded, {_mb(planes / world_size)}/s a "
        "rank"
    )
    yield (
        f"bandwidth at {tokens_per_s:,.0f} tokens/s: {_mb(bandwidth)}/s, {_mb(bandwidth / world_size)}/s a rank; "
        f"a step every {found.tokens_per_step / tokens_per_s:.2f} s"
    )
    yield (
        f"an epoch: {order.places_per_epoch:,} bins of {index.num_bins:,} in the shards, "
        f"{order.steps_per_epoch:,.2f} steps, {epoch_tokens:,.0f} tokens, "
        f"{_duration(epoch_tokens / tokens_per_s)}; {steps}"
    )


def _epoch_tokens(index: ShardIndex, order: DataOrder) -> float:
    """Tokens of an epoch; with a mixture, those of its sources' average bins."""
    mixture = order.mixture
    if mixture is None:
        return float(index.num_tokens.sum(dtype=np.int64))
    totals = np.add.reduceat(index.num_tokens.astype(np.int64), mixture.first_bins)
    shares = np.array(mixture.quotas) / sum(mixture.quotas)
    return float((totals / mixture.sizes * shares).sum() * mixture.places_per_epoch)


def _efficiency(order: DataOrder, places: NDArray[np.int64]) -> NDArray[np.float64]:
    """(S, A, W, P) bins -> (S, A) mean over highest cost of the ranks; 1 where no rank has a bin."""
    load = np.where(places == EMPTY, 0.0, order.cost[places]).sum(axis=3)
    highest: NDArray[np.float64] = load.max(axis=2)
    efficiency = np.ones_like(highest)
    np.divide(load.mean(axis=2), highest, out=efficiency, where=highest > 0)
    return efficiency


def _drawn_at_random(order: DataOrder, rng: np.random.Generator, num_steps: int) -> NDArray[np.int64]:
    """Steps (S, K) whose bins are drawn one by one, in the proportions of the mixture."""
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
