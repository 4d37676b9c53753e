"""Collects all problems of a record in bounded memory.

A record can have a million problems. Of each code, the first few are kept, and the number of the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from schemas.annotation import Problem, ReasonCode

MAX_OF_A_CODE = 10
"""Number of problems per code and record that are kept."""


class Problems:
    """The problems of one record while it is checked."""

    def __init__(self) -> None:
        self._kept: list[Problem] = []
        self._counts: Counter[ReasonCode] = Counter()

    def __bool__(self) -> bool:
        return bool(self._kept)

    def add(self, code: ReasonCode, message: str) -> None:
        """Add one problem."""
        self._counts[code] += 1
        if self._counts[code] <= MAX_OF_A_CODE:
            self._kept.append(Problem(code, message))

    def extend(self, problems: Iterable[Problem]) -> None:
        """Add several problems."""
        for problem in problems:
            self.add(problem.code, problem.message)

    def listed(self) -> list[Problem]:
        """The problems in the order in which they were added, then the number of those that were dropped."""
        more = {code: count - MAX_OF_A_CODE for code, count in self._counts.items() if count > MAX_OF_A_CODE}
        return self._kept + [Problem(code, f"… and {count:,} more of {code.value}") for code, count in more.items()]
