"""A DeepSpeed file holds what this trainer leaves to DeepSpeed, and what else is in it is said before a run starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from schemas.errors import ConfigError
from train import engine

ZERO2 = {"stage": 2, "reduce_bucket_size": "auto"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"amp": {"enabled": True}}, "has 'amp', which this trainer does not leave to DeepSpeed: remove it; allowed: "),
        ({"tensor_parallel": {"autotp_size": 2}}, "has 'tensor_parallel'"),
        ({"gradient_cliping": 1.0}, "did you mean 'gradient_clipping'?"),
        ({"data_types": 3}, "has data_types = 3; a section in braces is expected."),
        (
            {"data_types": {"grad_accum_dtype": "int8"}},
            "data_types.grad_accum_dtype is 'int8'; allowed: fp32, bf16, fp16.",
        ),
        ({"bf16": {"enabled": "perhaps"}}, "bf16.enabled is 'perhaps', which DeepSpeed does not take"),
        ({"fp16": {"loss_scale": "much"}}, "fp16.loss_scale is 'much'"),
        ({"checkpoint": {"load_universal": True}}, "turns checkpoint.load_universal on: remove it"),
        ({"zero_optimization": {**ZERO2, "reduce_bucket_sise": 5}}, "zero_optimization.reduce_bucket_sise is 5"),
        ({"zero_optimization": {**ZERO2, "reduce_bucket_size": -3}}, "zero_optimization.reduce_bucket_size is -3"),
        ({"zero_optimization": {**ZERO2, "offload_optimizer": "cpu"}}, "zero_optimization.offload_optimizer is 'cpu'"),
        (
            {"zero_optimization": {**ZERO2, "offload_optimizer": {"device": "moon"}}},
            "zero_optimization.offload_optimizer.device is 'moon'",
        ),
    ],
)
def test_what_deepspeed_would_leave_unread_or_not_take_is_an_error(
    tmp_path: Path, more: dict[str, object], message: str
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": ZERO2, **more}))
    with pytest.raises(ConfigError) as caught:
        engine.read_deepspeed_config(str(path))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_the_shipped_files_and_what_deepspeed_tells_about_itself_are_allowed(tmp_path: Path, name: str) -> None:
    shipped = engine.read_deepspeed_config(f"{name}.json")
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({**shipped, "steps_per_print": 10, "wall_clock_breakdown": True, "fp16": {}}))
    assert engine.read_deepspeed_config(str(path))["steps_per_print"] == 10
