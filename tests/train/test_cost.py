"""What a bin costs follows from the index and from the configuration of the model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import Qwen2_5_VLConfig

from schemas.errors import ConfigError
from tests.benchmarks.mixture import SIZES_OF_3B
from tests.train.synthetic import make_bins, write_shards
from train.arithmetic.cost import CostModel, read_config
from train.shards.index import ShardIndex, open_shards

# The sizes of Qwen2.5-VL-7B-Instruct, as its config.json has them: those of the language model at the top.
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


def test_cost_of_a_text_token_is_twice_the_weights_it_meets() -> None:
    """7.6 B parameters, less 0.54 B of input embeddings (looked up) and 0.54 B of lm_head, less biases and norms."""
    per_token = CostModel().flops_per_token
    assert per_token == 2 * 28 * (3584 * 3584 * 2 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    assert 6.4e9 < per_token / 2 < 6.6e9


def test_sizes_are_read_from_the_configuration() -> None:
    """The defaults are those of the 7B; both layouts of config.json are understood."""
    found = CostModel.of_training(CONFIG_7B)
    assert found == CostModel(language_passes=3, vision_passes=3)
    nested = {
        "text_config": {name: value for name, value in CONFIG_7B.items() if name != "vision_config"},
        "vision_config": CONFIG_7B["vision_config"],
    }
    assert CostModel.of_training(nested) == found
    assert CostModel.of_training(Qwen2_5_VLConfig(**nested).to_dict()) == found
    small = {**CONFIG_7B, "hidden_size": 2048, "num_hidden_layers": 36, "intermediate_size": 11008}
    small |= {"num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936}
    assert CostModel.of_training(small).flops_per_token == SIZES_OF_3B.flops_per_token


@pytest.mark.parametrize(
    ("flags", "language", "vision"),
    [
        ({"tune_vision": False}, 3, 1),
        ({"tune_llm": False}, 2, 3),
        ({"tune_llm": False, "tune_vision": False}, 2, 1),
        ({"gradient_checkpointing": True}, 4, 4),
        ({"gradient_checkpointing": True, "tune_vision": False}, 4, 1),
    ],
)
def test_what_is_frozen_costs_less(index: ShardIndex, flags: dict[str, bool], language: int, vision: int) -> None:
    """Forward 1, gradients of activations 1, gradients of weights 1, recomputation 1."""
    model = CostModel.of_training(CONFIG_7B, **flags)
    assert (model.language_passes, model.vision_passes) == (language, vision)
    # Bin 0 is text only, so it costs its passes; the others hold media.
    forward = index.cost()
    ratio = index.cost(model) / forward
    assert ratio[0] == language
    assert np.all((ratio > min(language, vision)) & (ratio < max(language, vision)) | (ratio == language))


@pytest.mark.parametrize("missing", ["hidden_size", "num_key_value_heads", "depth"])
def test_a_configuration_without_a_size_is_wrong_use(missing: str) -> None:
    config = json.loads(json.dumps(CONFIG_7B))
    del (config["vision_config"] if missing == "depth" else config)[missing]
    with pytest.raises(ConfigError, match=rf"config\.json has {missing} None"):
        CostModel.of_training(config)


def test_a_checkpoint_tells_its_sizes(tiny_vocab_checkpoint: Path, tmp_path: Path) -> None:
    assert CostModel.of_training(read_config(tiny_vocab_checkpoint)).vocab_size == 2048
    with pytest.raises(ConfigError, match=r"config\.json cannot be read"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match="is no JSON object"):
        read_config(tmp_path)


@pytest.mark.parametrize("recomputed", [0, 1])
def test_adapters_save_the_gradients_of_weights(recomputed: int) -> None:
    """Forward and gradients of activations are left; a frozen vision tower still costs its forward pass alone."""
    made = CostModel().in_training(uses_adapters=True, gradient_checkpointing=bool(recomputed))
    assert (made.language_passes, made.vision_passes) == (2 + recomputed, 2 + recomputed)
    frozen = CostModel().in_training(uses_adapters=True, tune_vision=False, gradient_checkpointing=bool(recomputed))
    assert (frozen.language_passes, frozen.vision_passes) == (2 + recomputed, 1)
