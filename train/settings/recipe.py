"""Batch, rate and length of a run: the flags, and for those left out what is recommended for the size of the model.

The flags and the ``config.json`` of a checkpoint -> a :class:`Recipe`. The recommendations are those of the upstream
framework. Its batch counts samples, and so does this one; :mod:`train.settings.batch` finds the bins that hold them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from schemas.wording import counted
from train.arithmetic.dimensions import official_size
from train.settings.arguments import TrainArguments


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Settings that depend on the size of a model.

    Attributes:
        learning_rate: peak rate of all parts without a rate of their own.
        samples: samples of a rank in an optimizer step.
        epochs: passes over all bins, unless ``--max_steps`` sets the length.
        origin: where the number of samples comes from, in a word.
    """

    learning_rate: float
    samples: int
    epochs: float
    origin: str = "upstream"


PRESETS = {
    "3B": Recipe(learning_rate=2e-7, samples=8 * 4, epochs=3.0),
    "7B": Recipe(learning_rate=2e-7, samples=4 * 4, epochs=0.5),
    "32B": Recipe(learning_rate=1e-7, samples=2 * 8, epochs=0.3),
    "72B": Recipe(learning_rate=5e-8, samples=1 * 16, epochs=0.1),
}
"""Recommended for the official sizes. Upstream's samples are those of a device and forward pass, times the passes."""

OTHER = Recipe(learning_rate=2e-7, samples=16, epochs=3.0, origin="recommended")
"""Recommended for any other size."""

ADAPTER_LEARNING_RATE = 1e-4
"""Recommended for LoRA at any size: adapters start from zero and need far higher rates than trained weights."""


def choose_recipe(args: TrainArguments, config: Mapping[str, Any]) -> Recipe:
    """Fill in the flags that are left out with what is recommended for the model.

    Args:
        args: the flags.
        config: contents of the ``config.json`` of the checkpoint.
    """
    size = official_size(config)
    preset = OTHER if size is None else PRESETS[size]
    flags: dict[str, Any] = {"learning_rate": args.learning_rate, "epochs": args.num_train_epochs}
    if args.lora_enable:
        preset = replace(preset, learning_rate=ADAPTER_LEARNING_RATE)
    return replace(preset, **{name: value for name, value in flags.items() if value is not None})


FEW_STEPS = 100
LOW_RATE, STEPS_AT_LOW_RATE = 1e-6, 1000
"""Fewer steps, or fewer at lower rates, hardly change a model."""


def doubts(args: TrainArguments, num_steps: int, rates: Iterable[float]) -> str:
    """What speaks against learning much in a run, in a sentence; empty if nothing does.

    Args:
        args: the flags.
        num_steps: optimizer steps of the run.
        rates: peak rates of the trained parts.
    """
    if num_steps < FEW_STEPS:
        return (
            f"this run makes {counted(num_steps, 'optimizer step')}, and little is learnt in fewer than {FEW_STEPS}: "
            f"{_ways_to_more_steps(args)}; runs usually make 1,000 or more"
        )
    highest = max(rates)
    if highest < LOW_RATE and num_steps < STEPS_AT_LOW_RATE:
        return (
            f"the learning rate is {highest:g}, and little is learnt below {LOW_RATE:g} in {num_steps} optimizer "
            f"steps: usual for fewer than {STEPS_AT_LOW_RATE:,} are 1e-6 to 1e-5, with LoRA {ADAPTER_LEARNING_RATE:g}"
        )
    return ""


def _ways_to_more_steps(args: TrainArguments) -> str:
    """The flags that give a run more steps, of those that decide its length."""
    if args.max_steps is not None:
        return "raise --max_steps"
    sizes = ("per_device_train_batch_size", "gradient_accumulation_steps") if args.counts_bins else ()
    lower = [f"--{name}" for name in sizes if (getattr(args, name) or 1) > 1] if sizes else ["--samples_per_step"]
    return "raise --num_train_epochs" + (f", or lower {' or '.join(lower)}" if lower else "")


def steps_to_do(num_done: int, num_steps: int) -> str:
    """The steps of a run that are still to do, counted from 1, in words."""
    if num_done >= num_steps:
        return f"{'the only step' if num_steps == 1 else f'all {num_steps:,} steps'} done before"
    return f"steps {num_done + 1:,} to {num_steps:,}" if num_done + 1 < num_steps else f"step {num_steps:,}"
