"""A checkpoint must be complete and match the shards; a written checkpoint loads again."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from schemas.errors import ConfigError
from schemas.manifest import Fingerprints
from schemas.qwen import IMAGE_MEAN, IMAGE_STD, tokenizer_fingerprint
from train.model import pretrained
from train.model.pretrained import ModelShape


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may change."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture(scope="module")
def fingerprints(tiny_checkpoint: Path) -> Fingerprints:
    path = tiny_checkpoint / "tokenizer.json"
    tokenizer = tokenizer_fingerprint(path.read_bytes(), where=str(path))
    return Fingerprints(tokenizer=tokenizer, image_mean=IMAGE_MEAN, image_std=IMAGE_STD)


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    value = json.loads(path.read_bytes())
    edit(value)
    path.write_text(json.dumps(value))


def load(folder: Path) -> Qwen2_5_VLForConditionalGeneration:
    return pretrained.load_model(folder, dtype=torch.float32, attn_implementation="sdpa")


def test_a_folder_is_used_directly(folder: Path) -> None:
    assert pretrained.find_checkpoint(str(folder)) == folder


@pytest.mark.parametrize("name", ["no/such-model", "no/such/folder", "/no/such/folder"])
def test_a_name_that_is_neither_a_folder_nor_on_the_hub_is_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=f"--model_name_or_path {name} is not a folder, and could not be downloaded"):
        pretrained.find_checkpoint(name)


def test_the_shape_of_a_model_is_read_from_its_configuration(folder: Path) -> None:
    assert pretrained.read_shape(folder) == ModelShape(hidden_size=32, window_size=112, sliding_window=None)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda config: config.update(image_token_id=7), "image_token_id is 7, but shards require 151655"),
        (lambda config: config["vision_config"].update(patch_size=16), "vision_config.patch_size is 16"),
        (lambda config: config["vision_config"].update(tokens_per_second=4), "tokens_per_second is 4"),
        (
            lambda config: config["text_config"].update(hidden_size="wide"),
            "is not a checkpoint folder: Validation",
        ),
        (
            lambda config: config["text_config"].update(num_attention_heads=3),
            "text_config has a width of 32, which is not divisible by its 3 heads",
        ),
        (
            lambda config: config["vision_config"].update(num_heads=0),
            "vision_config has a width of 32, which is not divisible by its 0 heads",
        ),
        (lambda config: config.update(model_type="qwen2_vl"), "holds a model of type qwen2_vl; use a Qwen2.5-VL"),
    ],
)
def test_a_model_that_does_not_match_the_shards_is_an_error(
    folder: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit_json(folder / "config.json", edit)
    with pytest.raises(ConfigError) as caught:
        pretrained.read_shape(folder)
    assert message in str(caught.value)


def test_a_folder_without_a_configuration_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a checkpoint folder"):
        pretrained.read_shape(tmp_path)


def test_the_tokenizer_of_the_shards_is_accepted(folder: Path, fingerprints: Fingerprints) -> None:
    pretrained.check_fingerprints(folder, fingerprints, shards="shards/")


def test_another_tokenizer_is_an_error_that_names_both_and_the_fix(folder: Path, fingerprints: Fingerprints) -> None:
    edit_json(folder / "tokenizer.json", lambda value: value["model"]["merges"].pop())
    with pytest.raises(ConfigError) as caught:
        pretrained.check_fingerprints(folder, fingerprints, shards="shards/demo")
    message = str(caught.value)
    assert str(folder) in message
    assert "shards/demo" in message
    assert fingerprints.tokenizer in message
    assert f"Build the shards again with --model {folder}" in message


@pytest.mark.parametrize("name", ["image_mean", "image_std"])
def test_another_normalisation_is_an_error(folder: Path, fingerprints: Fingerprints, name: str) -> None:
    edit_json(folder / "preprocessor_config.json", lambda value: value.update({name: [0.5, 0.5, 0.5]}))
    with pytest.raises(ConfigError, match=rf"{name} of .* is \[0.5, 0.5, 0.5\], but shards/ was built with \[0\."):
        pretrained.check_fingerprints(folder, fingerprints, shards="shards/")


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json"])
def test_a_checkpoint_without_tokenizer_or_processor_is_an_error(
    folder: Path, fingerprints: Fingerprints, name: str
) -> None:
    (folder / name).unlink()
    with pytest.raises(ConfigError, match=rf"cannot read .*{name} \(No such file or directory\)"):
        pretrained.check_fingerprints(folder, fingerprints, shards="shards/")


def test_a_preprocessor_file_of_another_kind_is_an_error(folder: Path, fingerprints: Fingerprints) -> None:
    (folder / "preprocessor_config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json is not a processor configuration: Expected `obj"):
        pretrained.check_fingerprints(folder, fingerprints, shards="shards/")


def test_a_missing_weight_is_an_error_rather_than_random(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ConfigError, match=r"is not a complete Qwen2.5-VL checkpoint: 1 missing keys \(model\.language_model"
    ):
        load(folder)


def test_weights_whose_shapes_do_not_match_the_configuration_are_an_error(folder: Path) -> None:
    edit_json(folder / "config.json", lambda config: config["text_config"].update(intermediate_size=136))
    with pytest.raises(ConfigError, match=f"{folder}: weight shapes do not match config.json"):
        load(folder)


def test_an_unexpected_weight_is_an_error(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["visual.extra.weight"] = torch.zeros(1)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="1 unexpected keys"):
        load(folder)


@pytest.mark.parametrize("contents", [None, b"cut short"])
def test_weights_that_cannot_be_read_are_an_error(folder: Path, contents: bytes | None) -> None:
    (folder / "model.safetensors").unlink()
    if contents is not None:
        (folder / "model.safetensors").write_bytes(contents)
    with pytest.raises(ConfigError, match=f"cannot load the weights of {folder}"):
        load(folder)


def test_a_written_checkpoint_loads_with_the_same_weights_and_files(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    weights = {name: weight.detach() + 1 for name, weight in model.named_parameters()}
    out = tmp_path / "run" / "final"
    for _ in range(2):  # the second overwrites the first
        pretrained.write_checkpoint(out, model, weights, source=folder)
    again = load(out)
    assert all(torch.equal(weight, weights[name]) for name, weight in again.named_parameters())
    assert {path.name for path in out.iterdir()} == {path.name for path in folder.iterdir()}
    assert [path.name for path in out.parent.iterdir()] == ["final"]
