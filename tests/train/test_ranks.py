"""Ranks outside of training steps: they wait for the first one as long as it needs, and make the same run."""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import deepspeed
import pytest
import torch
from torch.distributed import distributed_c10d

from schemas.errors import VlprepError
from tests.train.launching import as_flags, fingerprint_of, run_ranks
from tests.train.synthetic import make_bins, write_shards
from train.run import loop, process_group

pytestmark = pytest.mark.slow


@pytest.fixture
def flags(tiny_checkpoint: Path, tmp_path: Path) -> list[str]:
    write_shards(tmp_path / "shards", make_bins(num_bins=4), tokenizer=fingerprint_of(tiny_checkpoint))
    settings = {
        "shards": tmp_path / "shards",
        "model_name_or_path": tiny_checkpoint,
        "output_dir": tmp_path / "run",
        "gradient_accumulation_steps": 1,
        "save_steps": 1,
    }
    return as_flags(settings)


def wait_for_the_first() -> None:
    """The first rank works alone for longer than ranks wait for each other between steps."""

    def wait(*_: object) -> bool:
        with process_group.joined(torch.device("cpu")):
            time.sleep(8 if os.environ["RANK"] == "0" else 0)
            process_group.barrier()
            assert list(distributed_c10d._world.pg_map) == [distributed_c10d._get_default_group()], (
                "waiting needs no group of its own, whose ranks would all connect to each other"
            )
        return True

    patch = pytest.MonkeyPatch()
    patch.setattr(deepspeed, "init_distributed", partial(deepspeed.init_distributed, timeout=timedelta(seconds=5)))
    patch.setattr(loop, "train", wait)


def test_ranks_wait_for_work_that_the_first_one_does_alone(flags: list[str]) -> None:
    done = run_ranks(2, *flags, prepare=wait_for_the_first)
    assert done.returncode == 0, done.stderr


def fail(rank: str) -> None:
    """One rank fails while the other waits for it."""

    def wait_or_fail(*_: object) -> bool:
        with process_group.joined(torch.device("cpu")):
            process_group.barrier()
            if os.environ["RANK"] == rank:
                time.sleep(1)
                raise VlprepError(f"rank {rank} has no disk")
            process_group.barrier()
        return True

    pytest.MonkeyPatch().setattr(loop, "train", wait_or_fail)


@pytest.mark.parametrize("failing", ["0", "1"])
def test_a_rank_that_waits_for_one_that_fails_ends_at_once(flags: list[str], failing: str) -> None:
    done = run_ranks(2, *flags, prepare=partial(fail, failing))  # it fails if a rank runs on
    assert done.returncode == 1
    assert f"error (rank {failing}): rank {failing} has no disk" in done.stderr
    assert f"error (rank {1 - int(failing)}): " in done.stderr
    assert done.stderr.count("see its message, above or in its log.") == 1


def see_less_on_the_second() -> None:
    """The second rank does not see the checkpoint that the first one resumes from."""
    if os.environ["RANK"] == "1":
        pytest.MonkeyPatch().setattr("train.run.resume.choose_checkpoint", lambda *_: None)


def test_ranks_with_different_plans_end_before_training(flags: list[str], tmp_path: Path) -> None:
    """As on machines with separate disks."""
    assert run_ranks(2, *flags, "--max_steps", "1").returncode == 0
    done = run_ranks(2, *flags, "--max_steps", "2", prepare=see_less_on_the_second)
    assert done.returncode == 2
    for rank in (0, 1):
        assert f"error (rank {rank}): rank 1 would train with first step = 1, but rank 0 with 2: let" in done.stderr
    assert not (tmp_path / "run" / "checkpoint-2").exists()


def end_before_the_others(rank: str) -> None:
    """A rank ends while it starts."""
    if os.environ["RANK"] == rank:
        sys.exit(3)


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("1", "1 of 2 ranks came to 127.0.0.1:"),
        ("0", "the ranks cannot meet at 127.0.0.1:"),  # where the first one would open the store
    ],
)
def test_a_rank_that_ends_while_it_starts_is_waited_for_no_longer_than_the_limit(
    flags: list[str], missing: str, says: str
) -> None:
    prepare = partial(end_before_the_others, missing)
    done = run_ranks(2, *flags, "--rendezvous_timeout_s", "1", prepare=prepare, limit_s=60)
    assert f"error (rank {1 - int(missing)}): {says}" in done.stderr
    assert " within 1 s" in done.stderr
    assert "Traceback" not in done.stderr
