"""What a DeepSpeed configuration file may hold: sections, and what stands in them, looked at before anything starts.

DeepSpeed 0.19 leaves unknown sections unread, and some of those that it knows would change what is trained behind the
trainer's back (``amp``, ``curriculum_learning``, ``tensor_parallel``, …). Here whatever is not known to go well is an
error. The contents of the three sections that matter are checked by DeepSpeed's own classes.

Cost: none, where DeepSpeed is imported already.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from schemas.errors import ConfigError

SECTIONS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "bf16",
    "fp16",
    "data_types",
    "zero_optimization",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "aio",
    "checkpoint",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "comms_logger",
    "flops_profiler",
)
"""What is left to DeepSpeed: how ranks share the work and talk, and what it tells about itself."""

ACCUMULATION_DTYPES = ("fp32", "bf16", "fp16")


def check_sections(config: Mapping[str, Any], path: str) -> None:
    """See that a configuration holds nothing but what this trainer leaves to DeepSpeed, with values that it takes.

    Args:
        config: contents of the file; ``"auto"`` may stand anywhere.
        path: of the file, for messages.

    Raises:
        ConfigError: an unknown section or setting, or a value that is not allowed.
    """
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for name in config:
        if name not in SECTIONS:
            near = difflib.get_close_matches(name, SECTIONS, n=1)
            meant = f"did you mean {near[0]!r}?" if near else f"remove it; allowed: {', '.join(SECTIONS)}."
            raise ConfigError(
                f"--deepspeed {path} has {name!r}, which this trainer does not leave to DeepSpeed: {meant}"
            )
    models: dict[str, type[BaseModel]] = {
        "zero_optimization": DeepSpeedZeroConfig,
        "bf16": DeepSpeedBF16Config,
        "fp16": DeepSpeedFP16Config,
    }
    for name, model in models.items():
        try:
            model(**_section(config, name, path))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, (name, *first["loc"])))
            raise ConfigError(
                f"--deepspeed {path}: {place} is {first['input']!r}, which DeepSpeed does not take "
                f"({first['msg']}). Mend or remove it."
            ) from error
    accumulation = _section(config, "data_types", path).get("grad_accum_dtype", "fp32")
    if accumulation not in ACCUMULATION_DTYPES:
        raise ConfigError(
            f"--deepspeed {path}: data_types.grad_accum_dtype is {accumulation!r}; allowed: "
            f"{', '.join(ACCUMULATION_DTYPES)}."
        )
    if _section(config, "checkpoint", path).get("load_universal", False) is not False:
        raise ConfigError(
            f"--deepspeed {path} turns checkpoint.load_universal on: remove it, the trainer sees by itself when a "
            "checkpoint is of another number of ranks."
        )


def _section(config: Mapping[str, Any], name: str, path: str) -> Mapping[str, Any]:
    section = config.get(name, {})
    if not isinstance(section, dict):
        raise ConfigError(f"--deepspeed {path} has {name} = {section!r}; a section in braces is expected.")
    return section
