"""The fast path: records in the two most common spellings without other fields, decoded in one ``msgspec`` call.

Input: the JSON text of a record. Output: its annotation, or None for a record that :mod:`prep.annotations.dialects`
must read key by key. Cost: about 2 µs a record.

``msgspec`` skips the content of fields that no struct names. :func:`fault` checks the text of these: whether it is
UTF-8 and not nested too deeply.
"""

from __future__ import annotations

import msgspec

from prep.annotations.annotation import Annotation, MediaItem
from prep.annotations.array_scanner import nesting_depth
from prep.annotations.media_fields import ENCODED_NAMES
from schemas.annotation import LlavaRecord, MessagesRecord, Turn

MAX_DEPTH = 400
"""Maximum nesting of arrays and objects in a record. The interpreter's own bound depends on the depth of the caller."""

_CANONICAL_ROLES = frozenset({"system", "human", "gpt"})
_PLAIN_ROLES = {"system": "system", "human": "human", "user": "human", "gpt": "gpt", "assistant": "gpt"}


class _PlainTurn(Turn, frozen=True, gc=False, forbid_unknown_fields=True):
    pass


class _PlainLlava(LlavaRecord, frozen=True, kw_only=True, gc=False, forbid_unknown_fields=True):
    conversations: list[_PlainTurn]  # type: ignore[assignment]


class _PlainMessage(msgspec.Struct, frozen=True, gc=False, forbid_unknown_fields=True):
    role: str
    content: str


class _PlainMessages(MessagesRecord, frozen=True, kw_only=True, gc=False, forbid_unknown_fields=True):
    messages: list[_PlainMessage]  # type: ignore[assignment]


_llava_decoder = msgspec.json.Decoder(_PlainLlava)
_messages_decoder = msgspec.json.Decoder(_PlainMessages)


def decode_plain(data: bytes) -> Annotation | None:
    """The annotation of a record in one of the two common spellings without other fields; None for any other record."""
    try:
        # Looking for the key first avoids a failed decode of records in the other spelling.
        if b'"conversations"' in data:
            record: LlavaRecord | MessagesRecord = _llava_decoder.decode(data)
            turns: list[Turn] = record.conversations  # type: ignore[union-attr]
        else:
            record = messages = _messages_decoder.decode(data)
            turns = [Turn(message.role, str(message.content)) for message in messages.messages]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    if (record.image is not None and record.images is not None) or (
        record.video is not None and record.videos is not None
    ):
        return None
    if turns and not _CANONICAL_ROLES.issuperset([turn.role for turn in turns]):
        if not _PLAIN_ROLES.keys() >= {turn.role for turn in turns}:
            return None
        turns = [Turn(_PLAIN_ROLES[turn.role], turn.value) for turn in turns]
    images = _items(record.images if record.image is None else record.image)
    videos = _items(record.videos if record.video is None else record.video)
    if images is None or videos is None:
        return None
    return Annotation(turns=turns, images=images, videos=videos, id=record.id)


def _items(names: str | list[str] | None) -> list[MediaItem] | None:
    """The media of a field; None if one is a data URI or a ``file://`` URL."""
    if names is None:
        return []
    if isinstance(names, str):
        names = [names]
    for name in names:
        if name.startswith(ENCODED_NAMES):
            return None
    return [MediaItem(name) for name in names]


def fault(data: bytes) -> str | None:
    """What is wrong with the text of a record, even in a field that nobody reads; None if nothing is."""
    try:
        if not data.isascii():
            data.decode()
    except UnicodeDecodeError as error:
        return f"not valid JSON: byte {error.start} is not UTF-8"
    if data.count(b"[") + data.count(b"{") > MAX_DEPTH and nesting_depth(data) > MAX_DEPTH:
        return f"nested more than {MAX_DEPTH} levels deep"
    return None
