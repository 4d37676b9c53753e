"""What is built and trained is enough to learn to see: the whole way on one kind of question, in a minute or two of two
processors.

``python -m tests.benchmarks.learning`` does it with shapes and counts, and with the values of charts, for longer.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.learning import (
    Lesson,
    Record,
    Scores,
    draw_questions,
    exchange_pictures,
    learn,
    likeliest_answers,
    without_picture,
)


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory) -> Scores:
    lesson = Lesson(questions={"colours": 1500}, num_held_out=100, steps=140, text_steps=30)
    return learn(lesson, tmp_path_factory.mktemp("learning"), ranks=1)["colours"]


def test_a_tiny_model_learns_colours_from_pixels_alone(scores: Scores) -> None:
    """Random weights before, nine of ten right after; five colours come equally often, so one of five by guessing."""
    assert scores.seeing >= 0.9
    assert max(scores.text_only, scores.likeliest) <= 0.3


def test_with_exchanged_pictures_it_knows_no_more_than_the_text(scores: Scores) -> None:
    assert scores.exchanged <= 0.3


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
