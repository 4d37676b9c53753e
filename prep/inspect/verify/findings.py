"""Findings of a verification: where, what was found, what was expected, and what to do."""

from __future__ import annotations

from dataclasses import dataclass

from schemas.errors import BUILD_AGAIN, COPY_AGAIN, ShardError
from schemas.wording import one_line


@dataclass(frozen=True, slots=True)
class Finding:
    """One problem.

    Attributes:
        where: file, bin and offset, or file and row.
        text: the complete message, which begins with ``where``.
    """

    where: str
    text: str

    def __str__(self) -> str:
        return one_line(self.text)


def damaged(where: str, message: str) -> Finding:
    """The bytes are not those that were written. Another copy may be intact."""
    return Finding(where, f"{where}: {message}. {COPY_AGAIN}.")


def inconsistent(where: str, message: str) -> Finding:
    """The contents break a rule of the format."""
    return Finding(
        where, f"{where}: {message}. {BUILD_AGAIN}. If the problem remains, it is a bug in vlprep: please report it."
    )


def unreadable(where: str, error: ShardError) -> Finding:
    """Something could not be read. The message of the error names it."""
    return Finding(where, str(error))
