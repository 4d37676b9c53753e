"""From the text of a record to an annotation, or to everything that is wrong with it.

Input: the JSON text of one record. Output: a :class:`Checked` annotation with all its problems, each with a code, the
JSON path and what would be right. A good record costs one ``msgspec`` decode and a few passes over all its text at
once; only where these find something odd are its turns checked one by one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import msgspec

from prep.annotations.annotation import Annotation, MediaItem
from prep.annotations.boxes import (
    Shape,
    find_shapes,
    has_grounding_tokens,
    may_have_shapes,
    without_grounding_tokens,
)
from prep.annotations.chunks import Record
from prep.annotations.dialects import read_record
from prep.annotations.plain import MAX_DEPTH, decode_plain, fault
from prep.annotations.reading import Places
from prep.annotations.turns import ROLES
from prep.annotations.unused import unused_problem
from schemas.annotation import Problem, ReasonCode, Turn
from schemas.qwen import CONTROL_TOKENS
from schemas.wording import counted


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

_EXCHANGE = ["human", "gpt"]


class Checked(NamedTuple):
    """A record after its check.

    Attributes:
        annotation: whatever could be read; None for an unreadable record, or one with too many media.
        problems: everything that is wrong; none for a valid record.
        unused: names of its fields that nobody reads.
        embedded: bytes of media that came inside the record, by name.
        has_boxes: whether its text may hold boxes or points, so that its check depends on their coordinates.
        undeclared: the first box or point, as it reads, where nothing says what the coordinates are; else None.
    """

    annotation: Annotation | None
    problems: list[Problem]
    unused: tuple[str, ...] = ()
    embedded: Mapping[str, bytes] = {}
    has_boxes: bool = False
    undeclared: str | None = None


def parse_record(
    data: bytes,
    *,
    reserved: str = "reject",
    coordinates: str | None = None,
    embedded: Mapping[str, bytes] | None = None,
) -> Checked:
    """Decode and check one record.

    Args:
        data: JSON text of the record.
        reserved: what to do with text that spells a control token: ``reject`` or ``escape``.
        coordinates: of the boxes in its dataset, one of :data:`schemas.settings.BOX_COORDINATES`; None if undeclared.
        embedded: bytes of media that came beside the text.
    """
    annotation = decode_plain(data)
    if annotation is not None and _is_plain(annotation, data, reserved):
        return Checked(annotation, [], (), embedded or {})
    reading = read_record(data, embedded)
    annotation, undeclared, has_boxes = reading.annotation, None, False
    if annotation is not None and reading.is_plain and _is_plain(annotation, data, reserved):
        return Checked(annotation, [], reading.unused, reading.embedded)
    if annotation is not None:
        # A text that is too long to be tokenized is rejected without a look at its boxes.
        is_short = sum(len(turn.value) for turn in annotation.turns) <= MAX_TEXT_CHARACTERS
        has_boxes = is_short and (
            bool(annotation.shapes) or any(may_have_shapes(turn.value) for turn in annotation.turns)
        )
        if has_boxes:
            annotation, undeclared = _with_shapes(annotation, reading.places, coordinates, reading.problems.add)
        reading.problems.extend(_semantic_problems(annotation, reading.places, reserved, reading.unreadable))
        if max(len(annotation.images), len(annotation.videos)) > MAX_MEDIA:
            annotation = None
    return Checked(annotation, reading.problems.listed(), reading.unused, reading.embedded, has_boxes, undeclared)


def check_record(
    record: Record, reserved: str, coordinates: str | None = None, *, strict_fields: bool = False
) -> Checked:
    """As :func:`parse_record`, for a record whose text may be missing.

    Args:
        record: the record.
        reserved: as for :func:`parse_record`.
        coordinates: likewise.
        strict_fields: whether unused fields are problems.
    """
    if record.data is None:
        return Checked(None, [Problem(ReasonCode.BAD_JSON, record.fault)])
    checked = parse_record(record.data, reserved=reserved, coordinates=coordinates, embedded=record.embedded)
    if record.unread:
        checked = checked._replace(unused=(*checked.unused, *record.unread))
    if strict_fields and checked.unused:
        checked = checked._replace(problems=[*checked.problems, unused_problem(checked.unused)])
    return checked


def record_id(annotation: Annotation | None) -> str | None:
    """The annotation's own id as text, if it has one."""
    return None if annotation is None or annotation.id is None else str(annotation.id)


def read_id(data: bytes) -> str | None:
    """The id of a record that is not otherwise looked at, as text; None if it has none."""
    try:
        value = _id_decoder.decode(data).id
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None
    return str(value) if isinstance(value, (str, int)) and not isinstance(value, bool) else None


def _is_plain(annotation: Annotation, data: bytes, reserved: str) -> bool:
    """Whether a few passes over all text of a record with canonical spelling show that nothing is wrong with it.

    False for some valid records: those with boxes, and those with large texts that are not ASCII.
    """
    turns = annotation.turns
    roles = [turn.role for turn in turns]
    values = [turn.value for turn in turns]
    first = 1 if roles and roles[0] == "system" else 0
    if not all(map(str.strip, values)):
        return False
    if roles != _EXCHANGE:
        num_turns = len(roles) - first
        if num_turns < 1 or num_turns % 2 or roles[first:] != _EXCHANGE * (num_turns // 2):
            return False
    text = "\n".join(values)
    num_images = num_videos = 0
    num_brackets = text.count("<")
    if num_brackets:
        # Most records have no tag but in their first question.
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
        and num_images == len(annotation.images) <= MAX_MEDIA
        and num_videos == len(annotation.videos) <= MAX_MEDIA
        and not may_have_shapes(text)
        # What is not text of the turns is too short to be nested deeply, or is looked at.
        and ((data.isascii() and len(data) - len(text) <= 2 * MAX_DEPTH) or fault(data) is None)
    )


def _with_shapes(
    annotation: Annotation, places: Places, coordinates: str | None, fail: Callable[[ReasonCode, str], None]
) -> tuple[Annotation, str | None]:
    """Find the boxes, points and polygons of an annotation, each of which must lie in one of its images.

    Returns:
        The annotation with them, and the first one if nothing says what their coordinates are.
    """
    reads_text = coordinates != "off"
    coordinates = annotation.coordinates or coordinates
    if coordinates == "off":
        return msgspec.structs.replace(annotation, shapes={}, coordinates=coordinates), None
    shapes: dict[int, tuple[Shape, ...]] = {}
    is_single = len(annotation.images) == 1
    faults: list[tuple[ReasonCode, str]] = []
    excerpts: list[str] = []
    for index, turn in enumerate(annotation.turns):
        path = places.value_of(index)
        in_text, wrong = find_shapes(turn.value, is_answer=turn.role in ("gpt", "text"))
        beside = annotation.shapes.get(index, ())
        evident = {shape.spans for shape in in_text if reads_text and (shape.image is not None or is_single)}
        in_turn = tuple(
            replace(shape, path=path, is_evident=shape.spans in evident) for shape in _merged(beside, in_text)
        )
        if in_turn:
            shapes[index] = in_turn
        faults += [(ReasonCode.BAD_BOX, f"{path}: {message}") for message in wrong]
        faults += [(ReasonCode.AMBIGUOUS_BOX, f"{path}: {text}") for text in _contradictions(beside, in_text)]
        excerpts += [*(shape.excerpt for shape in in_turn[:1]), *wrong[:1], *_tokens_excerpt(turn.value)]
    num_shapes = sum(map(len, shapes.values()))
    if coordinates is None and num_shapes and num_shapes == annotation.num_shapes:
        # Boxes of ``objects`` are pixels by default. Other boxes have no default.
        coordinates = "pixels"
    if coordinates is not None:
        for code, message in faults:
            fail(code, message)
        for in_turn in shapes.values():
            for shape in in_turn:
                _check_image(shape, len(annotation.images), fail)
    grounding = any(has_grounding_tokens(turn.value) for turn in annotation.turns)
    annotation = msgspec.structs.replace(annotation, shapes=shapes, coordinates=coordinates, grounding=grounding)
    return annotation, excerpts[0] if excerpts and coordinates is None else None


def _tokens_excerpt(text: str) -> list[str]:
    """The first name of an object between control tokens, which is only text where boxes are off."""
    return [] if not has_grounding_tokens(text) else [text.strip()[:60]]


def _contradictions(beside: Sequence[Shape], in_text: Sequence[Shape]) -> Iterator[str]:
    """What is wrong with shapes beside the text that are in one image by ``image_id`` and in another by the text."""
    images = {shape.spans: shape.image for shape in in_text if shape.image is not None}
    for shape in beside:
        if shape.image is not None and images.get(shape.spans, shape.image) != shape.image:
            yield (
                f"{shape.excerpt} is in image {shape.image} by $.objects.image_id, and in image "
                f"{images[shape.spans]} by the text around it; name one of them"
            )


def _merged(beside: Sequence[Shape], in_text: Sequence[Shape]) -> tuple[Shape, ...]:
    """The shapes that a record gives beside its text and those in its text, each once.

    Shapes beside the text that name no image are in the image that the text around them names.
    """
    images = {shape.spans: shape.image for shape in in_text}
    spans = {shape.spans for shape in beside}
    placed = [replace(shape, image=images.get(shape.spans)) if shape.image is None else shape for shape in beside]
    return (*placed, *(shape for shape in in_text if shape.spans not in spans))


def _check_image(shape: Shape, num_images: int, fail: Callable[[ReasonCode, str], None]) -> None:
    box = f"{shape.path}: {shape.excerpt}"
    if not num_images:
        fail(
            ReasonCode.AMBIGUOUS_BOX,
            f"{box} is a box or point, but the record has no image; if it only looks like one, declare boxes as off",
        )
    elif shape.image is None and num_images > 1:
        fail(
            ReasonCode.AMBIGUOUS_BOX,
            f"{box} belongs to none of {num_images} images; name its image in the same object, "
            'as "image_id": 0 for the first one',
        )
    elif shape.image is not None and shape.image >= num_images:
        fail(
            ReasonCode.AMBIGUOUS_BOX,
            f"{box} names image {shape.image} of {num_images}; they are counted from 0",
        )


def _semantic_problems(
    annotation: Annotation, places: Places, reserved: str, unreadable: Collection[str]
) -> Iterator[Problem]:
    """What is wrong with a record of the right types; kinds of media in ``unreadable`` are not counted."""
    turns = annotation.turns
    if not annotation.is_text:
        if not turns:
            yield Problem(
                ReasonCode.MISSING_CONVERSATIONS, f"{places.turns} is empty; give at least a question and an answer"
            )
        yield from _order_problems([turn.role for turn in turns], places)
        if (
            turns
            and turns[-1].role == "gpt"
            and {i for i, turn in enumerate(turns) if turn.role == "gpt"} <= set(annotation.untrained)
        ):
            yield Problem(ReasonCode.NO_TARGETS, "every turn of the model is marked as not trained; drop the record")
    num_tags = {"image": 0, "video": 0}
    for index, turn in enumerate(turns):
        yield from _text_problems(turn, places.value_of(index), reserved, annotation.grounding, num_tags)
    num_characters = sum(len(turn.value) for turn in turns)
    if num_characters > MAX_TEXT_CHARACTERS:
        yield Problem(
            ReasonCode.TOO_LONG,
            f"the turns have {num_characters:,} characters; at most {MAX_TEXT_CHARACTERS:,} are tokenized. Cut the "
            "text into several records",
        )
    for kind, items in (("image", annotation.images), ("video", annotation.videos)):
        if kind not in unreadable:
            yield from _count_problems(kind, items, num_tags[kind])


def _text_problems(
    turn: Turn, path: str, reserved: str, grounding: bool, num_tags: dict[str, int]
) -> Iterator[Problem]:
    """What is wrong with the text of one turn; its tags are added to ``num_tags``."""
    if not turn.value.strip():
        yield Problem(ReasonCode.EMPTY_TURN, f"{path} is empty; write its text, or drop the exchange")
        return
    if "<" not in turn.value:
        return
    tags: list[str] = TAG.findall(turn.value)
    if tags and turn.role not in ("human", "text"):
        yield Problem(
            ReasonCode.TAG_IN_ANSWER,
            f"{path} has <{tags[0]}> in a {turn.role[:40]} turn; media tags are allowed in human turns only",
        )
    else:
        for tag in tags:
            num_tags[tag] += 1
    text = without_grounding_tokens(turn.value) if grounding else turn.value
    if reserved == "reject" and (control := RESERVED.search(text)):
        yield Problem(
            ReasonCode.RESERVED_TOKEN,
            f"{path} spells the control token {control.group()}; remove it, or use --reserved escape to encode it as "
            "ordinary text",
        )


def _count_problems(kind: str, items: list[MediaItem], num_tags: int) -> Iterator[Problem]:
    if len(items) > MAX_MEDIA:
        yield Problem(
            ReasonCode.BAD_FIELD,
            f"$.{kind}s names {len(items):,} media; at most {MAX_MEDIA:,} are allowed. Cut the record into several",
        )
    if num_tags != len(items):
        yield Problem(
            ReasonCode.TAG_MISMATCH,
            f"{counted(num_tags, f'<{kind}> tag')} in human turns and {counted(len(items), kind)}; "
            f"every {kind} needs one tag",
        )


def _order_problems(roles: list[str], places: Places) -> Iterator[Problem]:
    unknown = [index for index, role in enumerate(roles) if role not in ("system", "human", "gpt")]
    for index in unknown:
        yield Problem(
            ReasonCode.UNKNOWN_ROLE, f"{places.role_of(index)} is {roles[index][:40]!r}; allowed: {', '.join(ROLES)}"
        )
    if unknown or not roles:
        return
    first = 1 if roles[0] == "system" else 0
    for index, role in enumerate(roles[first:]):
        expected = ("human", "gpt")[index % 2]
        if role != expected:
            yield Problem(
                ReasonCode.BAD_TURN_ORDER,
                f"{places.role_of(index + first)} is {role[:40]!r}, expected {expected!r}; turns alternate human "
                "(user), gpt (assistant), and a system turn may only come first",
            )
            return
    if roles[-1] != "gpt":
        yield Problem(ReasonCode.BAD_TURN_ORDER, f"the last turn is {roles[-1][:40]!r}; a conversation ends with 'gpt'")
