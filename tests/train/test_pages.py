"""The commands of the README and of the page about training, run as they stand there, on small data and a CPU."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.guides import blocks, guide, page_commands
from tests.prep.corpus import turn
from tests.train.launching import fingerprint_of, read_metrics
from tests.train.synthetic import make_medium, make_sample, write_shards
from tests.typed import prepare_folder, run
from train.settings.flags import parse_arguments

pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, as after ``make demo``: the narrow checkpoint, and ``shards/demo`` with synthetic samples.

    Sixteen samples, which make a step, are one bin.
    """
    monkeypatch.chdir(tmp_path)
    prepare_folder(tiny_checkpoint)
    rng = np.random.default_rng(0)
    bins = [
        [make_sample(rng, [make_medium(rng)]), *(make_sample(rng, num_text=6, num_targets=3) for _ in range(15))]
        for _ in range(4)
    ]
    write_shards(tmp_path / "shards" / "demo", bins, tokenizer=fingerprint_of(tiny_checkpoint))
    return tmp_path


def steps(run_dir: str) -> list[int]:
    """The logged steps of a run."""
    return [record["step"] for record in read_metrics(Path(run_dir))]


def test_the_commands_of_the_page_about_training(folder: Path) -> None:
    """In the order of the page: later commands use what earlier ones wrote."""
    with guide("training.md") as page:
        outputs = [run(command.words) for command in page.take()]
    for name in ("first", "second", "lora"):
        assert steps(f"runs/{name}")[-1] == 10
    assert (folder / "runs" / "lora" / "merged" / "model.safetensors").is_file()
    assert "dry run passed" in outputs[5]
    assert "72B " in outputs[6]
    assert "step 8 (step 9 of the log), " in outputs[7]
    assert "a step: " in outputs[8] and "step 8 (step 9 of the log), " in outputs[9]
    assert steps("runs/elastic") == [1, 2, 3, 4]
    evaluated = [record["step"] for record in read_metrics(Path("runs/evaluated")) if "eval_loss" in record]
    assert evaluated == [2, 4]


def test_the_file_of_the_page_about_training_has_the_settings_of_its_first_command(folder: Path) -> None:
    first, *_ = page_commands("training.md")
    (settings,) = blocks("training.md", "Configure a run", "toml")
    Path("run.toml").write_text(settings)
    assert parse_arguments(["--config", "run.toml"]) == parse_arguments(first.words[2:])


def test_the_commands_of_the_readme(folder: Path) -> None:
    Image.new("RGB", (60, 40), "red").save("red.png")
    records = [{"image": "red.png", "conversations": turn("<image>Which colour?", "Red.")}] * 2
    Path("annotations.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    with guide("README.md") as page:
        outputs = [run(command.words) for command in page.take()]
    assert "2 annotations: 2 valid, 0 rejected" in outputs[2]
    assert Path("runs/demo/report.html").is_file() and Path("report.html").is_file()
    assert "shards/mine" in outputs[-1] and "shards/demo" in outputs[-1]


def test_the_chinese_readme_has_the_commands_of_the_english_one() -> None:
    with guide("README.zh.md") as page:
        ours = [command.words for command in page.take()]
    assert ours == [command.words for command in page_commands("README.md") if not command.reason]
