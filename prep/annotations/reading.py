"""Reads the fields of one decoded record and keeps account of them.

Every field is used, refused or counted by its name. :class:`FieldReader` collects the problems and the names of unused
fields while a dialect reads a record. :class:`Reading` is the result.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from prep.annotations.annotation import Annotation
from prep.annotations.fields import says_something, unsupported
from prep.annotations.problems import Problems
from schemas.annotation import ReasonCode

_TYPE_NAMES = {dict: "object", list: "array", str: "string", int: "number", float: "number", bool: "boolean"}
_MAX_UNUSED = 100
_MAX_NAME_CHARACTERS = 60


class Places(msgspec.Struct, frozen=True):
    """JSON paths of the turns of a record as its author wrote it.

    Attributes:
        turns: path of the list of turns.
        role: key of a turn's role.
        value: key of a turn's text.
        roles: path of each turn's role, if it does not follow from the above.
        values: path of each turn's text, likewise.
    """

    turns: str = "$.conversations"
    role: str = "from"
    value: str = "value"
    roles: tuple[str, ...] = ()
    values: tuple[str, ...] = ()

    def role_of(self, index: int) -> str:
        """Path of the role of a turn."""
        return self.roles[index] if self.roles else f"{self.turns}[{index}].{self.role}"

    def value_of(self, index: int) -> str:
        """Path of the text of a turn."""
        return self.values[index] if self.values else f"{self.turns}[{index}].{self.value}"


CONVERSATIONS = Places()
MESSAGES = Places("$.messages", "role", "content")


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of a record in canonical form.

    Attributes:
        annotation: None if the turns are unreadable.
        places: where the turns are in the record.
        problems: of the fields.
        unreadable: kinds of media (``image``, ``video``) of which some are unreadable.
        unused: names of the fields that have no effect. A field of a turn reads ``conversations[].name``.
        embedded: bytes of media inside the record, by the name that the annotation gives them.
        is_plain: whether it is a record of the two common spellings, with turns and media and nothing else.
    """

    annotation: Annotation | None
    places: Places = CONVERSATIONS
    problems: Problems
    unreadable: frozenset[str] = frozenset()
    unused: tuple[str, ...] = ()
    embedded: Mapping[str, bytes] = {}
    is_plain: bool = False


class FieldReader:
    """Reads fields of one record, and collects problems and the names of unused fields.

    Attributes:
        problems: of the fields read so far.
        unused: names of unused fields, in the order of the record. At most 100 are kept.
    """

    def __init__(self) -> None:
        self.problems = Problems()
        self.unused: dict[str, None] = {}

    def fail(self, message: str, code: ReasonCode = ReasonCode.BAD_FIELD) -> None:
        """Add a problem."""
        self.problems.add(code, message)

    def text(self, fields: Mapping[str, Any], key: str, where: str) -> str:
        """A field that must be a string; empty, with a problem, if it is not one."""
        value = fields.get(key)
        if isinstance(value, str):
            return value
        state = f"is of type {type_name(value)}" if key in fields else "is missing"
        self.fail(f"{where}.{key} {state}; expected a string")
        return ""

    def account(
        self,
        fields: Mapping[str, Any],
        used: Collection[str],
        name: str = "",
        *,
        where: str = "$",
        refused: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Add a problem for each refused field of an object, and note the name of each other field without use.

        Args:
            fields: the object.
            used: names of its used fields.
            name: of the object, before the names of unused fields; empty for the record.
            where: JSON path of the object, for messages.
            refused: a table of :mod:`prep.annotations.fields`.
        """
        for key, value in fields.items():
            message = unsupported(key, value, refused, where)
            if message is not None:
                self.fail(message, ReasonCode.UNSUPPORTED_FIELD)
            elif key not in used and says_something(value) and len(self.unused) < _MAX_UNUSED:
                key = key if len(key) <= _MAX_NAME_CHARACTERS else key[:_MAX_NAME_CHARACTERS] + "…"
                self.unused[f"{name}.{key}" if name else key] = None


def type_name(value: object) -> str:
    """Name of a value's JSON type."""
    return "null" if value is None else _TYPE_NAMES.get(type(value), type(value).__name__)
