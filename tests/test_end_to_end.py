"""Both programs together, through their command lines: annotations in, a trained model out."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from prep.cli import main as vlprep_command
from storage.shard_set import read_manifest
from tests.prep.commands import Command
from tests.prep.corpus import turn
from tests.train.launching import as_flags, run_ranks
from train.order.cli import main as order_command
from train.settings.record import read_record
from train.shards.index import open_shards
from train.shards.reader import BinReader

pytestmark = pytest.mark.slow

# Smaller media than the default, for steps of a tenth of a second.
SMALL = [
    *("--max-length", "1024", "--max-pixels", "100352"),
    *("--video-min-frame-pixels", "25088", "--video-max-frame-pixels", "50176"),
]


def vlprep(folder: Path, *arguments: object, code: int = 0) -> Command:
    """Run the command until it ends; its output goes into ``folder``."""
    command = Command(*arguments, folder=folder)
    assert command.wait() == code, command.output[-3000:] + command.errors[-3000:]
    return command


def train_on(shards: Path, model: Path, out: Path, *more: str) -> None:
    rates = [word for flag in ("learning_rate", "mm_projector_lr", "vision_tower_lr") for word in (f"--{flag}", "2e-3")]
    flags = ["--shards", str(shards), "--model_name_or_path", str(model), "--output_dir", str(out)]
    flags += ["--tune_mm_vision", "True", "--gradient_checkpointing", "False", "--save_steps", "0"]
    done = run_ranks(2, *flags, *rates, "--logging_steps", "1", *more)
    assert done.returncode == 0, done.stderr[-3000:]


def order(*arguments: object) -> str:
    """What ``python -m train.order`` prints."""
    result = CliRunner().invoke(order_command, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def refusal(shards: Path, model: Path, out: Path) -> tuple[int, str]:
    """Exit code and messages of two ranks that cannot train."""
    done = run_ranks(2, *as_flags({"shards": shards, "model_name_or_path": model, "output_dir": out, "max_steps": 1}))
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def real(qwen_demo: Path, tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Iterator[Path]:
    out = tmp_path_factory.mktemp("real")
    model = ["--model", tiny_checkpoint]
    command = vlprep(
        out, "build", qwen_demo / "annotations.jsonl", "--out", out / "shards", *model, *SMALL, "--boxes", "off"
    )
    assert "7 annotations = 6 packed + 1 rejected + 0 not sampled" in command.output
    assert "media_missing: 1" in command.output
    yield out
    shutil.rmtree(out)


def test_real_images_and_videos_become_shards_and_the_loss_falls_in_twelve_steps(
    real: Path, tiny_checkpoint: Path
) -> None:
    vlprep(real, "verify", real / "shards", "--workers", "1")
    train_on(real / "shards", tiny_checkpoint, real / "run", "--max_steps", "12", "--gradient_accumulation_steps", "1")
    run_losses = losses(real / "run")
    assert len(run_losses) == 12
    assert sum(run_losses[-3:]) < 0.8 * sum(run_losses[:3])
    args, facts = read_record(real / "run")
    assert (args.max_steps, args.learning_rate, args.gradient_accumulation_steps) == (12, 2e-3, 1)
    assert (facts.world_size, facts.global_batch, facts.num_steps) == (2, 2, 12)
    shown = order("--run", real / "run", "--step", 11)
    assert shown.startswith("step 11 (step 12 of the log), epoch ") and "annotations.jsonl:" in shown
    # The record of the run names the checkpoint.
    bins = CliRunner().invoke(vlprep_command, ["show", str(real / "run"), "--step", "11"])
    assert bins.exit_code == 0, bins.output
    assert "<|im_start|>system\nYou are a helpful assistant.<|im_end|>" in bins.stdout
    ranks = [f"step 11, micro-step 0, rank {rank}" for rank in (0, 1)]
    assert re.findall("^━━ (.*) ━━$", bins.stdout, re.MULTILINE) == ranks
    numbers = [
        re.findall(pattern, text) for pattern, text in ((r", bin (\d+) at", bins.stdout), (r"    bin (\d+) \(", shown))
    ]
    assert numbers[0] == numbers[1] and len(numbers[0]) == 2
    from transformers import Qwen2_5_VLForConditionalGeneration

    _, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(real / "run" / "final", output_loading_info=True)
    assert not any(info.values())


def test_shards_of_another_tokenizer_are_refused_with_one_sentence(real: Path, tiny_checkpoint: Path) -> None:
    other = real / "other"
    shutil.copytree(tiny_checkpoint, other)
    tokenizer: dict[str, Any] = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    code, message = refusal(real / "shards", other, real / "refused")
    assert code == 2
    assert "okenizer" in message


def test_a_folder_without_a_manifest_is_refused_with_one_sentence(real: Path, tiny_checkpoint: Path) -> None:
    (real / "empty").mkdir()
    code, message = refusal(real / "empty", tiny_checkpoint, real / "refused")
    assert code == 2
    assert "manifest" in message


def test_a_bin_whose_samples_all_fail_leaves_a_gap_that_the_trainer_skips(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    """Images that are cut short pass the scan, which reads headers only, and fail when they are decoded."""
    for index in range(3):
        Image.effect_noise((140, 140), 90).convert("RGB").save(tmp_path / f"{index}.jpg")
    cut = (tmp_path / "0.jpg").read_bytes()
    (tmp_path / "0.jpg").write_bytes(cut[: len(cut) // 2])
    records = [{"image": f"{index}.jpg", "conversations": turn("<image>?")} for index in range(3)]
    (tmp_path / "a.json").write_text(json.dumps(records))
    sizes = ["--max-length", "64", "--shard-bytes", "1", "--workers", "1"]
    vlprep(tmp_path, "build", tmp_path / "a.json", "--out", tmp_path / "out", "--model", tiny_checkpoint, *sizes)
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.counts.num_packed, manifest.counts.num_rejected, len(manifest.shards)) == (2, 1, 2)
    index = open_shards(tmp_path / "out")
    missing = {0, 1, 2} - set(index.local_bin.tolist())
    assert len(missing) == 1
    reader = BinReader(index)
    assert [reader.read(row).bin.index for row in range(index.num_bins)] == index.local_bin.tolist()
    vlprep(tmp_path, "verify", tmp_path / "out", "--workers", "1")
    explained = order("--shards", tmp_path / "out", "--global-batch", 2, "--world-size", 2, "--step", 0)
    assert explained.count("a.json:") == 2


def test_a_registered_dataset_asks_for_its_path_before_it_can_be_used(tmp_path: Path) -> None:
    command = vlprep(tmp_path, "build", "mp_doc%50", "--out", tmp_path / "out", code=2)
    assert "datasets.toml:" in command.errors
    assert "annotation_path" in command.errors
