"""Both programs together, through their command lines: annotations in, a trained model out."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from storage.shard_set import read_manifest
from tests.prep.corpus import turn
from tests.train.launching import as_flags, run_ranks
from train.settings.record import read_record
from train.shards.index import open_shards
from train.shards.reader import BinReader

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[1]
VLPREP = [sys.executable, "-c", "from prep.cli import main; main()"]
DEEPSPEED = [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators", "2"]
ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}


def run(*command: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, cwd=REPOSITORY, env=ENVIRONMENT
    )
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def train_on(shards: Path, model: Path, out: Path, *more: object) -> None:
    rates = [word for flag in ("learning_rate", "mm_projector_lr", "vision_tower_lr") for word in (f"--{flag}", "2e-3")]
    flags = ["--shards", shards, "--model_name_or_path", model, "--output_dir", out, "--tune_mm_vision", "True"]
    port = 20000 + os.getpid() % 9000
    run(
        *DEEPSPEED, "--master_port", port, "train/main.py", *flags, *rates,
        "--gradient_checkpointing", "False", "--save_steps", "0", "--logging_steps", "1", *more,
    )  # fmt: skip


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
    done = run(
        *VLPREP, "build", qwen_demo / "annotations.jsonl", "--out", out / "shards", "--model", tiny_checkpoint,
        "--max-length", "2048", "--boxes", "off",
    )  # fmt: skip
    assert "7 annotations = 6 packed + 1 rejected + 0 not sampled" in done.stdout
    assert "media_missing: 1" in done.stdout
    yield out
    shutil.rmtree(out)


def test_real_images_and_videos_become_shards_and_the_loss_falls_in_twelve_steps(
    real: Path, tiny_checkpoint: Path
) -> None:
    run(*VLPREP, "verify", real / "shards")
    train_on(real / "shards", tiny_checkpoint, real / "run", "--max_steps", 12, "--gradient_accumulation_steps", 1)
    run_losses = losses(real / "run")
    assert len(run_losses) == 12
    assert sum(run_losses[-3:]) < 0.8 * sum(run_losses[:3])
    args, facts = read_record(real / "run")
    assert (args.max_steps, args.learning_rate, args.gradient_accumulation_steps) == (12, 2e-3, 1)
    assert (facts.world_size, facts.global_batch, facts.num_steps) == (2, 2, 12)
    shown = run(sys.executable, "-m", "train.order", "--run", real / "run", "--step", 11).stdout
    assert shown.startswith("step 11, epoch ") and "annotations.jsonl:" in shown
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
    assert code == 1
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
    run(
        *VLPREP, "build", tmp_path / "a.json", "--out", tmp_path / "out", "--model", tiny_checkpoint,
        "--max-length", "64", "--shard-bytes", "1",
    )  # fmt: skip
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.counts.num_packed, manifest.counts.num_rejected, len(manifest.shards)) == (2, 1, 2)
    index = open_shards(tmp_path / "out")
    missing = {0, 1, 2} - set(index.local_bin.tolist())
    assert len(missing) == 1
    reader = BinReader(index)
    assert [reader.read(row).bin.index for row in range(index.num_bins)] == index.local_bin.tolist()
    run(*VLPREP, "verify", tmp_path / "out")
    explained = run(sys.executable, "-m", "train.order", "--shards", tmp_path / "out", "--global-batch", 2,
                    "--world-size", 2, "--step", 0)  # fmt: skip
    assert explained.stdout.count("a.json:") == 2


def test_a_registered_dataset_asks_for_its_path_before_it_can_be_used(tmp_path: Path) -> None:
    done = run(*VLPREP, "build", "mp_doc%50", "--out", tmp_path / "out", code=2)
    assert "datasets.toml:" in done.stderr
    assert "annotation_path" in done.stderr
