"""A checkpoint has the state of its step, and its name when all files are on the disk, also in the background."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from schemas.errors import ConfigError, VlprepError
from storage.files import write_synced
from train.run import saving
from train.run.process_group import Ranks
from train.run.run_dir import RunState, list_checkpoints
from train.run.saving import Saver

WEIGHT = "mp_rank_00_model_states.pt"


class DirectWriter:
    """As DeepSpeed's checkpoint engine."""

    def save(self, state_dict: object, path: str) -> None:
        torch.save(state_dict, path)


class FakeEngine:
    """An engine with one weight, which training changes in place."""

    def __init__(self) -> None:
        self.module = torch.nn.Linear(1, 1)
        self.device = torch.device("cpu")
        self.checkpoint_engine: Any = DirectWriter()

    def save_checkpoint(self, save_dir: str, *, tag: str, **_: object) -> None:
        Path(save_dir, tag).mkdir(exist_ok=True)
        self.checkpoint_engine.save({"weight": self.module.weight.data}, str(Path(save_dir, tag, WEIGHT)))

    def train(self, value: float) -> None:
        self.module.weight.data.fill_(value)


def state_of(step: int, ranks: int = 1) -> RunState:
    return RunState(stream={"step": step}, ranks=ranks, settings={})


def saved_weight(folder: Path) -> float:
    weight: torch.Tensor = torch.load(folder / "engine" / WEIGHT)["weight"]
    return weight.item()


def until(is_true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_a_checkpoint_may_get_its_name_as_soon_as_its_last_file_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first rank names it then, while the rank of the last file still flushes the folder."""
    temporary, folder = tmp_path / "checkpoint-1.tmp", tmp_path / "checkpoint-1"
    temporary.mkdir()
    rename = Path.replace

    def rename_both(path: Path, target: Path) -> Path:
        renamed = rename(path, target)
        temporary.rename(folder)
        return renamed

    monkeypatch.setattr(Path, "replace", rename_both)
    write_synced(temporary / "random-1.pt", b"state")
    assert [path.name for path in folder.iterdir()] == ["random-1.pt"]


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A disk that writes when the event is set."""
    write, go_on = saving.write_synced, threading.Event()

    def wait_and_write(*args: Any) -> None:
        assert go_on.wait(60)
        write(*args)

    monkeypatch.setattr(saving, "write_synced", wait_and_write)
    yield go_on
    go_on.set()


def saver_of(run: Path, monkeypatch: pytest.MonkeyPatch, *, world: int = 1, **settings: Any) -> Saver:
    """The saver of the first rank, which meets no other rank at a barrier."""
    monkeypatch.setattr(saving, "barrier", lambda: None)
    return Saver(run, Ranks(rank=0, local=0, world=world), **{"max_checkpoints": None, **settings})


def test_a_checkpoint_in_the_background_has_the_state_of_its_step_and_its_name_when_it_is_complete(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow_disk: threading.Event
) -> None:
    engine, saver = FakeEngine(), saver_of(tmp_path, monkeypatch)
    engine.train(1.0)
    saver.save(engine, state_of(1), in_background=True)
    engine.train(2.0)
    saver.check()
    assert list_checkpoints(tmp_path) == []
    assert isinstance(engine.checkpoint_engine, DirectWriter)
    slow_disk.set()
    until(lambda: list_checkpoints(tmp_path) != [])  # without another call
    saver.finish()
    assert saved_weight(tmp_path / "checkpoint-1") == 1.0
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert not list((tmp_path / "checkpoint-1").rglob("*.tmp"))


@pytest.mark.parametrize("in_background", [False, True])
def test_the_next_checkpoint_waits_for_the_one_before_and_old_ones_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_background: bool
) -> None:
    engine, saver = FakeEngine(), saver_of(tmp_path, monkeypatch, max_checkpoints=2)
    for step in range(1, 5):
        engine.train(step)
        saver.save(engine, state_of(step), in_background=in_background)
        assert step == 1 or step - 1 in [complete for complete, _ in list_checkpoints(tmp_path)]
    saver.finish()
    assert [saved_weight(folder) for _, folder in list_checkpoints(tmp_path)] == [3.0, 4.0]


@pytest.mark.parametrize("report", ["check", "finish"])
def test_a_full_disk_in_the_background_ends_the_run_and_names_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: str
) -> None:
    def fail(path: Path, _: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(saving, "write_synced", fail)
    saver = saver_of(tmp_path, monkeypatch)
    saver.save(FakeEngine(), state_of(1), in_background=True)
    with pytest.raises(VlprepError, match=rf"{WEIGHT} cannot be written \(No space left on device"):
        if report == "finish":
            saver.finish()
        until(lambda: saver.check() is not None)  # it raises
    assert list_checkpoints(tmp_path) == []


def test_the_first_rank_waits_for_the_files_of_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "_LOOK_AGAIN_S", 0.001)
    saver = saver_of(tmp_path, monkeypatch, world=2)
    saver.save(FakeEngine(), state_of(1, ranks=2), in_background=True)
    temporary = tmp_path / "checkpoint-1.tmp"
    until((temporary / "random-00000.pt").is_file)
    time.sleep(0.05)
    assert list_checkpoints(tmp_path) == []
    (temporary / "random-00001.pt").touch()
    until(lambda: list_checkpoints(tmp_path) != [])
    saver.finish()


@pytest.mark.parametrize("in_background", [False, True])
def test_a_save_without_the_files_of_a_rank_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_background: bool
) -> None:
    """Ranks on machines with separate disks have written elsewhere."""
    saver = saver_of(tmp_path, monkeypatch, world=3)
    with pytest.raises(ConfigError, match=r"no files of ranks 1, 2, .* Give an absolute --output_dir"):
        saver.save(FakeEngine(), state_of(1, ranks=3), in_background=in_background)
        saver.finish()
    assert list_checkpoints(tmp_path) == []


def test_a_run_that_fails_does_not_wait_for_the_background(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slow_disk: threading.Event
) -> None:
    saver = saver_of(tmp_path, monkeypatch)
    saver.save(FakeEngine(), state_of(1), in_background=True)
    (writer,) = [thread for thread in threading.enumerate() if thread.name == "checkpoint"]
    assert writer.is_alive() and writer.daemon
    slow_disk.set()
    saver.finish()
    assert not writer.is_alive()
