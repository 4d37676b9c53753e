"""Ranks: the launcher's environment says which rank a process is, and contradictions are errors."""

from __future__ import annotations

from datetime import timedelta

import pytest

from schemas.errors import ConfigError
from train.run.process_group import Ranks, read_ranks, warn_of_long_reads
from train.settings.arguments import TrainArguments


def test_reads_fail_before_the_ranks_that_wait_for_them(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the run would end without the name of the bin."""
    warn_of_long_reads(TrainArguments(shards="shards").read_timeout_s)
    assert caplog.text == ""
    monkeypatch.setattr("deepspeed.constants.default_pg_timeout", timedelta(minutes=8))
    warn_of_long_reads(TrainArguments(shards="shards").read_timeout_s)
    assert "--read_timeout_s 480 is not below the 480 s after which ranks stop waiting" in caplog.text


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        # setenv first, so that monkeypatch restores what the code under test sets
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    return monkeypatch


def test_without_a_launcher_a_process_is_the_only_rank(no_launcher: pytest.MonkeyPatch) -> None:
    assert read_ranks(-1) == Ranks(rank=0, local=0, world=1)


def test_the_environment_says_which_rank_a_process_is(no_launcher: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        no_launcher.setenv(name, value)
    assert read_ranks(-1) == read_ranks(1) == Ranks(rank=5, local=1, world=8)
    with pytest.raises(ConfigError, match="--local_rank is 0, but LOCAL_RANK is 1"):
        read_ranks(0)


def test_the_local_rank_flag_completes_the_environment(no_launcher: pytest.MonkeyPatch) -> None:
    no_launcher.setenv("RANK", "3")
    no_launcher.setenv("WORLD_SIZE", "4")
    assert read_ranks(3) == Ranks(rank=3, local=3, world=4)


@pytest.mark.parametrize(("rank", "local"), [("2", "0"), ("-1", "0"), ("0", "-1")])
def test_an_impossible_rank_is_an_error(no_launcher: pytest.MonkeyPatch, rank: str, local: str) -> None:
    for name, value in {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": local}.items():
        no_launcher.setenv(name, value)
    with pytest.raises(ConfigError, match="ranks count from 0 to WORLD_SIZE - 1"):
        read_ranks(-1)


def test_an_incomplete_environment_is_an_error(no_launcher: pytest.MonkeyPatch) -> None:
    no_launcher.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="start with `deepspeed` or `torchrun`"):
        read_ranks(-1)
