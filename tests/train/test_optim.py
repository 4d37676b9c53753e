"""Every parameter is in exactly one group, frozen parts are not trained, and unknown parameters are an error."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Qwen2_5_VLForConditionalGeneration

from schemas.errors import ConfigError
from train.model.optim import (
    LANGUAGE_MODEL,
    MERGER,
    VISION_TOWER,
    ParameterGroup,
    build_optimizer,
    format_table,
    group_parameters,
    learning_rates,
    part_of,
)
from train.model.packed import PackedQwen
from train.settings.arguments import TrainArguments
from train.settings.declarations import FUSED, UNFUSED
from train.settings.flags import parse_arguments
from train.settings.recipe import choose_recipe

RATES = {LANGUAGE_MODEL: 1e-3, MERGER: 2e-3, VISION_TOWER: 3e-3}


@pytest.fixture
def hf(tiny_vocab_checkpoint: Path) -> Qwen2_5_VLForConditionalGeneration:
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_vocab_checkpoint)


@pytest.fixture
def model(hf: Qwen2_5_VLForConditionalGeneration) -> PackedQwen:
    return PackedQwen(hf, attn_implementation="sdpa")


def test_every_parameter_is_in_exactly_one_group(model: PackedQwen) -> None:
    grouped = [id(parameter) for group in group_parameters(model, RATES) for parameter in group.parameters]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters())


def test_parts_are_distinguished_by_module(model: PackedQwen) -> None:
    hf, members = model.hf, {LANGUAGE_MODEL: set(), MERGER: set(), VISION_TOWER: set()}
    for group in group_parameters(model, RATES):
        members[group.part] |= set(group.parameters)
    assert members == {
        LANGUAGE_MODEL: {*hf.model.language_model.parameters(), *hf.lm_head.parameters()},
        MERGER: set(hf.model.visual.merger.parameters()),
        VISION_TOWER: {*hf.model.visual.blocks.parameters(), *hf.model.visual.patch_embed.parameters()},
    }


def test_matrices_decay_and_norms_and_biases_do_not(model: PackedQwen) -> None:
    """In this model exactly the matrices have two or more dimensions."""
    for group in group_parameters(model, RATES):
        assert all((parameter.ndim >= 2) == group.decays for parameter in group.parameters)


@pytest.mark.parametrize("frozen", [LANGUAGE_MODEL, MERGER, VISION_TOWER])
def test_a_part_without_a_rate_is_frozen_and_not_optimized(model: PackedQwen, frozen: str) -> None:
    groups = group_parameters(model, {**RATES, frozen: None})
    frozen_names = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen_names == {name for name, _ in model.named_parameters() if part_of(name) == frozen}
    optimizer = build_optimizer(groups, TrainArguments(shards="x", weight_decay=0.1))
    optimized = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    assert optimized == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}


def test_a_part_that_was_frozen_can_be_trained_again(model: PackedQwen) -> None:
    group_parameters(model, {**RATES, MERGER: None})
    group_parameters(model, RATES)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_freezing_the_language_model_freezes_an_untied_lm_head(hf: Qwen2_5_VLForConditionalGeneration) -> None:
    hf.lm_head.weight = nn.Parameter(hf.lm_head.weight.detach().clone())
    model = PackedQwen(hf, attn_implementation="sdpa")
    group_parameters(model, {**RATES, LANGUAGE_MODEL: None})
    assert not model.hf.lm_head.weight.requires_grad
    assert not model.hf.model.language_model.embed_tokens.weight.requires_grad


def test_optimizer_groups_have_the_rates_and_decay_of_their_parts(model: PackedQwen) -> None:
    optimizer = build_optimizer(group_parameters(model, RATES), TrainArguments(shards="x", weight_decay=0.1))
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.9, 0.999), 1e-8)
    assert optimizer.defaults["fused"] is True
    assert [(group["part"], group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (LANGUAGE_MODEL, 1e-3, 0.1),
        (LANGUAGE_MODEL, 1e-3, 0.0),
        (MERGER, 2e-3, 0.1),
        (MERGER, 2e-3, 0.0),
        (VISION_TOWER, 3e-3, 0.1),
        (VISION_TOWER, 3e-3, 0.0),
    ]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("", (2e-7, 2e-7, None)),
        ("--learning_rate 1e-5 --tune_mm_vision", (1e-5, 1e-5, 1e-5)),
        ("--learning_rate 1e-5 --mm_projector_lr 2e-5", (1e-5, 2e-5, None)),
        ("--tune_mm_vision --vision_tower_lr 3e-6", (2e-7, 2e-7, 3e-6)),
        ("--tune_mm_llm False --mm_projector_lr 2e-5", (None, 2e-5, None)),
    ],
)
def test_each_part_has_its_own_rate_or_the_base_rate(flags: str, expected: tuple[float | None, ...]) -> None:
    args = parse_arguments(["--shards", "x", *flags.split()])
    rates = learning_rates(args, choose_recipe(args, {}).learning_rate)
    assert (rates[LANGUAGE_MODEL], rates[MERGER], rates[VISION_TOWER]) == expected


def test_a_parameter_of_no_part_is_an_error(model: PackedQwen) -> None:
    model.hf.extra = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"parameter hf\.extra\.weight belongs to no part of the model"):
        group_parameters(model, RATES)


def test_a_parameter_of_an_unknown_kind_of_module_is_an_error(model: PackedQwen) -> None:
    model.hf.model.visual.merger.scale = nn.LayerNorm(4)
    with pytest.raises(ConfigError, match=r"hf\.model\.visual\.merger\.scale\.weight is in a LayerNorm"):
        group_parameters(model, RATES)


def test_a_part_to_train_without_parameters_is_an_error(model: PackedQwen) -> None:
    del model.hf.model.visual.merger
    with pytest.raises(ConfigError, match="merger has a learning rate, but the model has no parameters in it"):
        group_parameters(model, RATES)


def test_the_table_shows_what_is_trained(model: PackedQwen) -> None:
    lines = format_table(group_parameters(model, {**RATES, MERGER: None}), weight_decay=0.1).splitlines()
    rows = [line.split() for line in lines]
    assert rows[0] == ["part", "tensors", "parameters", "learning", "rate", "decay"]
    assert rows[1][0::3] == ["language_model", "0.001"]
    assert [row[0] for row in rows[1:] if row[-2:] == ["frozen", "-"]] == ["merger"], "in one row"
    total = sum(int(row[2].replace(",", "")) for row in rows[1:])
    assert total == sum(parameter.numel() for parameter in model.parameters())


def test_a_partitioned_parameter_counts_with_its_full_size() -> None:
    """ZeRO-3 leaves an empty tensor with the full size in ``ds_numel``."""
    linear = nn.Linear(4, 8, bias=False)
    model = nn.ModuleDict({"hf": nn.ModuleDict({"lm_head": linear})})
    linear.weight.data = torch.empty(0)
    linear.weight.ds_numel = 32
    (group,) = group_parameters(model, {LANGUAGE_MODEL: 1.0})
    assert group.num_elements == 32


def test_adam_has_the_moments_and_the_kernel_of_the_flags(model: PackedQwen) -> None:
    line = "--shards x --optim adamw_torch --adam_beta1 0.8 --adam_beta2 0.95 --adam_epsilon 1e-6"
    optimizer = build_optimizer(group_parameters(model, RATES), parse_arguments(line.split()))
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.8, 0.95), 1e-6)
    assert optimizer.defaults["fused"] is None


def test_the_fused_kernel_makes_the_steps_of_the_other_one_up_to_rounding() -> None:
    """Either kernel computes a step with some ten float32 operations, in another order: 1e-6 of its length.

    Gradients have all magnitudes from 1e-12, which is below epsilon, to 1.
    """
    torch.manual_seed(0)
    start = torch.randn(10_000)
    weights = {FUSED: nn.Parameter(start.clone()), UNFUSED: nn.Parameter(start.clone())}
    optimizers = {}
    for name, weight in weights.items():
        group = ParameterGroup(
            part=LANGUAGE_MODEL, is_adapter=False, learning_rate=1e-3, decays=True, parameters=(weight,)
        )
        optimizers[name] = build_optimizer([group], TrainArguments(shards="x", optim=name, weight_decay=0.1))
    for _ in range(20):
        grad = torch.randn(len(start)) * 10 ** (-12 * torch.rand(len(start)))
        before = {name: weight.detach().clone() for name, weight in weights.items()}
        for name, optimizer in optimizers.items():
            weights[name].grad = grad.clone()
            optimizer.step()
        steps = [weights[name].detach() - before[name] for name in optimizers]
        # The difference of two weights around 1 is rounded to 1e-7, whatever its length.
        torch.testing.assert_close(*steps, rtol=1e-5, atol=1e-6)
        assert steps[0].abs().max() > 1e-4
    moments = [optimizer.state[weights[name]] for name, optimizer in optimizers.items()]
    for moment in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(*(state[moment] for state in moments), rtol=1e-5, atol=1e-12)
