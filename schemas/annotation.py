"""A turn of a conversation, and the reasons to reject an annotation.

:mod:`schemas.records` describes the records that users write.
"""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import msgspec
from msgspec import Meta

from schemas.bounds import MAX_INT32, Count32

ANNOTATION_SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".json.zst", ".jsonl.zst", ".parquet")
"""Suffixes of annotation files."""


class Turn(msgspec.Struct, frozen=True, gc=False, rename={"role": "from"}):
    """One turn of a conversation: who speaks (``from``) and what is said (``value``)."""

    role: str
    value: str


class ReasonCode(str, Enum):
    """Why an annotation was rejected. A closed list: other programs match on these strings."""

    BAD_JSON = "bad_json"
    NOT_AN_OBJECT = "not_an_object"
    MISSING_CONVERSATIONS = "missing_conversations"
    BAD_FIELD = "bad_field"
    UNKNOWN_ROLE = "unknown_role"
    BAD_TURN_ORDER = "bad_turn_order"
    EMPTY_TURN = "empty_turn"
    TAG_MISMATCH = "tag_mismatch"
    TAG_IN_ANSWER = "tag_in_answer"
    RESERVED_TOKEN = "reserved_token"
    MEDIA_MISSING = "media_missing"
    MEDIA_UNREADABLE = "media_unreadable"
    MEDIA_EMPTY = "media_empty"
    MEDIA_OUTSIDE_ROOT = "media_outside_root"
    UNSUPPORTED_MEDIA = "unsupported_media"
    UNSUPPORTED_FIELD = "unsupported_field"
    BAD_BOX = "bad_box"
    AMBIGUOUS_BOX = "ambiguous_box"
    BAD_ASPECT_RATIO = "bad_aspect_ratio"
    MEDIA_TOO_LARGE = "media_too_large"
    TOO_LONG = "too_long"
    NO_TARGETS = "no_targets"
    DECODE_TIMEOUT = "decode_timeout"


class Problem(msgspec.Struct, frozen=True):
    """One problem of a record: its code, and a sentence that names the field and the fix."""

    code: ReasonCode
    message: str


_IN_IMAGE = Meta(ge=-1, le=MAX_INT32)
BoxNumbers = Annotated[list[Annotated[int, _IN_IMAGE] | Annotated[float, _IN_IMAGE]], Meta(min_length=2, max_length=4)]
"""Coordinates of a box or point, at most one pixel outside its image."""


class SampleBox(msgspec.Struct, frozen=True, gc=False):
    """A box or point of a sample that its text does not show as one, or not with its image.

    ``image`` counts the images of the sample from 0. ``numbers`` are ``[x1, y1, x2, y2]``, or ``[x, y]`` for a point,
    in pixels of the stored image.
    """

    image: Count32
    numbers: BoxNumbers


class SampleRef(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """Where a sample of a bin comes from, as ``samples.json`` stores it.

    ``record`` counts the annotations of the dataset from 0, over all its files; ``id`` is the annotation's own, if any.
    ``boxes`` is left out if it is empty.
    """

    dataset: str
    record: int
    id: str | None
    boxes: list[SampleBox] = []
