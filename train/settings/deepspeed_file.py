"""The DeepSpeed configuration: a JSON file and the flags -> a complete configuration, checked before anything starts.

A file may leave values to the flags (``"auto"``, as the files in ``train/settings/configs`` do). A value that
contradicts a flag is an error.

DeepSpeed 0.19 ignores sections that it does not know, and some that it knows change what is trained without the
trainer noticing (``amp``, ``curriculum_learning``, ``tensor_parallel``, …). So only the sections listed here are
allowed. DeepSpeed's own classes check those that have one. For the others, the tables hold what DeepSpeed would accept
with a wrong value, or reject with an error that does not name the setting; it reports the rest itself.

Cost: none once DeepSpeed is imported.
"""

from __future__ import annotations

import difflib
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ValidationError

from schemas.errors import ConfigError
from schemas.wording import counted
from train.settings.arguments import TrainArguments
from train.settings.batch import Batch

logger = logging.getLogger(__name__)

AUTO = "auto"
CONFIGS = Path(__file__).parent / "configs"

MIN_BUCKET = 200_000_000
"""Scalars of a gradient bucket whose size the file leaves open. transformers takes the square of the hidden size, so
that most matrices travel alone: the 7B would make 232 reductions in a backward pass instead of 45."""

STAGES = (1, 2, 3)
"""ZeRO stages. Without ZeRO (stage 0) DeepSpeed replaces the optimizer in bfloat16 and reports no gradient norm in
float32. Stage 1 computes the same and does neither."""

TRAINER_SECTIONS = {
    "optimizer": "the trainer creates AdamW with one group per part of the model (--learning_rate, --weight_decay, …)",
    "scheduler": "the trainer creates the schedule (--lr_scheduler_type, --warmup_ratio)",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """Values that a setting may have: ``allowed`` in words, ``accepts`` as a test."""

    allowed: str
    accepts: Callable[[Any], bool]


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


ANY = Rule(allowed="anything", accepts=lambda value: True)
SWITCH = Rule(allowed="true, false", accepts=lambda value: type(value) is bool)
OFF = Rule(allowed="false", accepts=lambda value: value is False)
COUNT = Rule(allowed="an integer from 1", accepts=lambda value: type(value) is int and value >= 1)

SETTINGS = {
    # complete_config compares these with the flags.
    "train_batch_size": ANY,
    "train_micro_batch_size_per_gpu": ANY,
    "gradient_accumulation_steps": ANY,
    "gradient_clipping": ANY,
    "communication_data_type": ANY,
    "zero_allow_untested_optimizer": SWITCH,
    "zero_force_ds_cpu_optimizer": SWITCH,
    "prescale_gradients": SWITCH,
    "gradient_predivide_factor": Rule(
        allowed="a number above 0", accepts=lambda value: _is_finite(value) and value > 0
    ),
    "steps_per_print": Rule(
        allowed="an integer from 1, null",
        accepts=lambda value: value is None or (_is_finite(value) and value >= 1 and value == int(value)),
    ),
    "wall_clock_breakdown": SWITCH,
    "memory_breakdown": SWITCH,
    "dump_state": SWITCH,
}
"""Settings outside of sections."""

TABLES = {
    # --bf16 and --fp16 decide the dtype of parameters and buffers.
    "data_types": {
        "grad_accum_dtype": Rule(allowed="fp32, bf16, fp16", accepts=lambda value: value in ("fp32", "bf16", "fp16"))
    },
    "aio": {
        "block_size": COUNT,
        "queue_depth": COUNT,
        "intra_op_parallelism": COUNT,
        "single_submit": SWITCH,
        "overlap_events": SWITCH,
        "use_gds": SWITCH,
    },
    # With another writer or node-local storage, a checkpoint would be incomplete when the trainer renames it, or would
    # not be visible to all ranks. The trainer detects by itself whether it needs a universal checkpoint.
    "checkpoint": {"tag_validation": ANY, "load_universal": OFF, "use_node_local_storage": OFF},
    "flops_profiler": {
        "enabled": SWITCH,
        "recompute_fwd_factor": Rule(allowed="a number from 0", accepts=lambda value: _is_finite(value) and value >= 0),
        "profile_step": COUNT,
        "module_depth": Rule(allowed="an integer from -1", accepts=lambda value: type(value) is int and value >= -1),
        "top_modules": COUNT,
        "detailed": SWITCH,
        "output_file": Rule(allowed="a path, null", accepts=lambda value: value is None or isinstance(value, str)),
    },
}
"""Settings of the sections that DeepSpeed has no classes for."""

WITH_CLASSES = ("bf16", "fp16", "zero_optimization", "comms_logger")

ALLOWED = (*SETTINGS, *WITH_CLASSES, *TABLES)
"""What the trainer leaves to DeepSpeed: how ranks share the work and communicate, and what DeepSpeed reports."""


def read_deepspeed_config(name: str) -> dict[str, Any]:
    """Read a configuration: a file of the user, else one of ``train/settings/configs``.

    A path that does not exist, such as ``./scripts/zero3.json``, falls back to the shipped file of its name.

    Raises:
        ConfigError: the file does not exist, is not a JSON object, or has a setting that this trainer does not allow.
    """
    path = next((path for path in (Path(name), CONFIGS / name, CONFIGS / Path(name).name) if path.is_file()), None)
    if path is not None and path not in (Path(name), CONFIGS / name):
        logger.info("--deepspeed %s does not exist: using the shipped %s", name, path.name)
    if path is None:
        shipped = ", ".join(sorted(path.name for path in CONFIGS.glob("*.json")))
        raise ConfigError(f"--deepspeed {name}: there is no such file, nor is it one of {shipped}.")
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"--deepspeed {path} cannot be read as JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ConfigError(f"--deepspeed {path} holds no JSON object.")
    check_sections(config, str(path))
    return config


def check_sections(config: Mapping[str, Any], path: str) -> None:
    """Check that a configuration holds only what this trainer leaves to DeepSpeed, with valid values.

    Args:
        config: contents of the file; any value may be ``"auto"``.
        path: of the file, for messages.

    Raises:
        ConfigError: a section or setting is unknown, or a value is not allowed.
    """
    for name, instead in TRAINER_SECTIONS.items():
        if name in config:
            raise ConfigError(f"--deepspeed {path} has a section {name!r}: remove it, {instead}.")
    _check_names(config, ALLOWED, "", path)
    _check_values(config, SETTINGS, "", path)
    for name, table in TABLES.items():
        values = section(config, name, path)
        _check_names(values, table, f"{name}.", path)
        _check_values(values, table, f"{name}.", path)
    _check_with_classes(config, path)
    for name in ("bf16", "fp16"):  # DeepSpeed would read "no" as false
        _check_values(section(config, name, path), {"enabled": SWITCH}, f"{name}.", path)
    for name, key in (("bf16", "check_grad_overflow"), ("zero_optimization", "compute_grad_norm")):
        if section(config, name, path).get(key, True) is not True:
            raise ConfigError(f"--deepspeed {path} turns off {name}.{key}, which detects steps with NaN: remove it.")
    stage = section(config, "zero_optimization", path).get("stage", 0)
    if stage not in STAGES:
        raise ConfigError(
            f"--deepspeed {path}: zero_optimization.stage is {stage}; allowed: 1, 2 or 3 (1 if all fits one rank)."
        )


def complete_config(
    config: dict[str, Any],
    args: TrainArguments,
    batch: Batch | None,
    *,
    world: int,
    dtype: torch.dtype,
    hidden_size: int,
    num_trained: int,
) -> dict[str, Any]:
    """Fill in what a configuration leaves open, so that upstream files work unchanged.

    Values are those of transformers, but for larger gradient buckets.

    Args:
        config: contents of the file; not modified.
        args: the flags.
        batch: bins of a forward pass and forward passes of a step. None leaves batch sizes out: memory does not follow
            from them.
        world: number of ranks.
        dtype: the precision.
        hidden_size: width of the language model, which bucket sizes follow from.
        num_trained: scalars of all trained parameters; no bucket needs to be larger.

    Raises:
        ConfigError: the file contradicts the flags, or leaves a value open that no flag decides.
    """
    complete: dict[str, Any] = json.loads(json.dumps(config))
    _apply_flags(complete, args, batch, world)
    for name, of_section in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        values = {**section(complete, name, args.deepspeed_file), "enabled": True}
        complete.pop(name, None)
        if dtype == of_section:
            complete[name] = values
    complete.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    # On by default, DeepSpeed's timer synchronizes the device twice a step. The trainer measures throughput itself.
    complete["timers"] = {"throughput": {"enabled": False}}
    zero = complete["zero_optimization"]
    sizes = {
        "reduce_bucket_size": max(hidden_size * hidden_size, min(MIN_BUCKET, num_trained)),
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    zero.update({key: size for key, size in sizes.items() if zero.get(key) == AUTO})
    if "offload_optimizer" in zero:
        complete.setdefault("zero_force_ds_cpu_optimizer", False)
    _check_secondary(zero, args.deepspeed_file, world)
    if (open_key := _find_auto(complete)) is not None:
        raise ConfigError(
            f'--deepspeed {args.deepspeed_file}: {open_key} is "auto", which no flag decides: write a value.'
        )
    return complete


def with_universal_checkpoint(config: dict[str, Any]) -> dict[str, Any]:
    """A complete configuration that loads a checkpoint in DeepSpeed's universal form."""
    return {**config, "checkpoint": {**config.get("checkpoint", {}), "load_universal": True}}


def section(config: Mapping[str, Any], name: str, path: str) -> Mapping[str, Any]:
    """A section of a configuration; empty if it is absent.

    Raises:
        ConfigError: it is not a section.
    """
    values = config.get(name, {})
    if not isinstance(values, dict):
        raise ConfigError(f"--deepspeed {path} has {name} = {values!r}; a section in braces is expected.")
    return values


def contradiction(path: str, key: str, in_file: object, flag: str, value: object) -> ConfigError:
    """The error of a file that says something else than a flag."""
    return ConfigError(
        f'--deepspeed {path} says {key} = {in_file}, but {flag} is {value}: write "auto" in the file, or change one.'
    )


def _apply_flags(config: dict[str, Any], args: TrainArguments, batch: Batch | None, world: int) -> None:
    """Set what flags decide, in place."""
    flags: dict[str, tuple[object, str]] = {"gradient_clipping": (args.max_grad_norm, "--max_grad_norm")}
    if batch is None:
        for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"):
            config.pop(key, None)
    else:
        per_device, accumulation = batch.per_device, batch.accumulation
        flags |= {
            "train_micro_batch_size_per_gpu": (
                per_device,
                "the number of bins in a forward pass" if batch.aim else "--per_device_train_batch_size",
            ),
            "gradient_accumulation_steps": (
                accumulation,
                "the number of forward passes in a step" if batch.aim else "--gradient_accumulation_steps",
            ),
            "train_batch_size": (per_device * accumulation * world, "the number of bins in a step"),
        }
    for key, (value, flag) in flags.items():
        if config.get(key, AUTO) not in (AUTO, value):
            raise contradiction(args.deepspeed_file, key, config[key], flag, value)
        config[key] = value


def _check_secondary(zero: Mapping[str, Any], path: str, world: int) -> None:
    """Check the groups that hold a second copy of the weights, which DeepSpeed creates after loading them."""
    size = zero.get("zero_hpz_partition_size", 1)
    if size == AUTO or int(size) <= 1:
        return
    if zero["stage"] != 3:
        raise ConfigError(
            f"--deepspeed {path}: zero_optimization.zero_hpz_partition_size {size} has no effect at stage "
            f"{zero['stage']}: remove it, or use stage 3."
        )
    if world % min(int(size), world):
        raise ConfigError(
            f"--deepspeed {path}: zero_optimization.zero_hpz_partition_size is {size}, which does not divide the "
            f"{counted(world, 'rank')}: give the GPUs of a machine."
        )


def _check_with_classes(config: Mapping[str, Any], path: str) -> None:
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    classes: tuple[type[BaseModel], ...] = (
        DeepSpeedBF16Config,
        DeepSpeedFP16Config,
        DeepSpeedZeroConfig,
        CommsLoggerConfig,
    )
    for name, model in zip(WITH_CLASSES, classes):
        try:
            model(**section(config, name, path))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, (name, *first["loc"])))
            raise ConfigError(
                f"--deepspeed {path}: DeepSpeed rejects {key} = {first['input']!r} ({first['msg']}). Correct or remove "
                "it."
            ) from error


def _check_names(names: Iterable[str], allowed: Iterable[str], prefix: str, path: str) -> None:
    known = tuple(allowed)
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}? Else remove it." if near else f"remove it; allowed: {', '.join(known)}."
            raise ConfigError(
                f"--deepspeed {path} has {prefix + name!r}, which this trainer does not leave to DeepSpeed: {hint}"
            )


def _check_values(values: Mapping[str, Any], rules: Mapping[str, Rule], prefix: str, path: str) -> None:
    for name, rule in rules.items():
        value = values.get(name, AUTO)
        if value != AUTO and not rule.accepts(value):
            raise ConfigError(f"--deepspeed {path}: {prefix}{name} is {value!r}; allowed: {rule.allowed}.")


def _find_auto(value: object, path: str = "") -> str | None:
    if isinstance(value, dict):
        keys = (_find_auto(item, f"{path}.{key}" if path else key) for key, item in value.items())
        return next((key for key in keys if key is not None), None)
    return path if value == AUTO else None
