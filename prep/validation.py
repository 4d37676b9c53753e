"""From the bytes of a record to an annotation, or to everything that is wrong with it.

Input: the JSON text of one record. Output: an :class:`Annotation`, or a list of problems: all of them, each with its
code, the JSON path and what would be right. A good record costs one ``msgspec`` decode and a walk over its turns;
only a bad one is looked at field by field.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import msgspec

from prep.records import MAX_RECORD_BYTES, Record
from prep.text import RESERVED, TAG
from schemas.annotation import Annotation, Problem, ReasonCode

_ROLES = ("system", "human", "gpt")
_TYPE_NAMES = {dict: "object", list: "array", str: "string", int: "number", float: "number", bool: "boolean"}

_decoder = msgspec.json.Decoder(Annotation)


class _OnlyId(msgspec.Struct):
    id: Any = None


_id_decoder = msgspec.json.Decoder(_OnlyId)


def parse_record(data: bytes, *, reserved: str = "reject") -> tuple[Annotation | None, list[Problem]]:
    """Decode and check one record.

    Args:
        data: JSON text of the record.
        reserved: what to do with text that spells a control token: ``reject`` or ``escape``.

    Returns:
        The annotation and no problems, or whatever could be decoded (or None) and all problems.
    """
    try:
        annotation = _decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None, list(_explain(data, reserved))
    return annotation, list(_semantic_problems(annotation, reserved))


def check_record(record: Record, reserved: str) -> tuple[Annotation | None, list[Problem]]:
    """As :func:`parse_record`, for a record that may be too long to have been read."""
    if record.data is None:
        message = f"the record is longer than {MAX_RECORD_BYTES:,} bytes; is a line break or a comma missing?"
        return None, [Problem(ReasonCode.BAD_JSON, message)]
    return parse_record(record.data, reserved=reserved)


def media_names(annotation: Annotation) -> tuple[list[str], list[str]]:
    """Names of the images and of the videos of a record, each in order."""
    return _names(annotation.image, annotation.images), _names(annotation.video, annotation.videos)


def record_id(annotation: Annotation | None) -> str | None:
    """The annotation's own id as text, if it has one."""
    return None if annotation is None or annotation.id is None else str(annotation.id)


def read_id(data: bytes) -> str | None:
    """The id of a record that is not otherwise looked at, as text; None if it has none."""
    try:
        found = _id_decoder.decode(data).id
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None
    return str(found) if isinstance(found, (str, int)) and not isinstance(found, bool) else None


def _names(one: str | list[str] | None, several: list[str] | None) -> list[str]:
    if one is None:
        return list(several or [])
    return [one] if isinstance(one, str) else list(one)


def _semantic_problems(annotation: Annotation, reserved: str, unreadable: Collection[str] = ()) -> Iterator[Problem]:
    """What is wrong with a record of the right types; media in ``unreadable`` fields are not counted."""
    turns = annotation.conversations
    if not turns:
        yield Problem(
            ReasonCode.MISSING_CONVERSATIONS, "$.conversations is empty; give at least one human and one gpt turn"
        )
    yield from _order_problems([turn.role for turn in turns])
    num_tags = {"image": 0, "video": 0}
    for number, turn in enumerate(turns):
        where = f"$.conversations[{number}].value"
        if not turn.value.strip():
            yield Problem(
                ReasonCode.EMPTY_TURN, f"{where} is empty; write what the {turn.role} says or drop the exchange"
            )
            continue
        if "<" not in turn.value:
            continue
        tags: list[str] = TAG.findall(turn.value)
        if tags and turn.role != "human":
            yield Problem(
                ReasonCode.TAG_IN_ANSWER,
                f"{where} has <{tags[0]}> in a {turn.role} turn; media tags stand in human turns only",
            )
        elif tags:
            for tag in tags:
                num_tags[tag] += 1
        if reserved == "reject" and (control := RESERVED.search(turn.value)):
            yield Problem(
                ReasonCode.RESERVED_TOKEN,
                f"{where} spells the control token {control.group()}; remove it, or build with --reserved escape to "
                "encode it as ordinary text",
            )
    for kind, one, several in (
        ("image", annotation.image, annotation.images),
        ("video", annotation.video, annotation.videos),
    ):
        if one is not None and several is not None:
            yield Problem(ReasonCode.BAD_FIELD, f"$.{kind} and $.{kind}s are both given; give one of them")
            continue
        if kind in unreadable or f"{kind}s" in unreadable:
            continue
        num_media = len(_names(one, several))
        if num_tags[kind] != num_media:
            yield Problem(
                ReasonCode.TAG_MISMATCH,
                f"{num_tags[kind]} <{kind}> tags in human turns and {num_media} {kind}s; every {kind} needs one tag",
            )


def _order_problems(roles: list[str]) -> Iterator[Problem]:
    unknown = [(number, role) for number, role in enumerate(roles) if role not in _ROLES]
    for number, role in unknown:
        yield Problem(
            ReasonCode.UNKNOWN_ROLE, f"$.conversations[{number}].from is {role[:40]!r}; allowed: {', '.join(_ROLES)}"
        )
    if unknown or not roles:
        return
    first = 1 if roles[0] == "system" else 0
    for number, role in enumerate(roles[first:]):
        expected = ("human", "gpt")[number % 2]
        if role != expected:
            yield Problem(
                ReasonCode.BAD_TURN_ORDER,
                f"$.conversations[{number + first}].from is {role!r}, expected {expected!r}; turns alternate human, "
                "gpt, and a system turn may only come first",
            )
            return
    if roles[-1] != "gpt":
        yield Problem(ReasonCode.BAD_TURN_ORDER, f"the last turn is {roles[-1]!r}; a conversation ends with 'gpt'")


def _explain(data: bytes, reserved: str) -> Iterator[Problem]:
    """Look at a record that is not an :class:`Annotation` field by field."""
    try:
        record = msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        yield Problem(ReasonCode.BAD_JSON, f"not valid JSON: {error}")
        return
    except RecursionError:
        yield Problem(ReasonCode.BAD_JSON, "nested too deeply to be read")
        return
    if not isinstance(record, dict):
        yield Problem(ReasonCode.NOT_AN_OBJECT, f"the record is of type {_type_name(record)}; expected an object")
        return
    turns, problems = _turn_problems(record.get("conversations"))
    yield from problems
    media: dict[str, Any] = {}
    unreadable: list[str] = []
    for field in ("image", "video", "images", "videos"):
        value, problem = _media_field(field, record.get(field))
        media[field] = value
        if problem is not None:
            unreadable.append(field)
            yield problem
    if isinstance(record.get("id"), (dict, list, bool, float)):
        yield Problem(
            ReasonCode.BAD_FIELD, f"$.id is of type {_type_name(record['id'])}; expected a string or an integer"
        )
    if turns and not problems:
        # Only other fields are at fault: what can be read is checked as usual.
        readable = {"conversations": turns, **media}
        yield from _semantic_problems(msgspec.convert(readable, Annotation), reserved, unreadable)


def _turn_problems(conversations: Any) -> tuple[list[dict[str, str]], list[Problem]]:
    if conversations is None:
        message = "$.conversations is missing; give a list of turns {from, value}"
        return [], [Problem(ReasonCode.MISSING_CONVERSATIONS, message)]
    if not isinstance(conversations, list):
        message = f"$.conversations is of type {_type_name(conversations)}; expected an array of turns"
        return [], [Problem(ReasonCode.BAD_FIELD, message)]
    problems = []
    for number, turn in enumerate(conversations):
        where = f"$.conversations[{number}]"
        if not isinstance(turn, dict):
            problems.append(Problem(ReasonCode.BAD_FIELD, f"{where} is of type {_type_name(turn)}; expected an object"))
            continue
        for key in ("from", "value"):
            if key not in turn:
                problems.append(Problem(ReasonCode.BAD_FIELD, f"{where}.{key} is missing; expected a string"))
            elif not isinstance(turn[key], str):
                message = f"{where}.{key} is of type {_type_name(turn[key])}; expected a string"
                problems.append(Problem(ReasonCode.BAD_FIELD, message))
    return conversations, problems


def _media_field(field: str, value: Any) -> tuple[Any, Problem | None]:
    expected = "an array of strings" if field.endswith("s") else "a string or an array of strings"
    if value is None or (isinstance(value, str) and not field.endswith("s")):
        return value, None
    if not isinstance(value, list):
        return None, Problem(ReasonCode.BAD_FIELD, f"$.{field} is of type {_type_name(value)}; expected {expected}")
    for number, name in enumerate(value):
        if not isinstance(name, str):
            message = f"$.{field}[{number}] is of type {_type_name(name)}; expected a string"
            return None, Problem(ReasonCode.BAD_FIELD, message)
    return value, None


def _type_name(value: Any) -> str:
    return "null" if value is None else _TYPE_NAMES.get(type(value), type(value).__name__)
