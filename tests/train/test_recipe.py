"""Flags left out take what is recommended for the size of the model. A flag always overrides it."""

from __future__ import annotations

import pytest

from train.arithmetic.dimensions import official_size
from train.settings.arguments import TrainArguments
from train.settings.flags import parse_arguments
from train.settings.recipe import Recipe, choose_recipe, doubts, steps_to_do

CONFIGS = {
    "3B": {"hidden_size": 2048, "num_hidden_layers": 36},
    "7B": {"hidden_size": 3584, "num_hidden_layers": 28},
    "32B": {"hidden_size": 5120, "num_hidden_layers": 64},
    "72B": {"hidden_size": 8192, "num_hidden_layers": 80},
}
"""Excerpts of the official ``config.json`` files."""


def recipe(config: dict[str, object], flags: str = "") -> tuple[float, int, float]:
    chosen = choose_recipe(parse_arguments(["--shards", "x", *flags.split()]), config)
    return chosen.learning_rate, chosen.samples, chosen.epochs


@pytest.mark.parametrize(
    ("size", "expected"),
    [("3B", (2e-7, 32, 3.0)), ("7B", (2e-7, 16, 0.5)), ("32B", (1e-7, 16, 0.3)), ("72B", (5e-8, 16, 0.1))],
)
@pytest.mark.parametrize("nested", [False, True])
def test_every_official_size_has_its_recommended_settings(
    size: str, expected: tuple[float, int, float], nested: bool
) -> None:
    """Sizes of the language model are at the top of older files, and in ``text_config`` of newer ones."""
    config = {"text_config": CONFIGS[size]} if nested else CONFIGS[size]
    assert official_size(config) == size
    assert recipe(config) == expected
    assert choose_recipe(parse_arguments(["--shards", "x"]), config).origin == "upstream"


def test_another_size_has_sixteen_samples_a_rank() -> None:
    assert official_size({"hidden_size": 64, "num_hidden_layers": 2}) is None
    assert recipe({}) == (2e-7, 16, 3.0)
    assert choose_recipe(parse_arguments(["--shards", "x"]), {}).origin == "recommended"


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("--learning_rate 1e-5", (1e-5, 16, 0.5)), ("--num_train_epochs 2", (2e-7, 16, 2.0))],
)
def test_a_flag_overrides_the_recommendation(flags: str, expected: tuple[float, int, float]) -> None:
    assert recipe(CONFIGS["7B"], flags) == expected


def test_a_recipe_cannot_be_changed() -> None:
    frozen = Recipe(learning_rate=1.0, samples=1, epochs=1.0)
    with pytest.raises(AttributeError):
        frozen.epochs = 2.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("num_steps", "rates", "expected"),
    [
        (99, [1e-5], "this run makes 99 optimizer steps, and little is learnt in fewer than 100"),
        (1, [1e-5], "this run makes 1 optimizer step, and little"),
        (999, [1e-7, 2e-7], "the learning rate is 2e-07, and little is learnt below 1e-06 in 999 optimizer steps"),
        (100, [1e-7, 1e-6], ""),
        (1000, [2e-7], ""),
    ],
)
def test_few_steps_and_low_rates_cause_a_warning(num_steps: int, rates: list[float], expected: str) -> None:
    doubt = doubts(TrainArguments(shards="a"), num_steps, rates)
    assert doubt.startswith(expected)
    assert bool(doubt) == bool(expected)
    assert "usual" in doubt or not expected


@pytest.mark.parametrize(
    ("flags", "advice"),
    [
        ("", "raise --num_train_epochs, or lower --samples_per_step"),
        ("--samples_per_step 64", "raise --num_train_epochs, or lower --samples_per_step"),
        ("--max_steps 20", "raise --max_steps"),
        ("--max_steps 20 --per_device_train_batch_size 4", "raise --max_steps"),
        ("--per_device_train_batch_size 1 --gradient_accumulation_steps 1", "raise --num_train_epochs"),
        ("--gradient_accumulation_steps 8", "raise --num_train_epochs, or lower --gradient_accumulation_steps"),
        (
            "--per_device_train_batch_size 2 --gradient_accumulation_steps 8",
            "raise --num_train_epochs, or lower --per_device_train_batch_size or --gradient_accumulation_steps",
        ),
    ],
)
def test_few_steps_are_mended_by_the_flags_that_decide_their_number(flags: str, advice: str) -> None:
    args = parse_arguments(["--shards", "a", *flags.split()])
    assert doubts(args, 5, [1e-5]).endswith(f"fewer than 100: {advice}; runs usually make 1,000 or more")


def test_the_steps_to_do_are_named_as_they_count() -> None:
    assert steps_to_do(0, 1200) == "steps 1 to 1,200"
    assert steps_to_do(19, 20) == "step 20"
    assert steps_to_do(20, 20) == "all 20 steps done before"
    assert steps_to_do(1, 1) == "the only step done before"
