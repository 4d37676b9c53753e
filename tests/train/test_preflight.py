"""A dry run tells whether a run would go well, on all ranks alike, and leaves nothing behind."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from schemas.errors import ConfigError
from tests.train.launching import alone, fingerprint_of, torchrun
from tests.train.synthetic import make_bins, write_shards
from train.batch import MicroBatch, build_micro_batch
from train.flags import parse_arguments
from train.index import open_shards
from train.memory import DEVICE, MOMENTS, Memory, Phase, Term
from train.model import PackedQwen
from train.preflight import (
    MAX_PROBLEMS_SHOWN,
    bins_to_compare,
    check_device,
    check_folder,
    compare_packed,
    split_samples,
)
from train.reader import BinReader


@pytest.fixture(scope="module")
def shards(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("preflight") / "shards"
    return write_shards(out, make_bins(num_bins=8), tokenizer=fingerprint_of(tiny_checkpoint))


def flags(shards: Path, checkpoint: Path, run: Path) -> list[str]:
    places = ["--shards", str(shards), "--model_name_or_path", str(checkpoint), "--output_dir", str(run)]
    return [*places, "--max_steps", "3", "--tune_mm_vision", "--dry-run"]


@pytest.mark.parametrize("strategy", ["zero2", "zero3", "zero3_offload"])
def test_two_ranks_look_and_leave_nothing(shards: Path, tiny_checkpoint: Path, tmp_path: Path, strategy: str) -> None:
    run = tmp_path / "run"
    done = torchrun(2, *flags(shards, tiny_checkpoint, run), "--deepspeed", f"{strategy}.json")
    assert done.returncode == 0, done.stderr
    for part in (
        "tokenizer and processor of",
        "memory of a rank:",
        "GiB for each of 2 ranks",
        "largest micro-batch, bins [",
        "mean losses packed and alone differ by",
        "all is well: the same command without --dry-run trains 3 steps",
    ):
        assert done.stderr.count(part) == 1, part
    assert "2 x 4 B x 9.903 M / 2 ranks" in done.stderr
    assert not run.exists()


def test_a_loss_that_is_no_number_is_found(shards: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_checkpoint)
    with torch.no_grad():
        hf.model.language_model.norm.weight[0] = float("nan")
    broken = tmp_path / "broken"
    hf.save_pretrained(broken)
    for name in ("tokenizer.json", "preprocessor_config.json"):
        (broken / name).write_bytes((tiny_checkpoint / name).read_bytes())
    done = alone(*flags(shards, broken, tmp_path / "run"))
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert "the run would not go well: the loss of the largest micro-batch" in line
    assert "has a loss of nan packed and nan alone" in line
    assert len(line.split("; ")) <= MAX_PROBLEMS_SHOWN + 1


@pytest.fixture
def model(tiny_checkpoint: Path) -> PackedQwen:
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    return PackedQwen(hf, attn_implementation="sdpa")


def plan_of(shards: Path) -> Any:
    index, shape = open_shards(shards), SimpleNamespace(window_size=112)
    return SimpleNamespace(index=index, dtype=torch.float32, device=torch.device("cpu"), shape=shape)


@pytest.mark.parametrize("codec", ["raw", "zstd", "jpeg"])
def test_samples_of_a_bin_have_the_same_losses_alone(
    model: PackedQwen, tmp_path: Path, caplog: pytest.LogCaptureFixture, codec: str
) -> None:
    caplog.set_level(logging.INFO)
    plan = plan_of(write_shards(tmp_path / "set", make_bins(num_bins=8), codec=codec))
    assert compare_packed(model, plan, BinReader(plan.index)) == []
    num_samples = sum(int(plan.index.num_samples[number]) for number in bins_to_compare(plan.index))
    assert f"{num_samples} samples of bins" in caplog.text


def test_a_sample_that_sees_its_neighbour_is_found(
    model: PackedQwen, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions that do not restart at the border of a sample let it."""

    def leaking(self: PackedQwen, micro: MicroBatch) -> dict[str, Any]:
        positions = micro.position_ids.clone()
        positions[0, 0] = torch.arange(micro.num_tokens)
        return {"position_ids": positions}

    monkeypatch.setattr(PackedQwen, "_isolation", leaking)
    plan = plan_of(shards)
    problems = compare_packed(model, plan, BinReader(plan.index))
    assert problems
    assert all("more than 0.0001 apart" in problem for problem in problems)
    # The first sample of a bin has nobody before it.
    assert not any(problem.startswith("sample 0 ") for problem in problems)


def test_a_bin_falls_apart_into_its_samples(shards: Path) -> None:
    """Two samples, with one picture and with three."""
    plan = plan_of(shards)
    reader = BinReader(plan.index)
    one = reader.read(1).bin
    micro = build_micro_batch([one])
    samples = split_samples(one, micro, plan)
    assert [len(sample.vision.media) for sample in samples] == [1, 3]
    assert torch.equal(torch.cat([sample.input_ids[0] for sample in samples]), micro.input_ids[0])
    assert torch.equal(torch.cat([sample.targets for sample in samples]), micro.targets)
    assert torch.equal(torch.cat([sample.vision.planes for sample in samples]), micro.vision.planes)
    assert {sample.vision.residuals for sample in samples} == {micro.vision.residuals}


def test_bins_of_each_kind_are_compared_if_they_hold_several_samples(shards: Path) -> None:
    """Text alone, pictures, all together; the bins with a clip alone hold one sample."""
    index = open_shards(shards)
    chosen = bins_to_compare(index)
    assert sorted(number % 4 for number in chosen) == [0, 1, 3]
    assert all(index.num_samples[chosen] > 1)


def test_a_step_must_fit_the_device() -> None:
    """Seen 60 bytes without the moments, which add 20; a step was worked out to take 50 + 25."""
    terms = {"weights": (30, Phase.ALWAYS), MOMENTS: (20, Phase.ALWAYS), "copies": (25, Phase.STEP)}
    memory = Memory(
        tuple(
            Term(name=name, num_bytes=size, arithmetic="", place=DEVICE, phase=phase)
            for name, (size, phase) in terms.items()
        )
    )
    assert check_device(memory, 60, 80) == []
    assert len(check_device(memory, 60, 79)) == 1
    assert check_device(memory, 10, 75) == []
    assert len(check_device(memory, 10, 74)) == 1


def test_a_folder_that_cannot_be_written_is_found(tmp_path: Path) -> None:
    check_folder(tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--output_dir .*file/run cannot be written"):
        check_folder(tmp_path / "file" / "run")


def test_the_flag_has_a_hyphen_or_not() -> None:
    for written in ("--dry-run", "--dry_run", "--dry-run=True"):
        assert parse_arguments(["--shards", "s", written]).dry_run
    assert not parse_arguments(["--shards", "s"]).dry_run
