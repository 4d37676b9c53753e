"""A step whose loss or gradient is not finite changes no weight, is reported with its samples, and may not repeat."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from schemas.errors import VlprepError
from tests.train.launching import as_flags, fingerprint_of, made_once, read_metrics, read_weights, run_ranks
from tests.train.synthetic import as_bin, make_bins, make_sample, write_shards
from train.batches.batch import build_micro_batch
from train.batches.stream import StepBatch
from train.run.nonfinite import SkippedSteps
from train.shards.index import ShardIndex, open_shards

POISON = 9
"""A token that only the poisoned sample has."""


@pytest.fixture(scope="module")
def poisoned(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose embedding of one token is NaN, and four bins of which one has that token."""

    def make(out: Path) -> None:
        checkpoint = out / "checkpoint"
        checkpoint.mkdir(parents=True)
        for path in tiny_checkpoint.iterdir():
            (checkpoint / path.name).write_bytes(path.read_bytes())
        config = AutoConfig.from_pretrained(checkpoint)
        config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
        config.save_pretrained(checkpoint)
        weights = load_file(checkpoint / "model.safetensors")
        (name,) = [name for name in weights if name.endswith("embed_tokens.weight")]
        weights["lm_head.weight"] = weights[name].clone()
        weights[name][POISON] = float("nan")
        save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
        rng = np.random.default_rng(0)
        bins = [[make_sample(rng)] for _ in range(4)]
        bins[2][0].input_ids[3] = POISON
        write_shards(out / "shards", bins, tokenizer=fingerprint_of(checkpoint))

    return made_once(tmp_path_factory, "poisoned", make)


def run(poisoned: Path, out: Path, *flags: str) -> tuple[int, str]:
    settings = {
        "shards": poisoned / "shards",
        "model_name_or_path": poisoned / "checkpoint",
        "output_dir": out,
        "max_steps": 4,
        "gradient_accumulation_steps": 1,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_steps": 0,
    }
    done = run_ranks(2, *as_flags(settings), *flags)
    return done.returncode, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "precision"),
    [("zero2", "fp32"), ("zero3", "fp32"), ("zero1", "bf16"), ("zero2", "bf16"), ("zero3_offload", "bf16")],
)
def test_a_bin_that_poisons_the_loss_is_skipped_and_reported_with_its_samples(
    poisoned: Path, tmp_path: Path, strategy: str, precision: str
) -> None:
    """Two ranks of one bin: in each epoch one of the two steps has the bin, on one of the ranks.

    In bfloat16 DeepSpeed looks for overflow in another optimizer under ZeRO-1 than under ZeRO-2 and 3.
    """
    code, errors = run(poisoned, tmp_path, "--deepspeed", f"{strategy}.json", "--bf16", str(precision == "bf16"))
    assert code == 0, errors
    records = read_metrics(tmp_path)
    bad = [record["step"] for record in records if record["loss"] is None]
    assert len(bad) == 2
    assert [record["skipped_steps"] for record in records] == [
        sum(step <= record["step"] for step in bad) for record in records
    ]
    for step in bad:
        assert f"the loss of step {step} is not finite in bin 2; skipping the step" in errors
    assert "  bin 2: synthetic, s.jsonl:3 (record 2, id s2)" in errors
    weights = read_weights(tmp_path)
    (name,) = [name for name in weights if name.endswith("embed_tokens.weight")]
    assert weights[name][POISON].isnan().all()
    weights[name][POISON] = 0.0
    assert [name for name, weight in weights.items() if not weight.isfinite().all()] == []


@pytest.mark.slow
def test_too_many_consecutive_skipped_steps_stop_the_run(poisoned: Path, tmp_path: Path) -> None:
    code, errors = run(poisoned, tmp_path, "--max_skipped_steps", "0")
    assert code == 1
    assert "is not finite in bin 2: 1 consecutive skipped step. Lower the learning rate" in errors
    assert not (tmp_path / "final").exists()


@pytest.fixture
def index(tmp_path: Path) -> ShardIndex:
    return open_shards(write_shards(tmp_path / "set", make_bins(num_bins=4)))


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def step_of(*bin_ids: int) -> StepBatch:
    rng = np.random.default_rng(0)
    micro_batches = tuple(build_micro_batch([as_bin([make_sample(rng)])], bin_ids=[bin_id]) for bin_id in bin_ids)
    return StepBatch(
        step=4,
        micro_batches=micro_batches,
        num_targets=10,
        num_tokens=10,
        max_tokens=10,
        num_samples=2,
        efficiency=1.0,
        bins=bin_ids,
        data_wait_s=0.0,
    )


def skipped_steps(index: ShardIndex, *, max_consecutive: int) -> SkippedSteps:
    return SkippedSteps(index, max_consecutive=max_consecutive, is_first=True, order_command="show")


INFINITE = torch.tensor([1.0, float("inf")])


def test_a_finite_step_resets_the_count_of_consecutive_skips(process_group: None, index: ShardIndex) -> None:
    skipped = skipped_steps(index, max_consecutive=1)
    for _ in range(3):
        skipped.note_skipped(step_of(0, 1), INFINITE, scales_loss=False)
        skipped.note_done()
    assert skipped.total == 3
    skipped.note_skipped(step_of(0, 1), INFINITE, scales_loss=False)
    message = r"loss of step 5 is not finite in bin 1: 2 consecutive skipped steps\..*\(`show --step 4`\)"
    with pytest.raises(VlprepError, match=message):
        skipped.note_skipped(step_of(0, 1), INFINITE, scales_loss=False)


def test_a_gradient_that_is_not_finite_reports_all_bins_and_samples_of_the_step(
    process_group: None, index: ShardIndex, caplog: pytest.LogCaptureFixture
) -> None:
    skipped = skipped_steps(index, max_consecutive=0)
    with pytest.raises(VlprepError, match=r"gradient of step 5 is not finite, though all losses are; bins 0, 1"):
        skipped.note_skipped(step_of(0, 1), torch.ones(2), scales_loss=False)
    reported = [line.split(":")[0] for line in caplog.text.splitlines() if line.startswith("  bin")]
    assert reported == [f"  bin {bin_id}" for bin_id in (0, 1) for _ in range(index.num_samples[bin_id])]


def test_a_scaled_gradient_may_overflow(
    process_group: None, index: ShardIndex, caplog: pytest.LogCaptureFixture
) -> None:
    """Float16 finds its scale by overflowing. A loss that is not finite still counts."""
    caplog.set_level(logging.INFO)
    skipped = skipped_steps(index, max_consecutive=0)
    for _ in range(5):
        skipped.note_skipped(step_of(0, 1), torch.ones(2), scales_loss=True)
    assert "lowering the loss scale" in caplog.text
    with pytest.raises(VlprepError, match="not finite in bin 1"):
        skipped.note_skipped(step_of(0, 1), INFINITE, scales_loss=True)


def test_a_step_is_skipped_even_if_the_ledger_of_its_samples_is_missing(
    process_group: None, index: ShardIndex, caplog: pytest.LogCaptureFixture
) -> None:
    Path(str(index.folders[0]), "samples.parquet").unlink()
    skipped_steps(index, max_consecutive=1).note_skipped(step_of(0, 1), INFINITE, scales_loss=False)
    assert "their samples are unknown: " in caplog.text
