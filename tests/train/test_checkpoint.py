"""Which checkpoint a run resumes from, and which it refuses. (Real runs test saving and resuming.)"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from torch import nn
from torch.utils.serialization import config

from schemas.errors import ConfigError
from train.run import checkpoint, run_dir, saving
from train.run.process_group import Ranks
from train.run.run_dir import RunState, Setting, list_checkpoints, lock_run_dir


def saved_at(step: int, **settings: Setting) -> RunState:
    return RunState(stream={"step": step}, ranks=1, settings=settings)


def make_checkpoint(run: Path, step: int) -> Path:
    folder = run / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_bytes(msgspec.json.encode(saved_at(step)))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Checkpoints of steps 5 and 10, an unfinished one of step 15, and folders with similar names."""
    for step in (10, 5):
        make_checkpoint(tmp_path / "run", step)
    for name in ("checkpoint-15.tmp", "checkpoint-last", "final"):
        (tmp_path / "run" / name).mkdir()
    return tmp_path / "run"


def test_complete_checkpoints_are_listed_by_step(run: Path) -> None:
    assert list_checkpoints(run) == [(5, run / "checkpoint-5"), (10, run / "checkpoint-10")]


def test_auto_resumes_from_the_newest_or_starts_from_the_beginning(run: Path) -> None:
    assert run_dir.choose_checkpoint(run, "auto") == run / "checkpoint-10"
    assert run_dir.choose_checkpoint(run.parent / "other", "auto") is None


def test_a_path_may_be_a_checkpoint_of_another_run(run: Path) -> None:
    assert run_dir.choose_checkpoint(run, str(run / "checkpoint-10")) == run / "checkpoint-10"
    assert run_dir.choose_checkpoint(run.parent / "other", str(run / "checkpoint-5")) == run / "checkpoint-5"


@pytest.mark.parametrize("resume", ["none", "checkpoint-5"])
def test_resuming_before_an_existing_checkpoint_is_refused(run: Path, resume: str) -> None:
    flag = resume if resume == "none" else str(run / resume)
    with pytest.raises(ConfigError, match=r"checkpoint-10 is later\. Resume from it, remove it, or give another"):
        run_dir.choose_checkpoint(run, flag)


def test_none_starts_a_new_run_from_the_beginning(tmp_path: Path) -> None:
    assert run_dir.choose_checkpoint(tmp_path, "none") is None


@pytest.mark.parametrize("contents", [None, b"{", b'{"step": 5}', b'{"stream": {}, "ranks": 1, "settings": {}}'])
def test_an_incomplete_checkpoint_is_refused(tmp_path: Path, contents: bytes | None) -> None:
    if contents is not None:
        (tmp_path / "state.json").write_bytes(contents)
    with pytest.raises(ConfigError, match=r"is not a complete checkpoint to resume from \(state\.json"):
        run_dir.choose_checkpoint(tmp_path / "run", str(tmp_path))


def test_resuming_with_another_setting_is_refused() -> None:
    saved = saved_at(5, seed=0, bf16=True)
    run_dir.check_settings(Path("c"), saved, {"seed": 0, "bf16": True})
    with pytest.raises(ConfigError, match="c was saved with bf16 = True, this run has False"):
        run_dir.check_settings(Path("c"), saved, {"seed": 0, "bf16": False})


def test_resuming_with_a_setting_unknown_to_the_checkpoint_is_refused() -> None:
    with pytest.raises(ConfigError, match="was saved with bf16 = nothing, this run has False"):
        run_dir.check_settings(Path("c"), saved_at(5), {"bf16": False})


def test_a_checkpoint_that_does_not_record_a_newer_setting_had_its_default() -> None:
    run_dir.check_settings(Path("c"), saved_at(5), {"adam_beta2": 0.999, "warmup_steps": None, "optim": "adamw_torch"})
    with pytest.raises(ConfigError, match=r"was saved with adam_beta2 = 0\.999, this run has 0\.95"):
        run_dir.check_settings(Path("c"), saved_at(5), {"adam_beta2": 0.95})


@pytest.mark.parametrize(("fused", "device"), [(True, "meta"), (None, "cpu")])
def test_every_parameter_gets_its_own_step_count_where_its_kernel_reads_it(fused: bool | None, device: str) -> None:
    """The device ``meta`` stands for a GPU. DeepSpeed shares a count, or pads it like a partition."""
    parameters = [nn.Parameter(torch.empty(3, device="meta")) for _ in range(3)]
    optimizer = torch.optim.AdamW(parameters, fused=fused)
    shared = torch.tensor(7.0)
    for parameter, saved in zip(parameters, (shared, shared, torch.tensor([7.0, 0.0]))):
        optimizer.state[parameter] = {"step": saved}
    checkpoint.restore_step_counts(optimizer)
    counts = [optimizer.state[parameter]["step"] for parameter in parameters]
    assert {(count.device.type, count.shape, count.dtype) for count in counts} == {(device, (), torch.float32)}
    assert len({id(count) for count in counts}) == 3
    if device == "cpu":
        counts[0].add_(1)
        assert [count.item() for count in counts] == [8, 7, 7]


def test_only_one_run_at_a_time_locks_its_folder(tmp_path: Path) -> None:
    lock = lock_run_dir(tmp_path / "run")
    with pytest.raises(ConfigError, match="in use by another run"):
        lock_run_dir(tmp_path / "run")
    lock.close()
    lock_run_dir(tmp_path / "run").close()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        lock_run_dir(tmp_path / "file" / "run")


@pytest.mark.parametrize("error_code", [errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error_code: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(error_code, os.strerror(error_code))

    monkeypatch.setattr("train.run.run_dir.fcntl.flock", refuse)
    lock_run_dir(tmp_path / "run").close()
    assert "has no locks" in caplog.text and str(tmp_path / "run") in caplog.text


def test_another_failure_to_lock_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("train.run.run_dir.fcntl.flock", fail)
    with pytest.raises(ConfigError, match="cannot be locked: Input/output error"):
        lock_run_dir(tmp_path / "run")


@pytest.fixture
def complete(tmp_path: Path) -> Path:
    """A checkpoint of one rank with all its files."""
    folder = make_checkpoint(tmp_path / "complete", 3)
    (folder / "engine").mkdir()
    for name in (
        "engine/mp_rank_00_model_states.pt",
        "engine/zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "random-00000.pt",
    ):
        torch.save({"weight": torch.zeros(100)}, folder / name)
    return folder


def test_a_checkpoint_with_the_files_of_every_rank_is_complete(complete: Path) -> None:
    run_dir.check_files(complete)


@pytest.mark.parametrize(
    "name", ["engine/mp_rank_00_model_states.pt", "engine/zero_pp_rank_0_mp_rank_00_optim_states.pt", "random-00000.pt"]
)
def test_a_truncated_or_missing_file_is_detected_before_anything_is_loaded(complete: Path, name: str) -> None:
    path = complete / name
    os.truncate(path, path.stat().st_size - 30)
    with pytest.raises(ConfigError, match=f"{path} is truncated or damaged. Resume from another checkpoint, or remove"):
        run_dir.check_files(complete)
    path.unlink()
    with pytest.raises(ConfigError, match=r"is missing\.|is incomplete: "):
        run_dir.check_files(complete)


def test_unfinished_checkpoints_are_removed_and_nothing_else(run: Path) -> None:
    run_dir.remove_unfinished(run)
    assert {path.name for path in run.iterdir()} == {"checkpoint-5", "checkpoint-10", "checkpoint-last", "final"}


def test_failing_to_remove_an_old_checkpoint_is_a_warning(
    run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    old = list_checkpoints(run)[0][1]

    def refuse(path: Path) -> None:
        raise OSError(39, "Directory not empty", str(path))

    monkeypatch.setattr(saving.shutil, "rmtree", refuse)
    saving._remove(old)
    assert f"{old}.tmp cannot be removed (Directory not empty)" in caplog.text
    assert old not in [path for _, path in list_checkpoints(run)]


def test_removing_an_old_checkpoint_removes_nothing_else(run: Path) -> None:
    before = {path.name for path in run.iterdir()}
    old = list_checkpoints(run)[0][1]
    saving._remove(old)
    assert {path.name for path in run.iterdir()} == before - {old.name}


def test_a_file_is_not_a_checkpoint(run: Path) -> None:
    before = list_checkpoints(run)
    (run / "checkpoint-77").touch()
    assert list_checkpoints(run) == before


@pytest.mark.parametrize("is_resharded", [False, True])
def test_only_resharded_files_are_mapped_into_memory(complete: Path, is_resharded: bool) -> None:
    """All ranks open all of them. The other files are removed while ranks on other machines train on."""
    is_mapped: list[bool] = []

    def load_checkpoint(*_: object, **__: object) -> tuple[str, None]:
        is_mapped.append(config.load.mmap)
        return str(complete), None

    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([weight], fused=False)
    torch.save({"cpu": torch.get_rng_state()}, complete / "random-00000.pt")
    engine: Any = SimpleNamespace(load_checkpoint=load_checkpoint, device=torch.device("cpu"))
    checkpoint.load(engine, optimizer, complete, Ranks(rank=0, local=0, world=1), is_resharded=is_resharded)
    assert is_mapped == [is_resharded]
    assert not config.load.mmap
