"""A DeepSpeed file: the flags complete it, and every setting that DeepSpeed would ignore or misread is an error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
from deepspeed.utils.config import get_timers_config
from deepspeed.utils.timer import ThroughputTimer

from schemas.errors import ConfigError
from train.settings.batch import choose_batch
from train.settings.deepspeed_file import TABLES, complete_config, read_deepspeed_config
from train.settings.flags import parse_arguments
from train.settings.recipe import choose_recipe

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


def complete(
    config: dict[str, Any],
    *flags: str,
    dtype: torch.dtype = torch.bfloat16,
    hidden_size: int = 100,
    num_trained: int = 7_000_000_000,
) -> dict[str, Any]:
    """Of eight ranks; a step has four forward passes of one bin, unless flags say otherwise."""
    args = parse_arguments(["--shards", "shards/", *(flags or ("--gradient_accumulation_steps", "4"))])
    batch = choose_batch(args, choose_recipe(args, {}), samples_per_bin=5.0, largest_bin=4096, world=8)
    return complete_config(config, args, batch, world=8, dtype=dtype, hidden_size=hidden_size, num_trained=num_trained)


def written(folder: Path, config: object) -> str:
    path = folder / "ds.json"
    path.write_text(json.dumps(config))
    return str(path)


@pytest.mark.parametrize(("name", "stage"), [("zero1", 1), ("zero2", 2), ("zero3", 3), ("zero3_offload", 3)])
def test_the_flags_complete_every_shipped_file(name: str, stage: int) -> None:
    config = read_deepspeed_config(f"{name}.json")
    assert config["zero_optimization"]["stage"] == stage
    done = complete(config, "--max_grad_norm", "0.5")
    assert '"auto"' not in json.dumps(done)
    assert done["gradient_clipping"] == 0.5


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3_offload"])
@pytest.mark.parametrize(
    ("hidden_size", "num_trained", "bucket"),
    [(3584, 7_000_000_000, 200_000_000), (20_000, 10**12, 400_000_000), (64, 3_000_000, 3_000_000)],
    ids=["7B", "wide", "tiny"],
)
def test_gradients_travel_in_large_buckets(name: str, hidden_size: int, num_trained: int, bucket: int) -> None:
    """Of at least 2e8 scalars, unless less is trained."""
    done = complete(read_deepspeed_config(f"{name}.json"), hidden_size=hidden_size, num_trained=num_trained)
    assert done["zero_optimization"]["reduce_bucket_size"] == bucket


@pytest.mark.parametrize("size", [0, 1, 2, 4, 8, 64])
def test_a_second_copy_of_the_weights_is_kept_by_equal_groups_of_ranks(size: int) -> None:
    config = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": size}}
    assert complete(config)["zero_optimization"]["zero_hpz_partition_size"] == size


@pytest.mark.parametrize(
    ("stage", "size", "message"),
    [(3, 3, "is 3, which does not divide the 8 ranks"), (2, 4, "4 has no effect at stage 2")],
)
def test_a_second_copy_that_cannot_be_kept_is_an_error(stage: int, size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=f"zero_hpz_partition_size {message}"):
        complete({"zero_optimization": {"stage": stage, "zero_hpz_partition_size": size}})


def test_the_throughput_timer_of_deepspeed_never_synchronizes_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's own timer, as its engine makes it: on by default, off in a completed file."""
    calls: list[str] = []
    monkeypatch.setattr(get_accelerator(), "synchronize", lambda *_: calls.append("synchronize"))
    for config, expected in (({}, 4), (complete(read_deepspeed_config("zero2.json")), 0)):
        calls.clear()
        timer = ThroughputTimer(get_timers_config(config), batch_size=1, start_step=0)
        for _ in range(2):
            timer.start()
            timer.stop(global_step=True)
        assert len(calls) == expected


def test_the_flags_complete_an_upstream_file() -> None:
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
    assert zero["reduce_bucket_size"] == 200_000_000
    assert zero["stage3_prefetch_bucket_size"] == 9_000
    assert zero["stage3_param_persistence_threshold"] == 1_000
    assert zero["sub_group_size"] == 1e9


def test_the_samples_of_a_step_complete_a_file_with_bins() -> None:
    """24 bins of five samples are nearest to 120; the file counts places for bins, of which one stays empty."""
    done = complete(UPSTREAM_ZERO3, "--samples_per_step", "120", "--max_tokens_per_forward", "8192")
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert [done[name] for name in sizes] == [32, 2, 2]
    for name, words in zip(sizes[1:], ("bins in a forward pass", "forward passes in a step")):
        with pytest.raises(ConfigError, match=f'says {name} = 9, but the number of {words} is 2: write "auto"'):
            complete({**UPSTREAM_ZERO3, name: 9}, "--samples_per_step", "120", "--max_tokens_per_forward", "8192")


def test_an_estimate_of_memory_needs_no_batch() -> None:
    args = parse_arguments(["--shards", "s"])
    file = {**UPSTREAM_ZERO3, "train_batch_size": 99}
    done = complete_config(file, args, None, world=8, dtype=torch.bfloat16, hidden_size=100, num_trained=10**10)
    assert {"train_batch_size", "gradient_accumulation_steps"}.isdisjoint(done)
    assert done["zero_optimization"] == complete(UPSTREAM_ZERO3)["zero_optimization"]


def test_completing_a_configuration_does_not_modify_it() -> None:
    before = json.dumps(UPSTREAM_ZERO3)
    complete(UPSTREAM_ZERO3)
    assert json.dumps(UPSTREAM_ZERO3) == before


def test_an_offloaded_optimizer_may_be_torch_s_own() -> None:
    config = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    assert complete(config)["zero_force_ds_cpu_optimizer"] is False


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("gradient_accumulation_steps", 8, "gradient_accumulation_steps = 8, but --gradient_accumulation_steps is 4"),
        ("train_micro_batch_size_per_gpu", 2, "--per_device_train_batch_size is 1"),
        ("train_batch_size", 64, "train_batch_size = 64, but the number of bins in a step is 32"),
        ("train_batch_size", "32", "train_batch_size = 32, but the number of bins in a step is 32"),
        ("gradient_clipping", 0.5, "gradient_clipping = 0.5, but --max_grad_norm is 1.0"),
        ("gradient_clipping", float("nan"), "gradient_clipping = nan, but --max_grad_norm is 1.0"),
        ("communication_data_type", "auto", 'communication_data_type is "auto", which no flag decides'),
    ],
)
def test_a_file_that_contradicts_the_flags_is_an_error(key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        complete({**read_deepspeed_config("zero2.json"), key: value})
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
            "turns off bf16.check_grad_overflow",
        ),
        (
            {"zero_optimization": {"stage": 2, "compute_grad_norm": False}},
            "turns off zero_optimization.compute_grad_norm",
        ),
        ({"zero_optimization": True}, "zero_optimization = True; a section in braces is expected"),
        ([], "holds no JSON object"),
    ],
)
def test_a_file_that_asks_for_what_the_trainer_does_not_do_is_an_error(
    tmp_path: Path, config: object, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        read_deepspeed_config(written(tmp_path, config))
    assert message in str(caught.value)


def test_a_missing_file_is_an_error_that_lists_the_shipped_files() -> None:
    with pytest.raises(
        ConfigError, match=r"zero9.json: there is no such file, nor is it one of zero1.json, zero2.json"
    ):
        read_deepspeed_config("zero9.json")


def test_a_file_that_is_not_json_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        read_deepspeed_config(str(tmp_path / "ds.json"))


def test_a_file_of_the_user_takes_precedence_over_a_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "zero2.json").write_text('{"zero_optimization": {"stage": 1}}')
    monkeypatch.chdir(tmp_path)
    assert read_deepspeed_config("zero2.json")["zero_optimization"]["stage"] == 1


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
            {"checkpoint": {"writer": {"decoupled": True}}},
            "has 'checkpoint.writer', which this trainer does not leave to DeepSpeed: remove it; allowed: "
            "tag_validation, load_universal, use_node_local_storage.",
        ),
        (
            {"checkpoint": {"use_node_local_storage": True}},
            "checkpoint.use_node_local_storage is True; allowed: false.",
        ),
        ({"aio": {"block_sise": 1}}, "has 'aio.block_sise', which"),
        ({"aio": {"queue_depth": "8"}}, "aio.queue_depth is '8'; allowed: an integer from 1."),
        ({"aio": {"single_submit": 1}}, "aio.single_submit is 1; allowed: true, false."),
        ({"aio": []}, "has aio = []; a section in braces is expected."),
        ({"comms_logger": {"enabeld": True}}, "DeepSpeed rejects comms_logger.enabeld = True ("),
        ({"comms_logger": {"prof_ops": "all"}}, "DeepSpeed rejects comms_logger.prof_ops = 'all' ("),
        ({"flops_profiler": {"profile_steps": 3}}, "did you mean 'profile_step'?"),
        (
            {"flops_profiler": {"module_depth": -2}},
            "flops_profiler.module_depth is -2; allowed: an integer from -1.",
        ),
        ({"flops_profiler": {"enabled": "no"}}, "flops_profiler.enabled is 'no'; allowed: true, false."),
        ({"prescale_gradients": "yes"}, "prescale_gradients is 'yes'; allowed: true, false."),
        ({"gradient_predivide_factor": 0}, "gradient_predivide_factor is 0; allowed: a number above 0."),
        ({"steps_per_print": 0}, "steps_per_print is 0; allowed: an integer from 1, null."),
        ({"steps_per_print": 2.5}, "steps_per_print is 2.5"),
        ({"wall_clock_breakdown": "true"}, "wall_clock_breakdown is 'true'; allowed: true, false."),
        ({"dump_state": None}, "dump_state is None; allowed: true, false."),
        ({"fp16": {"enabled": "no"}}, "fp16.enabled is 'no'; allowed: true, false."),
        ({"bf16": {"enabled": "perhaps"}}, "DeepSpeed rejects bf16.enabled = 'perhaps' ("),
        ({"fp16": {"loss_scale": "much"}}, "DeepSpeed rejects fp16.loss_scale = 'much'"),
        ({"checkpoint": {"load_universal": True}}, "checkpoint.load_universal is True; allowed: false."),
        (
            {"zero_optimization": {**ZERO2, "reduce_bucket_sise": 5}},
            "DeepSpeed rejects zero_optimization.reduce_bucket_sise = 5",
        ),
        (
            {"zero_optimization": {**ZERO2, "reduce_bucket_size": -3}},
            "DeepSpeed rejects zero_optimization.reduce_bucket_size = -3",
        ),
        (
            {"zero_optimization": {**ZERO2, "offload_optimizer": "cpu"}},
            "DeepSpeed rejects zero_optimization.offload_optimizer = 'cpu'",
        ),
        (
            {"zero_optimization": {**ZERO2, "offload_optimizer": {"device": "moon"}}},
            "DeepSpeed rejects zero_optimization.offload_optimizer.device = 'moon'",
        ),
    ],
)
def test_a_setting_that_deepspeed_would_ignore_or_misread_is_an_error(
    tmp_path: Path, more: dict[str, object], message: str
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": ZERO2, **more}))
    with pytest.raises(ConfigError) as caught:
        read_deepspeed_config(str(path))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_shipped_files_may_have_deepspeed_s_own_reports_added(tmp_path: Path, name: str) -> None:
    shipped = read_deepspeed_config(f"{name}.json")
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({**shipped, "steps_per_print": 10, "wall_clock_breakdown": True, "fp16": {}}))
    assert read_deepspeed_config(str(path))["steps_per_print"] == 10


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
def test_valid_settings_are_passed_on_unchanged(tmp_path: Path, name: str) -> None:
    config = {"zero_optimization": ZERO2, name: ALLOWED[name]}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    assert read_deepspeed_config(str(path)) == config


def test_any_setting_may_be_auto(tmp_path: Path) -> None:
    config = {"zero_optimization": ZERO2, **dict.fromkeys(("gradient_clipping", "prescale_gradients"), "auto")}
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(config))
    assert read_deepspeed_config(str(path)) == config


def test_tables_list_the_settings_that_deepspeed_reads() -> None:
    assert set(TABLES["aio"]) == set(AIO_DEFAULT_DICT)
    assert set(TABLES["flops_profiler"]) == set(vars(DeepSpeedFlopsProfilerConfig({})))


def test_a_path_that_does_not_exist_falls_back_to_the_shipped_file_of_its_name(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO"):
        assert read_deepspeed_config("./scripts/zero3.json") == read_deepspeed_config("zero3.json")
    assert caplog.messages == ["--deepspeed ./scripts/zero3.json does not exist: using the shipped zero3.json"]
