"""Flags of other trainers: what they become here, why they have no effect, or where they belong.

In: a flag of the upstream scripts or of transformers that this trainer does not declare, with its value. Out: the words
of our own flags, a note, or a problem. ``vlprep migrate`` rewrites launch scripts; this module serves commands whose
flags are still those of upstream.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass

from schemas.foreign_flags import AT_BUILD, NO_EFFECT, NO_EFFECT_WITH

RENAMED = {
    "activation_checkpointing": "gradient_checkpointing",
    "evaluation_strategy": "eval_strategy",
    "lora_rank": "lora_r",
    "resume_from_checkpoint": "resume",
}
RENAMED_VALUES = {
    "activation_checkpointing": {"": "True"},
    "resume_from_checkpoint": {"true": "auto", "": "auto", "false": "none"},
}
DTYPES = {
    "bfloat16": ("bf16", "True"),
    "float16": ("fp16", "True"),
    "float32": ("bf16", "False"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Translation:
    """The translation of a foreign flag. At most one of ``own`` and ``problem`` is set.

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
        value = RENAMED_VALUES.get(name, {}).get(value.lower(), value)
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
