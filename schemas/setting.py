"""How settings are declared: help, unit, bounds and choices are beside the field, and nowhere else.

A field of a dataclass or a msgspec Struct is annotated with a :class:`Setting`::

    max_length: Annotated[int, Setting("Capacity of a bin.", unit="tokens", low=32)] = 4096

:func:`setting_fields` reads the declarations. The options of ``vlprep`` and the flags of the trainer are generated from
them, and :func:`check_settings` compares values with them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, get_args, get_type_hints

import msgspec
from msgspec import UNSET, UnsetType

from schemas.errors import ConfigErrors

MAX_INT = 2**63 - 1
"""Integer settings go into checkpoints, tables and arrays of 64-bit integers."""


@dataclasses.dataclass(frozen=True, slots=True)
class Setting:
    """Declaration of a settings field. Numbers are always finite, and integers fit 64 bits.

    Attributes:
        help: what the setting does, in a sentence.
        unit: unit of a number, as it reads after the number.
        low: smallest value.
        above: exclusive lower bound.
        high: largest value.
        below: exclusive upper bound.
        choices: all values of a text, if they are a closed list.
        unset: what applies when the field is None or UNSET, in words.
    """

    help: str
    _: dataclasses.KW_ONLY
    unit: str = ""
    low: float | None = None
    above: float | None = None
    high: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    unset: str = ""

    def allows(self, value: object) -> bool:
        """Whether the bounds or choices admit a value."""
        if self.choices:
            return value in self.choices
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return True
        is_finite = abs(value) <= MAX_INT if isinstance(value, int) else math.isfinite(value)
        return (
            is_finite
            and (self.low is None or value >= self.low)
            and (self.above is None or value > self.above)
            and (self.high is None or value <= self.high)
            and (self.below is None or value < self.below)
        )

    def allowed(self) -> str:
        """The bounds or choices in words; empty if there are none."""
        if self.choices:
            return ", ".join(self.choices)
        upper = f"{self.high}" if self.high is not None else f"below {self.below}" if self.below is not None else ""
        if self.low is not None:
            bounds = f"{self.low} to {upper}" if upper else f"{self.low} or more"
        elif self.above is not None:
            bounds = f"more than {self.above}" + (f", up to {upper}" if upper else "")
        else:
            bounds = upper and f"up to {upper}"
        return f"{bounds} {self.unit}".strip()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SettingField:
    """A declared field of a settings class.

    Attributes:
        name: name of the field.
        kind: type of its value when it is set.
        default: default value; None for a required field.
        is_required: whether there is no default.
        setting: the declaration.
    """

    name: str
    kind: type
    default: Any
    is_required: bool
    setting: Setting

    def help_text(self) -> str:
        """Help of the option or flag: what it does, then bounds, unit and default."""
        bounds = "" if self.setting.choices else self.setting.allowed()
        default = self.setting.unset if self.default in (None, UNSET) else str(self.default)
        facts = [bounds, "required" if self.is_required else f"default: {default}" if default else ""]
        return f"{self.setting.help}  [{'; '.join(filter(None, facts))}]"


@cache
def setting_fields(settings_class: type) -> dict[str, SettingField]:
    """The declared fields of a dataclass or Struct by name, in order."""
    hints = get_type_hints(settings_class, include_extras=True)
    is_struct = issubclass(settings_class, msgspec.Struct)
    fields = msgspec.structs.fields(settings_class) if is_struct else dataclasses.fields(settings_class)
    declared = {}
    for field in fields:
        for setting in getattr(hints[field.name], "__metadata__", ()):
            annotated = hints[field.name].__origin__
            (kind,) = [part for part in get_args(annotated) or (annotated,) if part not in (type(None), UnsetType)]
            is_required = field.default in (dataclasses.MISSING, msgspec.NODEFAULT)
            declared[field.name] = SettingField(
                name=field.name,
                kind=kind,
                default=None if is_required else field.default,
                is_required=is_required,
                setting=setting,
            )
    return declared


def check_settings(settings: Any, *, spell: Callable[[str], str], fix: str) -> None:
    """Compare the values of all declared fields with their bounds and choices.

    Args:
        settings: an instance of a settings class.
        spell: how a message writes the name of a field.
        fix: end of a message: how to fix the value.

    Raises:
        ConfigErrors: a value is out of bounds, or not one of the choices.
    """
    problems = tuple(setting_problems(settings, spell=spell, fix=fix))
    if problems:
        raise ConfigErrors(problems)


def setting_problems(settings: Any, *, spell: Callable[[str], str], fix: str) -> Iterator[str]:
    """The problems that :func:`check_settings` raises, one sentence each."""
    for field in setting_fields(settings.__class__).values():
        value = getattr(settings, field.name)
        if value is None or value is UNSET or field.setting.allows(value):
            continue
        is_huge = isinstance(value, int) and abs(value) > MAX_INT
        allowed = f"up to {MAX_INT}" if is_huge and field.setting.high is None else field.setting.allowed()
        yield f"{spell(field.name)} is {value}; allowed: {allowed}.{fix}"
