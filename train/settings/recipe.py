"""Batch, rate and length of a run: the flags, and for those left out what is recommended for the size of the model.

The flags and the ``config.json`` of a checkpoint -> a :class:`Recipe`. The recommendations are those of the upstream
framework. Its batch counts samples, this one counts bins, each of which packs many samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from train.arithmetic.dimensions import official_size
from train.settings.arguments import TrainArguments


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Settings that depend on the size of a model.

    Attributes:
        learning_rate: peak rate of all parts without a rate of their own.
        per_device: bins of a rank in a forward pass.
        accumulation: forward passes of a rank in an optimizer step.
        epochs: passes over all bins, unless ``--max_steps`` sets the length.
    """

    learning_rate: float
    per_device: int
    accumulation: int
    epochs: float


PRESETS = {
    "3B": Recipe(learning_rate=2e-7, per_device=8, accumulation=4, epochs=3.0),
    "7B": Recipe(learning_rate=2e-7, per_device=4, accumulation=4, epochs=0.5),
    "32B": Recipe(learning_rate=1e-7, per_device=2, accumulation=8, epochs=0.3),
    "72B": Recipe(learning_rate=5e-8, per_device=1, accumulation=16, epochs=0.1),
}
"""Recommended for the official sizes."""

OTHER = Recipe(learning_rate=2e-7, per_device=1, accumulation=4, epochs=3.0)
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
    flags: dict[str, Any] = {
        "learning_rate": args.learning_rate,
        "per_device": args.per_device_train_batch_size,
        "accumulation": args.gradient_accumulation_steps,
        "epochs": args.num_train_epochs,
    }
    if args.lora_enable:
        preset = replace(preset, learning_rate=ADAPTER_LEARNING_RATE)
    return replace(preset, **{name: value for name, value in flags.items() if value is not None})
