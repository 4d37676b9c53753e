"""An exported model, loaded by transformers, has the logits of the trained engine, to the bit."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from torch.nn import functional
from transformers import Qwen2_5_VLForConditionalGeneration

from tests.train.launching import as_flags, fingerprint_of, run_ranks
from tests.train.synthetic import make_bins, write_shards
from train.batches.batch import build_micro_batch
from train.model import pretrained
from train.model.head import TargetHead
from train.model.packed import PackedQwen
from train.run import loop
from train.run.engine import Engine
from train.run.plan import Plan
from train.run.run_dir import list_checkpoints
from train.shards.index import open_shards
from train.shards.reader import read_checked_bin

pytestmark = pytest.mark.slow


def have_no_disk_for_the_model() -> None:
    """The disk is full when the model is written."""

    def fail(_: object, folder: Path, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder / "model.safetensors"))

    pytest.MonkeyPatch().setattr(Qwen2_5_VLForConditionalGeneration, "save_pretrained", fail)


def test_a_run_that_cannot_write_its_model_only_exports_when_it_is_rerun(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Whatever --save_steps says, the last step has a checkpoint before the model is gathered."""
    shards = write_shards(tmp_path / "shards", make_bins(num_bins=2), tokenizer=fingerprint_of(tiny_checkpoint))
    settings = {
        "shards": shards,
        "model_name_or_path": tiny_checkpoint,
        "output_dir": tmp_path / "run",
        "max_steps": 2,
        "gradient_accumulation_steps": 1,
        "save_steps": 0,
    }
    failed = run_ranks(1, *as_flags(settings), prepare=have_no_disk_for_the_model)
    assert failed.returncode == 1
    assert "model.safetensors cannot be written (No space left on device" in failed.stderr
    assert [step for step, _ in list_checkpoints(tmp_path / "run")] == [2]
    assert not (tmp_path / "run" / "final").exists()
    trained = (tmp_path / "run" / "metrics.jsonl").read_bytes()

    done = run_ranks(1, *as_flags(settings))
    assert done.returncode == 0, done.stderr
    assert f"resuming from {tmp_path / 'run' / 'checkpoint-2'}" in done.stderr
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == trained, "a step was trained again"
    assert (tmp_path / "run" / "final" / "model.safetensors").is_file()


LOGITS = "logits.pt"


def give_logits(head: TargetHead, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Logits of each target instead of its scores, (V, T) float32."""
    return functional.linear(rows, head.weight).float().T


def logits_of(model: Any, shards: str) -> list[torch.Tensor]:
    index = open_shards(shards)
    batches = (build_micro_batch([read_checked_bin(index, bin_id)]) for bin_id in range(index.num_bins))
    with torch.no_grad():
        return [model(batch, scores=True) for batch in batches]


def note_logits() -> None:
    """Make a rank write the logits of its engine, then export the model in several files."""
    export = loop.export

    def note_and_export(engine: Engine, plan: Plan) -> None:
        engine.eval()
        logits = logits_of(engine, plan.args.shards)
        if plan.ranks.is_first:
            torch.save(logits, plan.args.run_dir / LOGITS)
        export(engine, plan)

    patch = pytest.MonkeyPatch()  # a rank ends with its run: nothing is undone
    patch.setattr(TargetHead, "_chunk_scores", give_logits)
    patch.setattr(pretrained, "MAX_SHARD_SIZE", "100KB")
    patch.setattr(loop, "export", note_and_export)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in ranks: several threads may sum in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    ("strategy", "precision"), [("zero3", "float32"), ("zero2", "bfloat16"), ("zero3", "bfloat16")]
)
def test_the_exported_model_has_the_logits_of_the_trained_engine(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str, precision: str
) -> None:
    shards = write_shards(tmp_path / "shards", make_bins(num_bins=4), tokenizer=fingerprint_of(tiny_checkpoint))
    settings = {
        "shards": shards,
        "model_name_or_path": tiny_checkpoint,
        "output_dir": tmp_path / "run",
        "deepspeed": f"{strategy}.json",
        "bf16": precision == "bfloat16",
        "tune_mm_vision": True,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "gradient_accumulation_steps": 1,
        "save_steps": 0,
    }
    done = run_ranks(2, *as_flags(settings), prepare=note_logits)
    assert done.returncode == 0, done.stderr
    exported = tmp_path / "run" / "final"
    assert (exported / "model.safetensors.index.json").is_file()
    assert len(list(exported.glob("model-*-of-*.safetensors"))) > 2

    monkeypatch.setattr(TargetHead, "_chunk_scores", give_logits)
    if (strategy, precision) == ("zero3", "bfloat16"):
        # Its linear layers add the bias to a product that is rounded already; in float32 that makes no difference here.
        monkeypatch.setattr(functional, "linear", zero3_linear_wrap)
    logits = {}
    for folder in (exported, tiny_checkpoint):
        hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype="auto")
        assert folder == tiny_checkpoint or hf.dtype == getattr(torch, precision)
        logits[folder] = logits_of(PackedQwen(hf, attn_implementation="sdpa").eval(), str(shards))
    for engine, again, before in zip(torch.load(tmp_path / "run" / LOGITS), logits[exported], logits[tiny_checkpoint]):
        assert engine.shape[0] == 151936 and torch.equal(engine, again)
        assert (engine - before).abs().max() > 0.1, "training has hardly changed the model: nothing is compared"
