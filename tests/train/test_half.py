"""Training in 16 bits. In float16 the loss is scaled, a scale that is too large is lowered, and norms are unscaled.

Processors compute in float16 slowly, and DeepSpeed takes some for unable; here it is told that they can. In bfloat16
DeepSpeed shares out another optimizer under ZeRO-1 than under ZeRO-2 and 3.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

from tests.train.launching import (
    as_flags,
    fingerprint_of,
    launch,
    made_once,
    read_metrics,
    read_untimed,
    read_weights,
    torchrun,
)
from tests.train.synthetic import make_bins, write_shards
from train.engine import CONFIGS, can_lower_scale

PROGRAM = """
import sys
from deepspeed.accelerator import get_accelerator
get_accelerator().is_fp16_supported = lambda: True
from train.main import main
sys.exit(main(sys.argv[1:]))
"""


def run(shards: Path, checkpoint: Path, out: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    settings = {
        "shards": shards,
        "model_name_or_path": checkpoint,
        "output_dir": out,
        "max_steps": 12,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-30,
        "logging_steps": 1,
        "save_steps": 0,
        "max_skipped_steps": 0,
    }
    written = as_flags(settings)
    return launch(sys.executable, "-c", PROGRAM, *written, *flags)


def finished(shards: Path, checkpoint: Path, out: Path, *flags: str) -> list[dict[str, float]]:
    done = run(shards, checkpoint, out, *flags)
    assert done.returncode == 0, done.stderr
    return read_metrics(out)


@pytest.mark.parametrize("stage", [2, 3])
def test_losses_and_norms_are_those_of_float32_once_the_scale_fits(
    tiny_checkpoint: Path, tmp_path: Path, stage: int
) -> None:
    """With a rate that changes nothing, every step has the loss and gradient of the untrained model."""
    shards = write_shards(tmp_path / "shards", make_bins(num_bins=4), tokenizer=fingerprint_of(tiny_checkpoint))
    config = json.loads((CONFIGS / f"zero{stage}.json").read_bytes())
    config["fp16"] = {"enabled": "auto", "initial_scale_power": 20, "hysteresis": 1}
    (tmp_path / "ds.json").write_text(json.dumps(config))

    half = finished(shards, tiny_checkpoint, tmp_path / "half", "--fp16", "--deepspeed", str(tmp_path / "ds.json"))
    full = finished(shards, tiny_checkpoint, tmp_path / "full", "--deepspeed", f"zero{stage}.json")

    skipped = [record["grad_norm"] is None for record in half]
    assert skipped[0] and not skipped[-1], "a scale of 2^20 overflows, a lower one does not"
    assert skipped == sorted(skipped, reverse=True)
    assert half[-1]["skipped_steps"] == sum(skipped)
    for found, expected in zip(half, full, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)
        assert found["learning_rate"] == expected["learning_rate"]
        if found["grad_norm"] is not None:
            assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-2)


def test_a_gradient_that_overflows_at_the_lowest_scale_is_as_bad_as_any(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Losses are finite, but no scale makes the gradient fit: the run stops in place of going on for ever."""
    shards = write_shards(tmp_path / "shards", make_bins(num_bins=2), tokenizer=fingerprint_of(tiny_checkpoint))
    config = json.loads((CONFIGS / "zero2.json").read_bytes())
    config["fp16"] = {"enabled": "auto", "initial_scale_power": 21, "min_loss_scale": 2**20, "hysteresis": 1}
    (tmp_path / "ds.json").write_text(json.dumps(config))
    done = run(shards, tiny_checkpoint, tmp_path / "run", "--fp16", "--deepspeed", str(tmp_path / "ds.json"))
    assert done.returncode == 1, done.stderr
    assert "step 1 skipped: its gradient overflowed, the scale of the loss is lowered" in done.stderr
    assert "error: the gradient of step 2 is not finite, though all losses are; bins [" in done.stderr


@pytest.mark.parametrize(("scale", "expected"), [(4.0, True), (2.0, False)])
def test_a_scale_can_be_lowered_down_to_the_lowest(scale: float, expected: bool) -> None:
    def engine(scaler: object) -> object:
        return SimpleNamespace(fp16_enabled=lambda: True, optimizer=SimpleNamespace(loss_scaler=scaler))

    moving = DynamicLossScaler(scale, scale_window=9, min_scale=2.0, delayed_shift=1, consecutive_hysteresis=False)
    assert can_lower_scale(engine(moving)) == expected
    assert not can_lower_scale(engine(LossScaler(scale)))


@pytest.fixture(scope="module")
def bfloat16_flags(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    fingerprint = fingerprint_of(tiny_checkpoint)
    shards = made_once(
        tmp_path_factory, "half-shards", lambda out: write_shards(out, make_bins(num_bins=4), tokenizer=fingerprint)
    )
    flags = ["--shards", str(shards), "--model_name_or_path", str(tiny_checkpoint), "--max_steps", "3"]
    flags += ["--learning_rate", "1e-3", "--gradient_accumulation_steps", "2", "--logging_steps", "1"]
    return [*flags, "--save_steps", "2"]


@pytest.fixture(scope="module")
def in_float32(bfloat16_flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    def make(out: Path) -> None:
        done = torchrun(2, *bfloat16_flags, "--save_steps", "0", "--output_dir", str(out))
        assert done.returncode == 0, done.stderr

    return made_once(tmp_path_factory, "half-full", make)


@pytest.mark.parametrize("stage", [1, 3])
def test_two_ranks_in_bfloat16_have_the_losses_of_float32_and_go_on_to_the_bit(
    bfloat16_flags: list[str], in_float32: Path, tmp_path: Path, stage: int
) -> None:
    flags = [*bfloat16_flags, "--deepspeed", f"zero{stage}.json", "--bf16"]
    done = torchrun(2, *flags, "--output_dir", str(tmp_path / "half"))
    assert done.returncode == 0, done.stderr
    for expected, found in zip(read_metrics(in_float32), read_metrics(tmp_path / "half"), strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-2)
        assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=5e-2)

    shutil.copytree(tmp_path / "half" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    done = torchrun(2, *flags, "--output_dir", str(tmp_path / "again"))
    assert done.returncode == 0, done.stderr
    assert read_untimed(tmp_path / "again") == read_untimed(tmp_path / "half")[2:]
    weights, found_weights = read_weights(tmp_path / "half"), read_weights(tmp_path / "again")
    assert [name for name, weight in weights.items() if not torch.equal(found_weights[name], weight)] == []
