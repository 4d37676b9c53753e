"""What a flag of another trainer becomes: the :class:`Rule` of each, and the conversions of values."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import PurePath

TRAIN, BUILD = "train", "build"


class NoEffect(Exception):
    """The value means what happens here anyway; the message says why."""


class NotHere(Exception):
    """The value has no counterpart here; the message says what to do instead."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """What a flag becomes.

    Attributes:
        program: which command takes it: ``train``, ``build``; empty if neither does.
        name: name of the flag there, with underscores.
        convert: value there -> value here; raises :class:`NoEffect` or :class:`NotHere`.
        why: for the reader of the migration, part of a sentence.
    """

    program: str = ""
    name: str = ""
    convert: Callable[[str], str] = str
    why: str = ""


def trained(name: str, convert: Callable[[str], str] = str, why: str = "") -> Rule:
    """A flag of the trainer."""
    return Rule(program=TRAIN, name=name, convert=convert, why=why)


def built(name: str, convert: Callable[[str], str] = str, why: str = "") -> Rule:
    """An option of ``vlprep build``."""
    return Rule(program=BUILD, name=name, convert=convert, why=why)


def unneeded(why: str) -> Rule:
    """A flag without effect here."""

    def convert(value: str) -> str:
        raise NoEffect(why)

    return Rule(convert=convert)


def unneeded_with(values: set[str], why: str) -> Rule:
    """A flag without effect here if it has one of the values, in lower case; else it cannot be done."""

    def convert(value: str) -> str:
        if value.lower() in values:
            raise NoEffect(why)
        raise NotHere(why)

    return Rule(convert=convert)


def impossible(why: str) -> Rule:
    """A flag whose purpose needs another way here."""

    def convert(value: str) -> str:
        raise NotHere(why)

    return Rule(convert=convert)


def is_left_to_shell(value: str) -> bool:
    """Whether only a shell knows the value."""
    return "$" in value or "`" in value


def switch(value: str) -> str:
    """True or False, however it is written; an empty value is True."""
    if is_left_to_shell(value):
        return value
    known = {"": "True", "true": "True", "1": "True", "yes": "True", "false": "False", "0": "False", "no": "False"}
    if value.lower() not in known:
        raise NotHere("allowed here: True or False")
    return known[value.lower()]


def negated(value: str) -> str:
    """The opposite of a switch."""
    return {"True": "False", "False": "True"}.get(switch(value), value)


def one_of(*allowed: str, **renamed: str) -> Callable[[str], str]:
    """A value of a closed list, some of them with another name here."""

    def convert(value: str) -> str:
        value = renamed.get(value, value)
        if value in allowed or is_left_to_shell(value):
            return value
        raise NotHere(f"allowed here: {', '.join(allowed)}")

    return convert


def number(value: str) -> str:
    """A number, as it is written."""
    if not is_left_to_shell(value):
        float(value)
    return value


def at_least(lowest: int) -> Callable[[str], str]:
    """A count that has a lower bound here."""

    def convert(value: str) -> str:
        if is_left_to_shell(value):
            return value
        if not math.isfinite(float(value)):
            raise NotHere("give a number")
        return str(max(lowest, int(float(value))))

    return convert


def unless(values: set[str], why: str, convert: Callable[[str], str] = str) -> Callable[[str], str]:
    """A conversion for all values but some, which have no effect."""

    def converted(value: str) -> str:
        if value.lower() in values:
            raise NoEffect(why)
        return convert(value)

    return converted


def interval_of_fps(value: str) -> str:
    """Frames a second -> seconds between two frames."""
    if is_left_to_shell(value):
        raise NotHere("give --base-interval, which is 1 / fps")
    if not 0 < float(value) < math.inf:
        raise NotHere("allowed here: more than 0")
    return f"{1 / float(value):g}"


def comma_list(value: str) -> str:
    """Words or a list, separated by commas."""
    return ",".join(value.replace(",", " ").split())


_DEEPSPEED_FILES = {
    "zero0": "zero1.json",
    "zero1": "zero1.json",
    "zero2": "zero2.json",
    "zero3": "zero3.json",
    "zero3_offload": "zero3_offload.json",
    "ds_z0_config": "zero1.json",
    "ds_z2_config": "zero2.json",
    "ds_z3_config": "zero3.json",
    "ds_z3_offload_config": "zero3_offload.json",
}


def deepspeed_file(value: str) -> str:
    """The shipped configuration that does what a configuration of the other trainer does; any other is kept."""
    return _DEEPSPEED_FILES.get(PurePath(value).name.removesuffix(".json"), value)


def reporter(value: str) -> str:
    """One reporter of the trainer."""
    names = comma_list(value.strip("[]").replace("'", "").replace('"', "")).split(",")
    known = [name for name in names if name in ("tensorboard", "wandb", "none")]
    if not known:
        raise NotHere("metrics go to metrics.jsonl, and to tensorboard or wandb with --report_to")
    if len(set(known)) > 1:
        raise NotHere("a run here reports to one of tensorboard and wandb: choose with --report_to")
    return known[0]


def from_tables(no_effect: Mapping[str, str], no_effect_with: Mapping[str, tuple[set[str], str]]) -> dict[str, Rule]:
    """Rules of the flags that :mod:`schemas.foreign_flags` explains."""
    return {
        **{name: unneeded(why) for name, why in no_effect.items()},
        **{name: unneeded_with(values, why) for name, (values, why) in no_effect_with.items()},
    }
