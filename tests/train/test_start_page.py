"""The commands of ``docs/index.md`` lead from ten images to a model that answers questions about them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.guides import blocks, guide
from tests.typed import prepare_folder, run

pytestmark = pytest.mark.slow

COLOURS = ("red", "green", "blue", "yellow", "black", "white", "orange", "purple", "brown", "grey")


def write_images(folder: Path, record: str) -> None:
    """Ten images, and annotations in the form of the page's record."""
    folder.mkdir()
    lines = []
    for index, colour in enumerate(COLOURS, start=1):
        Image.new("RGB", (280 + 10 * index, 210), colour).save(folder / f"{index}.jpg")
        lines.append(record.replace("1.jpg", f"{index}.jpg").replace("red", colour))
    (folder / "annotations.jsonl").write_text("".join(lines))


def test_the_commands_lead_from_images_to_answers(
    tmp_path: Path, demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prepare_folder(demo_checkpoint)
    (record,) = blocks("index.md", "1. Write annotations", "json")
    assert json.loads(record)["image"] == "1.jpg"
    write_images(tmp_path / "mine", record)
    with guide("index.md", "2. Prepare the data", "3. Look at it", "4. Train", "5. Ask it") as page:
        model, *commands = page.take()
        # The checkpoint that this program writes is there.
        assert model.words == ["python", "-m", "train.tiny_model", "checkpoints/tiny"]
        outputs = [run(command.words) for command in commands]
    assert "10 annotations: 10 valid, 0 rejected" in outputs[0]
    assert "purple" in outputs[2] and Path("mine/report.html").is_file()
    assert "exact match: 10 of 10 answers (100.0%)" in outputs[-1]
