"""A DeepSpeed file holds what this trainer leaves to DeepSpeed, and what else is in it is said before a run starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT

from schemas.errors import ConfigError
from train.run import engine
from train.settings.deepspeed_file import TABLES

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
        (
            {"data_types": {"grad_accum_dtyp": "bf16"}},
            "has 'data_types.grad_accum_dtyp', which this trainer does not leave to DeepSpeed: "
            "did you mean 'grad_accum_dtype'?",
        ),
        (
            {"data_types": {"param_dtype": "bf16"}},
            "has 'data_types.param_dtype', which this trainer does not leave to DeepSpeed: did you mean "
            "'grad_accum_dtype'? Else remove it.",
        ),
        ({"checkpoint": {"tag_validaton": "Fail"}}, "has 'checkpoint.tag_validaton'"),
        (
            {"checkpoint": {"tag_validation": "shout"}},
            "checkpoint.tag_validation is 'shout'; allowed: ignore, warn, fail.",
        ),
        (
            {"checkpoint": {"writer": {"decoupled": True}}},
            "has 'checkpoint.writer', which this trainer does not leave to DeepSpeed: remove it; allowed: "
            "tag_validation, load_universal, use_node_local_storage.",
        ),
        (
            {"checkpoint": {"use_node_local_storage": True}},
            "checkpoint.use_node_local_storage is True; allowed: false.",
        ),
        ({"aio": {"block_sise": 1}}, "has 'aio.block_sise', which"),
        ({"aio": {"queue_depth": "8"}}, "aio.queue_depth is '8'; allowed: a whole number from 1."),
        ({"aio": {"single_submit": 1}}, "aio.single_submit is 1; allowed: true, false."),
        ({"aio": []}, "has aio = []; a section in braces is expected."),
        ({"comms_logger": {"enabeld": True}}, "comms_logger.enabeld is True, which DeepSpeed does not take"),
        ({"comms_logger": {"prof_ops": "all"}}, "comms_logger.prof_ops is 'all', which DeepSpeed does not take"),
        ({"flops_profiler": {"profile_steps": 3}}, "did you mean 'profile_step'?"),
        (
            {"flops_profiler": {"module_depth": -2}},
            "flops_profiler.module_depth is -2; allowed: a whole number from -1.",
        ),
        ({"flops_profiler": {"enabled": "no"}}, "flops_profiler.enabled is 'no'; allowed: true, false."),
        ({"communication_data_type": "fp7"}, "communication_data_type is 'fp7'; allowed: fp32, bf16, fp16, null."),
        ({"prescale_gradients": "yes"}, "prescale_gradients is 'yes'; allowed: true, false."),
        ({"gradient_predivide_factor": 0}, "gradient_predivide_factor is 0; allowed: a number above 0."),
        ({"gradient_clipping": True}, "gradient_clipping is True; allowed: a number from 0."),
        ({"gradient_clipping": float("nan")}, "gradient_clipping is nan"),
        ({"train_batch_size": "64"}, "train_batch_size is '64'; allowed: a whole number from 1."),
        ({"steps_per_print": 0}, "steps_per_print is 0; allowed: a whole number from 1, null."),
        ({"steps_per_print": 2.5}, "steps_per_print is 2.5"),
        ({"wall_clock_breakdown": "true"}, "wall_clock_breakdown is 'true'; allowed: true, false."),
        ({"dump_state": None}, "dump_state is None; allowed: true, false."),
        ({"fp16": {"enabled": "no"}}, "fp16.enabled is 'no'; allowed: true, false."),
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


ALLOWED = {
    "steps_per_print": 1e5,
    "wall_clock_breakdown": False,
    "gradient_clipping": 1,
    "communication_data_type": "FP32",
    "prescale_gradients": False,
    "gradient_predivide_factor": 2,
    "data_types": {"grad_accum_dtype": "auto"},
    "checkpoint": {"tag_validation": "Fail", "load_universal": False, "use_node_local_storage": False},
    "aio": {"block_size": 262144, "queue_depth": "auto", "overlap_events": True},
    "comms_logger": {"enabled": True, "prof_ops": ["all_reduce"]},
    "flops_profiler": {"enabled": True, "profile_step": 3, "module_depth": -1, "output_file": None},
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_deepspeed_takes_is_left_as_it_is(tmp_path: Path, name: str) -> None:
    config = {"zero_optimization": ZERO2, name: ALLOWED[name]}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    assert engine.read_deepspeed_config(str(path)) == config


def test_any_setting_beside_the_sections_may_be_left_open(tmp_path: Path) -> None:
    config = {"zero_optimization": ZERO2, **dict.fromkeys(("gradient_clipping", "prescale_gradients"), "auto")}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    assert engine.read_deepspeed_config(str(path)) == config


def test_tables_have_the_settings_that_deepspeed_reads() -> None:
    assert set(TABLES["aio"]) == set(AIO_DEFAULT_DICT)
    assert set(TABLES["flops_profiler"]) == set(vars(DeepSpeedFlopsProfilerConfig({})))
