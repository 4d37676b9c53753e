"""The fast path: records in the two most common spellings, without other fields that have an effect.

Input: a record as JSON text, or decoded. Output: its annotation, or None for a record that
:mod:`prep.annotations.dialects` must read key by key. Cost: about 1 µs a record.

``msgspec`` skips the content of fields that no struct names. :func:`fault` checks that their text is UTF-8
and not nested too deeply.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from prep.annotations.annotation import Annotation, MediaItem
from prep.annotations.array_scanner import nesting_depth
from prep.annotations.media_fields import ENCODED_NAMES
from schemas.annotation import Turn

MAX_DEPTH = 400
"""Maximum nesting of arrays and objects in a record. The interpreter's own bound depends on the depth of the caller."""

PLAIN_FIELDS = frozenset({"conversations", "messages", "image", "images", "video", "videos", "id"})
"""Fields of the two common spellings."""

_CANONICAL_ROLES = frozenset({"system", "human", "gpt"})
_PLAIN_ROLES = {"system": "system", "human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}


class _PlainTurn(Turn, frozen=True, gc=False, forbid_unknown_fields=True):
    pass


class _PlainMessage(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    role: str
    content: str


class _PlainFields(msgspec.Struct, frozen=True, kw_only=True, gc=False, forbid_unknown_fields=True):
    image: str | list[str] | None = None
    images: list[str] | None = None
    video: str | list[str] | None = None
    videos: list[str] | None = None
    id: str | int | None = None


class _PlainLlava(_PlainFields, frozen=True, kw_only=True, gc=False, forbid_unknown_fields=True):
    conversations: list[_PlainTurn]


class _PlainMessages(_PlainFields, frozen=True, kw_only=True, gc=False, forbid_unknown_fields=True):
    messages: list[_PlainMessage]


_llava_decoder = msgspec.json.Decoder(_PlainLlava)
_messages_decoder = msgspec.json.Decoder(_PlainMessages)


def decode_plain(data: bytes) -> Annotation | None:
    """The annotation of a record in one of the two common spellings without other fields; None for any other record."""
    try:
        # Looking for the key first avoids a failed decode of records in the other spelling.
        if b'"conversations"' in data:
            return _annotation(_llava_decoder.decode(data))
        return _annotation(_messages_decoder.decode(data))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def convert_plain(fields: Mapping[str, Any]) -> Annotation | None:
    """As :func:`decode_plain`, for a decoded record of which only :data:`PLAIN_FIELDS` are left."""
    try:
        if "conversations" in fields:
            return _annotation(msgspec.convert(fields, _PlainLlava))
        return _annotation(msgspec.convert(fields, _PlainMessages))
    except msgspec.ValidationError:
        return None


def _annotation(record: _PlainLlava | _PlainMessages) -> Annotation | None:
    if isinstance(record, _PlainLlava):
        turns: list[Turn] = record.conversations  # type: ignore[assignment]
    else:
        turns = [Turn(message.role, message.content) for message in record.messages]
    for turn in turns:
        if turn.role not in _CANONICAL_ROLES:
            if not _PLAIN_ROLES.keys() >= {turn.role for turn in turns}:
                return None
            turns = [Turn(_PLAIN_ROLES[turn.role], turn.value) for turn in turns]
            break
    images = _items(record.image, record.images)
    videos = _items(record.video, record.videos)
    if images is None or videos is None:
        return None
    return Annotation(turns=turns, images=images, videos=videos, id=record.id)


def _items(single: str | list[str] | None, several: list[str] | None) -> list[MediaItem] | None:
    """The media of two fields; None if both are given, or if a name is a data URI or a ``file://`` URL."""
    if single is None:
        if several is None:
            return []
        names = several
    elif several is not None:
        return None
    elif isinstance(single, str):
        return None if single.startswith(ENCODED_NAMES) else [MediaItem(single)]
    else:
        names = single
    for name in names:
        if name.startswith(ENCODED_NAMES):
            return None
    return [MediaItem(name) for name in names]


def fault(data: bytes) -> str | None:
    """What is wrong with the text of a record, even in a field without effect; None if nothing is."""
    try:
        if not data.isascii():
            data.decode()
    except UnicodeDecodeError as error:
        return f"not valid JSON: byte {error.start} is not UTF-8"
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH and nesting_depth(data) > MAX_DEPTH:
        return f"nested more than {MAX_DEPTH} levels deep"
    return None
