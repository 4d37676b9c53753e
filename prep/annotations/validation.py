"""Validates records: JSON text in, an :class:`Annotation` or all of its problems out.

Each problem has a reason code, a JSON path and a fix. A valid record costs one ``msgspec`` decode and a few passes over
its joined text. Only if these notice something unusual is the record checked turn by turn.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import msgspec

from prep.annotations.chunks import Record
from prep.annotations.dialects import MAX_DEPTH, ROLES, Places, decode_common, fault, read_record
from schemas.annotation import Annotation, Problem, ReasonCode, Turn
from schemas.qwen import CONTROL_TOKENS


class _OnlyId(msgspec.Struct):
    id: Any = None


_id_decoder = msgspec.json.Decoder(_OnlyId)

MAX_MEDIA = 1 << 14
"""Most media of a record. Each takes at least one token, and four times as many would fill the model's context."""

MAX_TEXT_CHARACTERS = 1 << 20
"""A conversation with more text is rejected as ``too_long`` before tokenization, which takes 100 times its memory. This
is about four times the model's context of 128k tokens."""

TAG = re.compile(r"<(image|video)>")
RESERVED = re.compile("|".join(re.escape(token) for token in CONTROL_TOKENS))

_EXCHANGES = ["human", "gpt"] * 256


def parse_record(data: bytes, *, reserved: str = "reject") -> tuple[Annotation | None, list[Problem]]:
    """Decode and check one record.

    Args:
        data: JSON text of the record.
        reserved: what to do with text that spells a control token: ``reject`` or ``escape``.

    Returns:
        The annotation and no problems; or what could be decoded, if anything, and all problems. A record with too many
        media gives None, so that nobody opens them.
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
    """Check a record as :func:`parse_record` does. A record without text has one problem, ``bad_json``."""
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
    """Decode only the id of a record, as text; None if it has none."""
    try:
        identity = _id_decoder.decode(data).id
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None
    return str(identity) if isinstance(identity, (str, int)) and not isinstance(identity, bool) else None


def _names(single: str | list[str] | None, several: list[str] | None) -> list[str]:
    if single is None:
        return list(several or [])
    return [single] if isinstance(single, str) else list(single)


def _is_plain(annotation: Annotation, data: bytes, reserved: str) -> bool:
    """Whether a record in canonical spelling has no problem, by a few passes over its joined text.

    False for some valid records: those with other role names, with hundreds of turns, or with unread fields that are
    large or not ASCII.
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
        # In most records, only the first question has tags.
        num_images = values[first].count("<image>")
        if num_brackets != num_images:
            questions = "\n".join(values[first::2])
            num_images, num_videos = questions.count("<image>"), questions.count("<video>")
        if num_brackets != num_images + num_videos and (
            TAG.search("\n".join(values[1 - first :: 2])) or (reserved == "reject" and RESERVED.search(text))
        ):
            return False
    return (
        len(text) <= MAX_TEXT_CHARACTERS
        and _has_count(num_images, annotation.image, annotation.images)
        and _has_count(num_videos, annotation.video, annotation.videos)
        # Bytes outside the turns' text are too few to be nested deeply, or are checked for it.
        and ((data.isascii() and len(data) - len(text) <= 2 * MAX_DEPTH) or fault(data) is None)
    )


def _has_count(expected: int, single: str | list[str] | None, several: list[str] | None) -> bool:
    """Whether one of the two fields of a kind of media, and not both, names ``expected`` media, within the limit."""
    if expected > MAX_MEDIA:
        return False
    if single is None:
        return expected == (0 if several is None else len(several))
    return several is None and expected == (1 if isinstance(single, str) else len(single))


def _semantic_problems(
    annotation: Annotation, places: Places, reserved: str, unreadable: Collection[str]
) -> Iterator[Problem]:
    """Problems of a record whose types are right. Media in ``unreadable`` fields are not counted."""
    turns = annotation.conversations
    if not turns:
        yield Problem(
            ReasonCode.MISSING_CONVERSATIONS, f"$.{places.turns} is empty; give at least a question and an answer"
        )
    yield from _order_problems([turn.role for turn in turns], places)
    for index, turn in enumerate(turns):
        yield from _turn_problems(turn, places.value_of(index), reserved)
    num_characters = sum(len(turn.value) for turn in turns)
    if num_characters > MAX_TEXT_CHARACTERS:
        yield Problem(
            ReasonCode.TOO_LONG,
            f"the turns have {num_characters:,} characters; at most {MAX_TEXT_CHARACTERS:,} are tokenized. Cut the "
            "text into several records",
        )
    yield from _media_problems("image", annotation.image, annotation.images, turns, unreadable)
    yield from _media_problems("video", annotation.video, annotation.videos, turns, unreadable)


def _turn_problems(turn: Turn, path: str, reserved: str) -> Iterator[Problem]:
    """Problems of the text of one turn, which stands at ``path`` in the record."""
    if not turn.value.strip():
        yield Problem(ReasonCode.EMPTY_TURN, f"{path} is empty; write what the {turn.role} says or drop the exchange")
        return
    tags: list[str] = TAG.findall(turn.value)
    if tags and turn.role != "human":
        yield Problem(
            ReasonCode.TAG_IN_ANSWER,
            f"{path} has <{tags[0]}> in a {turn.role} turn; media tags belong in human turns only",
        )
    if reserved == "reject" and (control := RESERVED.search(turn.value)):
        yield Problem(
            ReasonCode.RESERVED_TOKEN,
            f"{path} spells the control token {control.group()}; remove it, or use --reserved escape to encode it as "
            "ordinary text",
        )


def _media_problems(
    kind: str,
    single: str | list[str] | None,
    several: list[str] | None,
    turns: Sequence[Turn],
    unreadable: Collection[str],
) -> Iterator[Problem]:
    """Problems of the two fields of a kind of media, ``$.image`` and ``$.images``, say."""
    if single is not None and several is not None:
        yield Problem(ReasonCode.BAD_FIELD, f"$.{kind} and $.{kind}s are both given; give one of them")
        return
    if kind in unreadable or f"{kind}s" in unreadable:
        return
    num_media = len(_names(single, several))
    if num_media > MAX_MEDIA:
        field = kind if several is None else f"{kind}s"
        yield Problem(
            ReasonCode.BAD_FIELD,
            f"$.{field} names {num_media:,} media; at most {MAX_MEDIA:,} are allowed. Cut the record into several",
        )
    num_tags = sum(turn.value.count(f"<{kind}>") for turn in turns if turn.role == "human")
    if num_tags != num_media:
        yield Problem(
            ReasonCode.TAG_MISMATCH,
            f"{num_tags} <{kind}> tags in human turns and {num_media} {kind}s; every {kind} needs one tag",
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
