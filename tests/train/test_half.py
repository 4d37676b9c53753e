"""Training in float16: the loss is scaled, a scale that is too large is lowered step by step, and norms are unscaled.

Processors compute in float16 slowly, and DeepSpeed takes some for unable; here it is told that they can.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.train.launching import fingerprint_of, launch, read_metrics
from tests.train.synthetic import make_bins, write_shards
from train.engine import CONFIGS

PROGRAM = """
import sys
from deepspeed.accelerator import get_accelerator
get_accelerator().is_fp16_supported = lambda: True
from train.main import main
sys.exit(main(sys.argv[1:]))
"""


def run(shards: Path, checkpoint: Path, out: Path, *flags: str) -> list[dict[str, float]]:
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
    written = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    done = launch(sys.executable, "-c", PROGRAM, *written, *flags)
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

    half = run(shards, tiny_checkpoint, tmp_path / "half", "--fp16", "--deepspeed", str(tmp_path / "ds.json"))
    full = run(shards, tiny_checkpoint, tmp_path / "full", "--deepspeed", f"zero{stage}.json")

    skipped = [record["grad_norm"] is None for record in half]
    assert skipped[0] and not skipped[-1], "a scale of 2^20 overflows, a lower one does not"
    assert skipped == sorted(skipped, reverse=True)
    assert half[-1]["skipped_steps"] == sum(skipped)
    for found, expected in zip(half, full, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)
        assert found["learning_rate"] == expected["learning_rate"]
        if found["grad_norm"] is not None:
            assert found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-2)
