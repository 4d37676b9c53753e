"""The ways in which records are spelled, all turned into :class:`Annotation`.

Input: the JSON text of a record. Output: a :class:`Reading`: the annotation in the one form that the rest of the
program knows, how to name places in the record as its author spelled it, and every field of a wrong type. The two
common spellings (``conversations`` with ``from``/``value``, ``messages`` with ``role``/``content``) cost one
``msgspec`` decode; other mixtures of the keys, ``texts``, and records with wrong fields are looked at key by key.

What ``msgspec`` passes over in fields that nobody reads is checked here: that the bytes are UTF-8, and that they are
not nested deeper than a fixed bound (the interpreter's own depends on who calls).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import msgspec

from prep.annotations.array_scanner import nesting_depth
from prep.annotations.problems import Problems
from schemas.annotation import Annotation, MessagesAnnotation, ReasonCode, Turn

ROLES = {"system": "system", "human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}
"""Canonical role of every accepted spelling."""

MAX_DEPTH = 400
"""A record with more arrays and objects inside one another is rejected as ``bad_json``."""

_CANONICAL_ROLES = frozenset(ROLES.values())
_TYPE_NAMES = {dict: "object", list: "array", str: "string", int: "number", float: "number", bool: "boolean"}
_TURN_KEYS = ("conversations", "messages", "texts")
_MEDIA_FIELDS = ("image", "images", "video", "videos")

_conversations_decoder = msgspec.json.Decoder(Annotation)
_messages_decoder = msgspec.json.Decoder(MessagesAnnotation)
# Python's float takes numbers beyond its range for infinite; what nobody reads may hold them.
_any_decoder = msgspec.json.Decoder(float_hook=float)


@dataclass(frozen=True, slots=True)
class Places:
    """Names the places of a record as its author spelled them."""

    turns: str = "conversations"
    role: str = "from"
    value: str = "value"

    def role_of(self, number: int) -> str:
        """Path of the role of turn ``number``."""
        return self.value_of(number) if self.turns == "texts" else f"$.{self.turns}[{number}].{self.role}"

    def value_of(self, number: int) -> str:
        """Path of the text of turn ``number``."""
        if self.turns == "texts":
            return f"$.texts[{number // 2}].{('user', 'assistant')[number % 2]}"
        return f"$.{self.turns}[{number}].{self.value}"


CONVERSATIONS = Places()
MESSAGES = Places("messages", "role", "content")


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """What could be read of a record.

    Attributes:
        annotation: in canonical form; None where the turns could not be read.
        places: how its author spelled it.
        problems: what is wrong with the types of its fields.
        unreadable: media fields whose names could not be read.
    """

    annotation: Annotation | None
    places: Places = CONVERSATIONS
    problems: Problems
    unreadable: frozenset[str] = frozenset()


def decode_common(data: bytes) -> Annotation | None:
    """The annotation of a record in one of the two common spellings; None for any other.

    Roles are canonical if the last one is. Fields that nobody reads are passed over, whatever they hold; :func:`fault`
    tells what may be wrong with them.
    """
    annotation: Annotation | None
    try:
        # Looking for the key first keeps a record of the other spelling from being decoded in vain.
        if b'"conversations"' in data:
            annotation = _conversations_decoder.decode(data)
        else:
            annotation = _from_messages(_messages_decoder.decode(data))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    if annotation is None or not annotation.conversations:
        return annotation
    return annotation if annotation.conversations[-1].role in _CANONICAL_ROLES else canonical_roles(annotation)


def canonical_roles(annotation: Annotation) -> Annotation:
    """The annotation with the canonical names of its roles; unknown ones stay."""
    if _CANONICAL_ROLES.issuperset([turn.role for turn in annotation.conversations]):
        return annotation
    turns = [Turn(ROLES.get(turn.role, turn.role), turn.value) for turn in annotation.conversations]
    return msgspec.structs.replace(annotation, conversations=turns)


def fault(data: bytes) -> str | None:
    """What is wrong with the text of a record, be it in a field that nobody reads."""
    try:
        if not data.isascii():
            data.decode()
    except UnicodeDecodeError as error:
        return f"not valid JSON: byte {error.start} is not UTF-8"
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH and nesting_depth(data) > MAX_DEPTH:
        return f"nested more than {MAX_DEPTH} levels deep"
    return None


def read_record(data: bytes) -> Reading:
    """Read a record in any of the accepted spellings."""
    found = fault(data)
    if found is not None:
        return _unreadable(ReasonCode.BAD_JSON, found)
    annotation = decode_common(data)
    if annotation is None:
        return _read_by_key(data)
    places = CONVERSATIONS if b'"conversations"' in data else MESSAGES
    return Reading(annotation=canonical_roles(annotation), places=places, problems=Problems())


def _unreadable(code: ReasonCode, message: str) -> Reading:
    problems = Problems()
    problems.add(code, message)
    return Reading(annotation=None, problems=problems)


def _from_messages(found: MessagesAnnotation) -> Annotation | None:
    if not all(isinstance(message.content, str) for message in found.messages):
        return None
    return Annotation(
        conversations=[Turn(message.role, str(message.content)) for message in found.messages],
        image=found.image,
        images=found.images,
        video=found.video,
        videos=found.videos,
        id=found.id,
    )


def _read_by_key(data: bytes) -> Reading:
    try:
        record = _any_decoder.decode(data)
    except msgspec.MsgspecError as error:
        return _unreadable(ReasonCode.BAD_JSON, f"not valid JSON: {error}")
    if not isinstance(record, dict):
        return _unreadable(ReasonCode.NOT_AN_OBJECT, f"the record is of type {_type_name(record)}; expected an object")
    reader = _KeyReader(record)
    turns = reader.turns()
    turns_are_good = not reader.problems
    media = reader.media(turns)
    identity = reader.identity()
    annotation = Annotation(conversations=turns, id=identity, **media) if turns_are_good else None
    return Reading(
        annotation=None if annotation is None else canonical_roles(annotation),
        places=reader.places,
        problems=reader.problems,
        unreadable=frozenset(reader.unreadable),
    )


class _KeyReader:
    """Reads a decoded record key by key and collects what is wrong."""

    def __init__(self, record: dict[str, Any]) -> None:
        self._record = record
        self.problems = Problems()
        self.unreadable: set[str] = set()
        self.places = CONVERSATIONS
        self._part_names: dict[str, list[str]] = {"image": [], "video": []}

    def turns(self) -> list[Turn]:
        """The turns, under whichever key they stand."""
        key = next((name for name in _TURN_KEYS if self._record.get(name) is not None), None)
        if key is None:
            self._problem(
                "$.conversations is missing; give a list of turns {from, value}", ReasonCode.MISSING_CONVERSATIONS
            )
            return []
        found = self._record[key]
        self.places = Places(key)
        if not isinstance(found, list):
            self._problem(f"$.{key} is of type {_type_name(found)}; expected an array of turns")
            return []
        if key == "texts":
            return [turn for number, exchange in enumerate(found) for turn in self._exchange(exchange, number)]
        first = next((turn for turn in found if isinstance(turn, dict)), {})
        self.places = Places(
            key, *(("role", "content") if "role" in first or "content" in first else ("from", "value"))
        )
        return [turn for number, item in enumerate(found) for turn in self._turn(item, number)]

    def media(self, turns: list[Turn]) -> dict[str, Any]:
        """The four media fields; names that stand in the turns' parts take the place of an absent field."""
        media: dict[str, Any] = {}
        for name in _MEDIA_FIELDS:
            value = self._record.get(name)
            if not self._is_media(name, value):
                self.unreadable.add(name)
                value = None
            media[name] = value
        for kind, names in self._part_names.items():
            if names and media[kind] is None and media[f"{kind}s"] is None:
                media[f"{kind}s"] = names
            elif names:
                self._problem(f"the turns name {kind}s and $.{kind} or $.{kind}s does too; name each once")
                self.unreadable.add(kind)
        if self.places.turns == "texts" and turns and not any("<image>" in turn.value for turn in turns):
            pictures = media["image"] if media["image"] is not None else media["images"]
            num_pictures = 1 if isinstance(pictures, str) else len(pictures or [])
            turns[0] = Turn(turns[0].role, "<image>\n" * num_pictures + turns[0].value)
        return media

    def identity(self) -> str | int | None:
        """The record's own id."""
        found = self._record.get("id")
        if isinstance(found, bool) or not isinstance(found, (str, int, type(None))):
            self._problem(f"$.id is of type {_type_name(found)}; expected a string or an integer")
            return None
        return found

    def _problem(self, message: str, code: ReasonCode = ReasonCode.BAD_FIELD) -> None:
        self.problems.add(code, message)

    def _exchange(self, exchange: Any, number: int) -> Iterator[Turn]:
        if not isinstance(exchange, dict):
            self._problem(
                f"$.texts[{number}] is of type {_type_name(exchange)}; expected an object {{user, assistant}}"
            )
            return
        for role in ("user", "assistant"):
            if self._is_string(exchange, role, f"$.texts[{number}]"):
                yield Turn(role, exchange[role])

    def _turn(self, turn: Any, number: int) -> Iterator[Turn]:
        where = f"$.{self.places.turns}[{number}]"
        if not isinstance(turn, dict):
            self._problem(f"{where} is of type {_type_name(turn)}; expected an object")
            return
        role_is_good = self._is_string(turn, self.places.role, where)
        content = turn.get(self.places.value)
        if isinstance(content, list):
            content = self._joined(content, f"{where}.{self.places.value}")
        elif not self._is_string(turn, self.places.value, where):
            return
        if role_is_good:
            yield Turn(turn[self.places.role], str(content))

    def _joined(self, parts: list[Any], where: str) -> str:
        """The text of a content that is a list of parts: text as it is, a tag for each medium."""
        pieces: list[str] = []
        for number, part in enumerate(parts):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text" and self._is_string(part, "text", f"{where}[{number}]"):
                pieces.append(part["text"])
            elif kind in ("image", "video"):
                pieces.append(f"<{kind}>")
                name = part.get(kind)
                if isinstance(name, str):
                    self._part_names[kind].append(name)
                elif name is not None:
                    self._problem(f"{where}[{number}].{kind} is of type {_type_name(name)}; expected a string")
            elif kind != "text":
                self._problem(f"{where}[{number}] is not a part of type text, image or video")
        return "".join(pieces)

    def _is_string(self, holder: dict[str, Any], key: str, where: str) -> bool:
        if isinstance(holder.get(key), str):
            return True
        found = f"is of type {_type_name(holder[key])}" if key in holder else "is missing"
        self._problem(f"{where}.{key} {found}; expected a string")
        return False

    def _is_media(self, name: str, value: Any) -> bool:
        takes_one = name in ("image", "video")
        if value is None or (takes_one and isinstance(value, str)):
            return True
        if not isinstance(value, list):
            expected = "a string or an array of strings" if takes_one else "an array of strings"
            self._problem(f"$.{name} is of type {_type_name(value)}; expected {expected}")
            return False
        for number, item in enumerate(value):
            if not isinstance(item, str):
                self._problem(f"$.{name}[{number}] is of type {_type_name(item)}; expected a string")
                return False
        return True


def _type_name(value: Any) -> str:
    return "null" if value is None else _TYPE_NAMES.get(type(value), type(value).__name__)
