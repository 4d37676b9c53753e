"""The boxes of the pointing benchmark are those of the shapes in the images, and an answer is judged by its overlap."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image

from tests.benchmarks.pointing import ENLARGED, SIDE, draw_question, overlap, read_box, true_box


def box(*values: int) -> tuple[Fraction, ...]:
    return tuple(map(Fraction, values))


def test_the_overlap_is_the_intersection_over_the_union() -> None:
    assert overlap(box(0, 0, 10, 10), box(0, 0, 10, 10)) == 1
    # 5 x 10 in common, 150 in all.
    assert overlap(box(0, 0, 10, 10), box(5, 0, 15, 10)) == Fraction(1, 3)
    assert overlap(box(0, 0, 10, 10), box(10, 0, 20, 10)) == 0
    assert overlap(box(10, 10, 0, 0), box(0, 0, 10, 10)) == 0


def test_an_answer_without_a_box_has_none() -> None:
    assert read_box('{"bbox_2d": [1, 2, 3, 4]}<|im_end|>') == box(1, 2, 3, 4)
    assert read_box('{"bbox_2d": [1, 2, 3') is None
    assert read_box("1, 2, 3, 4") is None


def test_a_shape_lies_in_its_box_and_is_two_thirds_as_wide(tmp_path: Path) -> None:
    for index in range(12):
        record = draw_question(tmp_path, "test", index)
        image = np.asarray(Image.open(tmp_path / record["image"])).astype(int)
        enlarged = ENLARGED[index % len(ENLARGED)]
        assert image.shape[:2] == (SIDE * enlarged, SIDE * enlarged)
        ys, xs = np.nonzero(np.abs(image - image[0, 0]).max(axis=-1) > 20)
        x1, y1, x2, y2 = (float(value) * enlarged for value in true_box(record))
        assert x1 - 2 <= xs.min() and y1 - 2 <= ys.min() and xs.max() <= x2 + 2 and ys.max() <= y2 + 2
        assert np.ptp(xs) > 0.66 * (x2 - x1) and np.ptp(ys) > 0.66 * (y2 - y1)
