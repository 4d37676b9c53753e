"""How much and how fast a run trains: flags, and where they say nothing what is recommended for a model of its size.

The flags and the ``config.json`` of a checkpoint -> a :class:`Recipe`. The recommendations are those of the upstream
framework, whose batch is counted in samples; here it is in bins, each of which packs many.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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
        epochs: passes over all bins, where the number of steps is not given.
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
"""For a model of any other size."""

ADAPTER_LEARNING_RATE = 1e-4
"""For LoRA at any size: adapters start from zero and want rates far above those of trained weights."""


def choose_recipe(args: TrainArguments, config: Mapping[str, Any]) -> Recipe:
    """What the flags say, and the rest as recommended for the model.

    Args:
        args: the flags.
        config: contents of the ``config.json`` of the checkpoint.
    """
    size = official_size(config)
    preset = OTHER if size is None else PRESETS[size]
    return Recipe(
        learning_rate=_first(args.learning_rate, ADAPTER_LEARNING_RATE if args.lora_enable else preset.learning_rate),
        per_device=_first(args.per_device_train_batch_size, preset.per_device),
        accumulation=_first(args.gradient_accumulation_steps, preset.accumulation),
        epochs=_first(args.num_train_epochs, preset.epochs),
    )


def _first(given: Any, recommended: Any) -> Any:
    return recommended if given is None else given
