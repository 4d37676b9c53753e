"""Flags of other trainers: what they become here, why they have no effect, or where they belong.

In: a flag of the upstream scripts or of transformers that this trainer does not declare, with its value. Out: the words
of our own flags, a note, or a problem. ``vlprep migrate`` rewrites launch scripts; this module serves commands whose
flags are still those of upstream.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass

AT_BUILD = {
    "dataset_use": "DATASETS, as in make shards DATASET=name%50",
    "model_max_length": "--max-length",
    "max_pixels": "--max-pixels",
    "min_pixels": "--min-pixels",
    "video_max_frames": "--video-max-frames",
    "video_min_frames": "--video-min-frames",
    "video_max_frame_pixels": "--video-max-frame-pixels",
    "video_min_frame_pixels": "--video-min-frame-pixels",
    "video_max_pixels": "--video-max-frame-pixels",
    "video_min_pixels": "--video-min-frame-pixels",
    "video_fps": "--base-interval, which is 1 / fps",
    "base_interval": "--base-interval",
}
"""Flags that are decided when shards are built, and the argument of ``vlprep build``."""

_PACKED = "bins are always packed, and their samples isolated"
_LOADER = "shards need no data loader of PyTorch"
_SCREEN = "metrics go to metrics.jsonl, and to --report_to"

NO_EFFECT = {
    "data_flatten": _PACKED,
    "data_packing": _PACKED,
    "lazy_preprocess": "shards are preprocessed",
    "group_by_length": "bins are full, and dealt so that ranks have similar costs",
    "remove_unused_columns": "shards hold what is trained and nothing else",
    "per_device_eval_batch_size": "evaluation takes one bin at a time",
    "eval_accumulation_steps": "evaluation keeps no predictions",
    "prediction_loss_only": "evaluation keeps no predictions",
    "dataloader_pin_memory": _LOADER,
    "dataloader_persistent_workers": _LOADER,
    "dataloader_drop_last": "every bin is used once an epoch",
    "gradient_checkpointing_kwargs": "checkpointing is always the non-reentrant one",
    "average_tokens_across_devices": "the loss is the mean over all targets of a step",
    "data_seed": "--seed seeds the order of bins",
    "overwrite_output_dir": "a run resumes from its folder; --resume none starts over",
    "save_safetensors": "final/ is written as safetensors",
    "save_on_each_node": "machines share the folder of the run",
    "logging_strategy": "--logging_steps says how often to log",
    "logging_first_step": "the first step is always logged",
    "disable_tqdm": _SCREEN,
    "log_level": _SCREEN,
    "trust_remote_code": "no code of a checkpoint is run",
}
"""Flags that have no effect here with any value, and why."""

NO_EFFECT_WITH = {
    "save_strategy": ({"steps"}, "--save_steps says how often to save, 0 only when the run is asked to stop"),
    "do_train": ({"true", ""}, "this program trains"),
    "do_eval": ({"true", "false", ""}, "--eval_shards and --eval_strategy say whether to evaluate"),
    "do_predict": ({"false"}, "this program trains"),
    "push_to_hub": ({"false"}, "nothing is uploaded"),
    "load_best_model_at_end": ({"false"}, "final/ is the model after the last step"),
    "label_smoothing_factor": ({"0", "0.0"}, "the loss is the plain cross-entropy"),
    "fsdp": ({""}, "DeepSpeed shards the model"),
    "save_only_model": ({"false"}, "checkpoints hold what a run needs to resume"),
}
"""Flags whose listed values have no effect here, and why. Another value would mean something that does not exist."""

RENAMED = {"lora_rank": "lora_r", "resume_from_checkpoint": "resume"}
RESUME_VALUES = {"true": "auto", "": "auto", "false": "none"}
DTYPES = {
    "bfloat16": ("bf16", "True"),
    "float16": ("fp16", "True"),
    "float32": ("bf16", "False"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Translation:
    """What a foreign flag comes to. At most one of ``own`` and ``problem`` is set.

    Attributes:
        own: name and value of a flag of this trainer.
        note: what was done with the flag, a sentence.
        problem: why it cannot be taken, a sentence.
    """

    own: tuple[str, str] | None = None
    note: str = ""
    problem: str = ""


def translate(written: str, name: str, value: str, own_names: Collection[str]) -> Translation:
    """Translate a flag that this trainer does not declare.

    Args:
        written: the flag as a message writes it: ``--lora_rank`` or, in a file, ``lora_rank``.
        name: its name, with underscores.
        value: its value; empty for a switch without one.
        own_names: the flags of this trainer, one of which may have been meant.
    """
    prefix = written.removesuffix(name) if written.endswith(name) else "--"
    if name in AT_BUILD:
        return Translation(
            problem=f"{written} is not a flag of the trainer: it was decided when the shards were built "
            f"(vlprep build {AT_BUILD[name]}). Leave it out."
        )
    reason = "DeepSpeed moves the gradients" if name.startswith("ddp_") else NO_EFFECT.get(name)
    if reason is not None:
        return Translation(note=f"{written} has no effect here: {reason}.")
    if name in NO_EFFECT_WITH:
        values, reason = NO_EFFECT_WITH[name]
        if value.lower() in values:
            return Translation(note=f"{written} has no effect here: {reason}.")
        return Translation(problem=f"{written} {value} cannot be done here: {reason}. Leave it out.")
    if name in ("torch_dtype", "dtype"):
        return _translate_dtype(written, value)
    if name in RENAMED:
        value = RESUME_VALUES.get(value.lower(), value) if name == "resume_from_checkpoint" else value
        return Translation(own=(RENAMED[name], value), note=f"{written} is {prefix}{RENAMED[name]} {value} here.")
    near = difflib.get_close_matches(name, own_names, n=1)
    hint = f"; did you mean {prefix}{near[0]}?" if near else "; --help lists the flags."
    return Translation(problem=f"unknown flag {written}{hint}")


def _translate_dtype(written: str, value: str) -> Translation:
    if value == "auto":
        return Translation(note=f"{written} auto has no effect here: the precision follows the accelerator.")
    if value not in DTYPES:
        return Translation(problem=f"{written} is {value or 'empty'}; allowed: {', '.join(DTYPES)}, auto.")
    name, own_value = DTYPES[value]
    return Translation(own=(name, own_value), note=f"{written} {value} is --{name} {own_value} here.")
