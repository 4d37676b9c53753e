"""A dry run tells whether a run would go well, on all ranks alike, and leaves nothing behind."""

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
from train.preflight.dry_run import MAX_PROBLEMS_SHOWN, check_folder, explain, room_for, run_largest
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
    places = ["--shards", str(shards), "--model_name_or_path", str(checkpoint), "--output_dir", str(run)]
    return [*places, "--max_steps", "3", "--tune_mm_vision", "--dry-run"]


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_two_ranks_look_and_leave_nothing(shards: Path, tiny_checkpoint: Path, tmp_path: Path, strategy: str) -> None:
    run = tmp_path / "run"
    held_out = ["--eval_shards", str(shards)]
    done = run_ranks(2, *flags(shards, tiny_checkpoint, run), *held_out, "--deepspeed", f"{strategy}.json")
    assert done.returncode == 0, done.stderr
    for part in (
        "tokenizer and processor of",
        "memory of a rank:",
        "GiB for each of 2 ranks",
        f"the run writes up to 1 x 0.{'15' if strategy in ('zero1', 'zero2') else '11'} GiB of checkpoints",
        "largest micro-batch, bins [3]:",
        "to evaluate on, bin 3:",
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
    done = run_ranks(2, *flags(shards, broken, tmp_path / "run"), "--eval_shards", str(shards))
    assert done.returncode == 1
    line, other = sorted(line for line in done.stderr.splitlines() if line.startswith("error ("))
    assert other == "error (rank 1): the run would not go well. The first rank says why."
    assert "the run would not go well: the loss of the largest micro-batch" in line
    assert "the loss of bin 3 of --eval_shards is nan" in line
    assert "has a loss of nan packed and nan alone" in line
    assert len(line.split("; ")) <= MAX_PROBLEMS_SHOWN + 1


def have_no_memory() -> None:
    """Make the second rank see a host without memory."""
    if os.environ["RANK"] == "1":
        mock.patch.object(train.preflight.dry_run, "host_bytes", return_value=0).start()


def have_no_disk() -> None:
    """Make ranks see a full disk."""
    mock.patch.object(shutil, "disk_usage", return_value=SimpleNamespace(free=0)).start()


@pytest.mark.parametrize(
    ("strategy", "prepare", "code", "message"),
    [
        ("zero3_offload", have_no_memory, 2, "offloading takes 0.3 GiB of a machine that has 0.0 GiB"),
        ("zero2", have_no_disk, 1, "1 x 0.15 GiB of checkpoints"),
    ],
    ids=["memory of a host", "disk"],
)
def test_a_machine_without_room_is_found_and_all_ranks_end(
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
    assert first.startswith(f"error (rank 0): the run would not go well: {message}")
    assert second == "error (rank 1): the run would not go well. The first rank says why."
    assert ("largest micro-batch, bins" in done.stderr) == (code == 1)


def test_a_folder_that_cannot_be_written_is_found(tmp_path: Path) -> None:
    check_folder(tmp_path / "new" / "run")
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--output_dir .*file/run cannot be written"):
        check_folder(tmp_path / "file" / "run")


def test_memory_that_runs_out_is_one_sentence() -> None:
    message = r"^the model takes more memory than there is \(CUDA out of memory\): lower"
    with pytest.raises(ConfigError, match=message), room_for("the model"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of")


class Passes:
    """A model that notes what is asked of it."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, micro: object) -> torch.Tensor:
        self.asked.append("forward")
        return torch.tensor(1.0)

    def backward(self, loss: torch.Tensor) -> None:
        self.asked.append("backward")

    def step(self) -> None:
        self.asked.append("step")


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_a_pass_beside_the_gradients_of_another_is_looked_at_and_no_step_is_done(
    shards: Path, accumulation: int
) -> None:
    """Gradients that add up make the second pass the larger one; after the last of a step the optimizer would step."""
    running, index = Passes(), open_shards(shards)
    plan = SimpleNamespace(
        index=index,
        compute=SimpleNamespace(device=torch.device("cpu")),
        recipe=SimpleNamespace(accumulation=accumulation),
        shape=SimpleNamespace(window_size=112),
    )
    assert run_largest(running, cast(Plan, plan), BinReader(index), [3]) == []
    once = ["forward", "backward"]
    assert running.asked == (once if accumulation == 1 else [*once, "step", *once])


def test_the_first_rank_says_for_all_what_is_wrong() -> None:
    problems = [f"problem {number}" for number in range(MAX_PROBLEMS_SHOWN + 2)]
    first, second = (Ranks(rank=rank, local=rank, world=2) for rank in (0, 1))
    assert explain(problems, first).endswith("; problem 7; and 2 more.")
    assert explain(problems[:1], first) == "the run would not go well: problem 0."
    assert "problem" not in explain(problems, second)


def test_the_flag_has_a_hyphen_or_not() -> None:
    for written in ("--dry-run", "--dry_run", "--dry-run=True"):
        assert parse_arguments(["--shards", "s", written]).dry_run
    assert not parse_arguments(["--shards", "s"]).dry_run
