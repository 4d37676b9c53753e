"""The commands of ``docs/examples.md`` lead from three shapes of public data to answers of a model trained on all."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from PIL import Image, ImageDraw

from examples.pdf_pages import main as pdf_pages
from storage.shard_set import read_manifest
from tests.guides import Command, blocks, guide
from tests.typed import prepare_folder, run

PAGE = "examples.md"
LLAVA, CAULDRON, PDFS, LAST = "LLaVA-Instruct", "FineVision and the Cauldron", "Pages of PDFs", "Look and train"
A4 = (595, 842)
ON_A_CPU = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "1", "--max_steps", "2"]


def files(section: str) -> list[Path]:
    """The files that a section lists."""
    (text,) = blocks(PAGE, section, "text")
    return [Path(line) for line in text.splitlines()]


def image(colour: str) -> Image.Image:
    return Image.new("RGB", (140, 112), colour)


def write_llava() -> None:
    """The records of the page, one whose image is there, and one whose image was not downloaded."""
    annotations, *images = files(LLAVA)
    for path in images:
        path.parent.mkdir(parents=True)
        image("red").save(path)
    (text,) = blocks(PAGE, LLAVA, "json")
    records = json.loads(text)
    assert Path("data/llava", records[0]["image"]) in images
    more = [{**records[0], "image": name} for name in ("vg/VG_100K/2366072.jpg", "ocr_vqa/images/none.jpg")]
    annotations.write_text(json.dumps(records + more))


def write_cauldron() -> None:
    """Two rows in every file, with an image inside, two turns, and a column of FineVision."""
    stream = io.BytesIO()
    image("green").save(stream, "PNG")
    exchanges = [{"user": "Which colour?", "assistant": "Green.", "source": "s"}] * 2
    row = {"images": [{"bytes": stream.getvalue(), "path": None}], "texts": exchanges, "relevance_ratings": [5, 4]}
    for path in files(CAULDRON):
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist([row] * 2), path)
    (registry,) = blocks(PAGE, CAULDRON, "toml")
    Path("data/the_cauldron/datasets.toml").write_text(registry)


def write_pdfs() -> None:
    """Two PDFs of two A4 pages, and three questions: two about one page, one about both pages of the other PDF."""
    *pdfs, questions = files(PDFS)
    for path in pdfs:
        path.parent.mkdir(parents=True, exist_ok=True)
        pages = [Image.new("RGB", A4, "white") for _ in range(2)]
        for number, page in enumerate(pages, start=1):
            ImageDraw.Draw(page).rectangle((0, 0, 100 * number, 100), fill="black")
        pages[0].save(path, save_all=True, append_images=pages[1:], resolution=72)
    (line,) = blocks(PAGE, PDFS, "json")
    both = {"pdf": "garden.pdf", "pages": [1, 2], "question": "Do they differ?", "answer": "Yes."}
    questions.write_text(line + json.dumps(both) + "\n" + line.replace("total", "sum"))


@pytest.mark.slow
def test_the_commands_lead_from_three_shapes_to_answers(
    tmp_path: Path, demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prepare_folder(demo_checkpoint)
    with guide("examples.md") as page:
        prepare_llava(page.take(LLAVA))
        prepare_cauldron(page.take(CAULDRON))
        prepare_pdfs(page.take(PDFS))
        report, launch, ask = page.take(LAST)
        run(report.words)
        assert Path("data/pages/report.html").is_file()
        run([*launch.words, *ON_A_CPU])
        assert "of 3 answers" in run([*ask.words, "--max-new-tokens", "4"])


def prepare_llava(commands: list[Command]) -> None:
    write_llava()
    validate, build = commands
    assert "4 annotations: 3 valid, 1 rejected" in run(validate.words, exit_code=1)
    (reject,) = Path("data/llava/rejects.jsonl").read_text().splitlines()
    assert json.loads(reject)["problems"][0]["code"] == "media_missing"
    run(build.words)
    assert read_manifest(Path("shards/llava")).counts.num_packed == 3


def prepare_cauldron(commands: list[Command]) -> None:
    write_cauldron()
    validate, build = commands
    assert "relevance_ratings" in run(validate.words)
    run(build.words)
    counts = read_manifest(Path("shards/cauldron")).counts
    assert (counts.num_packed, counts.num_not_sampled, counts.num_images) == (4, 2, 4)


def prepare_pdfs(commands: list[Command]) -> None:
    write_pdfs()
    draw, validate, build = commands
    assert draw.words[:2] == ["python", "examples/pdf_pages.py"]
    result = CliRunner().invoke(pdf_pages, draw.words[2:])
    assert result.exit_code == 0 and "2 conversations with 3 questions" in result.stderr, result.output
    assert "2 valid, 0 rejected" in run(validate.words)
    run(build.words)
    counts = read_manifest(Path("shards/pages")).counts
    assert (counts.num_packed, counts.num_images, counts.num_patches) == (2, 3, 3 * 4 * 1260)


def test_pages_are_drawn_once_and_their_questions_are_turns_of_one_conversation(tmp_path: Path) -> None:
    write(tmp_path, *({"pdf": "in/a.pdf", "pages": [2], "question": q, "answer": q.lower()} for q in ("One?", "Two?")))
    assert convert(tmp_path, "--dpi", "36").exit_code == 0
    (record,) = map(json.loads, (tmp_path / "out" / "annotations.jsonl").read_text().splitlines())
    assert record == {
        "id": "in/a.pdf:2",
        "images": ["pages/in/a.pdf/0002.png"],
        "conversations": [
            {"from": "human", "value": "<image>\nOne?"},
            {"from": "gpt", "value": "one?"},
            {"from": "human", "value": "Two?"},
            {"from": "gpt", "value": "two?"},
        ],
    }
    (page,) = (tmp_path / "out" / "pages").rglob("*.png")
    drawn = Image.open(page).convert("L")
    assert drawn.size == (50, 30)
    assert drawn.getpixel((5, 15)) > 200 > 50 > drawn.getpixel((45, 15))


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"pages": [3]}, "has pages 1 to 2, and a question names page 3"),
        ({"pages": [0]}, "a question names page 0"),
        ({"pages": []}, "line 1: Expected `array` of length >= 1"),
        ({"pdf": "none.pdf"}, "none.pdf: "),
        ({"pdf": "broken.pdf"}, "broken.pdf: Failed to load document"),
        ({"pdf": "../a.pdf"}, "line 1: '../a.pdf' leads out of the folder of PDFs"),
        ({"page": 1}, "line 1: Object contains unknown field `page`"),
    ],
)
def test_a_wrong_question_is_named(tmp_path: Path, question: dict[str, object], message: str) -> None:
    write(tmp_path, {"pdf": "in/a.pdf", "pages": [1], "question": "Q", "answer": "A", **question})
    result = convert(tmp_path)
    assert result.exit_code == 1 and message in result.stderr
    assert not (tmp_path / "out" / "annotations.jsonl").exists()


def test_without_pypdfium2_the_error_is_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, {"pdf": "in/a.pdf", "pages": [1], "question": "Q", "answer": "A"})
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    result = convert(tmp_path)
    assert result.exit_code == 1 and "pip install pypdfium2" in result.stderr


def write(folder: Path, *questions: dict[str, object]) -> None:
    """A PDF whose second page is black on the right, a broken one, and questions."""
    (folder / "pdfs" / "in").mkdir(parents=True)
    pages = [Image.new("RGB", (100, 60), "white") for _ in range(2)]
    pages[1].paste("black", (50, 0, 100, 60))
    pages[0].save(folder / "pdfs" / "in" / "a.pdf", save_all=True, append_images=pages[1:], resolution=72)
    (folder / "pdfs" / "broken.pdf").write_bytes(b"%PDF-1.7")
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))


def convert(folder: Path, *options: str) -> Result:
    arguments = [folder / "pdfs", folder / "questions.jsonl", "--out", folder / "out"]
    return CliRunner().invoke(pdf_pages, [*map(str, arguments), *options])
