"""Builds and training teach a tiny model to see: the whole pipeline on one kind of question, in 1 to 2 minutes.

``python -m tests.benchmarks.learning`` also trains on shapes, counts and the values of charts, for longer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from demo.kinds import Language, Wording, generator
from prep.cli import main
from schemas.qwen import PATCH_SIZE
from tests.benchmarks import learning
from tests.benchmarks.charts import COLUMN_WIDTH, sample_chart
from tests.benchmarks.learning import (
    EXERCISES,
    Lesson,
    Record,
    Scores,
    draw_questions,
    exchange_images,
    learn,
    likeliest_answers,
    without_image,
)
from tests.train.launching import run_ranks


def launch(ranks: int, *flags: str) -> None:
    done = run_ranks(ranks, *flags, limit_s=1800)
    assert done.returncode == 0, done.stderr


def vlprep(arguments: Sequence[str]) -> None:
    """Run ``vlprep`` in this process."""
    done = CliRunner().invoke(main, [*arguments, "--workers", "1"])
    assert done.exit_code == 0, done.output


@pytest.fixture(scope="module")
def scores(demo_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Scores:
    """Of a lesson that starts with the demo's checkpoint, which has the sizes of the lesson's."""

    def copy(out: Path, **sizes: object) -> None:
        assert sizes == {"num_hidden_layers": 2, "vision_hidden_size": 32, "cosines": False}
        shutil.copytree(demo_checkpoint, out)

    lesson = Lesson(questions={"colours": 1500}, num_held_out=100, steps=140, text_steps=30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(learning, "launch", launch)
        patch.setattr(learning, "vlprep", vlprep)
        patch.setattr(learning, "write_tiny_checkpoint", copy)
        return learn(lesson, tmp_path_factory.mktemp("learning"), ranks=1)["colours"]


@pytest.mark.slow
def test_a_tiny_model_learns_colours_from_pixels_alone(scores: Scores) -> None:
    """From random weights to 9 of 10 right. The 5 colours are equally frequent, so a guess is right 1 of 5 times."""
    assert scores.seeing >= 0.9
    assert max(scores.text_only, scores.likeliest) <= 0.3


@pytest.mark.slow
def test_with_exchanged_images_the_model_knows_no_more_than_the_text(scores: Scores) -> None:
    assert scores.exchanged <= 0.3


def test_no_question_keeps_its_image_when_images_are_exchanged(tmp_path: Path) -> None:
    records = draw_questions("shapes", 12, tmp_path, held_out=True)
    exchanged = exchange_images(records)
    assert [record["conversations"] for record in exchanged] == [record["conversations"] for record in records]
    assert all(changed["image"] != original["image"] for changed, original in zip(exchanged, records))
    assert sorted(record["image"] for record in exchanged) == sorted(record["image"] for record in records)


def test_the_likeliest_answer_is_the_most_frequent_one_to_the_same_text() -> None:
    def record(question: str, answer: str) -> Record:
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        return {"id": "", "image": "", "conversations": turns}

    train = [record("A?", "one"), record("A?", "one"), record("A?", "two"), record("B?", "two"), record("B?", "two")]
    train.append(record("C?", "two"))
    questions = [
        record("A?", "one"),
        record("A?", "two"),
        record("B?", "two"),
        record("new?", "two"),
        record("new?", "one"),
    ]
    assert likeliest_answers(train, questions) == 3 / 5
    assert without_image(questions[0])["conversations"][0]["value"] == "A?"


def colour_words(colour: str) -> set[str]:
    languages: tuple[Language, ...] = ("en", "zh")
    return {Wording(language=language).word(colour) for language in languages}


@pytest.mark.parametrize(("name", "sizes"), [("words", {(56, 56)}), ("columns", {(56, 168), (112, 168)})])
def test_a_crop_shows_the_column_that_its_question_names(name: str, sizes: set[tuple[int, int]]) -> None:
    """Another name changes the crop, and only where the name is drawn."""
    rng = generator(0, "test")
    sizes_seen = set()
    for seed in range(40):
        chart = sample_chart(rng, ("bar", "line"))
        column = int(rng.integers(len(chart.values)))
        exchange, image = EXERCISES[name](chart, column, generator(seed, "cut"))
        category, value = chart.categories[column], str(chart.values[column])
        named = {category} if name == "words" else {category, *colour_words(chart.colours[column])}
        assert exchange.answer in {text + (value if name == "columns" else "") for text in named}
        assert name == "words" or exchange.answer.removesuffix(value) in exchange.question
        renamed = replace(chart, categories=(*chart.categories[:column], "ox", *chart.categories[column + 1 :]))
        other = EXERCISES[name](renamed, column, generator(seed, "cut"))[1]
        rows, columns = np.nonzero((np.asarray(image) != np.asarray(other)).any(axis=-1))
        assert rows.size >= 20
        assert np.ptp(rows) < 1.5 * PATCH_SIZE and np.ptp(columns) < COLUMN_WIDTH
        sizes_seen.add(image.size)
    assert sizes_seen == sizes


def test_exercises_on_full_charts_show_the_full_chart() -> None:
    chart = sample_chart(generator(1, "test"), ("bar",))
    exchange, image = EXERCISES["whole_charts"](chart, 1, generator(1, "cut"))
    assert exchange.answer.endswith(str(chart.values[1]))
    np.testing.assert_array_equal(np.asarray(image), np.asarray(chart.draw()))


@pytest.mark.slow
def test_training_with_images_starts_with_the_exercises_and_text_only_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: dict[str, tuple[str, ...]] = {}
    trained: list[tuple[str, str, int]] = []

    def build(_: object, names: Sequence[str], _folder: Path, _way: str, out: str, *_more: object) -> None:
        built[out] = tuple(names)

    def train(shards: Path, out: Path, steps: int, _: Lesson, model: Path, *_more: object, **settings: Any) -> None:
        trained.append((shards.name, model.relative_to(tmp_path).as_posix(), steps))
        datasets = built[settings["eval_shards"].name] if "eval_shards" in settings else ()
        out.mkdir()
        scores = {"eval_datasets": {name: {"exact_match": 0.5} for name in datasets}}
        (out / "metrics.jsonl").write_text(json.dumps(scores) + "\n")

    monkeypatch.setattr(learning, "build", build)
    monkeypatch.setattr(learning, "train", train)
    lesson = Lesson(
        questions={"values_by_name": 9},
        exercises={"words": 2, "columns": 2},
        exercise_steps=7,
        num_held_out=9,
        steps=5,
        text_steps=3,
    )
    assert learn(lesson, tmp_path, ranks=1)["values_by_name"].seeing == 0.5
    assert built["exercises"] == ("words", "columns")
    assert trained == [
        ("exercises", "model", 7),
        ("seeing-train", "exercises-run/final", 5),
        ("text-train", "model", 3),
    ]
