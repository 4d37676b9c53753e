"""A tiny model learns to see: ``python -m tests.benchmarks.learning`` (``--help`` lists the lessons).

The lessons ask questions about one image: the colour or shape of a figure, the number of figures, the value of a bar
named by its colour, the value of a bar or a point named by a word. Some questions are for training, others, about other
images, are held out. All answers of a kind are equally frequent, so the text of a question does not reveal its answer.
The data take the usual path: ``vlprep build``, then ``train/main.py`` from random weights, vision tower included, with
the held-out shards as ``--eval_shards``. An answer is right if all its tokens are.

To find a word in a chart, a model must be able to read. The lesson on charts therefore begins with exercises on other
charts: read a cropped word, give the value of a name or a colour in one or two cropped columns, then in full charts.
The answer repeats the name before the value, so it starts with the item being looked up.

Three baselines:

- exchanged: the same held-out questions, each with the image of another question of its kind;
- text only: the same model, trained on the same questions without images;
- likeliest: the most frequent training answer to the same question text, a bound on what text alone can give.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from demo.dataset import build_record
from demo.drawing import PNG, encode_image
from demo.kinds import Exchange, Kind, Language, Wording, compose, generator
from demo.scenes import SCENE_KINDS
from demo.tiny_model import write_tiny_checkpoint
from schemas.qwen import PATCH_SIZE
from tests.benchmarks.charts import CHART_KINDS, COLUMN_WIDTH, Chart, sample_chart
from tests.benchmarks.machine import describe_machine
from tests.train.launching import ENVIRONMENT, as_flags

REPOSITORY = Path(__file__).resolve().parents[2]

KINDS: dict[str, Kind] = {
    "colours": next(kind for kind in SCENE_KINDS if kind.name == "scene/colour"),
    "shapes": next(kind for kind in SCENE_KINDS if kind.name == "scene/shape"),
    "counts": next(kind for kind in SCENE_KINDS if kind.name == "scene/count"),
    "values_by_colour": next(kind for kind in CHART_KINDS if kind.name == "chart/value_by_colour"),
    "values_by_name": next(kind for kind in CHART_KINDS if kind.name == "chart/value"),
}
"""Kinds of questions by dataset name."""

EXCHANGED = "exchanged"
MIN_PIXELS = (4 * PATCH_SIZE) ** 2
"""No image is enlarged. The smallest ones are cropped words."""

Record = dict[str, Any]


def crop_word(chart: Chart, column: int, rng: np.random.Generator) -> tuple[Exchange, Image.Image]:
    """Ask for the name of a column: 2 x 2 merged tokens around its label, off by at most one patch."""
    x, y = chart.point(column)
    left, top = (int(at + PATCH_SIZE * rng.integers(-1, 2)) for at in (x - 2 * PATCH_SIZE, y - 3 * PATCH_SIZE))
    exchange = Exchange(question="Read the word.", answer=chart.categories[column], value=chart.categories[column])
    return exchange, chart.draw().crop((left, top, left + 4 * PATCH_SIZE, top + 4 * PATCH_SIZE))


def crop_columns(chart: Chart, column: int, rng: np.random.Generator) -> tuple[Exchange, Image.Image]:
    """Ask for the value of a column: that column without margins, usually with a neighbour."""
    num = 1 if rng.random() < 0.2 else 2
    first = min(max(0, column - int(rng.integers(num))), len(chart.values) - num)
    left, bottom = chart.point(first)[0] - COLUMN_WIDTH // 2, chart.height_of(0)
    image = chart.draw().crop((left, bottom - 12 * PATCH_SIZE, left + num * COLUMN_WIDTH, bottom))
    return _name_and_value(chart, column, rng), image


def whole_chart(chart: Chart, column: int, rng: np.random.Generator) -> tuple[Exchange, Image.Image]:
    """Ask for the value of a column in the full chart."""
    return _name_and_value(chart, column, rng), chart.draw()


def _name_and_value(chart: Chart, column: int, rng: np.random.Generator) -> Exchange:
    """Half of the bars are named by their colours. The answer repeats the name right before the value."""
    name, value = chart.categories[column], str(chart.values[column])
    if chart.chart_type == "bar" and rng.random() < 0.5:
        language: Language = "zh" if rng.random() < 0.2 else "en"
        name = Wording(language=language).word(chart.colours[column])
    return Exchange(question=f"Read {name}.", answer=name + value, value=value)


Exercise = Callable[[Chart, int, np.random.Generator], tuple[Exchange, Image.Image]]

EXERCISES: dict[str, Exercise] = {
    "words": crop_word,
    "columns": crop_columns,
    "whole_charts": whole_chart,
}
"""Exercises about one column of a bar or line chart, by dataset name. They come before the questions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Shares of right answers to the held-out questions of one kind."""

    seeing: float
    exchanged: float
    text_only: float
    likeliest: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Lesson:
    """Data, model and duration of a training.

    Attributes:
        questions: Number of training questions by kind, a key of :data:`KINDS`.
        exercises: Number of exercises before them by kind, a key of :data:`EXERCISES`.
        exercise_steps: Optimizer steps of the exercises, at a constant learning rate.
        num_held_out: Held-out questions of each kind.
        steps: Optimizer steps of the questions.
        text_steps: Optimizer steps of the text-only baseline, whose bins hold several times as many questions.
        max_length: Tokens of a bin. Each rank gets one bin per step.
        learning_rate: Peak learning rate.
        num_layers: Layers of the language model.
        vision_size: Width of the vision tower.
        cosines: Whether patches are embedded by cosines.
    """

    questions: Mapping[str, int]
    exercises: Mapping[str, int] = field(default_factory=dict)
    exercise_steps: int = 0
    num_held_out: int = 200
    steps: int
    text_steps: int = 200
    max_length: int = 1024
    learning_rate: float = 3e-3
    num_layers: int = 2
    vision_size: int = 32
    cosines: bool = False


def learn(lesson: Lesson, folder: Path, *, ranks: int) -> dict[str, Scores]:
    """Draw the data of a lesson, build shards, train and evaluate.

    Args:
        lesson: The lesson.
        folder: An empty working folder.
        ranks: Number of training processes.

    Returns:
        The scores of every kind of question.
    """
    model = folder / "model"
    write_tiny_checkpoint(
        model, num_hidden_layers=lesson.num_layers, vision_hidden_size=lesson.vision_size, cosines=lesson.cosines
    )
    train = {name: draw_questions(name, num, folder, held_out=False) for name, num in lesson.questions.items()}
    held_out = {name: draw_questions(name, lesson.num_held_out, folder, held_out=True) for name in lesson.questions}
    all_train = [record for records in train.values() for record in records]
    exchanged = {f"{name}_{EXCHANGED}": exchange_images(records) for name, records in held_out.items()}
    with_images = {"train": all_train, **held_out, **exchanged}
    text_only = {
        name: [without_image(record) for record in records]
        for name, records in {"train": all_train, **held_out}.items()
    }
    exercises = {name: draw_exercises(name, num, folder) for name, num in lesson.exercises.items()}
    initial_models = {"seeing": model, "text": model}
    if exercises:
        build(exercises, tuple(exercises), folder, "seeing", "exercises", lesson, model)
        initial_models["seeing"] = exercise(folder, lesson, model, ranks)
    accuracy: dict[str, dict[str, float]] = {}
    for way, datasets, steps in (("seeing", with_images, lesson.steps), ("text", text_only, lesson.text_steps)):
        build(datasets, ("train",), folder, way, f"{way}-train", lesson, model)
        build(
            datasets, tuple(name for name in datasets if name != "train"), folder, way, f"{way}-held-out", lesson, model
        )
        accuracy[way] = train_and_ask(folder, way, steps, lesson, initial_models[way], ranks)
    return {
        name: Scores(
            seeing=accuracy["seeing"][name],
            exchanged=accuracy["seeing"][f"{name}_{EXCHANGED}"],
            text_only=accuracy["text"][name],
            likeliest=likeliest_answers(train[name], held_out[name]),
        )
        for name in lesson.questions
    }


def draw_questions(name: str, num: int, folder: Path, *, held_out: bool) -> list[Record]:
    """Return records of one kind, with their images in ``folder``."""
    part = "heldout" if held_out else "train"
    drafts = compose([KINDS[name]], num, generator(0, f"{part}/{name}"), held_out=held_out)
    rng = generator(0, f"{part}/{name}/records")
    (folder / "images").mkdir(exist_ok=True)
    records: list[Record] = []
    for index, draft in enumerate(drafts):
        path = f"images/{part}-{name}-{index:05d}.png"
        (folder / path).write_bytes(encode_image(draft.facts[0].draw(), PNG))
        record = build_record(draft, [path], identifier=f"{part}-{name}-{index:05d}", rng=rng)
        del record["image" if "image" in record else "images"]
        records.append({**record, "image": path})
    return records


def draw_exercises(name: str, num: int, folder: Path) -> list[Record]:
    """Return records of one kind of exercise, with their images in ``folder``."""
    (folder / "images").mkdir(exist_ok=True)
    return [draw_exercise(name, folder, index) for index in range(num)]


def draw_exercise(name: str, folder: Path, index: int) -> Record:
    """Return the record of one exercise on its own chart. Two of three charts have bars."""
    rng = generator(0, f"exercises/{name}/{index}")
    chart = sample_chart(rng, ("bar", "bar", "line"))
    exchange, image = EXERCISES[name](chart, int(rng.integers(len(chart.values))), rng)
    path = f"images/exercise-{name}-{index:05d}.png"
    (folder / path).write_bytes(encode_image(image, PNG))
    turns = [("human", f"<image>\n{exchange.question}"), ("gpt", exchange.answer)]
    return {"id": path, "image": path, "conversations": [{"from": who, "value": text} for who, text in turns]}


def exchange_images(records: Sequence[Record]) -> list[Record]:
    """Return the same questions and answers, each with the image of the next one."""
    images = [record["image"] for record in records]
    return [{**record, "image": image} for record, image in zip(records, [*images[1:], images[0]])]


def without_image(record: Record) -> Record:
    """Return the same question and answer without the image."""
    question, answer = record["conversations"]
    bare = {"from": "human", "value": question["value"].replace("<image>", "").strip()}
    return {"id": record["id"], "conversations": [bare, answer]}


def likeliest_answers(train: Sequence[Record], held_out: Sequence[Record]) -> float:
    """Return the share of right answers if each is the most frequent one to the same text in training (or overall)."""

    def words(record: Record) -> str:
        text: str = without_image(record)["conversations"][0]["value"]
        return text

    by_words: dict[str, Counter[str]] = {}
    for record in train:
        answers = by_words.setdefault(words(record), Counter())
        answers[record["conversations"][1]["value"]] += 1
    of_all: Counter[str] = sum(by_words.values(), Counter())
    right = sum(
        by_words.get(words(record), of_all).most_common(1)[0][0] == record["conversations"][1]["value"]
        for record in held_out
    )
    return right / len(held_out)


def build(
    datasets: dict[str, list[Record]],
    names: Sequence[str],
    folder: Path,
    way: str,
    out: str,
    lesson: Lesson,
    model: Path,
    *options: str,
) -> None:
    """Build shards of some of the datasets with ``vlprep build``. ``options`` are further command-line options."""
    lines = []
    for name in names:
        path = folder / f"{way}-{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in datasets[name]))
        lines += [f"[{name}]", f'annotation_path = "{path}"', f'media_root = "{folder}"']
    registry = folder / f"{out}.toml"
    registry.write_text("\n".join(lines) + "\n")
    arguments = ["build", ",".join(names), "--registry", str(registry), "--model", str(model)]
    arguments += ["--out", str(folder / out), "--max-length", str(lesson.max_length)]
    vlprep([*arguments, "--min-pixels", str(MIN_PIXELS), *options])


def vlprep(arguments: Sequence[str]) -> None:
    """Run ``vlprep``."""
    _run([sys.executable, "-c", "from prep.cli import main; main()", *arguments])


def exercise(folder: Path, lesson: Lesson, model: Path, ranks: int) -> Path:
    """Train on the exercises and return the folder of the trained model."""
    out = folder / "exercises-run"
    train(
        folder / "exercises", out, lesson.exercise_steps, lesson, model, ranks, lr_scheduler_type="constant_with_warmup"
    )
    return out / "final"


def train_and_ask(folder: Path, way: str, steps: int, lesson: Lesson, model: Path, ranks: int) -> dict[str, float]:
    """Train on ``<way>-train`` and return the share of right answers for every dataset of ``<way>-held-out``."""
    out = folder / f"{way}-run"
    train(folder / f"{way}-train", out, steps, lesson, model, ranks, eval_shards=folder / f"{way}-held-out")
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    return {name: scores["exact_match"] for name, scores in last["eval_datasets"].items()}


def train(shards: Path, out: Path, steps: int, lesson: Lesson, model: Path, ranks: int, **more: object) -> None:
    """Run ``train/main.py``. ``more`` are further settings."""
    settings: dict[str, object] = {
        "shards": shards,
        "model_name_or_path": model,
        "output_dir": out,
        "tune_mm_vision": True,
        "learning_rate": lesson.learning_rate,
        "max_steps": steps,
        "gradient_accumulation_steps": 1,
        "per_device_train_batch_size": 1,
        "gradient_checkpointing": False,
        "logging_steps": 100,
        "save_steps": 0,
        **more,
    }
    launch(ranks, *as_flags(settings))


def launch(ranks: int, *flags: str) -> None:
    """Run ``train/main.py`` on several ranks."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    _run([*launcher, "train/main.py", *flags])


def _run(program: Sequence[str]) -> None:
    done = subprocess.run(program, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"{' '.join(program)} ended with {done.returncode}:\n{done.stderr[-3000:]}")


SCENES = Lesson(questions=dict.fromkeys(("colours", "shapes", "counts"), 3000), steps=1500)
CHARTS = Lesson(
    exercises={"words": 5_000, "columns": 36_000, "whole_charts": 28_000},
    exercise_steps=3200,
    questions={"values_by_colour": 10_000, "values_by_name": 14_000},
    num_held_out=400,
    steps=1600,
    text_steps=400,
    learning_rate=1e-3,
    num_layers=3,
    vision_size=64,
    cosines=True,
)
LESSONS = {"scenes": SCENES, "charts": CHARTS}


@click.command()
@click.argument("lessons", type=click.Choice(list(LESSONS)), nargs=-1)
@click.option("--steps", type=click.IntRange(min=1), help="Optimizer steps of the questions.")
@click.option("--exercise-steps", type=click.IntRange(min=1), help="Optimizer steps of the exercises.")
@click.option("--samples", type=click.IntRange(min=1), help="Number of questions and exercises of each kind.")
@click.option(
    "--ranks", type=click.IntRange(min=1), default=2, show_default=True, help="Training processes, one per core."
)
def main(
    lessons: Sequence[str], steps: int | None, exercise_steps: int | None, samples: int | None, ranks: int
) -> None:
    """Train a tiny model from random weights and ask it about images that it has not seen.

    LESSONS are scenes (colours, shapes, counts) and charts (values). Default: both.
    """
    click.echo(describe_machine("torch", "transformers", "deepspeed"))
    for name in lessons or LESSONS:
        lesson = LESSONS[name]
        lesson = replace(
            lesson,
            steps=steps or lesson.steps,
            exercise_steps=exercise_steps or lesson.exercise_steps,
            questions={kind: samples or num for kind, num in lesson.questions.items()},
            exercises={kind: samples or num for kind, num in lesson.exercises.items()},
        )
        with tempfile.TemporaryDirectory() as folder:
            click.echo(report(lesson, learn(lesson, Path(folder), ranks=ranks), ranks=ranks))


def report(lesson: Lesson, scores: dict[str, Scores], *, ranks: int) -> str:
    """Return the settings and the scores of a lesson as a table."""
    width = max(len(name) for name in scores) + 2
    questions, exercises = (
        ", ".join(f"{num} {name}" for name, num in kinds.items()) for kinds in (lesson.questions, lesson.exercises)
    )
    before = f"; before them {lesson.exercise_steps} steps of exercises: {exercises}" if exercises else ""
    lines = [
        f"\ntraining questions: {questions}; {lesson.num_held_out} of each held out; {lesson.steps} steps of "
        f"{ranks} bins of {lesson.max_length} tokens{before}",
        f"{'':<{width}}{'seeing':>12}{'exchanged':>12}{'text only':>12}{'likeliest':>12}",
    ]
    shares = {name: (score.seeing, score.exchanged, score.text_only, score.likeliest) for name, score in scores.items()}
    if len(scores) > 1:
        # The kinds have equally many held-out questions.
        shares["all"] = tuple(sum(column) / len(scores) for column in zip(*shares.values()))
    lines += [f"{name:<{width}}" + "".join(f"{share:>12.1%}" for share in columns) for name, columns in shares.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
