"""The boxes, points and polygons of a sample, drawn onto the images that the model gets.

Input: the spans of a sample, whose coordinates are pixels of its stored images, and these images. Output: images with
lines on them.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import cycle

from PIL import Image, ImageDraw

from prep.annotations.boxes import Shape, find_shapes, number_shape
from prep.inspect.transcript import Span, SpanKind
from schemas.manifest import Manifest

_COLOURS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080")
_PLAIN_LIST = re.compile(r"\[(?P<first>\d{1,6}), \d{1,6}(?:, \d{1,6}, \d{1,6})?\]")
_TURN_START = "<|im_start|>"
_ANSWER = "assistant\n"


def shapes_by_image(
    spans: Iterable[Span], images: Sequence[int], dataset: str, manifest: Manifest
) -> Mapping[int, list[Shape]]:
    """The shapes in the text of a sample by the image that they lie in.

    In a dataset with boxes, a list of two or four numbers without a key, as ms-swift's ``<bbox>`` leaves it in plain
    text, counts as one if the sample has one image. Nothing in the text says in which of several it lies.

    Args:
        spans: of the sample, with text.
        images: the sample's images in order, by their index in the bin.
        dataset: of the sample; its text is left alone if its boxes are ``off``.
        manifest: of the set.
    """
    result: dict[int, list[Shape]] = {}
    if any(source.dataset == dataset and source.media.boxes == "off" for source in manifest.inputs):
        return result
    has_boxes = any(source.dataset == dataset and source.num_boxes for source in manifest.statistics)
    for text in _turns(spans):
        is_answer = text.startswith(_ANSWER) or not text.startswith(("user\n", "system\n"))
        shapes = find_shapes(text, is_answer=is_answer).shapes
        if has_boxes and len(images) == 1:
            shapes += _plain_lists(text, shapes)
        for shape in shapes:
            index = shape.image if shape.image is not None else 0 if len(images) == 1 else len(images)
            if index < len(images):
                result.setdefault(images[index], []).append(shape)
    return result


def draw_shapes(image: Image.Image, shapes: Sequence[Shape]) -> Image.Image:
    """A copy of a stored image with shapes on it, whose coordinates are its pixels."""
    drawn = image.copy()
    if not shapes:
        return drawn
    draw = ImageDraw.Draw(drawn)
    width = max(2, max(image.size) // 200)
    for shape, colour in zip(shapes, cycle(_COLOURS)):
        numbers = [float(value) for value in shape.values]
        points = list(zip(numbers[::2], numbers[1::2]))
        if shape.is_box:
            draw.rectangle(points, outline=colour, width=width)
        elif len(points) == 1:
            draw.circle(points[0], 2 * width, fill=colour, outline="white")
        else:
            draw.line([*points, points[0]], fill=colour, width=width)
    return drawn


def _plain_lists(text: str, others: Sequence[Shape]) -> list[Shape]:
    """Lists of numbers that are none of the other shapes, as :func:`number_shape` writes them."""
    starts = {start for shape in others for start, _ in shape.spans}
    lists = (match for match in _PLAIN_LIST.finditer(text) if match.start("first") not in starts)
    shapes = [number_shape([int(value) for value in match[0][1:-1].split(", ")], image=None)[1] for match in lists]
    return [shape for shape in shapes if not shape.is_box or all(map(operator.le, shape.values[:2], shape.values[2:]))]


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
