"""The commands of ``docs/index.md`` lead from ten images to a model that answers questions about them."""

from __future__ import annotations

import json
import os
import re
import shlex
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from prep.cli import main
from tests.guides import blocks
from tests.train.launching import run_ranks
from train.generate.cli import main as generate

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


def commands(section: str) -> list[list[str]]:
    """The words of the commands of a section."""
    text = "".join(blocks("index.md", section, ""))
    return [shlex.split(line) for line in re.sub(r"\\\n", " ", text).splitlines()]


def test_the_commands_lead_from_images_to_answers(
    tmp_path: Path, demo_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (record,) = blocks("index.md", "1. Write annotations", "json")
    assert json.loads(record)["image"] == "1.jpg"
    write_images(tmp_path / "mine", record)
    Path("checkpoints").mkdir()
    model, *prepare = commands("2. Prepare the data")
    assert model == ["python", "-m", "train.tiny_model", "checkpoints/tiny"]
    Path("checkpoints/tiny").symlink_to(demo_checkpoint)

    outputs = []
    for program, *arguments in (*prepare, *commands("3. Look at it")):
        assert program == "vlprep"
        defaults = {"build": {"workers": 1}, "validate": {"workers": 1}}
        result = CliRunner().invoke(main, arguments, default_map=defaults)
        assert result.exit_code == 0, result.output
        outputs.append(result.stdout)
    assert "10 annotations: 10 valid, 0 rejected" in outputs[0]
    assert "purple" in outputs[2] and Path("mine/report.html").is_file()

    (launch,) = commands("4. Train")
    flags = launch[launch.index("train/main.py") + 1 :]
    done = run_ranks(1, *flags, prepare=partial(os.chdir, tmp_path))
    assert done.returncode == 0, done.stderr

    (ask,) = commands("5. Ask it")
    assert ask[:3] == ["python", "-m", "train.generate"]
    answers = CliRunner().invoke(generate, ask[3:])
    assert answers.exit_code == 0, answers.output
    assert "exact match: 10 of 10 answers (100.0%)" in answers.output
