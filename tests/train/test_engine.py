"""Configuration of DeepSpeed: flags and file agree, upstream files work as they are, and ranks know their place."""

from __future__ import annotations

import json
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch

from schemas.errors import ConfigError
from train.run import engine
from train.run.engine import Ranks
from train.settings.arguments import TrainArguments
from train.settings.flags import parse_arguments
from train.settings.recipe import choose_recipe

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)

UPSTREAM_ZERO3: dict[str, Any] = {
    "fp16": {"enabled": "auto", "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16},
    "bf16": {"enabled": "auto"},
    "train_micro_batch_size_per_gpu": "auto",
    "train_batch_size": "auto",
    "gradient_accumulation_steps": "auto",
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}
"""``scripts/zero3.json`` of the upstream framework."""


def arguments(*flags: str) -> TrainArguments:
    return parse_arguments(["--shards", "shards/", *flags])


def complete(config: dict[str, Any], *flags: str, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    args = arguments(*flags)
    return engine.complete_config(config, args, choose_recipe(args, {}), world=8, dtype=dtype, hidden_size=100)


def written(folder: Path, config: object) -> str:
    path = folder / "ds.json"
    path.write_text(json.dumps(config))
    return str(path)


@pytest.mark.parametrize(("name", "stage"), [("zero1", 1), ("zero2", 2), ("zero3", 3), ("zero3_offload", 3)])
def test_the_shipped_files_are_usable_as_they_are(name: str, stage: int) -> None:
    config = engine.read_deepspeed_config(f"{name}.json")
    assert config["zero_optimization"]["stage"] == stage
    done = complete(config, "--max_grad_norm", "0.5")
    assert '"auto"' not in json.dumps(done)
    assert done["gradient_clipping"] == 0.5


def test_what_an_upstream_file_leaves_open_is_filled_in() -> None:
    flags = ("--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4")
    done = complete(UPSTREAM_ZERO3, *flags)
    assert done["train_batch_size"] == 2 * 4 * 8
    assert (done["train_micro_batch_size_per_gpu"], done["gradient_accumulation_steps"]) == (2, 4)
    assert done["bf16"] == {"enabled": True}
    assert "fp16" not in done
    in_half = complete(UPSTREAM_ZERO3, *flags, dtype=torch.float16)
    assert in_half["fp16"] == {
        "enabled": True,
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
    }
    assert "bf16" not in in_half
    assert {"bf16", "fp16"}.isdisjoint(complete(UPSTREAM_ZERO3, dtype=torch.float32))
    assert done["data_types"] == {"grad_accum_dtype": "fp32"}
    zero = done["zero_optimization"]
    assert zero["reduce_bucket_size"] == 10_000
    assert zero["stage3_prefetch_bucket_size"] == 9_000
    assert zero["stage3_param_persistence_threshold"] == 1_000
    assert zero["sub_group_size"] == 1e9


def test_completing_a_configuration_leaves_the_original_as_it_is() -> None:
    before = json.dumps(UPSTREAM_ZERO3)
    complete(UPSTREAM_ZERO3)
    assert json.dumps(UPSTREAM_ZERO3) == before


def test_an_offloaded_optimizer_is_allowed_to_be_that_of_torch() -> None:
    config = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    assert complete(config)["zero_force_ds_cpu_optimizer"] is False


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("gradient_accumulation_steps", 8, "gradient_accumulation_steps = 8, but --gradient_accumulation_steps is 4"),
        ("train_micro_batch_size_per_gpu", 2, "--per_device_train_batch_size is 1"),
        ("train_batch_size", 64, "train_batch_size = 64, but the number of bins in a step is 32"),
        ("gradient_clipping", 0.5, "gradient_clipping = 0.5, but --max_grad_norm is 1.0"),
        ("communication_data_type", "auto", 'communication_data_type is "auto", which no flag decides'),
    ],
)
def test_a_file_that_contradicts_the_flags_is_an_error(key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        complete({**engine.read_deepspeed_config("zero2.json"), key: value})
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage is 0; allowed: 1, 2 or 3"),
        ({}, "zero_optimization.stage is 0"),
        ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}, "has a section 'optimizer': remove it"),
        ({"zero_optimization": {"stage": 2}, "scheduler": {"type": "WarmupLR"}}, "has a section 'scheduler'"),
        (
            {"zero_optimization": {"stage": 2}, "bf16": {"check_grad_overflow": False}},
            "turns bf16.check_grad_overflow off",
        ),
        (
            {"zero_optimization": {"stage": 2, "compute_grad_norm": False}},
            "turns zero_optimization.compute_grad_norm off",
        ),
        ({"zero_optimization": True}, "zero_optimization = True; a section in braces is expected"),
        ([], "holds no JSON object"),
    ],
)
def test_a_file_that_asks_for_something_else_is_an_error(tmp_path: Path, config: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        engine.read_deepspeed_config(written(tmp_path, config))
    assert message in str(caught.value)


def test_a_file_that_is_not_there_is_an_error_that_names_the_shipped_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"zero9.json: there is no such file, nor is it one of zero1.json, zero2.json"
    ):
        engine.read_deepspeed_config("zero9.json")


def test_a_file_that_is_no_json_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        engine.read_deepspeed_config(str(tmp_path / "ds.json"))


def test_a_file_of_the_user_goes_before_a_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zero2.json").write_text('{"zero_optimization": {"stage": 1}}')
    monkeypatch.chdir(tmp_path)
    assert engine.read_deepspeed_config("zero2.json")["zero_optimization"]["stage"] == 1


@pytest.fixture
def half_is_supported(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed asks torch, whose answer differs from processor to processor."""
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("flags", "in_file", "expected"),
    [
        ("", {}, FP32),
        ("", {"bf16": "auto", "fp16": "auto"}, FP32),
        ("--bf16", {"bf16": "auto"}, BF16),
        ("", {"bf16": True}, BF16),
        ("--bf16 False", {"bf16": False}, FP32),
        ("--fp16", {}, FP16),
        ("--fp16", {"bf16": "auto", "fp16": "auto"}, FP16),
        ("--fp16", {"bf16": False, "fp16": True}, FP16),
        ("", {"fp16": True}, FP16),
        ("--fp16 False", {"fp16": "auto"}, FP32),
        ("--fp16 False", {"bf16": "auto", "fp16": False}, FP32),
        ("--fp16 False", {"bf16": True, "fp16": "auto"}, BF16),
        ("--fp16 False --bf16", {}, BF16),
        ("--bf16 False", {"fp16": True}, FP16),
    ],
)
def test_precision_is_that_of_the_flag_or_the_file_or_the_device(
    half_is_supported: None, flags: str, in_file: dict[str, object], expected: torch.dtype
) -> None:
    config = {name: {"enabled": value} for name, value in in_file.items()}
    assert engine.choose_dtype(arguments(*flags.split()), config, CPU) == expected


@pytest.mark.parametrize(
    ("flags", "in_file", "message"),
    [
        ("--bf16", {"bf16": False}, "bf16.enabled = False, but --bf16 is True"),
        ("--fp16", {"fp16": False}, "fp16.enabled = False, but --fp16 is True"),
        ("--fp16 False", {"fp16": True}, "fp16.enabled = True, but --fp16 is False"),
        ("--fp16 False --bf16", {"fp16": True}, "fp16.enabled = True, but --fp16 is False"),
        ("--fp16", {"bf16": True}, "ask for bf16 and for fp16"),
        ("--bf16", {"fp16": True}, "ask for bf16 and for fp16"),
        ("", {"bf16": True, "fp16": True}, "ask for bf16 and for fp16"),
    ],
)
def test_flags_and_file_must_agree_on_the_precision(
    half_is_supported: None, flags: str, in_file: dict[str, object], message: str
) -> None:
    config = {name: {"enabled": value} for name, value in in_file.items()}
    with pytest.raises(ConfigError, match=message):
        engine.choose_dtype(arguments(*flags.split()), config, CPU)


def test_a_device_without_float16_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    with pytest.raises(ConfigError, match="cpu cannot compute in float16: leave out --fp16"):
        engine.choose_dtype(arguments("--fp16"), {}, CPU)


@pytest.mark.parametrize(
    ("device", "dtype", "installed", "expected"),
    [
        (GPU, BF16, True, "flash_attention_2"),
        (GPU, FP16, True, "flash_attention_2"),
        (GPU, BF16, False, "sdpa"),
        (GPU, FP32, True, "sdpa"),
        (CPU, BF16, True, "sdpa"),
    ],
)
def test_flash_attention_is_used_where_it_can_be(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, dtype: torch.dtype, installed: bool, expected: str
) -> None:
    pretend_flash_attn(monkeypatch, installed)
    assert engine.choose_attention(arguments(), device, dtype) == expected
    assert engine.choose_attention(arguments("--attn_implementation", "sdpa"), device, dtype) == "sdpa"


@pytest.mark.parametrize(
    ("device", "installed", "message"),
    [(CPU, True, "needs a GPU and bfloat16 or float16"), (GPU, False, "pip install flash-attn --no-build-isolation")],
)
def test_flash_attention_that_is_asked_for_and_cannot_be_is_an_error(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, installed: bool, message: str
) -> None:
    pretend_flash_attn(monkeypatch, installed)
    with pytest.raises(ConfigError, match=message):
        engine.choose_attention(arguments("--attn_implementation", "flash_attention_2"), device, BF16)


def pretend_flash_attn(monkeypatch: pytest.MonkeyPatch, installed: bool) -> None:
    spec = ModuleSpec("flash_attn", loader=None) if installed else None
    monkeypatch.setattr(engine, "find_spec", lambda name: spec)


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        # setenv first, so that what the code sets is undone after the test
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def test_without_a_launcher_a_process_is_the_only_one(no_launcher: pytest.MonkeyPatch) -> None:
    assert engine.read_ranks(-1) == Ranks(rank=0, local=0, world=1)


def test_the_environment_of_a_launcher_says_which_rank_this_is(no_launcher: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        no_launcher.setenv(name, value)
    assert engine.read_ranks(-1) == engine.read_ranks(1) == Ranks(rank=5, local=1, world=8)
    with pytest.raises(ConfigError, match="--local_rank is 0, but LOCAL_RANK is 1"):
        engine.read_ranks(0)


def test_the_flag_of_the_launcher_stands_in_for_the_environment(no_launcher: pytest.MonkeyPatch) -> None:
    no_launcher.setenv("RANK", "3")
    no_launcher.setenv("WORLD_SIZE", "4")
    assert engine.read_ranks(3) == Ranks(rank=3, local=3, world=4)


@pytest.mark.parametrize(("rank", "local"), [("2", "0"), ("-1", "0"), ("0", "-1")])
def test_a_rank_that_cannot_be_is_an_error(no_launcher: pytest.MonkeyPatch, rank: str, local: str) -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": local}.items():
        no_launcher.setenv(name, value)
    with pytest.raises(ConfigError, match="ranks count from 0 to WORLD_SIZE - 1"):
        engine.read_ranks(-1)


def test_half_an_environment_is_an_error(no_launcher: pytest.MonkeyPatch) -> None:
    no_launcher.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="start with `deepspeed` or `torchrun`"):
        engine.read_ranks(-1)
