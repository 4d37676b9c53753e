"""Which checkpoint a run goes on from, and which it refuses. (Saving and going on is tested with real runs.)"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest
import torch

from schemas.errors import ConfigError
from train.run import checkpoint
from train.run.checkpoint import RunState, Setting
from train.run.engine import Ranks


def saved_at(step: int, **settings: Setting) -> RunState:
    return RunState(stream={"step": step}, ranks=1, settings=settings)


def make_checkpoint(run: Path, step: int) -> Path:
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_bytes(msgspec.json.encode(saved_at(step)))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Steps 5 and 10 saved, 15 broken off; and things with similar names."""
    for step in (10, 5):
        make_checkpoint(tmp_path / "run", step)
    for name in ("checkpoint-15.tmp", "checkpoint-last", "final"):
        (tmp_path / "run" / name).mkdir()
    return tmp_path / "run"


def test_checkpoints_are_listed_by_step_and_unfinished_ones_are_not(run: Path) -> None:
    assert checkpoint.list_checkpoints(run) == [(5, run / "checkpoint-5"), (10, run / "checkpoint-10")]


def test_auto_goes_on_from_the_newest_or_starts_anew(run: Path) -> None:
    assert checkpoint.choose_checkpoint(run, "auto") == run / "checkpoint-10"
    assert checkpoint.choose_checkpoint(run.parent / "other", "auto") is None


def test_a_path_can_be_given_also_of_another_run(run: Path) -> None:
    assert checkpoint.choose_checkpoint(run, str(run / "checkpoint-10")) == run / "checkpoint-10"
    assert checkpoint.choose_checkpoint(run.parent / "other", str(run / "checkpoint-5")) == run / "checkpoint-5"


@pytest.mark.parametrize("resume", ["none", "checkpoint-5"])
def test_a_start_before_checkpoints_that_are_there_is_refused(run: Path, resume: str) -> None:
    given = resume if resume == "none" else str(run / resume)
    with pytest.raises(
        ConfigError, match=r"checkpoint-10 is of a later one\. Resume from it, remove it, or give another"
    ):
        checkpoint.choose_checkpoint(run, given)


def test_none_starts_anew_where_there_is_nothing(tmp_path: Path) -> None:
    assert checkpoint.choose_checkpoint(tmp_path, "none") is None


@pytest.mark.parametrize("contents", [None, b"{", b'{"step": 5}', b'{"stream": {}, "ranks": 1, "settings": {}}'])
def test_a_folder_that_is_no_complete_checkpoint_is_refused(tmp_path: Path, contents: bytes | None) -> None:
    if contents is not None:
        (tmp_path / "state.json").write_bytes(contents)
    with pytest.raises(ConfigError, match=r"is no complete checkpoint to resume from \(state\.json"):
        checkpoint.choose_checkpoint(tmp_path / "run", str(tmp_path))


def test_settings_that_would_make_another_run_are_refused() -> None:
    saved = saved_at(5, seed=0, bf16=True)
    checkpoint.check_settings(Path("c"), saved, {"seed": 0, "bf16": True})
    with pytest.raises(ConfigError, match="c was saved with bf16 = True, this run has False"):
        checkpoint.check_settings(Path("c"), saved, {"seed": 0, "bf16": False})


def test_a_setting_that_a_checkpoint_does_not_know_is_refused() -> None:
    with pytest.raises(ConfigError, match="was saved with bf16 = nothing, this run has False"):
        checkpoint.check_settings(Path("c"), saved_at(5), {"bf16": False})


def test_a_run_folder_belongs_to_one_run_at_a_time(tmp_path: Path) -> None:
    from train.run.checkpoint import hold

    lock = hold(tmp_path / "run")
    with pytest.raises(ConfigError, match="in use by another run"):
        hold(tmp_path / "run")
    lock.close()
    hold(tmp_path / "run").close()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        hold(tmp_path / "file" / "run")


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A checkpoint of one rank with all its files."""
    folder = make_checkpoint(tmp_path / "whole", 3)
    (folder / "engine").mkdir()
    for name in (
        "engine/mp_rank_00_model_states.pt",
        "engine/zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "random-00000.pt",
    ):
        torch.save({"weight": torch.zeros(100)}, folder / name)
    return folder


def test_a_checkpoint_with_a_file_of_each_rank_is_whole(whole: Path) -> None:
    checkpoint.check_files(whole)


@pytest.mark.parametrize(
    "name", ["engine/mp_rank_00_model_states.pt", "engine/zero_pp_rank_0_mp_rank_00_optim_states.pt", "random-00000.pt"]
)
def test_a_checkpoint_whose_file_is_cut_short_or_gone_is_refused_before_anything_is_loaded(
    whole: Path, name: str
) -> None:
    path = whole / name
    os.truncate(path, path.stat().st_size - 30)
    with pytest.raises(ConfigError, match=f"{path} is cut short or damaged. Resume from another checkpoint, or remove"):
        checkpoint.check_files(whole)
    path.unlink()
    with pytest.raises(ConfigError, match=r"is missing\.|is incomplete: "):
        checkpoint.check_files(whole)


def test_what_a_killed_run_left_unfinished_is_removed_and_nothing_else(run: Path) -> None:
    checkpoint.remove_unfinished(run)
    assert {path.name for path in run.iterdir()} == {"checkpoint-5", "checkpoint-10", "checkpoint-last", "final"}


def test_a_checkpoint_without_the_files_of_a_rank_is_not_called_one(tmp_path: Path) -> None:
    """Ranks on machines with disks of their own have written elsewhere."""
    (tmp_path / "random-00000.pt").touch()
    checkpoint._check_shared(tmp_path, Ranks(rank=0, local=0, world=1))
    with pytest.raises(ConfigError, match=r"no files of the ranks \[1, 2\].* Give an absolute --output_dir"):
        checkpoint._check_shared(tmp_path, Ranks(rank=0, local=0, world=3))


def test_an_old_checkpoint_that_cannot_be_removed_is_told_of_and_the_run_goes_on(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    old = checkpoint.list_checkpoints(run)[0][1]

    def refuse(path: Path) -> None:
        raise OSError(39, "Directory not empty", str(path))

    monkeypatch.setattr(checkpoint.shutil, "rmtree", refuse)
    checkpoint._remove(old)
    assert f"{old}.tmp cannot be removed (Directory not empty)" in caplog.text
    assert old not in [path for _, path in checkpoint.list_checkpoints(run)]


def test_an_old_checkpoint_is_removed(run: Path) -> None:
    before = {path.name for path in run.iterdir()}
    old = checkpoint.list_checkpoints(run)[0][1]
    checkpoint._remove(old)
    assert {path.name for path in run.iterdir()} == before - {old.name}


def test_a_file_is_no_checkpoint(run: Path) -> None:
    before = checkpoint.list_checkpoints(run)
    (run / "checkpoint-77").touch()
    assert checkpoint.list_checkpoints(run) == before
