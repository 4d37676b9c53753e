"""A tiny model learns to see: ``python -m tests.benchmarks.learning`` (see ``--help`` for its lessons).

Questions of the demo dataset about one picture (its colour, its shape, how many shapes, a value of a chart), for
training and, about other pictures, held out. Every answer of a kind comes equally often, so the text of a question says
nothing about its answer. To read a chart takes more than its questions: see :func:`draw_exercises`. They go the whole
way: ``vlprep build``, then ``train/main.py`` from random weights, vision tower included, with the held-out shards as
``--eval_shards``. An answer is right where all its tokens are.

Beside it stand

- the same held-out questions with their pictures exchanged among them (each gets that of another question of its
  kind): what a model that sees must lose;
- the same model trained on the same questions without their pictures: the text-only baseline;
- the answer that came most often in training with the same words of the question: what text alone can give at best.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image

from prep.demo.chart_questions import CHART_KINDS
from prep.demo.charts import Chart, sample_chart
from prep.demo.kinds import Draft, Kind, compose, generator
from prep.demo.media import PNG, encode_picture
from prep.demo.records import MediaFile, build_record
from prep.demo.scene_questions import SCENE_KINDS
from prep.demo.vocabulary import Dialogue, Language, Wording
from tests.benchmarks.machine import describe_machine
from tests.train.launching import ENVIRONMENT
from train.tiny_model import write_tiny_checkpoint

REPOSITORY = Path(__file__).resolve().parents[2]

KINDS: dict[str, Kind[Any]] = {
    "colours": next(kind for kind in SCENE_KINDS if kind.name == "colour"),
    "shapes": next(kind for kind in SCENE_KINDS if kind.name == "shape"),
    "counts": next(kind for kind in SCENE_KINDS if kind.name == "count"),
    "values": next(kind for kind in CHART_KINDS if kind.name == "value"),
}
"""What is asked, by the name of its dataset."""

EXCHANGED = "exchanged"

EXERCISES = {"label": 0.4, "value": 0.15, "column": 0.15, "chart": 0.3}
"""Sorts of exercises and their shares."""

CUT_SIZE = 56
"""Side of the pieces that are cut out of charts, in pixels: two merged patches."""

HALF_HEIGHT = 7
"""Of the texts beside and below bars and points, in pixels."""

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Shares of the held-out questions of one kind that are answered right."""

    seeing: float
    exchanged: float
    text_only: float
    likeliest: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a text stands: its middle, and half of its width, in pixels."""

    x: float
    y: float
    half_width: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Lesson:
    """How long to learn, and from what.

    Attributes:
        kinds: keys of :data:`KINDS`.
        num_train: questions of each kind to learn from.
        num_held_out: questions of each kind to be asked.
        steps: of the optimizer, each with one bin a rank.
        text_steps: the same for the text-only baseline, whose bins hold several times as many questions.
        max_length: tokens of a bin.
        learning_rate: peak.
        vision_rate: peak of the vision tower and the merger; that of all the rest if not given.
        num_exercises: pictures to learn to read from, beside the questions: see :func:`draw_exercises`.
        bins: of a rank in each step.
        num_layers: of the language model.
        vision_size: width of the vision tower.
        cosines: whether patches are embedded by cosines.
    """

    kinds: tuple[str, ...] = tuple(KINDS)
    num_train: int = 3000
    num_held_out: int = 200
    steps: int = 1500
    text_steps: int = 200
    max_length: int = 1024
    learning_rate: float = 3e-3
    vision_rate: float | None = None
    num_exercises: int = 0
    bins: int = 1
    num_layers: int = 2
    vision_size: int = 32
    cosines: bool = False


def learn(lesson: Lesson, folder: Path, *, ranks: int) -> dict[str, Scores]:
    """Draw, build, train and ask.

    Args:
        lesson: what and how long.
        folder: an empty folder to work in.
        ranks: processes that train.

    Returns:
        What came of every kind.
    """
    model = folder / "model"
    write_tiny_checkpoint(
        model, num_hidden_layers=lesson.num_layers, vision_hidden_size=lesson.vision_size, cosines=lesson.cosines
    )
    train = {name: draw_questions(name, lesson.num_train, folder, held_out=False) for name in lesson.kinds}
    asked = {name: draw_questions(name, lesson.num_held_out, folder, held_out=True) for name in lesson.kinds}
    everything = [record for records in train.values() for record in records]
    exchanged = {f"{name}_{EXCHANGED}": exchange_pictures(records) for name, records in asked.items()}
    seen = {"train": everything + draw_exercises(lesson.num_exercises, folder), **asked, **exchanged}
    blind = {
        name: [without_picture(record) for record in records]
        for name, records in {"train": everything, **asked}.items()
    }
    found: dict[str, dict[str, float]] = {}
    for way, datasets, steps in (("seeing", seen, lesson.steps), ("text", blind, lesson.text_steps)):
        build(datasets, ("train",), folder, way, f"{way}-train", lesson, model)
        build(datasets, tuple(name for name in datasets if name != "train"), folder, way, f"{way}-asked", lesson, model)
        found[way] = train_and_ask(folder, way, steps, lesson, model, ranks)
    return {
        name: Scores(
            seeing=found["seeing"][name],
            exchanged=found["seeing"][f"{name}_{EXCHANGED}"],
            text_only=found["text"][name],
            likeliest=likeliest_answers(train[name], asked[name]),
        )
        for name in lesson.kinds
    }


def draw_questions(name: str, num: int, folder: Path, *, held_out: bool) -> list[Record]:
    """Records of one kind; their pictures lie in ``folder``."""
    part = "heldout" if held_out else "train"
    drafts: list[Draft[Any]] = compose([KINDS[name]], num, generator(0, f"{part}/{name}"), held_out=held_out)
    rng = generator(0, f"{part}/{name}/records")
    (folder / "images").mkdir(exist_ok=True)
    records: list[Record] = []
    for number, draft in enumerate(drafts):
        path = f"images/{part}-{name}-{number:05d}.png"
        (folder / path).write_bytes(encode_picture(draft.facts[0].draw(), PNG))
        records.append(record_of(draft, path, f"{part}-{name}-{number:05d}", name, rng))
    return records


def draw_exercises(num: int, folder: Path) -> list[Record]:
    """Charts in small pieces and whole ones, so that a model learns to read before it is to find what to read.

    A label or a value is cut out of a chart, to be read; of the column of one category, and of a whole chart, all
    values in it are asked for, one after another.
    """
    rng = generator(0, "exercises")
    (folder / "images").mkdir(exist_ok=True)
    records: list[Record] = []
    for number in range(num):
        chart = sample_chart(rng, ("bar", "line"))
        picture, sort = chart.draw(), str(rng.choice(list(EXERCISES), p=list(EXERCISES.values())))
        language: Language = "zh" if rng.random() < 0.2 else "en"
        wording = Wording(language=language, sentence=False, variant=int(rng.integers(56)))
        column = int(rng.integers(len(chart.values)))
        columns = [column]
        if sort == "label":
            picture = cut_out(picture, label_place(chart, column), rng)
        elif sort == "value":
            picture = cut_out(picture, value_place(chart, column), rng)
        elif sort == "column":
            left = min(max(0, round(chart.point(column)[0] - CUT_SIZE / 2)), chart.width - CUT_SIZE)
            picture = picture.crop((left, 0, left + CUT_SIZE, chart.height))
        else:
            columns = [int(one) for one in rng.permutation(len(chart.values))]
        if sort in ("label", "value"):
            read = chart.categories[column] if sort == "label" else str(chart.values[column])
            noun, noun_zh = {"label": ("word", "文字"), "value": ("number", "数字")}[sort]
            exchanges = [wording.exchange(wording.say(f"Read the {noun}.", f"请读出{noun_zh}。"), value=read)]
        else:
            exchanges = [
                wording.exchange(
                    wording.say(
                        f"What is the value for {chart.categories[one]}?", f"图中{chart.categories[one]}的数值是多少？"
                    ),
                    value=str(chart.values[one]),
                )
                for one in columns
            ]
        draft = Draft(
            kind=sort,
            facts=(chart,),
            dialogue=Dialogue(exchanges=tuple(exchanges)),
            wording=wording,
            needs_colour=False,
            turn_by_turn=False,
        )
        path = f"images/exercise-{number:05d}.png"
        (folder / path).write_bytes(encode_picture(picture, PNG))
        records.append(record_of(draft, path, f"exercise-{number:05d}", sort, rng))
    return records


def label_place(chart: Chart, column: int) -> Place:
    """Where the name of a category is written in a bar or line chart."""
    x, _ = chart.point(column)
    return Place(x=x, y=chart.base() + 13, half_width=21)


def value_place(chart: Chart, column: int) -> Place:
    """Where the value of a category is written in a bar or line chart."""
    x, y = chart.point(column)
    return Place(x=x, y=y - (7 if chart.chart_type == "bar" else 10), half_width=9)


def cut_out(picture: Image.Image, place: Place, rng: np.random.Generator) -> Image.Image:
    """A square in which a text lies somewhere, whole.

    Args:
        picture: what to cut from.
        place: of the text.
        rng: where in the square it lies.
    """
    corner = []
    for middle, reach, size in (
        (place.x, place.half_width, picture.width),
        (place.y, HALF_HEIGHT, picture.height),
    ):
        first = min(max(0, math.ceil(middle + reach - CUT_SIZE)), size - CUT_SIZE)
        last = max(first, min(math.floor(middle - reach), size - CUT_SIZE))
        corner.append(int(rng.integers(first, last + 1)))
    return picture.crop((corner[0], corner[1], corner[0] + CUT_SIZE, corner[1] + CUT_SIZE))


def record_of(draft: Draft[Any], path: str, identifier: str, kind: str, rng: np.random.Generator) -> Record:
    """The record of a draft about one picture."""
    file = MediaFile(media_type="image", path=path)
    record = build_record(draft, [file], identifier=identifier, kind=kind, rng=rng)
    del record["image" if "image" in record else "images"]
    return {**record, "image": path}


def exchange_pictures(records: Sequence[Record]) -> list[Record]:
    """The same questions and answers, each with the picture of the next one."""
    pictures = [record["image"] for record in records]
    return [{**record, "image": picture} for record, picture in zip(records, [*pictures[1:], pictures[0]])]


def without_picture(record: Record) -> Record:
    """The same question and answer without the picture."""
    question, answer = record["conversations"]
    bare = {"from": "human", "value": question["value"].replace("<image>", "").strip()}
    return {"id": record["id"], "conversations": [bare, answer]}


def likeliest_answers(train: Sequence[Record], asked: Sequence[Record]) -> float:
    """Share that is right of answering what came most often in training with the same words (or at all)."""

    def words(record: Record) -> str:
        text: str = without_picture(record)["conversations"][0]["value"]
        return text

    by_words: dict[str, Counter[str]] = {}
    for record in train:
        answers = by_words.setdefault(words(record), Counter())
        answers[record["conversations"][1]["value"]] += 1
    of_all: Counter[str] = sum(by_words.values(), Counter())
    right = sum(
        by_words.get(words(record), of_all).most_common(1)[0][0] == record["conversations"][1]["value"]
        for record in asked
    )
    return right / len(asked)


def build(
    datasets: dict[str, list[Record]],
    names: Sequence[str],
    folder: Path,
    way: str,
    out: str,
    lesson: Lesson,
    model: Path,
) -> None:
    """Build shards of some of the datasets with ``vlprep build``."""
    lines = []
    for name in names:
        path = folder / f"{way}-{name}.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in datasets[name]))
        lines += [f"[{name}]", f'annotation_path = "{path}"', f'media_root = "{folder}"']
    registry = folder / f"{out}.toml"
    registry.write_text("\n".join(lines) + "\n")
    program = [sys.executable, "-c", "from prep.cli import main; main()", "build", ",".join(names)]
    program += ["--registry", str(registry), "--model", str(model), "--out", str(folder / out)]
    # Small pictures stay as they are.
    _run([*program, "--max-length", str(lesson.max_length), "--min-pixels", str(CUT_SIZE**2)])


def train_and_ask(folder: Path, way: str, steps: int, lesson: Lesson, model: Path, ranks: int) -> dict[str, float]:
    """Train on ``<way>-train`` and return the share of right answers of every dataset in ``<way>-asked``."""
    out = folder / f"{way}-run"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    settings: dict[str, object] = {
        "shards": folder / f"{way}-train",
        "eval_shards": folder / f"{way}-asked",
        "model_name_or_path": model,
        "output_dir": out,
        "tune_mm_vision": True,
        "learning_rate": lesson.learning_rate,
        "max_steps": steps,
        "gradient_accumulation_steps": 1,
        "per_device_train_batch_size": lesson.bins,
        "gradient_checkpointing": False,
        "logging_steps": 100,
        "save_steps": 0,
    }
    if lesson.vision_rate is not None:
        settings |= {"vision_tower_lr": lesson.vision_rate, "mm_projector_lr": lesson.vision_rate}
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    _run([*launcher, "train/main.py", *flags])
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    return {name: scores["exact_match"] for name, scores in last["eval_datasets"].items()}


def _run(program: Sequence[str]) -> None:
    done = subprocess.run(program, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"{' '.join(program)} ended with {done.returncode}:\n{done.stderr[-3000:]}")


SCENES = Lesson(kinds=("colours", "shapes", "counts"))
CHARTS = Lesson(
    kinds=("values",),
    steps=2600,
    learning_rate=2e-3,
    vision_rate=5e-4,
    num_exercises=30_000,
    bins=4,
    num_layers=3,
    vision_size=64,
    cosines=True,
)
LESSONS = {"scenes": SCENES, "charts": CHARTS}


@click.command()
@click.argument("lessons", type=click.Choice(list(LESSONS)), nargs=-1)
@click.option("--steps", type=click.IntRange(min=1), help="Of the optimizer.")
@click.option("--samples", type=click.IntRange(min=1), help="Questions of each kind to learn from.")
@click.option("--ranks", type=click.IntRange(min=1), default=2, show_default=True, help="Each with a core of its own.")
def main(lessons: Sequence[str], steps: int | None, samples: int | None, ranks: int) -> None:
    """Train a tiny model from random weights and ask it about pictures that it has not seen.

    LESSONS are scenes (colours, shapes, counts) and charts (values); both if not given.
    """
    click.echo(describe_machine("torch", "transformers", "deepspeed"))
    for name in lessons or LESSONS:
        lesson = LESSONS[name]
        lesson = replace(lesson, steps=steps or lesson.steps, num_train=samples or lesson.num_train)
        with tempfile.TemporaryDirectory() as folder:
            click.echo(report(lesson, learn(lesson, Path(folder), ranks=ranks), ranks=ranks))


def report(lesson: Lesson, scores: dict[str, Scores], *, ranks: int) -> str:
    """What a lesson took and what came of it, as a table."""
    lines = [
        f"\n{lesson.num_train} questions of each kind and {lesson.num_exercises} exercises to learn from, "
        f"{lesson.num_held_out} questions held out; {lesson.steps} steps of {ranks * lesson.bins} bins of "
        f"{lesson.max_length} tokens",
        f"{'':<10}{'seeing':>12}{'exchanged':>12}{'text only':>12}{'likeliest':>12}",
    ]
    shares = {name: (one.seeing, one.exchanged, one.text_only, one.likeliest) for name, one in scores.items()}
    if len(scores) > 1:
        # All kinds have as many questions.
        shares["all"] = tuple(sum(column) / len(scores) for column in zip(*shares.values()))
    lines += [f"{name:<10}" + "".join(f"{share:>12.1%}" for share in columns) for name, columns in shares.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
