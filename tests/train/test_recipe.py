"""Flags left out take what is recommended for the size of the model. A flag always overrides it."""

from __future__ import annotations

import pytest

from train.arithmetic.dimensions import official_size
from train.settings.flags import parse_arguments
from train.settings.recipe import Recipe, choose_recipe

CONFIGS = {
    "3B": {"hidden_size": 2048, "num_hidden_layers": 36},
    "7B": {"hidden_size": 3584, "num_hidden_layers": 28},
    "32B": {"hidden_size": 5120, "num_hidden_layers": 64},
    "72B": {"hidden_size": 8192, "num_hidden_layers": 80},
}
"""Excerpts of the official ``config.json`` files."""


def recipe(config: dict[str, object], flags: str = "") -> tuple[float, int, int, float]:
    chosen = choose_recipe(parse_arguments(["--shards", "x", *flags.split()]), config)
    return chosen.learning_rate, chosen.per_device, chosen.accumulation, chosen.epochs


@pytest.mark.parametrize(
    ("size", "expected"),
    [("3B", (2e-7, 8, 4, 3.0)), ("7B", (2e-7, 4, 4, 0.5)), ("32B", (1e-7, 2, 8, 0.3)), ("72B", (5e-8, 1, 16, 0.1))],
)
@pytest.mark.parametrize("nested", [False, True])
def test_every_official_size_has_its_recommended_settings(
    size: str, expected: tuple[float, int, int, float], nested: bool
) -> None:
    """Sizes of the language model stand at the top of older files, and in ``text_config`` of newer ones."""
    config = {"text_config": CONFIGS[size]} if nested else CONFIGS[size]
    assert official_size(config) == size
    assert recipe(config) == expected


def test_another_size_has_one_bin_and_four_micro_steps() -> None:
    assert official_size({"hidden_size": 64, "num_hidden_layers": 2}) is None
    assert recipe({}) == (2e-7, 1, 4, 3.0)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--learning_rate 1e-5", (1e-5, 4, 4, 0.5)),
        ("--per_device_train_batch_size 2", (2e-7, 2, 4, 0.5)),
        ("--gradient_accumulation_steps 1", (2e-7, 4, 1, 0.5)),
        ("--num_train_epochs 2", (2e-7, 4, 4, 2.0)),
    ],
)
def test_a_flag_overrides_the_recommendation(flags: str, expected: tuple[float, int, int, float]) -> None:
    assert recipe(CONFIGS["7B"], flags) == expected


def test_a_recipe_cannot_be_changed() -> None:
    frozen = Recipe(learning_rate=1.0, per_device=1, accumulation=1, epochs=1.0)
    with pytest.raises(AttributeError):
        frozen.epochs = 2.0  # type: ignore[misc]
