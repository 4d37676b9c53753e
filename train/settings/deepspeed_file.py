"""What a DeepSpeed configuration file may hold: sections, and what stands in them, looked at before anything starts.

DeepSpeed 0.19 leaves unknown sections unread, and some of those that it knows would change what is trained behind the
trainer's back (``amp``, ``curriculum_learning``, ``tensor_parallel``, …). Here whatever is not known to go well is an
error. Sections for which DeepSpeed has classes are checked by them. From the others, and from the settings beside the
sections, it takes what it knows, as it is, and leaves the rest unread, so what they may hold stands here.

Cost: none, where DeepSpeed is imported already.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from schemas.errors import ConfigError

AUTO = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """Values that a setting may have: ``allowed`` in words, and ``takes`` tells whether one is among them."""

    allowed: str
    takes: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _one_of(*names: str, any_case: bool = False) -> Kind:
    def takes(value: Any) -> bool:
        return isinstance(value, str) and (value.lower() if any_case else value) in names

    return Kind(allowed=", ".join(names), takes=takes)


def _or_null(kind: Kind) -> Kind:
    return Kind(allowed=f"{kind.allowed}, null", takes=lambda value: value is None or kind.takes(value))


SWITCH = Kind(allowed="true, false", takes=lambda value: type(value) is bool)
COUNT = Kind(allowed="a whole number from 1", takes=lambda value: type(value) is int and value >= 1)
ROUND = Kind(allowed=COUNT.allowed, takes=lambda value: _is_number(value) and value >= 1 and value == int(value))
"""A count that may be written ``1e5``."""

ACCUMULATION_DTYPES = ("fp32", "bf16", "fp16")

SETTINGS = {
    "train_batch_size": ROUND,
    "train_micro_batch_size_per_gpu": ROUND,
    "gradient_accumulation_steps": ROUND,
    "gradient_clipping": Kind(allowed="a number from 0", takes=lambda value: _is_number(value) and value >= 0),
    "zero_allow_untested_optimizer": SWITCH,
    "zero_force_ds_cpu_optimizer": SWITCH,
    "communication_data_type": _or_null(_one_of(*ACCUMULATION_DTYPES, any_case=True)),
    "prescale_gradients": SWITCH,
    "gradient_predivide_factor": Kind(allowed="a number above 0", takes=lambda value: _is_number(value) and value > 0),
    "steps_per_print": _or_null(ROUND),
    "wall_clock_breakdown": SWITCH,
    "memory_breakdown": SWITCH,
    "dump_state": SWITCH,
}
"""What may stand beside the sections."""

TABLES = {
    # What parameters and buffers are is for --bf16 and --fp16 to say.
    "data_types": {"grad_accum_dtype": _one_of(*ACCUMULATION_DTYPES)},
    "aio": {
        "block_size": COUNT,
        "queue_depth": COUNT,
        "intra_op_parallelism": COUNT,
        "single_submit": SWITCH,
        "overlap_events": SWITCH,
        "use_gds": SWITCH,
    },
    # Other writers do not have a checkpoint complete when the trainer gives it its name, or not where all ranks see it.
    "checkpoint": {
        "tag_validation": _one_of("ignore", "warn", "fail", any_case=True),
        "load_universal": SWITCH,
        "use_node_local_storage": Kind(allowed="false", takes=lambda value: value is False),
    },
    "flops_profiler": {
        "enabled": SWITCH,
        "recompute_fwd_factor": Kind(allowed="a number from 0", takes=lambda value: _is_number(value) and value >= 0),
        "profile_step": COUNT,
        "module_depth": Kind(allowed="a whole number from -1", takes=lambda value: type(value) is int and value >= -1),
        "top_modules": COUNT,
        "detailed": SWITCH,
        "output_file": _or_null(Kind(allowed="a path", takes=lambda value: isinstance(value, str))),
    },
}
"""What may stand in sections for which DeepSpeed has no classes."""

WITH_CLASSES = ("bf16", "fp16", "zero_optimization", "comms_logger")

SECTIONS = (*SETTINGS, *WITH_CLASSES, *TABLES)
"""What is left to DeepSpeed: how ranks share the work and talk, and what it tells about itself."""


def check_sections(config: Mapping[str, Any], path: str) -> None:
    """See that a configuration holds nothing but what this trainer leaves to DeepSpeed, with values that it takes.

    Args:
        config: contents of the file; ``"auto"`` may stand anywhere.
        path: of the file, for messages.

    Raises:
        ConfigError: an unknown section or setting, or a value that is not allowed.
    """
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    classes: tuple[type[BaseModel], ...] = (
        DeepSpeedBF16Config,
        DeepSpeedFP16Config,
        DeepSpeedZeroConfig,
        CommsLoggerConfig,
    )
    _check_names(config, SECTIONS, "", path)
    for name, model in zip(WITH_CLASSES, classes):
        try:
            model(**_section(config, name, path))
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, (name, *first["loc"])))
            raise ConfigError(
                f"--deepspeed {path}: {place} is {first['input']!r}, which DeepSpeed does not take "
                f"({first['msg']}). Mend or remove it."
            ) from error
    _check_values(config, SETTINGS, "", path)
    for name, table in TABLES.items():
        section = _section(config, name, path)
        _check_names(section, table, f"{name}.", path)
        _check_values(section, table, f"{name}.", path)
    for name in ("bf16", "fp16"):  # read by the trainer, too, for which "no" is no switch
        _check_values(_section(config, name, path), {"enabled": SWITCH}, f"{name}.", path)
    if _section(config, "checkpoint", path).get("load_universal", False) is not False:
        raise ConfigError(
            f"--deepspeed {path} turns checkpoint.load_universal on: remove it, the trainer sees by itself when a "
            "checkpoint is of another number of ranks."
        )


def _check_names(found: Iterable[str], allowed: Iterable[str], prefix: str, path: str) -> None:
    known = tuple(allowed)
    for name in found:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            meant = f"did you mean {near[0]!r}? Else remove it." if near else f"remove it; allowed: {', '.join(known)}."
            raise ConfigError(
                f"--deepspeed {path} has {prefix + name!r}, which this trainer does not leave to DeepSpeed: {meant}"
            )


def _check_values(found: Mapping[str, Any], kinds: Mapping[str, Kind], prefix: str, path: str) -> None:
    for name, kind in kinds.items():
        value = found.get(name, AUTO)
        if value != AUTO and not kind.takes(value):
            raise ConfigError(f"--deepspeed {path}: {prefix}{name} is {value!r}; allowed: {kind.allowed}.")


def _section(config: Mapping[str, Any], name: str, path: str) -> Mapping[str, Any]:
    section = config.get(name, {})
    if not isinstance(section, dict):
        raise ConfigError(f"--deepspeed {path} has {name} = {section!r}; a section in braces is expected.")
    return section
