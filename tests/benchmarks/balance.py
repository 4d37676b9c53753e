"""How evenly ranks are loaded, and the price in randomness: ``python -m tests.benchmarks.balance``.

A realistic mixture is packed, and every method is measured on the same bins: efficiency (mean over highest cost of the
ranks, averaged over micro-steps), and the variance of the mixture of datasets between steps, relative to bins drawn at
random. Then the effect of a patch budget, and the time to resume at any step of ten million bins. It reads no file and
takes less than a minute.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import lru_cache

import click
import numpy as np

from tests.benchmarks.machine import describe_machine
from tests.benchmarks.mixture import KINDS, PackedMixture, packed_mixture
from train.arithmetic.cost import CostModel
from train.arithmetic.dimensions import OFFICIAL
from train.order.dealing import DataOrder, Grouping
from train.order.simulate import mixture_variance

MODELS = {
    f"{name}{suffix}": CostModel.of(OFFICIAL[name]).in_training(tune_vision=trained, gradient_checkpointing=True)
    for suffix, trained in (("", True), (", frozen tower", False))
    for name in ("3B", "7B")
}
WINDOWS = (None, 2, 4, 8)
MAX_PATCHES = 12_288


@lru_cache(maxsize=2)
def mixture(max_patches: int | None) -> PackedMixture:
    """The packed mixture, with or without a patch budget."""
    return packed_mixture(num_samples=300_000, max_length=4096, max_patches=max_patches, seed=0)


def random_variance(packed: PackedMixture, global_batch: int) -> float:
    """Variance of the mixture of datasets over steps of bins drawn at random."""
    drawn = np.random.default_rng(0).integers(0, packed.num_bins, (8000, global_batch))
    return mixture_variance(packed.composition, drawn)


def resume_ms(grouping: Grouping | None, num_bins: int = 10_000_000) -> float:
    """Median time from the state of a run to the bins of its next step, in milliseconds."""
    cost = np.random.default_rng(0).random(num_bins)
    state = DataOrder(cost, seed=0, global_batch=512, grouping=grouping).state_dict(10**9)
    times = []
    for later in range(9):
        began = time.perf_counter()
        order = DataOrder(cost, seed=0, global_batch=512, grouping=grouping)
        step = order.step_of({**state, "step": state["step"] + later})
        order.bins_of_step(step, world_size=64, accumulation=8, per_device=1)
        times.append(1e3 * (time.perf_counter() - began))
    return float(np.median(times))


def measure(
    model: CostModel, *, max_patches: int | None, world_size: int, accumulation: int, num_steps: int
) -> Iterator[tuple[str, float, float]]:
    """Name, efficiency and relative variance of every method, a random deal first."""
    packed = mixture(max_patches)
    cost = model.bin_flops(**packed.columns)
    global_batch = world_size * accumulation
    reference = random_variance(packed, global_batch)
    for window in WINDOWS:
        grouping = Grouping(steps=window, runs=accumulation) if window else None
        order = DataOrder(cost, seed=0, global_batch=global_batch, grouping=grouping)
        steps = np.stack([order.global_bins(step) for step in range(num_steps)])
        ratio = mixture_variance(packed.composition, steps) / reference
        if window is None:
            # The same bins in the order of the draw, which is random.
            at_random = cost[steps].reshape(-1, world_size)
            yield f"random deal (fill {packed.fill:.3f})", _efficiency(at_random), ratio
        dealt = [
            order.bins_of_step(step, world_size=world_size, accumulation=accumulation, per_device=1)[..., 0]
            for step in range(min(num_steps, 200))
        ]
        name = f"grouped over {window} steps" if window else "sorted inside the step"
        yield name, _efficiency(cost[np.concatenate(dealt)]), ratio


def _efficiency(load: np.ndarray) -> float:
    return float((load.mean(axis=1) / load.max(axis=1)).mean())


@click.command(name="python -m tests.benchmarks.balance")
@click.option("--world-size", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--accumulation", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--num-steps", type=click.IntRange(min=2), default=2000, show_default=True)
def main(world_size: int, accumulation: int, num_steps: int) -> None:
    """Measure how evenly ranks are loaded."""
    click.echo(describe_machine("numpy"))
    click.echo(f"mixture of {', '.join(KINDS)}; {world_size} ranks, {accumulation} micro-steps, {num_steps} steps")
    for name, model in MODELS.items():
        for max_patches in (None, MAX_PATCHES):
            results = measure(
                model,
                max_patches=max_patches,
                world_size=world_size,
                accumulation=accumulation,
                num_steps=num_steps,
            )
            for method, efficiency, ratio in results:
                budget = f"{max_patches:,} patches" if max_patches else "no budget"
                click.echo(f"{name:<16} {budget:<16} {method:<28} efficiency {efficiency:.4f}  variance x {ratio:.2f}")
    with_budget, without = (
        random_variance(mixture(max_patches), world_size * accumulation) for max_patches in (MAX_PATCHES, None)
    )
    click.echo(f"budget of {MAX_PATCHES:,} patches: variance of random steps x {with_budget / without:.2f}")
    for grouping in (None, Grouping(steps=8, runs=8)):
        name = "grouped over 8 steps" if grouping else "not grouped"
        click.echo(f"resume among ten million bins, {name}: {resume_ms(grouping):.2f} ms")


if __name__ == "__main__":
    main()
