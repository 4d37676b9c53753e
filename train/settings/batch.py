"""What a step is made of: the samples that it should have, the flags and the contents of the shards -> :class:`Batch`.

A recipe counts samples, as that of the upstream framework does, but a step takes bins, each of which packs several
samples. So the bins of a step are chosen by the samples that they hold in expectation, and split into forward passes by
a budget of tokens. Flags that count bins override this.

Cost: none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from schemas.errors import ConfigError
from schemas.wording import counted
from train.settings.arguments import TrainArguments
from train.settings.recipe import Recipe

DEFAULT_TOKENS = 16 * 1024
"""Tokens of a forward pass where the memory of the device is not known."""

TOLERANCE = 0.1
"""All ranks get as many bins if the expected number of samples is then off by no more than this share."""


class Aim(msgspec.Struct, frozen=True, kw_only=True):
    """The samples that a step should have.

    Attributes:
        samples: their number, over all ranks.
        is_recommended: whether it is what is recommended for the size of the model, times the number of ranks.
    """

    samples: int
    is_recommended: bool = False

    def continues(self, other: Aim) -> bool:
        """Whether a run that has begun with another aim can continue with this one."""
        return self.samples == other.samples or (self.is_recommended and other.is_recommended)


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What a step is made of.

    Attributes:
        bins: bins of a step, over all ranks and forward passes; fewer in the last step of a run.
        per_device: bins of a rank in a forward pass. A rank may have fewer in some passes.
        accumulation: forward passes of a rank in a step.
        aim: the samples that the bins were chosen for; None if flags count bins.
    """

    bins: int
    per_device: int
    accumulation: int
    aim: Aim | None = None


def choose_batch(
    args: TrainArguments,
    recipe: Recipe,
    *,
    samples_per_bin: float,
    largest_bin: int,
    world: int,
    begun: tuple[Aim | None, int] = (None, 0),
    fitting: Callable[[int], int] | None = None,
) -> Batch:
    """Choose the bins of a step and their forward passes.

    Args:
        args: the flags.
        recipe: what is recommended.
        samples_per_bin: mean samples of a bin.
        largest_bin: tokens of the largest bin.
        world: number of ranks.
        begun: aim and bins of a step with which the run began. If it resumes, it keeps them on any number of ranks.
        fitting: how many bins of a forward pass fit the device, up to a number; None if that is not known.

    Raises:
        ConfigError: ``--max_tokens_per_forward`` does not allow a single bin.
    """
    aim = _aim(args, recipe, world)
    if aim is None:
        per_device, accumulation = args.per_device_train_batch_size or 1, args.gradient_accumulation_steps or 1
        return Batch(bins=per_device * accumulation * world, per_device=per_device, accumulation=accumulation)
    first_aim, bins = begun
    if first_aim is not None and aim.continues(first_aim):
        aim = first_aim
    else:
        bins = choose_bins(aim.samples, samples_per_bin=samples_per_bin, world=world)
    if args.max_tokens_per_forward is None and fitting is not None:
        limit = fitting(math.ceil(bins / world))
    else:
        limit = bins_of_budget(args, largest_bin)
    return split_bins(bins, aim, world=world, limit=limit)


def _aim(args: TrainArguments, recipe: Recipe, world: int) -> Aim | None:
    """The samples that a step should have; None if flags count its bins."""
    if args.counts_bins:
        return None
    if args.samples_per_step is not None:
        return Aim(samples=args.samples_per_step)
    return Aim(samples=recipe.samples * world, is_recommended=True)


def choose_bins(samples: int, *, samples_per_bin: float, world: int) -> int:
    """The bins of a step whose expected number of samples is nearest to ``samples``.

    A multiple of the ranks keeps all of them busy. It is taken if that changes the number of samples by no more than
    :data:`TOLERANCE`.

    Args:
        samples: samples that the step should have.
        samples_per_bin: mean samples of a bin.
        world: number of ranks.
    """

    def nearest(unit: int) -> int:
        return unit * max(1, round(samples / (samples_per_bin * unit)))

    even = nearest(world)
    return even if abs(even * samples_per_bin - samples) <= TOLERANCE * samples else nearest(1)


def split_bins(bins: int, aim: Aim, *, world: int, limit: int) -> Batch:
    """Split the bins of a step into as few forward passes as possible, of equal size.

    Args:
        bins: bins of the step.
        aim: the samples that they were chosen for.
        world: number of ranks.
        limit: most bins of a rank in a forward pass.
    """
    accumulation = math.ceil(bins / (world * limit))
    per_device = math.ceil(bins / (world * accumulation))
    return Batch(bins=bins, per_device=per_device, accumulation=accumulation, aim=aim)


def bins_of_budget(args: TrainArguments, largest_bin: int) -> int:
    """Bins of a forward pass that ``--max_tokens_per_forward`` allows.

    Args:
        args: the flags.
        largest_bin: tokens of the largest bin.

    Raises:
        ConfigError: not even one bin.
    """
    budget = args.max_tokens_per_forward
    if budget is None:
        return max(1, DEFAULT_TOKENS // largest_bin)
    if budget < largest_bin:
        raise ConfigError(
            f"--max_tokens_per_forward {budget} is less than the largest bin has, {largest_bin}: raise it, or build "
            "shards with a lower --max-length."
        )
    return budget // largest_bin


def describe_batch(
    batch: Batch, *, samples_per_bin: float, world: int, device: str, steps_per_epoch: float, reference: str
) -> str:
    """Describe the samples, bins and forward passes of a step in one line.

    Args:
        batch: the batch.
        samples_per_bin: mean samples of a bin.
        world: number of ranks.
        device: what a rank computes on: ``cuda``, ``cpu``.
        steps_per_epoch: steps of an epoch.
        reference: what the number of samples is to be compared with.
    """
    samples = batch.bins * samples_per_bin
    passes = counted(batch.accumulation, "forward pass", "forward passes")
    is_full = batch.bins == world * batch.per_device * batch.accumulation
    of_pass = f"of {'' if is_full else 'up to '}{counted(batch.per_device, 'bin')}"
    return (
        f"{samples:,.0f} samples a step in expectation ({reference}): {counted(batch.bins, 'bin')} on "
        f"{counted(world, 'GPU' if device == 'cuda' else 'rank')}, {passes} {of_pass}"
        f"{' each' if batch.accumulation > 1 else ''}; {_pace(steps_per_epoch)}"
    )


def _pace(steps_per_epoch: float) -> str:
    """Steps of an epoch, or epochs of a step."""
    if steps_per_epoch < 1:
        return f"{1 / steps_per_epoch:.3g} epochs a step: it has more bins than an epoch"
    if steps_per_epoch == 1:
        return "1 step an epoch"
    return (
        f"{steps_per_epoch:,.0f} steps an epoch" if steps_per_epoch >= 100 else f"{steps_per_epoch:.3g} steps an epoch"
    )
