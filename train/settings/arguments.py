"""Settings of a run: an immutable :class:`TrainArguments`, checked when it is made and read by ``flags``.

A value out of bounds, a setting that would be ignored, or one that contradicts another is an error.
"""

from __future__ import annotations

from dataclasses import dataclass

from schemas.errors import ConfigErrors
from schemas.setting import setting_problems
from train.settings.contradictions import contradictions
from train.settings.declarations import Declarations


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainArguments(Declarations):
    """All settings of a run, with valid values that do not contradict each other."""

    def __post_init__(self) -> None:
        problems = (*setting_problems(self, spell="--{}".format, fix=""), *contradictions(self))
        if problems:
            raise ConfigErrors(problems)
