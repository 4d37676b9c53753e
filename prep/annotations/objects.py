"""ms-swift's ``objects``: boxes and names of objects that replace ``<bbox>`` and ``<ref-object>`` in the turns.

In: the field and the turns. Out: turns with the text of the boxes, and their shapes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from prep.annotations.boxes import BoxError, Shape, moved, number_shape
from prep.annotations.fields import says_something
from prep.annotations.reading import FieldReader, type_name
from schemas.annotation import ReasonCode, Turn
from schemas.wording import counted

_PLACEHOLDER = re.compile("(<ref-object>|<bbox>)")
_COORDINATES = {None: None, "real": "pixels", "norm1": "norm1"}


def place_objects(
    objects: object, turns: list[Turn], fields: FieldReader
) -> tuple[dict[int, tuple[Shape, ...]], str | None]:
    """Put the boxes and names of ``objects`` into the turns.

    Args:
        objects: the field's value.
        turns: of the record; changed in place.
        fields: collects problems.

    Returns:
        The shapes by the index of their turn, and what their coordinates are if ``bbox_type`` says so.
    """
    if not says_something(objects):
        return {}, None
    if not isinstance(objects, dict):
        fields.fail(f"$.objects is of type {type_name(objects)}; expected an object {{ref, bbox}}")
        return {}, None
    fields.account(objects, {"ref", "bbox", "bbox_type", "image_id"}, "objects")
    names, boxes, images = (objects.get(key) or [] for key in ("ref", "bbox", "image_id"))
    kind = objects.get("bbox_type")
    if not all(isinstance(value, list) for value in (names, boxes, images)) or kind not in [*_COORDINATES]:
        fields.fail('$.objects has ref, bbox and image_id as lists, and bbox_type as "real" or "norm1"')
        return {}, None
    if images and len(images) != len(boxes):
        counts = f"{counted(len(images), 'image')} for {counted(len(boxes), 'box', 'boxes')}"
        fields.fail(f"$.objects.image_id names {counts}; give one for each box")
        return {}, None
    if not all(isinstance(image, int) and not isinstance(image, bool) and image >= 0 for image in images):
        fields.fail("$.objects.image_id has an entry that is not 0 or more; images are counted from 0")
        return {}, None
    for index, name in enumerate(names):
        if not isinstance(name, str):
            fields.fail(f"$.objects.ref[{index}] is of type {type_name(name)}; expected a string")
            return {}, None
    for tag, values in (("<ref-object>", names), ("<bbox>", boxes)):
        num_tags = sum(turn.value.count(tag) for turn in turns)
        if num_tags != len(values):
            fields.fail(f"$.objects has {len(values)} entries for {num_tags} {tag} in the turns")
            return {}, None
    waiting = {"<ref-object>": iter(names), "<bbox>": iter(zip(boxes, images or [None] * len(boxes)))}
    shapes: dict[int, tuple[Shape, ...]] = {}
    for index, turn in enumerate(turns):
        try:
            text, in_turn = _filled(turn.value, waiting)
        except BoxError as error:
            fields.fail(f"$.objects.bbox: {error}", ReasonCode.BAD_BOX)
            continue
        turns[index] = Turn(turn.role, text)
        if in_turn:
            shapes[index] = tuple(in_turn)
    return shapes, _COORDINATES[kind]


def _filled(text: str, waiting: Mapping[str, Iterator[Any]]) -> tuple[str, list[Shape]]:
    """Replace the placeholders of a text with the next names and boxes; returns it with the boxes in it."""
    pieces: list[str] = []
    shapes: list[Shape] = []
    length = 0
    for piece in _PLACEHOLDER.split(text):
        if piece == "<bbox>":
            values, image = next(waiting[piece])
            if not isinstance(values, list):
                raise BoxError(f"{str(values)[:40]!r} is not a list of numbers")
            piece, shape = number_shape(values, image=image)
            shapes.append(moved(shape, length))
        elif piece == "<ref-object>":
            piece = next(waiting[piece])
        pieces.append(piece)
        length += len(piece)
    return "".join(pieces), shapes
