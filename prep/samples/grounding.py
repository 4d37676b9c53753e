"""Boxes and points in the coordinates of the images that the model sees.

Input: an annotation whose shapes are found, and its probed images. Output: problems of shapes that do not fit their
images, or the annotation with the coordinates of the resized images in its text. The text depends on the sizes of the
images, so it is written again whenever these change.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from prep.annotations.annotation import Annotation
from prep.annotations.boxes import BoxError, ImageSize, check, rewrite, stored_numbers
from prep.annotations.problems import Problems
from prep.samples.media import Medium
from schemas.annotation import Problem, ReasonCode, SampleBox, Turn
from schemas.bins import MEDIA_IMAGE
from schemas.qwen import PATCH_SIZE


def follows_resize(annotation: Annotation) -> bool:
    """Whether the text of an annotation depends on the sizes of its images."""
    return bool(annotation.shapes) and annotation.coordinates not in (None, "resized", "off")


def box_problems(annotation: Annotation, media: Sequence[Medium]) -> list[Problem]:
    """The shapes that cannot be right for their images.

    Args:
        annotation: a record without other problems.
        media: its probed media, images first.
    """
    if not annotation.shapes or annotation.coordinates is None:
        return []
    problems = Problems()
    sizes = _sizes(media)
    for shapes in annotation.shapes.values():
        for shape in shapes:
            try:
                check(shape, sizes, annotation.coordinates)
            except BoxError as error:
                problems.add(ReasonCode.BAD_BOX, f"{shape.path}: {error}")
    return problems.listed()


def in_resized_pixels(annotation: Annotation, media: Sequence[Medium]) -> Annotation:
    """The annotation with the coordinates of the resized images in its text.

    Args:
        annotation: a record whose shapes passed :func:`box_problems`.
        media: its probed media, images first, in the size that they are stored in.
    """
    if not follows_resize(annotation) or annotation.coordinates is None:
        return annotation
    sizes = _sizes(media)
    turns = list(annotation.turns)
    for index, shapes in annotation.shapes.items():
        turns[index] = Turn(turns[index].role, rewrite(turns[index].value, shapes, sizes, annotation.coordinates))
    return msgspec.structs.replace(annotation, turns=turns)


def boxes_beside_text(annotation: Annotation, media: Sequence[Medium]) -> list[SampleBox]:
    """The shapes that a reader of the shards would not find in the text, such as ms-swift's plain lists of numbers.

    Args:
        annotation: as for :func:`in_resized_pixels`.
        media: likewise; only the order of the images counts.
    """
    if annotation.coordinates is None:
        return []
    hidden = [shape for shapes in annotation.shapes.values() for shape in shapes if not shape.is_evident]
    sizes = _sizes(media) if hidden else []
    return [
        SampleBox(shape.image or 0, stored_numbers(shape, sizes[shape.image or 0], annotation.coordinates))
        for shape in hidden
    ]


def _sizes(media: Sequence[Medium]) -> list[ImageSize]:
    return [
        ImageSize(
            height=medium.height,
            width=medium.width,
            resized_height=medium.grid.h * PATCH_SIZE,
            resized_width=medium.grid.w * PATCH_SIZE,
        )
        for medium in media
        if medium.media_type == MEDIA_IMAGE
    ]
