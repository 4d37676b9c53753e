"""From the bytes of a record to an annotation, or to everything that is wrong with it.

Input: the JSON text of one record. Output: an :class:`Annotation`, or a list of problems: all of them, each with its
code, the JSON path and what would be right. A good record costs one ``msgspec`` decode and a few passes over all its
text at once; only where these find something odd is it looked at turn by turn.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

import msgspec

from prep.annotations.chunks import Record
from prep.annotations.dialects import MAX_DEPTH, ROLES, Places, decode_common, fault, read_record
from schemas.annotation import Annotation, Problem, ReasonCode
from schemas.qwen import CONTROL_TOKENS


class _OnlyId(msgspec.Struct):
    id: Any = None


_id_decoder = msgspec.json.Decoder(_OnlyId)

MAX_MEDIA = 1 << 14
"""Media that a record may name: each is one token at least, and four times as many would fill the model's context."""

MAX_TEXT_CHARACTERS = 1 << 20
"""A conversation with more text is rejected as ``too_long`` before it is tokenized (which takes 100 times its memory):
it would be four times what the model's context of 128k tokens holds."""

TAG = re.compile(r"<(image|video)>")
RESERVED = re.compile("|".join(re.escape(token) for token in CONTROL_TOKENS))

_EXCHANGES = ["human", "gpt"] * 256


def parse_record(data: bytes, *, reserved: str = "reject") -> tuple[Annotation | None, list[Problem]]:
    """Decode and check one record.

    Args:
        data: JSON text of the record.
        reserved: what to do with text that spells a control token: ``reject`` or ``escape``.

    Returns:
        The annotation and no problems, or whatever could be decoded (or None, as for a record whose media are too many
        to be looked at) and all problems.
    """
    annotation = decode_common(data)
    if annotation is not None and _is_plain(annotation, data, reserved):
        return annotation, []
    reading = read_record(data)
    annotation = reading.annotation
    if annotation is not None:
        reading.problems.extend(_semantic_problems(annotation, reading.places, reserved, reading.unreadable))
        if max(map(len, media_names(annotation))) > MAX_MEDIA:
            annotation = None
    return annotation, reading.problems.listed()


def check_record(record: Record, reserved: str) -> tuple[Annotation | None, list[Problem]]:
    """As :func:`parse_record`, for a record whose text may not be there."""
    if record.data is None:
        return None, [Problem(ReasonCode.BAD_JSON, record.fault)]
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


def _is_plain(annotation: Annotation, data: bytes, reserved: str) -> bool:
    """Whether nothing is wrong with a record of canonical spelling, told by a few passes over all its text at once.

    Says no to some good ones: those with other names of the roles, with hundreds of turns, or with fields that nobody
    reads and that are not ASCII or large.
    """
    roles = [turn.role for turn in annotation.conversations]
    values = [turn.value for turn in annotation.conversations]
    first = 1 if roles and roles[0] == "system" else 0
    num_turns = len(roles) - first
    if num_turns < 1 or num_turns % 2 or roles[first:] != _EXCHANGES[:num_turns] or not all(map(str.strip, values)):
        return False
    text = "\n".join(values)
    num_images = num_videos = 0
    num_brackets = text.count("<")
    if num_brackets:
        # Most records have no tag but in their first question.
        num_images = values[first].count("<image>")
        if num_brackets != num_images:
            asked = "\n".join(values[first::2])
            num_images, num_videos = asked.count("<image>"), asked.count("<video>")
        if num_brackets != num_images + num_videos and (
            TAG.search("\n".join(values[1 - first :: 2])) or (reserved == "reject" and RESERVED.search(text))
        ):
            return False
    return (
        len(text) <= MAX_TEXT_CHARACTERS
        and _is_number(num_images, annotation.image, annotation.images)
        and _is_number(num_videos, annotation.video, annotation.videos)
        # What is not text of the turns is too short to be nested deeply, or is looked at.
        and ((data.isascii() and len(data) - len(text) <= 2 * MAX_DEPTH) or fault(data) is None)
    )


def _is_number(expected: int, one: str | list[str] | None, several: list[str] | None) -> bool:
    """Whether the two fields of a kind of media name so many of them, in one field only, and not too many."""
    if expected > MAX_MEDIA:
        return False
    if one is None:
        return expected == (0 if several is None else len(several))
    return several is None and expected == (1 if isinstance(one, str) else len(one))


def _semantic_problems(
    annotation: Annotation, places: Places, reserved: str, unreadable: Collection[str]
) -> Iterator[Problem]:
    """What is wrong with a record of the right types; media in ``unreadable`` fields are not counted."""
    turns = annotation.conversations
    if not turns:
        yield Problem(
            ReasonCode.MISSING_CONVERSATIONS, f"$.{places.turns} is empty; give at least a question and an answer"
        )
    yield from _order_problems([turn.role for turn in turns], places)
    num_tags = {"image": 0, "video": 0}
    for number, turn in enumerate(turns):
        if not turn.value.strip():
            yield Problem(
                ReasonCode.EMPTY_TURN,
                f"{places.value_of(number)} is empty; write what the {turn.role} says or drop the exchange",
            )
            continue
        if "<" not in turn.value:
            continue
        tags: list[str] = TAG.findall(turn.value)
        if tags and turn.role != "human":
            yield Problem(
                ReasonCode.TAG_IN_ANSWER,
                f"{places.value_of(number)} has <{tags[0]}> in a {turn.role} turn; media tags stand in human "
                "turns only",
            )
        else:
            for tag in tags:
                num_tags[tag] += 1
        if reserved == "reject" and (control := RESERVED.search(turn.value)):
            yield Problem(
                ReasonCode.RESERVED_TOKEN,
                f"{places.value_of(number)} spells the control token {control.group()}; remove it, or use --reserved "
                "escape to encode it as ordinary text",
            )
    num_characters = sum(len(turn.value) for turn in turns)
    if num_characters > MAX_TEXT_CHARACTERS:
        yield Problem(
            ReasonCode.TOO_LONG,
            f"the turns have {num_characters:,} characters; at most {MAX_TEXT_CHARACTERS:,} are tokenized. Cut the "
            "text into several records",
        )
    for kind, one, several in (
        ("image", annotation.image, annotation.images),
        ("video", annotation.video, annotation.videos),
    ):
        if one is not None and several is not None:
            yield Problem(ReasonCode.BAD_FIELD, f"$.{kind} and $.{kind}s are both given; give one of them")
        elif kind not in unreadable and f"{kind}s" not in unreadable:
            num_media = len(_names(one, several))
            if num_media > MAX_MEDIA:
                field = kind if several is None else f"{kind}s"
                yield Problem(
                    ReasonCode.BAD_FIELD,
                    f"$.{field} names {num_media:,} media; at most {MAX_MEDIA:,} are allowed. Cut the record into "
                    "several",
                )
            if num_tags[kind] != num_media:
                yield Problem(
                    ReasonCode.TAG_MISMATCH,
                    f"{num_tags[kind]} <{kind}> tags in human turns and {num_media} {kind}s; every {kind} "
                    "needs one tag",
                )


def _order_problems(roles: list[str], places: Places) -> Iterator[Problem]:
    canonical = set(ROLES.values())
    unknown = [number for number, role in enumerate(roles) if role not in canonical]
    for number in unknown:
        yield Problem(
            ReasonCode.UNKNOWN_ROLE, f"{places.role_of(number)} is {roles[number][:40]!r}; allowed: {', '.join(ROLES)}"
        )
    if unknown or not roles:
        return
    first = 1 if roles[0] == "system" else 0
    for number, role in enumerate(roles[first:]):
        expected = ("human", "gpt")[number % 2]
        if role != expected:
            yield Problem(
                ReasonCode.BAD_TURN_ORDER,
                f"{places.role_of(number + first)} is {role!r}, expected {expected!r}; turns alternate human (user), "
                "gpt (assistant), and a system turn may only come first",
            )
            return
    if roles[-1] != "gpt":
        yield Problem(ReasonCode.BAD_TURN_ORDER, f"the last turn is {roles[-1]!r}; a conversation ends with 'gpt'")
