"""The table of weights lists exactly the parameters of the model, and parameter counts follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from demo.tiny_model import tiny_config
from schemas.checkpoints import read_config
from train.arithmetic.dimensions import OFFICIAL, Dimensions
from train.arithmetic.weights import Kind, weight_table
from train.model import adapters, optim
from train.model.packed import PackedQwen
from train.model.sizes import sizes_of
from train.settings.arguments import TrainArguments
from train.settings.recipe import PRESETS

TINY = tiny_config(2048, num_hidden_layers=3, vision_hidden_size=48).to_dict()
CONFIGS = {**OFFICIAL, "tiny": TINY}


def without_weights(config: Mapping[str, Any]) -> Qwen2_5_VLForConditionalGeneration:
    with torch.device("meta"):
        return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config))


@pytest.mark.parametrize(
    ("size", "expected"),
    [("3B", 3_754_622_976), ("7B", 8_292_166_656), ("32B", 33_452_718_336), ("72B", 73_410_777_344)],
)
def test_official_sizes_have_the_official_parameter_counts(size: str, expected: int) -> None:
    """The index files of the weights add up to them: 3.75, 8.29, 33.45 and 73.41 billion."""
    sizes = sizes_of(OFFICIAL[size], TrainArguments(shards="shards", tune_mm_vision=True))
    assert sizes.num_parameters == sizes.num_trained == expected


def test_every_official_size_has_recommended_settings() -> None:
    assert list(PRESETS) == list(OFFICIAL)


@pytest.mark.parametrize("size", CONFIGS)
def test_the_table_lists_every_parameter_with_its_shape(size: str) -> None:
    listed: dict[str, tuple[int, ...]] = {}
    for row in weight_table(Dimensions.of(CONFIGS[size])):
        for layer in range(row.copies):
            name = row.name.format(layer)
            if not row.is_tied:
                shape = (row.outputs, row.inputs) if row.kind == Kind.MATRIX else (row.inputs, row.outputs)
                listed[f"{name}.weight"] = shape[1:] if row.kind == Kind.NORM else shape
            if row.has_bias:
                listed[f"{name}.bias"] = (row.outputs,)
    parameters = {name: tuple(parameter.shape) for name, parameter in without_weights(CONFIGS[size]).named_parameters()}
    patches = parameters["model.visual.patch_embed.proj.weight"]
    # the patch embedding is a convolution whose kernel is one patch: (V, 3, 2, 14, 14)
    parameters["model.visual.patch_embed.proj.weight"] = (patches[0], 3 * 2 * 14 * 14)
    assert patches[1:] == (3, 2, 14, 14)
    assert listed == parameters


FLAGS: list[dict[str, Any]] = [
    {},
    {"tune_mm_vision": True},
    {"tune_mm_llm": False, "tune_mm_vision": True},
    {"tune_mm_llm": False},
    {"lora_enable": True, "tune_mm_vision": True},
    {"lora_enable": True, "lora_r": 7, "lora_target_modules": "q_proj,down_proj,mlp.0"},
]


@pytest.mark.parametrize(
    ("size", "flags"),
    [*(("tiny", flags) for flags in FLAGS), ("3B", FLAGS[1]), ("3B", FLAGS[5]), ("7B", FLAGS[0])],
    ids=str,
)
def test_counts_are_those_of_the_parameter_groups_of_a_model(size: str, flags: dict[str, Any]) -> None:
    """Of a model that was built, with adapters, tied embeddings (tiny, 3B) and frozen parts."""
    config, args = CONFIGS[size], TrainArguments(shards="shards", **flags)
    hf = without_weights(config)
    if (chosen := adapters.choose_adapters(args, config)) is not None:
        with torch.device("meta"):
            adapters.add_adapters(hf, chosen, seed=0)
    model = PackedQwen(hf, attn_implementation="sdpa")
    groups = optim.group_parameters(model, optim.learning_rates(args, 1.0))
    trained = [group for group in groups if group.learning_rate is not None]
    sizes = sizes_of(config, args)
    assert sorted(sizes.elements) == sorted(parameter.numel() for parameter in model.parameters())
    assert sizes.num_trained == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sizes.largest_group == max(group.num_elements for group in trained)
    assert sizes.largest_trained == max(p.numel() for p in model.parameters() if p.requires_grad)
    assert sizes.largest_module == max(
        sum(parameter.numel() for parameter in module.parameters(recurse=False)) for module in model.modules()
    )
    assert sizes.trained_parts == {group.part for group in trained}
    assert sizes.num_in_small(64) == sum(p.numel() for p in model.parameters() if p.numel() <= 64)


@pytest.mark.parametrize("lora", [False, True])
def test_counts_are_those_of_a_checkpoint(tiny_checkpoint: Path, lora: bool) -> None:
    sizes = sizes_of(read_config(tiny_checkpoint), TrainArguments(shards="shards", lora_enable=lora))
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_checkpoint)
    num_own = sum(parameter.numel() for parameter in hf.parameters())
    assert (sizes.num_parameters == num_own) != lora
    assert sizes.largest_module == 151936 * hf.config.text_config.hidden_size
    assert (sizes.num_trained < sizes.num_parameters / 2) == lora
