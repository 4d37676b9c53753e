"""What a bin costs follows from the index and from the model's config.json."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import Qwen2_5_VLConfig

from schemas.checkpoints import read_config
from schemas.errors import ConfigError
from tests.train.synthetic import make_bins, write_shards
from train.arithmetic.cost import CostModel
from train.arithmetic.dimensions import OFFICIAL
from train.shards.index import ShardIndex, open_shards

# Sizes from the config.json of Qwen2.5-VL-7B-Instruct, which has those of the language model at the top.
CONFIG_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
    },
}


@pytest.fixture
def index(tmp_path: Path) -> ShardIndex:
    return open_shards(write_shards(tmp_path / "set", make_bins(num_bins=8)))


def test_cost_grows_with_every_part_of_the_work(index: ShardIndex) -> None:
    columns = {
        name: getattr(index, name)
        for name in ("num_tokens", "sum_squared_lengths", "num_targets", "num_patches", "num_images", "num_videos")
    }
    base = index.cost()
    assert base.dtype == np.float64
    assert base.shape == (8,)
    for name in ("num_tokens", "sum_squared_lengths", "num_targets", "num_patches"):
        assert np.all(CostModel().bin_flops(**{**columns, name: columns[name] + 1}) > base), name
    split = CostModel().bin_flops(**{**columns, "num_images": columns["num_images"] + 1})
    assert np.all(split[columns["num_patches"] > 0] < base[columns["num_patches"] > 0])


def test_cost_of_a_text_token_is_twice_the_weights_it_is_multiplied_with() -> None:
    """7.6 B parameters, less 0.54 B of input embeddings (looked up) and 0.54 B of lm_head, less biases and norms."""
    per_token = CostModel().flops_per_token
    assert per_token == 2 * 28 * (3584 * 3584 * 2 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    assert 6.4e9 < per_token / 2 < 6.6e9


def test_other_units_of_work_cost_what_is_worked_out_by_hand() -> None:
    model = CostModel()
    assert model.flops_per_target == 2 * 3584 * 152064
    assert model.flops_per_squared_length == 28 * 2 * 3584
    assert model.flops_per_squared_patches == 4 * 4 * 1280
    blocks = 32 * (8 * 1280 * 1280 + 6 * 1280 * 3420) + 28 * 4 * 64 * 1280
    assert model.flops_per_patch == 2 * 1176 * 1280 + blocks + 2 * 5120 * (5120 + 3584) / 4


def test_costs_never_change_between_versions() -> None:
    """They decide which rank gets which bin, and in a grouped order which step does."""
    counts = {
        "num_tokens": np.array([4096, 3071], dtype=np.int32),
        "sum_squared_lengths": np.array([4096**2, 2_000_003], dtype=np.int64),
        "num_targets": np.array([77, 1000], dtype=np.int32),
        "num_patches": np.array([0, 8236], dtype=np.int32),
        "num_images": np.array([0, 2], dtype=np.int32),
        "num_videos": np.array([0, 1], dtype=np.int32),
    }
    assert CostModel().bin_flops(**counts).tolist() == [56906346921984.0, 52461914506581.336]
    trained = CostModel.of(OFFICIAL["72B"]).in_training(tune_vision=False, gradient_checkpointing=True)
    assert trained.bin_flops(**counts).tolist() == [2389456367648768.0, 1756498013853013.2]


def test_both_layouts_of_config_json_are_read() -> None:
    """Newer files have the sizes of the language model in text_config. The default is the 7B."""
    read = CostModel.of(CONFIG_7B)
    assert read == CostModel()
    nested = {
        "text_config": {name: value for name, value in CONFIG_7B.items() if name != "vision_config"},
        "vision_config": CONFIG_7B["vision_config"],
    }
    assert CostModel.of(nested) == read
    assert CostModel.of(Qwen2_5_VLConfig(**nested).to_dict()) == read


@pytest.mark.parametrize(
    ("flags", "language", "vision"),
    [
        ({}, 3, 3),
        ({"tune_vision": False}, 3, 1),
        ({"tune_llm": False}, 2, 3),
        ({"tune_llm": False, "tune_vision": False}, 2, 1),
        ({"gradient_checkpointing": True}, 4, 4),
        ({"gradient_checkpointing": True, "tune_vision": False}, 4, 1),
    ],
)
def test_frozen_parts_cost_less(index: ShardIndex, flags: dict[str, bool], language: int, vision: int) -> None:
    """Forward 1, gradients of activations 1, gradients of weights 1, recomputation 1."""
    model = CostModel.of(CONFIG_7B).in_training(**flags)
    assert (model.language_passes, model.vision_passes) == (language, vision)
    # Bin 0 is text only, so it costs its passes; the others hold media.
    forward = index.cost()
    ratio = index.cost(model) / forward
    assert ratio[0] == language
    assert np.all((ratio > min(language, vision)) & (ratio < max(language, vision)) | (ratio == language))


@pytest.mark.parametrize("recomputed", [0, 1])
def test_adapters_save_the_gradients_of_weights(recomputed: int) -> None:
    """The forward pass and gradients of activations remain; a frozen vision tower costs its forward pass alone."""
    model = CostModel().in_training(uses_adapters=True, gradient_checkpointing=bool(recomputed))
    assert (model.language_passes, model.vision_passes) == (2 + recomputed, 2 + recomputed)
    frozen = CostModel().in_training(uses_adapters=True, tune_vision=False, gradient_checkpointing=bool(recomputed))
    assert (frozen.language_passes, frozen.vision_passes) == (2 + recomputed, 1)


@pytest.mark.parametrize("missing", ["hidden_size", "num_key_value_heads", "depth"])
def test_a_config_json_without_a_size_is_an_error(missing: str) -> None:
    config = json.loads(json.dumps(CONFIG_7B))
    del (config["vision_config"] if missing == "depth" else config)[missing]
    with pytest.raises(ConfigError, match=rf"config\.json has {missing} None"):
        CostModel.of(config)


def test_sizes_are_read_from_the_config_json_of_a_checkpoint(tiny_vocab_checkpoint: Path, tmp_path: Path) -> None:
    assert CostModel.of(read_config(tiny_vocab_checkpoint)).dims.vocab_size == 2048
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="is not a JSON object"):
        read_config(tmp_path)
