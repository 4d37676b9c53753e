"""Boxes, points and polygons in text: where they are, what is wrong with them, and the text with other coordinates.

Qwen2.5-VL was trained on absolute integer coordinates of the *resized* image. Annotations have others: pixels of the
original image, or shares of it. Input: the text of a turn and the sizes of the record's images. Output: the same text,
byte for byte, except for the digits of the coordinates.

Recognised are the forms that the model and its tools use:

===============================================  =======================================================
``"bbox_2d": [x1, y1, x2, y2]``                  JSON, with ``point_2d`` likewise; also lists of them, in fenced
                                                 blocks, and inside a JSON string
``data-bbox="x1 y1 x2 y2"``, ``data-polygon``    the model's HTML of documents
``<|box_start|>(x1,y1),(x2,y2)<|box_end|>``      the control tokens of Qwen2-VL; one pair of numbers is a point
===============================================  =======================================================

Cost: one regular expression over each text that has any of the marker words; exact rational arithmetic a coordinate.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import NamedTuple

from schemas.wording import counted

# No expression backtracks over an unbounded run of characters, and none looks for the end of a text from each of many
# beginnings: a text of a million characters takes seconds at most.
_NUMBER = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,3})?"
_MARKER = re.compile(
    r"""(?P<quote>\\{0,16}["'])(?P<key>bbox_2d|point_2d)(?P=quote)\s*:\s*"""
    r"""|\b(?i:data-(?P<attribute>bbox|polygon))\s*=\s*(?P<mark>\\{0,16}["'])(?P<list>[^"'<>\\]*)(?P=mark)"""
    r"""|<\|box_start\|>(?P<pairs>(?:(?!<\|).)*)<\|box_end\|>""",
    re.DOTALL,
)
_TOKEN = re.compile(r"<\|(?:object_ref|box)_(?:start|end)\|>")
_WELL_FORMED = re.compile(
    rf"<\|object_ref_start\|>(?:(?!<\|).)+<\|object_ref_end\|>"
    rf"|<\|box_start\|>\s*\(\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\)"
    rf"(?:\s*,\s*\(\s*{_NUMBER}\s*,\s*{_NUMBER}\s*\))*\s*<\|box_end\|>",
    re.DOTALL,
)
_LIST_ITEM = re.compile(rf"\s*(?:(?P<number>{_NUMBER})(?![\w.])|(?P<mark>[\[\],])|(?P<other>[^\s\[\],]{{1,64}}))")
_PLAIN_NUMBER = re.compile(_NUMBER)
_SEPARATED = re.compile(r"[^\s,]+")
_PAIR = re.compile(rf"\(\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\)")
_IMAGE_INDEX = re.compile(r"""(?P<quote>\\{0,16}["'])image_(?:id|index)(?P=quote)\s*:\s*(?P<index>\d{1,15})(?![\w.])""")
_BRACE = re.compile("[{}]")

_MAX_EXCERPT = 60
_MAX_DIGITS = 64


class ImageSize(NamedTuple):
    """Pixels of an image before (as displayed) and after resizing."""

    height: int
    width: int
    resized_height: int
    resized_width: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """One box, point or polygon in a text.

    Attributes:
        spans: start and end, in characters, of each number in the text: x, y, x, y, …
        values: the numbers.
        is_box: whether they are two opposite corners.
        image: index (from 0) of the image that the text names, or None.
        excerpt: how it reads, for messages.
        path: JSON path of its text, for messages.
        is_evident: whether the text alone shows that it is a shape, and of which image.
    """

    spans: tuple[tuple[int, int], ...]
    values: tuple[Fraction, ...]
    is_box: bool
    image: int | None = None
    excerpt: str
    path: str = ""
    is_evident: bool = True


class BoxError(ValueError):
    """A shape whose coordinates cannot be right; the message says why."""


class Shapes(NamedTuple):
    """What :func:`find_shapes` returns: the shapes in the order of the text, and sentences about malformed ones."""

    shapes: list[Shape]
    faults: list[str]


def may_have_shapes(text: str) -> bool:
    """Whether a text may have boxes, points or names of objects. Cheap; says yes to some texts without them."""
    # Coordinates in JSON and HTML are quoted, and a quote is found faster than a word.
    if ('"' in text or "'" in text) and ("_2d" in text or "data-" in text or "DATA-" in text or "Data-" in text):
        return True
    return "<|" in text and ("<|box_start|>" in text or "<|object_ref_start|>" in text)


def find_shapes(text: str, *, is_answer: bool = True) -> Shapes:
    """Find all boxes, points and polygons.

    Args:
        text: of one turn.
        is_answer: whether the model says it. Other text may describe the format without numbers, as
            ``"bbox_2d": [x1, y1, x2, y2]`` does, or ``data-bbox="x1 y1 x2 y2"``; these are no boxes.
    """
    result = Shapes([], [])
    if not may_have_shapes(text):
        return result
    objects = _Objects(text)
    for match in _MARKER.finditer(text):
        try:
            result.shapes.extend(_shapes_at(text, match, objects, is_answer=is_answer))
        except BoxError as error:
            result.faults.append(str(error))
    return result


def rewrite(text: str, shapes: Sequence[Shape], sizes: Sequence[ImageSize], coordinates: str) -> str:
    """The text with coordinates of the resized images.

    Every coordinate is scaled exactly, rounded once, half to even, and clamped to the image.

    Args:
        text: of one turn.
        shapes: those of the text, checked by :func:`check`.
        sizes: of the record's images.
        coordinates: one of :data:`schemas.settings.BOX_COORDINATES`.
    """
    if coordinates in ("resized", "off"):
        return text
    pieces: list[str] = []
    position = 0
    numbers = sorted(
        (span, value, axis, sizes[shape.image or 0])
        for shape in shapes
        for axis, (span, value) in enumerate(zip(shape.spans, shape.values))
    )
    for (start, end), value, axis, size in numbers:
        pieces += (text[position:start], str(_scale(value, axis % 2, size, coordinates)))
        position = end
    return "".join((*pieces, text[position:]))


def stored_numbers(shape: Shape, size: ImageSize, coordinates: str) -> list[int | float]:
    """The numbers of a shape as the text has them after :func:`rewrite`: pixels of the resized image."""
    if coordinates == "resized":
        return [value.numerator if value.denominator == 1 else float(value) for value in shape.values]
    return [_scale(value, axis % 2, size, coordinates) for axis, value in enumerate(shape.values)]


def check(shape: Shape, sizes: Sequence[ImageSize], coordinates: str) -> None:
    """Check a shape against its image.

    Args:
        shape: the shape.
        sizes: of the record's images; the shape's own index must be below their number.
        coordinates: one of :data:`schemas.settings.BOX_COORDINATES`.

    Raises:
        BoxError: it lies outside the image by more than one pixel (of the image that its coordinates refer to), or the
            second corner of a box comes before the first.
    """
    if coordinates == "off":
        return
    size = sizes[shape.image or 0]
    for axis, value in enumerate(shape.values):
        extent, limit, slack = _extent(axis % 2, size, coordinates)
        if not -slack <= value <= limit + slack:
            direction = ("wide", "high")[axis % 2]
            raise BoxError(
                f"{shape.excerpt} has {'xy'[axis % 2]} = {_plain(value)}, outside the image, which is {extent} pixels "
                f"{direction} ({coordinates}: 0 to {limit})"
            )
    if shape.is_box:
        x1, y1, x2, y2 = shape.values
        for name, low, high in (("x", x1, x2), ("y", y1, y2)):
            if low > high:
                raise BoxError(f"{shape.excerpt} has {name}1 = {_plain(low)} beyond {name}2 = {_plain(high)}")


def has_grounding_tokens(text: str) -> bool:
    """Whether a text has well-formed grounding between control tokens."""
    return "<|" in text and _WELL_FORMED.search(text) is not None


def without_grounding_tokens(text: str) -> str:
    """The text without well-formed grounding: what remains must spell no control token."""
    return _WELL_FORMED.sub("", text)


def split_grounding_tokens(text: str) -> Iterator[tuple[str, bool]]:
    """Cut a text at the tokens of well-formed grounding: ``(piece, is_token)``, without empty pieces."""
    position = 0
    for formed in _WELL_FORMED.finditer(text):
        for match in _TOKEN.finditer(text, *formed.span()):
            if match.start() > position:
                yield text[position : match.start()], False
            yield match.group(), True
            position = match.end()
    if position < len(text):
        yield text[position:], False


def number_shape(values: Sequence[object], *, image: int | None) -> tuple[str, Shape]:
    """A box or point that a record gives as a list of numbers beside its text, and how it is written into the text.

    Args:
        values: ``[x1, y1, x2, y2]``, or ``[x, y]`` for a point.
        image: index of its image, or None.

    Returns:
        ``[x1, y1, x2, y2]`` as text, and the shape within that text.

    Raises:
        BoxError: they are not two or four numbers.
    """
    text = f"[{', '.join(map(str, values))}]"
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        raise BoxError(f"{_short(text)} has something that is not a number")
    if len(values) not in (2, 4):
        raise BoxError(f"{_short(text)} has {counted(len(values), 'number')}; a box has 4, a point 2")
    spans, position = [], 1
    for value in values:
        spans.append((position, position + len(str(value))))
        position = spans[-1][1] + 2
    return text, _shape(text, spans, is_box=len(values) == 4, image=image, excerpt=text)


def moved(shape: Shape, offset: int) -> Shape:
    """The same shape ``offset`` characters further on."""
    return Shape(
        spans=tuple((start + offset, end + offset) for start, end in shape.spans),
        values=shape.values,
        is_box=shape.is_box,
        image=shape.image,
        excerpt=shape.excerpt,
    )


class _Objects:
    """The JSON objects of a text, by their braces. They are looked for once, when the first is needed."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._edges: list[int] = []
        self._innermost: list[int] = []
        self._images: dict[int, int] = {}

    def image_at(self, position: int) -> int | None:
        """``image_id`` or ``image_index`` of the innermost object around a character, not of the objects inside it."""
        if not self._edges:
            self._find()
        return self._images.get(self._innermost_at(position))

    def _innermost_at(self, position: int) -> int:
        """Where the innermost object around a character begins; -1 outside of all objects."""
        return self._innermost[bisect.bisect_right(self._edges, position) - 1]

    def _find(self) -> None:
        self._edges, self._innermost = [-1], [-1]
        opened = [-1]
        for brace in _BRACE.finditer(self._text):
            if brace.group() == "{":
                opened.append(brace.start())
            elif len(opened) > 1:
                opened.pop()
            self._edges.append(brace.start())
            self._innermost.append(opened[-1])
        for match in _IMAGE_INDEX.finditer(self._text):
            start = self._innermost_at(match.start())
            if start >= 0:
                self._images.setdefault(start, int(match["index"]))


def _shapes_at(text: str, match: re.Match[str], objects: _Objects, *, is_answer: bool) -> Iterator[Shape]:
    if match["key"] is not None:
        yield from _json_shapes(text, match, objects, is_answer=is_answer)
    elif match["attribute"] is not None:
        start = match.start("list")
        spans = [(start + item.start(), start + item.end()) for item in _SEPARATED.finditer(match["list"])]
        if not is_answer and not any(_PLAIN_NUMBER.fullmatch(text, *span) for span in spans):
            return
        is_box = match["attribute"].lower() == "bbox"
        if len(spans) != 4 if is_box else len(spans) < 4 or len(spans) % 2:
            expected = "4" if is_box else "an even number, 4 or more,"
            raise BoxError(f"{_short(match.group())} has {counted(len(spans), 'number')}; expected {expected}")
        yield _shape(text, spans, is_box=is_box, image=None, excerpt=match.group())
    else:
        start = match.start("pairs")
        pairs = list(_PAIR.finditer(match["pairs"]))
        if not pairs or not _WELL_FORMED.fullmatch(match.group()):
            raise BoxError(f"{_short(match.group())} is not (x1,y1),(x2,y2) between its tokens")
        spans = [(start + pair.start(side), start + pair.end(side)) for pair in pairs for side in (1, 2)]
        yield _shape(text, spans, is_box=len(pairs) == 2, image=None, excerpt=match.group())


def _json_shapes(text: str, match: re.Match[str], objects: _Objects, *, is_answer: bool) -> Iterator[Shape]:
    """The shapes of a JSON value: one list of numbers, or a list of such lists; two corners may be lists themselves."""
    rows, end, wrong = _number_lists(text, match.end())
    if wrong is not None:
        if is_answer or any(rows):
            raise BoxError(f"{_short(text[match.start() : end])} has {wrong[:20]!r}, which is not a number")
        return
    excerpt = text[match.start() : end]
    is_box = match["key"] == "bbox_2d"
    expected = 4 if is_box else 2
    if is_box and [len(row) for row in rows] == [2, 2]:
        rows = [rows[0] + rows[1]]
    if not rows or any(len(row) != expected for row in rows):
        count = len(rows[0]) if rows else 0
        raise BoxError(f"{_short(excerpt)} has {counted(count, 'number')}; {match['key']} has {expected}")
    image = objects.image_at(match.start())
    for row in rows:
        yield _shape(text, row, is_box=is_box, image=image, excerpt=excerpt)


def _number_lists(text: str, position: int) -> tuple[list[list[tuple[int, int]]], int, str | None]:
    """Spans of the numbers of a JSON array by innermost list, where it ends, and the first item that is not a number.

    Nothing after such an item is read.
    """
    rows: list[list[tuple[int, int]]] = [[]]
    depth = 0
    while (item := _LIST_ITEM.match(text, position)) is not None:
        position = item.end()
        if item["other"] is not None:
            return rows, position, item["other"]
        if item["number"] is not None:
            rows[-1].append(item.span("number"))
        elif item["mark"] != ",":
            rows.append([])
            depth += 1 if item["mark"] == "[" else -1
        if depth <= 0:
            break
    return [row for row in rows if row], position, None


def _shape(text: str, spans: Sequence[tuple[int, int]], *, is_box: bool, image: int | None, excerpt: str) -> Shape:
    values = tuple(_number(text[start:end], excerpt) for start, end in spans)
    return Shape(spans=tuple(spans), values=values, is_box=is_box, image=image, excerpt=_short(excerpt))


def _number(text: str, excerpt: str) -> Fraction:
    if len(text) > _MAX_DIGITS:
        raise BoxError(f"{_short(excerpt)} has a number of {len(text)} characters")
    try:
        value = Decimal(text)
    except InvalidOperation:
        value = Decimal("nan")
    if not value.is_finite():
        raise BoxError(f"{_short(excerpt)} has {text[:20]!r}, which is not a number")
    if value and value.adjusted() > 12:
        raise BoxError(f"{_short(excerpt)} has {text[:20]}, which no image has")
    return Fraction(value) if value.adjusted() > -40 else Fraction(0)


def _extent(axis: int, size: ImageSize, coordinates: str) -> tuple[int, int, Fraction]:
    """Pixels of the image along an axis, the largest coordinate, and one pixel in units of the coordinates."""
    if coordinates == "resized":
        extent = (size.resized_width, size.resized_height)[axis]
        return extent, extent, Fraction(1)
    extent = (size.width, size.height)[axis]
    limit = {"pixels": extent, "norm1": 1, "norm1000": 1000}[coordinates]
    return extent, limit, Fraction(limit, extent)


def _scale(value: Fraction, axis: int, size: ImageSize, coordinates: str) -> int:
    _, limit, _ = _extent(axis, size, coordinates)
    resized = (size.resized_width, size.resized_height)[axis]
    return min(max(round(value * resized / limit), 0), resized)


def _plain(value: Fraction) -> str:
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.6g}"


def _short(excerpt: str) -> str:
    line = " ".join(excerpt.split())
    return line if len(line) <= _MAX_EXCERPT else f"{line[: _MAX_EXCERPT - 1]}…"
