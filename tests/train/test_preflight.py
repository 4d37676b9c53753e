"""A dry run says on all ranks alike whether a run would succeed, and leaves nothing behind."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast
from unittest import mock

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

import train.preflight.dry_run
from schemas.errors import ConfigError
from tests.train.launching import fingerprint_of, run_ranks
from tests.train.synthetic import make_bins, write_shards
from train.preflight.dry_run import check_folder
from train.preflight.passes import run_largest
from train.preflight.problems import MAX_PROBLEMS_SHOWN, explain, room_for
from train.run.engine import Engine
from train.run.plan import Plan
from train.run.process_group import Ranks
from train.settings.flags import parse_arguments
from train.shards.index import open_shards
from train.shards.reader import BinReader


@pytest.fixture(scope="module")
def shards(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("preflight") / "shards"
    return write_shards(out, make_bins(num_bins=8), tokenizer=fingerprint_of(tiny_checkpoint))


def flags(shards: Path, checkpoint: Path, run: Path) -> list[str]:
    paths = ["--shards", str(shards), "--model_name_or_path", str(checkpoint), "--output_dir", str(run)]
    return [*paths, "--gradient_accumulation_steps", "4", "--max_steps", "3", "--tune_mm_vision", "--dry-run"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_a_dry_run_passes_and_leaves_nothing(
    shards: Path, tiny_checkpoint: Path, tmp_path: Path, strategy: str
) -> None:
    run = tmp_path / "run"
    held_out = ["--eval_shards", str(shards)]
    done = run_ranks(2, *flags(shards, tiny_checkpoint, run), *held_out, "--deepspeed", f"{strategy}.json")
    assert done.returncode == 0, done.stderr
    for part in (
        "tokenizer and processor of",
        "memory of a rank:",
        "GiB per rank on 2 ranks",
        f"disk: the run writes up to 1 x 0.{'07' if strategy in ('zero1', 'zero2') else '06'} GiB of checkpoints",
        "largest micro-batch, bin 3:",
        "evaluation, bin 3:",
        "mean losses packed and alone differ by at most",
        "dry run passed: the same command without --dry-run trains 3 steps",
    ):
        assert done.stderr.count(part) == 1, part
    assert "2 x 4 B x 4.981 M / 2 ranks" in done.stderr
    assert not run.exists()


@pytest.mark.slow
def test_a_loss_that_is_not_finite_fails_the_dry_run(shards: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_checkpoint)
    with torch.no_grad():
        hf.model.language_model.norm.weight[0] = float("nan")
    broken = tmp_path / "broken"
    hf.save_pretrained(broken)
    for name in ("tokenizer.json", "preprocessor_config.json"):
        (broken / name).write_bytes((tiny_checkpoint / name).read_bytes())
    done = run_ranks(2, *flags(shards, broken, tmp_path / "run"), "--eval_shards", str(shards))
    assert done.returncode == 1
    line, other = sorted(line for line in done.stderr.splitlines() if line.startswith("error ("))
    assert other == "error (rank 1): dry run failed; see the message of rank 0."
    assert "dry run failed: the loss of the largest micro-batch" in line
    assert "the loss of bin 3 of --eval_shards is nan" in line
    assert "has a loss of nan packed and nan alone" in line
    assert len(line.split("; ")) <= MAX_PROBLEMS_SHOWN + 1


def have_no_memory() -> None:
    """Let the second rank see a host without memory."""
    if os.environ["RANK"] == "1":
        mock.patch.object(train.preflight.dry_run, "host_bytes", return_value=0).start()


def have_no_disk() -> None:
    """Let all ranks see a full disk."""
    mock.patch.object(shutil, "disk_usage", return_value=SimpleNamespace(free=0)).start()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "prepare", "code", "message"),
    [
        (
            "zero3_offload",
            have_no_memory,
            2,
            "offloading needs 0.1 GiB (2 ranks with 0.1 GiB each), but the machine has 0.0 GiB",
        ),
        ("zero2", have_no_disk, 1, "1 x 0.07 GiB of checkpoints"),
    ],
    ids=["memory of a host", "disk"],
)
def test_a_machine_without_room_fails_the_dry_run_on_all_ranks(
    shards: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    strategy: str,
    prepare: Callable[[], None],
    code: int,
    message: str,
) -> None:
    argv = [*flags(shards, tiny_checkpoint, tmp_path / "run"), "--deepspeed", f"{strategy}.json"]
    done = run_ranks(2, *argv, prepare=prepare)
    assert done.returncode == code, done.stderr
    first, second = sorted(line for line in done.stderr.splitlines() if line.startswith("error ("))
    assert first.startswith(f"error (rank 0): dry run failed: {message}")
    assert second == "error (rank 1): dry run failed; see the message of rank 0."
    assert ("largest micro-batch, bin" in done.stderr) == (code == 1)


def test_a_folder_that_is_not_writable_is_an_error(tmp_path: Path) -> None:
    check_folder(tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--output_dir .*file/run is not writable"):
        check_folder(tmp_path / "file" / "run")


def test_running_out_of_device_memory_is_one_sentence() -> None:
    message = r"^device memory is too small for the model \(CUDA out of memory\): lower"
    with pytest.raises(ConfigError, match=message), room_for("the model"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of")


class Passes:
    """A model that records how it is called."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(self, micro: object) -> torch.Tensor:
        self.calls.append("forward")
        return torch.tensor(1.0)

    def backward(self, loss: torch.Tensor) -> None:
        self.calls.append("backward")

    def step(self) -> None:
        self.calls.append("step")


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_the_largest_micro_batch_runs_next_to_the_gradients_of_another_without_a_step(
    shards: Path, accumulation: int
) -> None:
    """Accumulated gradients make the second pass the larger one. The optimizer would step after the last one."""
    engine, index = Passes(), open_shards(shards)
    plan = SimpleNamespace(
        index=index,
        compute=SimpleNamespace(device=torch.device("cpu")),
        batch=SimpleNamespace(accumulation=accumulation),
        shape=SimpleNamespace(window_size=112),
    )
    assert run_largest(cast(Engine, engine), cast(Plan, plan), BinReader(index), [3]) == []
    once = ["forward", "backward"]
    assert engine.calls == (once if accumulation == 1 else [*once, "step", *once])


def test_the_first_rank_explains_for_all() -> None:
    problems = [f"problem {index}" for index in range(MAX_PROBLEMS_SHOWN + 2)]
    first, second = (Ranks(rank=rank, local=rank, world=2) for rank in (0, 1))
    assert explain(problems, first).endswith("; problem 7; and 2 more.")
    assert explain(problems[:1], first) == "dry run failed: problem 0."
    assert "problem" not in explain(problems, second)


def test_the_flag_is_spelled_with_a_hyphen_or_an_underscore() -> None:
    for written in ("--dry-run", "--dry_run", "--dry-run=True"):
        assert parse_arguments(["--shards", "s", written]).dry_run
    assert not parse_arguments(["--shards", "s"]).dry_run
