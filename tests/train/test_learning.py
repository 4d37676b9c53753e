"""What is built and trained is enough to learn to see: the whole way on one kind of question, in a minute or two of two
processors.

``python -m tests.benchmarks.learning`` does it with shapes and counts, and with the values of charts, for longer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageDraw

from prep.demo import charts
from prep.demo.charts import TOPICS, Chart, sample_chart
from tests.benchmarks.learning import (
    CUT_SIZE,
    EXERCISES,
    HALF_HEIGHT,
    Lesson,
    Place,
    Record,
    Scores,
    cut_out,
    draw_exercises,
    draw_questions,
    exchange_pictures,
    label_place,
    learn,
    likeliest_answers,
    value_place,
    without_picture,
)


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Scores:
    lesson = Lesson(kinds=("colours",), num_train=1500, num_held_out=100, steps=140, text_steps=30)
    return learn(lesson, tmp_path_factory.mktemp("learning"), ranks=1)["colours"]


def test_a_tiny_model_learns_colours_from_pixels_alone(scores: Scores) -> None:
    """Random weights before, nine of ten right after; five colours come equally often, so one of five by guessing."""
    assert scores.seeing >= 0.9
    assert max(scores.text_only, scores.likeliest) <= 0.3


def test_with_exchanged_pictures_it_knows_no_more_than_the_text(scores: Scores) -> None:
    assert scores.exchanged <= 0.3


@given(st.data())
def test_what_is_cut_out_has_the_whole_text_in_it(data: st.DataObject) -> None:
    """A text of white pixels, as far from the border of a black picture as texts of charts are."""
    width, height = data.draw(st.integers(60, 336)), data.draw(st.integers(60, 252))
    half = data.draw(st.integers(1, 24))
    x, y = data.draw(st.integers(half, width - half)), data.draw(st.integers(7, height - 7))
    picture = Image.new("L", (width, height))
    picture.paste(255, (x - half, y - HALF_HEIGHT, x + half, y + HALF_HEIGHT))
    place = Place(x=x, y=y, half_width=half)
    cut = cut_out(picture, place, np.random.default_rng(data.draw(st.integers(0, 9))))
    assert cut.size == (CUT_SIZE, CUT_SIZE)
    assert np.count_nonzero(np.asarray(cut)) == 2 * half * 2 * HALF_HEIGHT


@given(seed=st.integers(0, 2**32 - 1), column=st.integers(0, 2), is_label=st.booleans())
def test_the_answer_is_written_where_it_is_cut_out(seed: int, column: int, is_label: bool) -> None:
    """What changes in the picture when nothing but this one text is left out; edges are smoothed over a pixel."""
    chart = sample_chart(np.random.default_rng(seed), ("bar", "line"))
    place = (label_place if is_label else value_place)(chart, column)
    with pytest.MonkeyPatch.context() as patch:
        if is_label:
            names = [" " if number == column else name for number, name in enumerate(chart.categories)]
            without = replace(chart, categories=tuple(names)).draw()
        else:
            patch.setattr(charts, "_paint_values", all_values_but(column, charts._paint_values))
            without = chart.draw()
    changed = ImageChops.difference(chart.draw(), without).getbbox()
    assert changed is not None
    left, top, right, bottom = changed
    assert place.x - place.half_width - 1 <= left and right <= place.x + place.half_width + 1
    assert place.y - HALF_HEIGHT - 1 <= top and bottom <= place.y + HALF_HEIGHT + 1


def all_values_but(column: int, paint: Callable[..., None]) -> Callable[..., None]:
    """A function in place of the one that paints the values of a chart."""

    def paint_others(draw: ImageDraw.ImageDraw, chart: Chart, points: list[tuple[float, float]], gap: int) -> None:
        others = [number for number in range(len(points)) if number != column]
        rest = replace(chart, values=tuple(chart.values[number] for number in others))
        paint(draw, rest, [points[number] for number in others], gap=gap)

    return paint_others


def test_exercises_ask_for_what_is_in_their_pictures(tmp_path: Path) -> None:
    records = draw_exercises(40, tmp_path)
    assert {record["kind"] for record in records} == set(EXERCISES)
    labels = {label for labels in TOPICS.values() for label in labels}
    for record in records:
        turns = record["conversations"]
        answers = [turn["value"] for turn in turns if turn["from"] == "gpt"]
        with Image.open(tmp_path / record["image"]) as picture:
            is_piece = picture.size == (CUT_SIZE, CUT_SIZE)
            assert picture.width == CUT_SIZE or record["kind"] == "chart"
        assert is_piece == (record["kind"] in ("label", "value"))
        assert [turn["value"].count("<image>") for turn in turns] == [1] + [0] * (len(turns) - 1)
        if record["kind"] == "label":
            assert set(answers) <= labels
        else:
            assert {int(answer) % 10 for answer in answers} == {0}
        assert (len(answers) > 1) == (record["kind"] == "chart")


def test_no_question_keeps_its_picture_when_they_are_exchanged(tmp_path: Path) -> None:
    records = draw_questions("shapes", 12, tmp_path, held_out=True)
    exchanged = exchange_pictures(records)
    assert [record["conversations"] for record in exchanged] == [record["conversations"] for record in records]
    assert all(one["image"] != other["image"] for one, other in zip(exchanged, records))
    assert sorted(record["image"] for record in exchanged) == sorted(record["image"] for record in records)


def test_the_likeliest_answer_is_that_of_the_same_words() -> None:
    def record(question: str, answer: str) -> Record:
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        return {"id": "", "image": "", "conversations": turns}

    train = [record("A?", "one"), record("A?", "one"), record("A?", "two"), record("B?", "two"), record("B?", "two")]
    train.append(record("C?", "two"))
    asked = [
        record("A?", "one"),
        record("A?", "two"),
        record("B?", "two"),
        record("new?", "two"),
        record("new?", "one"),
    ]
    assert likeliest_answers(train, asked) == 3 / 5
    assert without_picture(asked[0])["conversations"][0]["value"] == "A?"
