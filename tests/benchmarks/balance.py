"""How evenly ranks are loaded, and what that costs in randomness: ``python -m tests.benchmarks.balance``.

A realistic mixture is packed, and every means is measured on the same bins: efficiency (mean cost over highest cost of
the ranks, mean over micro-steps), and the variance of the mixture of datasets from step to step, as a multiple of that
of bins drawn at random. No file is read; it takes a quarter of a minute.
"""

from __future__ import annotations

from collections.abc import Iterator

import click
import numpy as np

from tests.benchmarks.machine import describe_machine
from tests.benchmarks.mixture import KINDS, SIZES_OF_3B, packed_mixture
from train.cost import CostModel
from train.order import DataOrder, Grouping
from train.simulate import mixture_variance

MODELS = {"3B": SIZES_OF_3B, "7B": CostModel()}
WINDOWS = (None, 2, 4, 8)


def measure(
    model: CostModel, *, max_patches: int | None, world_size: int, accumulation: int, num_steps: int
) -> Iterator[tuple[str, float, float]]:
    """Name, efficiency and ratio of variances of every means, a random deal first."""
    packed = packed_mixture(num_samples=300_000, max_length=4096, max_patches=max_patches, seed=0)
    cost = model.bin_flops(**packed.columns)
    global_batch = world_size * accumulation
    drawn = np.random.default_rng(0).integers(0, packed.num_bins, (8000, global_batch))
    of_chance = mixture_variance(packed.composition, drawn)
    for window in WINDOWS:
        grouping = Grouping(steps=window, runs=accumulation) if window else None
        order = DataOrder(cost, seed=0, global_batch=global_batch, grouping=grouping)
        steps = np.stack([order.global_bins(step) for step in range(num_steps)])
        ratio = mixture_variance(packed.composition, steps) / of_chance
        if window is None:
            # The same bins in the order they are drawn, which is a random one.
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
    """Measure what balances the ranks."""
    click.echo(describe_machine("numpy"))
    click.echo(f"mixture of {', '.join(KINDS)}; {world_size} ranks, {accumulation} micro-steps, {num_steps} steps")
    for name, model in MODELS.items():
        for max_patches in (None, 12_288):
            found = measure(
                model,
                max_patches=max_patches,
                world_size=world_size,
                accumulation=accumulation,
                num_steps=num_steps,
            )
            for means, efficiency, ratio in found:
                budget = f"{max_patches:,} patches" if max_patches else "no budget"
                click.echo(f"{name}  {budget:<16} {means:<28} efficiency {efficiency:.4f}  variance x {ratio:.2f}")


if __name__ == "__main__":
    main()
