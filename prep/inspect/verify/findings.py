"""What verification finds wrong: a place, and a sentence that says what was found, what was expected and what to do."""

from __future__ import annotations

from dataclasses import dataclass

from prep.shards.reader import BUILD_AGAIN, COPY_AGAIN
from schemas.errors import ShardError


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        where: file, bin and offset; or file and row.
        text: the whole message; it begins with ``where``.
    """

    where: str
    text: str

    def __str__(self) -> str:
        return self.text


def damaged(where: str, message: str) -> Finding:
    """The bytes are not those that were written: another copy may be whole."""
    return Finding(where, f"{where}: {message}. {COPY_AGAIN}.")


def inconsistent(where: str, message: str) -> Finding:
    """Whatever the bytes went through, what they say breaks a rule of the format."""
    return Finding(
        where, f"{where}: {message}. {BUILD_AGAIN}; if that says the same, it is a bug of vlprep, please report it."
    )


def unreadable(where: str, error: ShardError) -> Finding:
    """What could not be read at all; the error names the place itself."""
    return Finding(where, str(error))
