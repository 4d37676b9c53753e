"""The boxes, points and polygons of a sample, drawn onto the images that the model gets.

Input: the spans of a sample, whose coordinates are pixels of its stored images, the boxes that ``samples.json`` has
beside them, and these images. Output: images with lines on them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import cycle, islice

from PIL import Image, ImageDraw

from prep.annotations.boxes import Shape, find_shapes, number_shape
from prep.inspect.transcript import Span, SpanKind
from schemas.annotation import SampleBox

_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080")
_MAX_BOXES = 10_000
"""Boxes of a sample that are drawn besides those in its text. A set from elsewhere may have millions."""

_TURN_START = "<|im_start|>"
_ANSWER = "assistant\n"


def shapes_by_image(
    spans: Iterable[Span], images: Sequence[int], boxes: Iterable[SampleBox]
) -> Mapping[int, list[Shape]]:
    """The shapes of a sample by the image that they lie in.

    Args:
        spans: of the sample, with text; none if its text is left alone.
        images: the sample's images in order, by their index in the bin.
        boxes: those that the text does not show. The first 10,000 are drawn.
    """
    result: dict[int, list[Shape]] = {}
    drawn = islice(boxes, _MAX_BOXES)
    shapes = [number_shape(box.numbers, image=box.image)[1] for box in drawn if len(box.numbers) in (2, 4)]
    for text in _turns(spans):
        is_answer = text.startswith(_ANSWER) or not text.startswith(("user\n", "system\n"))
        shapes += find_shapes(text, is_answer=is_answer).shapes
    for shape in shapes:
        index = shape.image if shape.image is not None else 0 if len(images) == 1 else len(images)
        if index < len(images):
            result.setdefault(images[index], []).append(shape)
    return result


def draw_shapes(image: Image.Image, shapes: Sequence[Shape], *, width: int | None = None) -> Image.Image:
    """A copy of a stored image with shapes on it, whose coordinates are its pixels.

    Shapes are cut at the edges of the image, since a set from elsewhere may have any numbers.

    Args:
        image: the image.
        shapes: boxes, points and polygons.
        width: of the lines in pixels. None follows the size of the image.
    """
    drawn = image.copy()
    if not shapes:
        return drawn
    draw = ImageDraw.Draw(drawn)
    width = width or max(2, max(image.size) // 200)
    for shape, colour in zip(shapes, cycle(_COLOURS)):
        limits = cycle(image.size)
        numbers = [min(max(float(value), -1.0), limit + 1.0) for value, limit in zip(shape.values, limits)]
        points = list(zip(numbers[::2], numbers[1::2]))
        if shape.is_box:
            xs, ys = zip(*points)
            draw.rectangle([(min(xs), min(ys)), (max(xs), max(ys))], outline=colour, width=width)
        elif len(points) == 1:
            draw.circle(points[0], 2 * width, fill=colour, outline="white")
        else:
            draw.line([*points, points[0]], fill=colour, width=width)
    return drawn


def _turns(spans: Iterable[Span]) -> Iterator[str]:
    """The text of each turn, with its role first. Text that only spells a control token starts no turn."""
    pieces: list[str] = []
    for span in spans:
        if span.kind is SpanKind.CONTROL and span.text == _TURN_START:
            yield "".join(pieces)
            pieces = []
        else:
            pieces.append(span.text)
    yield "".join(pieces)
