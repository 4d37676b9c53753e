"""Forked ranks are ranks as launchers start them, and one that fails or hangs is not overlooked."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from tests.train import launching
from tests.train.launching import made_once, run_ranks

NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "DS_ACCELERATOR", "OMP_NUM_THREADS")


def tell_environment() -> None:
    """End after telling what a rank finds."""
    sys.stderr.write(" ".join(os.environ[name] for name in NAMES) + "\n")
    sys.exit(0)


def fail_second() -> None:
    """End with 0 in the first rank and with 7 in the second."""
    sys.exit(7 * int(os.environ["RANK"]))


def hang_second() -> None:
    """End with 3 in the first rank and not at all in the second."""
    if os.environ["RANK"] == "0":
        sys.exit(3)
    time.sleep(600)


@pytest.mark.slow
def test_ranks_have_their_own_environment_and_the_test_keeps_its_own() -> None:
    before = dict(os.environ)
    done = run_ranks(2, prepare=tell_environment)
    assert done.returncode == 0
    assert sorted(done.stderr.splitlines()) == ["0 0 2 127.0.0.1 cpu 1", "1 1 2 127.0.0.1 cpu 1"]
    assert dict(os.environ) == before


@pytest.mark.slow
def test_the_failure_of_a_later_rank_is_seen() -> None:
    assert run_ranks(2, prepare=fail_second).returncode == 7


@pytest.mark.slow
def test_a_rank_that_continues_after_another_failed_fails_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "GRACE_S", 0.1)
    with pytest.raises(pytest.fail.Exception, match="rank 1 did not end:"):
        run_ranks(2, prepare=hang_second)


def test_a_failed_run_is_not_continued(tmp_path_factory: pytest.TempPathFactory) -> None:
    def fail(out: Path) -> None:
        (out / "checkpoint-1").mkdir(parents=True)
        raise ValueError("the run failed")

    with pytest.raises(ValueError, match="the run failed"):
        made_once(tmp_path_factory, "launching", fail)
    folder = made_once(tmp_path_factory, "launching", lambda out: out.mkdir())
    assert list(folder.iterdir()) == []
