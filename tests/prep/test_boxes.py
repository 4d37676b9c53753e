"""Box coordinates are converted to those of the resized image, and all other text is unchanged."""

from __future__ import annotations

import json
import re
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prep.annotations.boxes import (
    BoxError,
    ImageSize,
    check,
    find_shapes,
    number_shape,
    rewrite,
    split_grounding_tokens,
    without_grounding_tokens,
)
from prep.media.resize import smart_resize

SIZE = ImageSize(height=400, width=600, resized_height=392, resized_width=588)
HALF = ImageSize(height=1080, width=1920, resized_height=560, resized_width=980)


def rewritten(text: str, coordinates: str = "pixels", *sizes: ImageSize) -> str:
    shapes, faults = find_shapes(text)
    assert not faults
    for shape in shapes:
        check(shape, sizes or (SIZE,), coordinates)
    return rewrite(text, shapes, sizes or (SIZE,), coordinates)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('{"bbox_2d": [100, 200, 300, 400]}', '{"bbox_2d": [98, 196, 294, 392]}'),
        ("```json\n[\n\t{\"bbox_2d\":[0,0,600,400], 'label': 'é'}\n]\n```", None),
        ('{"bbox_2d": [[10, 10, 20, 20], [30, 30, 40, 40]]}', '{"bbox_2d": [[10, 10, 20, 20], [29, 29, 39, 39]]}'),
        ('{"bbox_2d": [[10, 10], [20, 20]]}', '{"bbox_2d": [[10, 10], [20, 20]]}'),
        ('{"point_2d": [50.5, 25.5]}', '{"point_2d": [49, 25]}'),
        ('{\\"bbox_2d\\": [100, 200, 300, 400]}', '{\\"bbox_2d\\": [98, 196, 294, 392]}'),
        ('<p data-bbox="100 200 300 400">x</p>', '<p data-bbox="98 196 294 392">x</p>'),
        ('<P DATA-BBOX="100 200 300 400">x</P>', '<P DATA-BBOX="98 196 294 392">x</P>'),
        ("<p Data-Bbox='100 200 300 400'>x</p>", "<p Data-Bbox='98 196 294 392'>x</p>"),
        ('<div data-polygon="100 0 0 100 50 50 7 7"/>', '<div data-polygon="98 0 0 98 49 49 7 7"/>'),
        ("<|box_start|>(100,200),(300,400)<|box_end|>", "<|box_start|>(98,196),(294,392)<|box_end|>"),
        ("<|box_start|>(100,200)<|box_end|>", "<|box_start|>(98,196)<|box_end|>"),
        ("no box: [100, 200, 300, 400] and (1,2)", "no box: [100, 200, 300, 400] and (1,2)"),
    ],
)
def test_only_the_digits_of_coordinates_change(before: str, after: str | None) -> None:
    result = rewritten(before)
    assert result == (after if after is not None else before.replace("600,400", "588,392"))
    assert re.sub(r"\d+(\.\d+)?", "#", result) == re.sub(r"\d+(\.\d+)?", "#", before)


def test_a_coordinate_is_rounded_once_and_half_to_even() -> None:
    # 1920 -> 980 pixels: 48 * 980 / 1920 = 24.5 and 144 * 980 / 1920 = 73.5.
    assert rewritten('{"point_2d": [48, 0]}', "pixels", HALF) == '{"point_2d": [24, 0]}'
    assert rewritten('{"point_2d": [144, 0]}', "pixels", HALF) == '{"point_2d": [74, 0]}'


def test_shares_are_scaled_to_the_resized_image() -> None:
    assert rewritten('{"bbox_2d": [0.25, 0.5, 1, 1.0]}', "norm1") == '{"bbox_2d": [147, 196, 588, 392]}'
    assert rewritten('{"bbox_2d": [250, 500, 1000, 1000]}', "norm1000") == '{"bbox_2d": [147, 196, 588, 392]}'


@pytest.mark.parametrize("coordinates", ["resized", "off"])
def test_coordinates_that_need_no_rewriting_stay(coordinates: str) -> None:
    text = '{"bbox_2d": [10.50, 20, 30, 40]}'
    assert rewritten(text, coordinates) == text


def test_the_image_is_the_one_that_the_object_names() -> None:
    text = (
        '[{"bbox_2d": [192, 108, 1920, 1080], "image_id": 1}, {"image_index": 0, "bbox_2d": [6, 4, 600, 400]},'
        ' {"label": {"image_id": 1}, "bbox_2d": [0, 0, 1, 1]}]'
    )
    shapes, _ = find_shapes(text)
    assert [shape.image for shape in shapes] == [1, 0, None]
    for elsewhere in ('[{"image_id": 1}, {"bbox_2d": [0, 0, 1, 1]}]', '{"image_id": 1.5, "bbox_2d": [0, 0, 1, 1]}'):
        assert [shape.image for shape in find_shapes(elsewhere).shapes] == [None]
    (shape,) = find_shapes('{"image_id": 39713312, "bbox_2d": [0, 0, 1, 1]}').shapes
    assert shape.image == 39713312
    assert json.loads(rewritten(text[: text.index("}, {")] + "}]", "pixels", SIZE, HALF))[0]["bbox_2d"] == [
        98,
        56,
        980,
        560,
    ]


@pytest.mark.parametrize(
    ("text", "num_shapes", "num_faults"),
    [
        ('{"bbox_2d":[1,2,3,4],"a":' * 20_000 + "0" + "}" * 20_000, 20_000, 0),
        ('"bbox_2d":x' * 40_000, 0, 40_000),
    ],
    ids=["nested objects", "one long word"],
)
def test_boxes_are_found_in_time_that_grows_with_the_text(text: str, num_shapes: int, num_faults: int) -> None:
    """A fraction of a second; reading the rest of the text for each box would take minutes."""
    start = time.process_time()
    shapes, faults = find_shapes(text)
    assert (len(shapes), len(faults)) == (num_shapes, num_faults)
    assert time.process_time() - start < 10


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"bbox_2d": [1, 2, 3]}', "has 3 numbers; bbox_2d has 4"),
        ('{"bbox_2d": [1, 2, 3, "4"]}', "not a number"),
        ('{"bbox_2d": [1, 2, NaN, 4]}', "not a number"),
        ('{"bbox_2d": null}', "not a number"),
        ('{"bbox_2d": [1, 2, 3, 1e99]}', "which no image has"),
        ('{"point_2d": [1, 2, 3]}', "point_2d has 2"),
        ('<p data-bbox="1 2 3">', "has 3 numbers; expected 4"),
        ('<p data-bbox="1 2 3 x">', "not a number"),
        ('<p data-polygon="1 2 3 4 5">', "even number"),
        ("<|box_start|>1,2,3,4<|box_end|>", "between its tokens"),
    ],
)
def test_a_malformed_box_is_reported_with_its_value(text: str, reason: str) -> None:
    shapes, faults = find_shapes(text)
    assert not shapes and len(faults) == 1 and reason in faults[0]


def test_a_question_may_describe_the_format_with_names() -> None:
    text = 'Answer as {"bbox_2d": [x1, y1, x2, y2], "label": "…"}.'
    assert find_shapes(text, is_answer=False) == ([], [])
    assert find_shapes(text, is_answer=True).faults
    text = 'Mark every line, as in <p data-bbox="x1 y1 x2 y2">.'
    assert find_shapes(text, is_answer=False) == ([], [])
    assert find_shapes(text, is_answer=True).faults
    assert find_shapes('<p data-bbox="0 y1 x2 y2">', is_answer=False).faults


@pytest.mark.parametrize(
    ("values", "coordinates", "reason"),
    [
        ([0, 0, 601.5, 400], "pixels", "x = 601.5, outside the image, which is 600 pixels wide"),
        ([0, -1.25, 5, 5], "pixels", "y = -1.25"),
        ([5, 0, 4, 5], "pixels", "x1 = 5 beyond x2 = 4"),
        ([0, 5, 5, 4], "pixels", "y1 = 5 beyond y2 = 4"),
        ([0, 0, 1.01, 1], "norm1", "norm1: 0 to 1"),
        ([0, 0, 1003, 1], "norm1000", "norm1000: 0 to 1000"),
        ([0, 0, 590, 1], "resized", "588 pixels wide"),
    ],
)
def test_a_box_that_cannot_be_right_is_an_error(values: list[float], coordinates: str, reason: str) -> None:
    (shape,), _ = find_shapes(json.dumps({"bbox_2d": values}))
    with pytest.raises(BoxError, match=re.escape(reason)):
        check(shape, [SIZE], coordinates)


def test_one_pixel_beyond_the_edge_is_clamped() -> None:
    assert rewritten('{"bbox_2d": [-1, -0.5, 601, 401]}') == '{"bbox_2d": [0, 0, 588, 392]}'


def test_a_list_beside_the_text_is_written_as_a_list() -> None:
    text, shape = number_shape([100, 200.5, 300, 400], image=2)
    assert text == "[100, 200.5, 300, 400]" and shape.image == 2 and shape.is_box
    assert [text[start:end] for start, end in shape.spans] == ["100", "200.5", "300", "400"]
    for wrong in ([1, 2, 3], [1, "2"], [True, 1], [1, float("nan")]):
        with pytest.raises(BoxError):
            number_shape(wrong, image=None)


def test_grounding_tokens_are_cut_out_and_the_rest_is_what_must_not_spell_a_token() -> None:
    text = "The <|object_ref_start|>cat<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|>."
    assert without_grounding_tokens(text) == "The ."
    assert "".join(piece for piece, _ in split_grounding_tokens(text)) == text
    assert [piece for piece, is_token in split_grounding_tokens(text) if not is_token] == [
        "The ",
        "cat",
        "(1,2),(3,4)",
        ".",
    ]
    assert "<|box_start|>" in without_grounding_tokens("<|box_start|>(1,2),(3,4)")
    assert "<|im_end|>" in without_grounding_tokens("<|object_ref_start|>a<|im_end|>b<|object_ref_end|>")


@given(
    st.integers(28, 4000),
    st.integers(28, 4000),
    st.integers(4 * 784, 2000 * 784),
    st.lists(st.fractions(0, 1), min_size=4, max_size=4),
    st.sampled_from(["pixels", "norm1", "norm1000"]),
)
def test_mapped_back_a_coordinate_lies_within_half_a_resized_pixel(
    height: int, width: int, max_pixels: int, shares: list[Fraction], coordinates: str
) -> None:
    if max(height, width) / min(height, width) > 200:
        return
    resized = smart_resize(height, width, min_pixels=784, max_pixels=max_pixels)
    size = ImageSize(height, width, *resized)
    limits = {"pixels": (width, height), "norm1": (1, 1), "norm1000": (1000, 1000)}[coordinates]
    x1, x2 = sorted(round(float(share * limits[0]), 3) for share in shares[:2])
    y1, y2 = sorted(round(float(share * limits[1]), 3) for share in shares[2:])
    result = json.loads(rewritten(json.dumps({"bbox_2d": [x1, y1, x2, y2]}), coordinates, size))["bbox_2d"]
    assert all(isinstance(coordinate, int) for coordinate in result)
    for axis, (before, after) in enumerate(zip((x1, y1, x2, y2), result)):
        extent = (size.resized_width, size.resized_height)[axis % 2]
        original = Fraction(str(before)) * extent / limits[axis % 2]
        assert abs(original - after) <= Fraction(1, 2) and 0 <= after <= extent


@given(st.text(alphabet='{}[]":,0123456789.-exN bbox_2dpoint_2d<>|()=\\' + "'", max_size=80))
def test_no_text_raises(text: str) -> None:
    shapes, _ = find_shapes('{"bbox_2d": ' + text)
    for shape in shapes:
        for start, end in shape.spans:
            assert start < end
