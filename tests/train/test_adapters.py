"""The right layers get adapters, only adapters are trained, and impossible settings are errors."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from schemas.errors import ConfigError
from tests.train.test_model import gradients, micro_batch, samples_of_all_kinds
from train.model import adapters, optim
from train.model.adapters import Adapters, add_adapters, choose_adapters, merge_weights, split_weights
from train.model.optim import LANGUAGE_MODEL, MERGER, VISION_TOWER
from train.model.packed import PackedQwen, checkpoint_activations
from train.settings.arguments import TrainArguments
from train.settings.flags import parse_arguments
from train.settings.recipe import ADAPTER_LEARNING_RATE, choose_recipe

RATES = {LANGUAGE_MODEL: 1e-3, MERGER: 2e-3, VISION_TOWER: 3e-3}
TINY = {"llm": 14, "mlp": 2, "vision": 20}
"""Linear layers of the parts of the tiny model: 2 layers of 7, 2, 4 blocks of 5."""


def choose(checkpoint: Path, *flags: str) -> Adapters:
    args = parse_arguments(["--shards", "x", "--lora_enable", *flags])
    chosen = choose_adapters(args, json.loads((checkpoint / "config.json").read_bytes()))
    assert chosen is not None
    return chosen


@pytest.fixture
def hf(tiny_vocab_checkpoint: Path) -> Qwen2_5_VLForConditionalGeneration:
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_vocab_checkpoint, dtype=torch.float32)


ALL_TUNED = ("--tune_mm_vision",)
LLM_ALONE = ("--tune_mm_mlp", "False")


@pytest.mark.parametrize(
    ("flags", "num_layers"),
    [
        ((), TINY["llm"] + TINY["mlp"]),
        (ALL_TUNED, sum(TINY.values())),
        (LLM_ALONE, TINY["llm"]),
        (("--tune_mm_llm", "False"), TINY["mlp"]),
        ((*LLM_ALONE, "--lora_target_modules", "all-linear"), TINY["llm"]),
        ((*LLM_ALONE, "--lora_target_modules", "q_proj, v_proj"), 4),
        ((*LLM_ALONE, "--lora_target_modules", "self_attn.q_proj"), 2),
        ((*LLM_ALONE, "--lora_target_modules", "self_attn\\..*"), 8),
        ((*LLM_ALONE, "--lora_target_modules", "layers\\.1\\..*_proj"), 7),
        (("--lora_target_modules", "q_proj,merger.mlp.0"), 3),
        ((*ALL_TUNED, "--lora_target_modules", "proj,q_proj,merger.*"), 4 + 2 + 2),
    ],
)
def test_layers_of_the_tuned_parts_are_chosen_by_the_ends_of_their_names(
    tiny_vocab_checkpoint: Path, flags: tuple[str, ...], num_layers: int
) -> None:
    modules = choose(tiny_vocab_checkpoint, *flags).modules
    assert len(modules) == len(set(modules)) == num_layers
    assert not any("lm_head" in name or "patch_embed" in name for name in modules)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--lora_target_modules", "q_prj,mlp.0"),
            "q_prj matches no linear layer of language_model, merger; allowed: ",
        ),
        ((*LLM_ALONE, "--lora_target_modules", "qkv"), "qkv is in vision_tower, which is frozen"),
        ((*LLM_ALONE, "--lora_target_modules", "lm_head"), "lm_head cannot have an adapter"),
        ((*LLM_ALONE, "--lora_target_modules", "q_proj,("), "is not a valid regular expression"),
        (
            (*LLM_ALONE, "--lora_target_modules", "embed_tokens"),
            "embed_tokens matches no linear layer of language_model",
        ),
        (("--lora_target_modules", "q_proj"), "merger is tuned, but --lora_target_modules q_proj matches none"),
    ],
)
def test_a_target_that_matches_nothing_is_an_error(
    tiny_vocab_checkpoint: Path, flags: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        choose(tiny_vocab_checkpoint, *flags)


def test_lora_is_off_by_default_and_has_its_own_default_learning_rate() -> None:
    without, with_lora = (parse_arguments(["--shards", "x", *flags]) for flags in ([], ["--lora_enable"]))
    assert choose_adapters(without, {}) is None
    assert choose_recipe(without, {}).learning_rate == 2e-7
    assert choose_recipe(with_lora, {}).learning_rate == ADAPTER_LEARNING_RATE
    own = parse_arguments(["--shards", "x", "--lora_enable", "--learning_rate", "1e-3"])
    assert choose_recipe(own, {}).learning_rate == 1e-3


@pytest.mark.parametrize(
    "flags",
    [
        ("--lora_r", "8"),
        ("--lora_alpha", "8"),
        ("--lora_dropout", "0.1"),
        ("--lora_target_modules", "q_proj"),
    ],
)
def test_a_lora_setting_without_lora_is_an_error(flags: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match=f"{flags[0]} {flags[1]} has no effect without --lora_enable"):
        parse_arguments(["--shards", "x", *flags])


@pytest.mark.parametrize("flags", ["--lora_r 0", "--lora_alpha 0", "--lora_dropout 1", "--lora_dropout -0.1"])
def test_a_lora_setting_out_of_range_is_an_error(flags: str) -> None:
    with pytest.raises(ConfigError, match=r"--lora_\w+ is .*; allowed: "):
        parse_arguments(["--shards", "x", "--lora_enable", *flags.split()])


def test_without_peft_the_error_names_the_pip_command(
    tiny_vocab_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="LoRA needs the peft package: pip install peft"):
        choose(tiny_vocab_checkpoint)


def test_only_adapters_are_trained_each_in_one_group_at_the_rate_of_its_part(
    hf: Qwen2_5_VLForConditionalGeneration, tiny_vocab_checkpoint: Path
) -> None:
    add_adapters(hf, choose(tiny_vocab_checkpoint, *ALL_TUNED, "--lora_r", "2"), seed=0)
    model = PackedQwen(hf, attn_implementation="sdpa")
    groups = optim.group_parameters(model, RATES)
    assert sum(len(group.parameters) for group in groups) == len(list(model.parameters()))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".lora_" in name}
    assert len(trained) == 2 * sum(TINY.values())
    optimizer = optim.build_optimizer(groups, TrainArguments(shards="x", weight_decay=0.1))
    assert [(group["part"], group["lr"], len(group["params"])) for group in optimizer.param_groups] == [
        (LANGUAGE_MODEL, 1e-3, 28),
        (MERGER, 2e-3, 4),
        (VISION_TOWER, 3e-3, 40),
    ]
    rows = optim.format_table(groups, weight_decay=0.1).splitlines()[1:]
    shown = [re.split(r"  +", row) for row in rows]
    assert {row[0] for row in shown if row[3] == "frozen"} == set(RATES)
    assert [(row[0], row[3]) for row in shown if row[3] != "frozen"] == [
        ("language_model, adapters", "0.001"),
        ("merger, adapters", "0.002"),
        ("vision_tower, adapters", "0.003"),
    ]


def test_a_part_to_train_without_adapters_is_an_error(
    hf: Qwen2_5_VLForConditionalGeneration, tiny_vocab_checkpoint: Path
) -> None:
    add_adapters(hf, choose(tiny_vocab_checkpoint, *LLM_ALONE), seed=0)
    model = PackedQwen(hf, attn_implementation="sdpa")
    with pytest.raises(ConfigError, match="merger has a learning rate, but the model has no adapters in it"):
        optim.group_parameters(model, {**RATES, VISION_TOWER: None})


@pytest.mark.parametrize("recomputed", [False, True])
def test_gradients_reach_every_adapter_through_frozen_embeddings_and_nothing_else(
    tiny_checkpoint: Path, recomputed: bool
) -> None:
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    add_adapters(hf, choose(tiny_checkpoint, *LLM_ALONE), seed=0)
    model = PackedQwen(hf, attn_implementation="sdpa").train()
    optim.group_parameters(model, {**RATES, MERGER: None, VISION_TOWER: None})
    if recomputed:
        checkpoint_activations(model)
    grads = gradients(model, model(micro_batch(*samples_of_all_kinds())))
    assert len(grads) == 2 * TINY["llm"]
    assert all(gradient.any() == (".lora_B." in name) for name, gradient in grads.items()), (
        "B is zero, so A gets no gradient"
    )
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)


def test_recomputed_activations_use_the_same_dropout_mask(tiny_checkpoint: Path) -> None:
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    add_adapters(hf, choose(tiny_checkpoint, *ALL_TUNED, "--lora_dropout", "0.3"), seed=0)
    model = PackedQwen(hf, attn_implementation="sdpa").train()
    optim.group_parameters(model, RATES)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.fill_(0.01)
    batch = micro_batch(*samples_of_all_kinds())
    runs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        runs.append(gradients(model, model(batch)))
        checkpoint_activations(model)
    stored, recomputed, other = runs
    for name, gradient in stored.items():
        torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-5)
    assert any(not torch.allclose(other[name], gradient, rtol=1e-2) for name, gradient in stored.items())


@pytest.mark.parametrize(("size", "num_layers"), [("3B", 36 * 7 + 2), ("7B", 28 * 7 + 2)])
def test_linear_layers_are_listed_for_the_official_configurations(size: str, num_layers: int) -> None:
    """The official files have the sizes of the language model at the top level."""
    text: dict[str, object] = {
        "3B": {"hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2},
        "7B": {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4},
    }[size]
    vision = {"depth": 32, "hidden_size": 1280, "out_hidden_size": text["hidden_size"], "num_heads": 16}
    scaling = {"type": "mrope", "mrope_section": [16, 24, 24]}
    config = {
        "model_type": "qwen2_5_vl",
        **text,
        "vocab_size": 151936,
        "rope_scaling": scaling,
        "vision_config": vision,
    }
    layers = adapters.linear_layers(config)
    tuned = [name for name, part in layers.items() if part != VISION_TOWER]
    assert len(tuned) == num_layers and len(layers) == num_layers + 32 * 5


def test_adapters_start_with_the_distribution_of_peft_and_depend_on_the_seed_only(tiny_vocab_checkpoint: Path) -> None:
    adapters_16 = choose(tiny_vocab_checkpoint, *ALL_TUNED, "--lora_r", "16")
    first, same, other = (
        Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_vocab_checkpoint, dtype=dtype)
        for dtype in (torch.float32, torch.float32, torch.bfloat16)
    )
    for hf, seed in ((first, 0), (same, 0), (other, 1)):
        torch.manual_seed(torch.randint(1000, ()))
        add_adapters(hf, adapters_16, seed=seed)
    assert all(parameter.dtype == torch.bfloat16 for parameter in other.parameters())
    seen = set()
    for (name, weight), again, different in zip(first.named_parameters(), same.parameters(), other.parameters()):
        assert torch.equal(weight, again)
        if ".lora_B." in name:
            assert not weight.any()
        if ".lora_A." in name:
            bound = 1 / math.sqrt(weight.shape[1])  # torch's default initialisation of a linear layer
            assert 0.9 * bound < weight.abs().max() <= bound
            assert abs(weight.mean()) < 0.1 * bound
            assert not torch.equal(weight.bfloat16(), different)
            seen.add(weight.flatten()[0].item())
    assert len(seen) == sum(TINY.values()), "layers have equal initial values"


def test_merging_adds_the_scaled_product_in_float32_and_rounds_once() -> None:
    """2 x (B A) worked out by hand; the sum 1 + 2^-7 + 2^-8 is not representable in bfloat16 and rounds to even."""
    weights = {
        "layer.base_layer.weight": torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16),
        "layer.base_layer.bias": torch.tensor([5.0]),
        "layer.lora_A.default.weight": torch.tensor([[2**-8, 3.0]], dtype=torch.bfloat16),
        "layer.lora_B.default.weight": torch.tensor([[1.5]], dtype=torch.bfloat16),
        "norm.weight": torch.tensor([7.0]),
    }
    own, adapter_weights = split_weights(weights)
    assert set(adapter_weights) == {f"base_model.model.layer.lora_{kind}.weight" for kind in "AB"}
    addresses = {name: weight.data_ptr() for name, weight in own.items()}
    merge_weights(own, adapter_weights, 2.0)
    assert {name: weight.tolist() for name, weight in own.items()} == {
        "layer.weight": [[1.0 + 2**-6, 9.0]],
        "layer.bias": [5.0],
        "norm.weight": [7.0],
    }
    assert own["layer.weight"].dtype == torch.bfloat16
    assert {name: weight.data_ptr() for name, weight in own.items()} == addresses, "a second copy was made"


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("base_model.model.layer.lora_B.weight", (3, 1), "layer does not match a layer of this model"),
        ("base_model.model.layer.lora_A.weight", (2, 2), "layer does not match a layer of this model"),
        ("base_model.model.layer.lora_A.weight", (2,), "layer does not match a layer of this model"),
        ("base_model.model.other.lora_A.weight", (1, 2), "other does not match a layer of this model"),
        ("base_model.model.layer.lora_magnitude_vector", (1,), "which is not a LoRA matrix: merge it with peft"),
    ],
)
def test_an_adapter_of_another_model_or_kind_is_rejected(name: str, shape: tuple[int, ...], message: str) -> None:
    adapter_weights = {
        "base_model.model.layer.lora_A.weight": torch.zeros(1, 2),
        "base_model.model.layer.lora_B.weight": torch.zeros(1, 1),
    }
    with pytest.raises(ConfigError, match=message):
        merge_weights({"layer.weight": torch.zeros(1, 2)}, {**adapter_weights, name: torch.zeros(shape)}, 1.0)
