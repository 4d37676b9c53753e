"""A tiny model learns to point at a shape: ``python -m tests.benchmarks.pointing``.

Every image shows one shape somewhere, drawn in one of several sizes and reduced to the same number of pixels. The
answer is its box. The same records are built twice: with their boxes declared as ``pixels``, so that they follow the
resize, and as ``off``, so that they keep the coordinates of the original images. Both sets train the same model from
random weights, vision tower included. Then the models answer held-out questions, token by token.

A box is right if its intersection with the true one, in the image that the model sees, is at least half of their union.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import click

from demo.drawing import BACKGROUNDS, COLOURS, PNG, SHAPES, Figure, encode_image
from demo.kinds import generator, pick
from demo.scenes import Scene
from demo.tiny_model import write_tiny_checkpoint
from prep.annotations.boxes import find_shapes
from schemas.qwen import PATCH_SIZE
from tests.benchmarks.learning import Lesson, Record, build, train
from tests.benchmarks.machine import describe_machine
from train.generate.answers import Answerer
from train.shards.index import open_shards

SIDE = 12 * PATCH_SIZE
"""Side of the images that the model sees: 6 x 6 merged tokens."""

ENLARGED = (1, 2, 3)
"""How many times larger the original images are, all equally frequent."""

WAYS = ("pixels", "off")
MIN_OVERLAP = Fraction(1, 2)
QUESTION = "Where is the shape?"
MAX_ANSWER_TOKENS = 40

POINTING = Lesson(
    questions={"boxes": 6000}, num_held_out=150, steps=3000, learning_rate=2e-3, num_layers=3, vision_size=64
)

ROPE_THETA = 10.0
"""Base of the language model's rotary frequencies.

A head of the tiny model has 8 of them. With the released base of 1e6, those of rows and columns turn by less than 0.2
rad over the image, so the model could hardly tell where a token lies.
"""

Box = tuple[Fraction, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Pointed:
    """Right answers and held-out questions of one way, by how many times larger the original images are."""

    right: dict[int, int] = field(default_factory=lambda: dict.fromkeys(ENLARGED, 0))
    questions: dict[int, int] = field(default_factory=lambda: dict.fromkeys(ENLARGED, 0))

    @property
    def share(self) -> float:
        """Share of right answers."""
        return sum(self.right.values()) / sum(self.questions.values())


def draw_question(folder: Path, part: str, index: int) -> Record:
    """Write one image and return its record: a question and the box of the shape in pixels of that image."""
    rng = generator(0, f"pointing/{part}/{index}")
    enlarged = ENLARGED[index % len(ENLARGED)]
    side = SIDE * enlarged
    radius = side * (0.14 + 0.1 * rng.random())
    x, y = (radius + (side - 2 * radius) * rng.random() for _ in range(2))
    figure = Figure(shape=pick(rng, SHAPES), colour=pick(rng, COLOURS), x=x, y=y, radius=radius)
    background = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
    scene = Scene(width=side, height=side, background=background, figures=(figure,))
    path = f"images/{part}-{index:05d}.png"
    (folder / "images").mkdir(exist_ok=True)
    (folder / path).write_bytes(encode_image(scene.draw(), PNG))
    box = [round(value) for value in (x - radius, y - radius, x + radius, y + radius)]
    turns = [("human", f"<image>{QUESTION}"), ("gpt", json.dumps({"bbox_2d": box}))]
    conversations = [{"from": role, "value": text} for role, text in turns]
    return {"id": f"{part}-{index}", "image": path, "conversations": conversations}


def overlap(box: Sequence[Fraction], other: Sequence[Fraction]) -> Fraction:
    """Intersection over union of two boxes ``x1, y1, x2, y2``; 0 for one without area."""
    width = min(box[2], other[2]) - max(box[0], other[0])
    height = min(box[3], other[3]) - max(box[1], other[1])
    if width <= 0 or height <= 0:
        return Fraction(0)
    areas = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (box, other)]
    return width * height / (sum(areas) - width * height)


def read_box(text: str) -> Box | None:
    """The first box of an answer, or None."""
    shapes, _ = find_shapes(text)
    return next((shape.values for shape in shapes if shape.is_box), None)


def true_box(record: Record) -> Box:
    """The box of a record in pixels of the image that the model sees."""
    box = read_box(record["conversations"][1]["value"])
    assert box is not None
    enlarged = ENLARGED[int(record["id"].rpartition("-")[2]) % len(ENLARGED)]
    return tuple(value / enlarged for value in box)


def write_model(folder: Path, lesson: Lesson) -> None:
    """Write the untrained model."""
    write_tiny_checkpoint(folder, num_hidden_layers=lesson.num_layers, vision_hidden_size=lesson.vision_size)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["rope_parameters"]["rope_theta"] = ROPE_THETA
    path.write_text(json.dumps(config, indent=2))


def learn(lesson: Lesson, folder: Path, *, ranks: int) -> dict[str, Pointed]:
    """Draw the records, and for each way build shards, train a model and ask it.

    Args:
        lesson: counts, steps and model.
        folder: an empty working folder.
        ranks: number of training processes.

    Returns:
        The right answers of every way.
    """
    model = folder / "model"
    write_model(model, lesson)
    datasets = {
        "train": [draw_question(folder, "train", index) for index in range(lesson.questions["boxes"])],
        "heldout": [draw_question(folder, "heldout", index) for index in range(lesson.num_held_out)],
    }
    results: dict[str, Pointed] = {}
    for way in WAYS:
        for name in datasets:
            options = ("--boxes", way, "--max-pixels", str(SIDE**2))
            build(datasets, (name,), folder, way, f"{way}-{name}", lesson, model, *options)
        train(folder / f"{way}-train", folder / f"{way}-run", lesson.steps, lesson, model, ranks)
        results[way] = Pointed()
        answerer = Answerer(folder / f"{way}-run" / "final", max_new_tokens=MAX_ANSWER_TOKENS)
        answers = answerer.answer_shards(open_shards(folder / f"{way}-heldout"))
        said = {answer.question.sample.id: answer.generated for answer in answers}
        for index, record in enumerate(datasets["heldout"]):
            enlarged = ENLARGED[index % len(ENLARGED)]
            box = read_box(said[record["id"]])
            results[way].questions[enlarged] += 1
            results[way].right[enlarged] += box is not None and overlap(box, true_box(record)) >= MIN_OVERLAP
    return results


def report(lesson: Lesson, results: dict[str, Pointed]) -> str:
    """The shares of right answers as a table."""
    lines = [
        f"{lesson.questions['boxes']} training questions, {lesson.num_held_out} held out, {lesson.steps} steps; "
        f"right: overlap of at least {float(MIN_OVERLAP)}",
        f"{'':<10}{'all':>8}" + "".join(f"{f'{enlarged}x':>8}" for enlarged in ENLARGED),
    ]
    for way, pointed in results.items():
        shares = [pointed.right[enlarged] / max(1, pointed.questions[enlarged]) for enlarged in ENLARGED]
        lines.append(f"{way:<10}{pointed.share:>8.1%}" + "".join(f"{share:>8.1%}" for share in shares))
    return "\n".join(lines)


@click.command()
@click.option("--steps", type=click.IntRange(min=1), default=POINTING.steps, show_default=True)
@click.option("--samples", type=click.IntRange(min=3), default=POINTING.questions["boxes"], show_default=True)
@click.option("--held-out", type=click.IntRange(min=3), default=POINTING.num_held_out, show_default=True)
@click.option("--ranks", type=click.IntRange(min=1), default=2, show_default=True, help="Training processes.")
def main(steps: int, samples: int, held_out: int, ranks: int) -> None:
    """Train a tiny model to point at a shape, with boxes that follow the resize and with boxes that do not."""
    lesson = Lesson(
        questions={"boxes": samples},
        num_held_out=held_out,
        steps=steps,
        learning_rate=POINTING.learning_rate,
        num_layers=POINTING.num_layers,
        vision_size=POINTING.vision_size,
    )
    click.echo(describe_machine("torch", "transformers", "deepspeed"))
    with tempfile.TemporaryDirectory() as folder:
        click.echo(report(lesson, learn(lesson, Path(folder), ranks=ranks)))


if __name__ == "__main__":
    main()
