"""The commands of pages in ``docs`` about annotations, boxes and the report, run as they stand there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from prep.cli import main
from storage.shard_set import read_manifest
from tests.guides import DOCS
from tests.prep.dialect_corpus import HELLO, llava
from tests.prep.test_formats import write_jsonl
from tests.prep.test_grounding import BOX, thumbnails, write_images

GOOD = llava("<image>Where?", "A cat.", image="photo.png")


def commands(page: str) -> list[str]:
    """The lines of all shell blocks of a page."""
    shell = re.findall(r"^```bash\n(.*?)^```$", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    return "".join(shell).splitlines()


def typed(command: str, model: Path) -> Result:
    """Run a line; its defaults need no network and no other process."""
    program, *arguments = shlex.split(command, comments=True)
    assert program == "vlprep"
    defaults = {name: {"workers": 1, "model": str(model)} for name in ("build", "show", "report")}
    return CliRunner().invoke(main, arguments, default_map={**defaults, "validate": {"workers": 1}})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path)
    return tmp_path


def test_the_commands_of_the_page_about_annotations(folder: Path, tiny_checkpoint: Path) -> None:
    write_jsonl(folder / "annotations.jsonl", [GOOD, {**GOOD, "image": "none.png"}, HELLO])
    write_jsonl(folder / "pages.jsonl", [GOOD])
    (folder / "datasets.toml").write_text('[mp_doc]\nannotation_path = "pages.jsonl"\n')
    write_jsonl(folder / "a.jsonl", [GOOD])
    write_jsonl(folder / "b.jsonl", [HELLO] * 4)
    build, *validations = commands("annotations.md")
    assert build.startswith("vlprep build ") and len(validations) == 4
    for command in validations:
        result = typed(command, tiny_checkpoint)
        is_good = " mp_doc" in command
        assert result.exit_code == (0 if is_good else 1), result.output
        assert ("1 annotation: 1 valid" if is_good else "3 annotations: 2 valid, 1 rejected") in result.stdout
    bad, good = ((folder / f"{name}.jsonl").read_text().splitlines() for name in ("bad", "good"))
    assert [problem["code"] for line in bad for problem in json.loads(line)["problems"]] == ["media_missing"]
    assert [json.loads(line) for line in good] == [GOOD, HELLO]
    result = typed(build, tiny_checkpoint)
    assert result.exit_code == 0, result.output
    manifest = read_manifest(folder / "shards" / "mix")
    assert [source.dataset for source in manifest.inputs] == ["a", "b"]
    assert (manifest.counts.num_packed, manifest.counts.num_not_sampled) == (3, 2)


def test_the_commands_of_the_page_about_boxes(folder: Path, tiny_checkpoint: Path) -> None:
    objects = {"objects": {"bbox": [[960, 540, 1920, 1080]], "image_id": [1]}}
    two = llava("<image><image>Where?", "<bbox>", images=["photo.png", "wide.png"])
    write_jsonl(folder / "annotations.jsonl", [llava("<image>Where?", BOX, image="photo.png"), {**two, **objects}])
    for command in commands("grounding.md"):
        result = typed(command, tiny_checkpoint)
        assert result.exit_code == 0, result.output
    assert read_manifest(folder / "shards" / "mine").statistics[0].num_boxes == 2
    drawn = sorted(path.name for path in (folder / "pngs").glob("*-boxes.png"))
    assert len(drawn) == 2 and len(list((folder / "pngs").glob("*.png"))) == 3 + 2
    page = (folder / "report.html").read_text()
    assert "2 boxes and points" in page
    # The box of the second record is in its second image, the wide one.
    is_drawn = {(width > 1.6 * height, drawn) for (width, height), drawn in thumbnails(page)}
    assert is_drawn == {(False, True), (False, False), (True, True)}


def test_the_commands_of_the_page_about_the_report(folder: Path, tiny_checkpoint: Path) -> None:
    write_jsonl(folder / "annotations.jsonl", [GOOD, HELLO])
    for command in commands("report.md"):
        result = typed(command, tiny_checkpoint)
        assert result.exit_code == 0, result.output
    names = ["shards/mine/report.html", "pages/mine.html", "pages/bin.html", "pages/sample.html"]
    pages = [(folder / name).read_text() for name in names]
    assert pages[0] == pages[1]
    assert [page.count("<article") for page in pages] == [2, 2, 2, 2]
