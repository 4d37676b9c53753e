"""A run fits if device, host and disk have as much as it needs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from train.arithmetic.dimensions import OFFICIAL
from train.memory.states import MOMENTS
from train.memory.terms import DEVICE, GIB, HOST, Memory, Phase, Term
from train.model.sizes import sizes_of
from train.preflight import capacity
from train.preflight.capacity import (
    DiskUsage,
    check_device,
    check_disk,
    check_held,
    check_host,
    disk_usage,
    export_bytes,
    host_bytes,
    snapshot_bytes,
)
from train.run.process_group import Ranks
from train.run.resume import ResumePoint
from train.settings.arguments import TrainArguments


def test_a_step_must_fit_the_device() -> None:
    """60 bytes were measured without the moments, which add 20; the estimate of a step is 50 + 25."""
    terms = {"weights": (30, Phase.ALWAYS), MOMENTS: (20, Phase.ALWAYS), "copies": (25, Phase.STEP)}
    memory = Memory(
        tuple(
            Term(name=name, num_bytes=size, formula="", location=DEVICE, phase=phase)
            for name, (size, phase) in terms.items()
        )
    )
    assert check_device(memory, 60, 80) == []
    assert len(check_device(memory, 60, 79)) == 1
    assert check_device(memory, 10, 75) == []
    assert len(check_device(memory, 10, 74)) == 1


def always_held(device: int, host: int) -> Memory:
    sizes = {DEVICE: device, HOST: host}
    return Memory(tuple(Term(name="a", num_bytes=size, formula="", location=where) for where, size in sizes.items()))


def test_always_held_memory_must_fit_the_device() -> None:
    assert check_held(always_held(80, 1000), 80) == []
    (problem,) = check_held(always_held(81 * GIB, 0), 80 * GIB)
    assert "need 81.0 GiB, but the device has 80.0 GiB" in problem


def test_memory_offloaded_by_all_ranks_must_fit_the_machine() -> None:
    assert check_host(always_held(1000, 100), 8, 800, snapshots=0, export=0) == []
    (problem,) = check_host(always_held(0, 100 * GIB), 8, 799 * GIB, snapshots=0, export=0)
    assert "offloading needs 800.0 GiB (8 ranks with 100.0 GiB each), but the machine has 799.0 GiB" in problem


def test_the_gathered_model_must_fit_the_machine_of_the_first_rank() -> None:
    """Next to what is offloaded, but not next to what a step alone needs."""
    assert check_host(always_held(1000, 0), 8, 50, snapshots=0, export=50) == []
    (problem,) = check_host(always_held(0, 0), 8, 49 * GIB, snapshots=0, export=50 * GIB)
    assert "gathers 50.0 GiB in the host memory of the first rank, but the machine has 49.0 GiB" in problem
    assert check_host(always_held(0, 100), 8, 850, snapshots=0, export=50) == []
    (problem,) = check_host(always_held(0, 100 * GIB), 8, 849 * GIB, snapshots=0, export=50 * GIB)
    assert "gathers 50.0 GiB in the host memory of the first rank next to 800.0 GiB that are offloaded" in problem
    step = Term(name="a", num_bytes=50, formula="", location=HOST, phase=Phase.STEP)
    assert check_host(Memory((*always_held(0, 100).terms, step)), 1, 150, snapshots=0, export=50) == []


def test_host_memory_is_limited_by_the_control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert 0 < host_bytes() <= physical
    monkeypatch.setattr(capacity, "CGROUPS", tmp_path)
    monkeypatch.setattr(capacity, "OWN_CGROUP", tmp_path / "own")
    assert host_bytes() == physical
    (tmp_path / "own").write_text("12:cpuset:/elsewhere\n0::/job/step\n")
    (tmp_path / "job" / "step").mkdir(parents=True)
    (tmp_path / "job" / "step" / "memory.max").write_text("max\n")
    assert host_bytes() == physical
    (tmp_path / "job" / "memory.max").write_text("4096\n")
    assert host_bytes() == 4096


def plan_of(
    run: Path,
    *,
    stage: int = 2,
    steps: int = 2000,
    start: int = 0,
    lora: bool = False,
    world: int = 1,
    converts: Path | None = None,
    **flags: Any,
) -> Any:
    return SimpleNamespace(
        args=TrainArguments(shards="shards", output_dir=run, **flags),
        compute=SimpleNamespace(dtype=torch.bfloat16),
        ranks=Ranks(rank=0, local=0, world=world),
        deepspeed={"zero_optimization": {"stage": stage}},
        num_steps=steps,
        start_step=start,
        adapters=object() if lora else None,
        resume=None if converts is None else ResumePoint(folder=converts, step=start, is_resharded=True),
    )


@pytest.mark.parametrize(
    ("flags", "existing", "expected"),
    [
        ({}, 0, 4),  # every 500 steps
        ({"start": 700}, 1, 3),
        ({"save_steps": 0}, 0, 1),  # of the last step
        ({"save_steps": 600}, 0, 4),  # 600, 1200, 1800 and the last step
        ({"save_steps": 0.1}, 0, 10),
        ({"start": 1800, "save_steps": 600}, 3, 1),
        ({"start": 2000, "save_steps": 600}, 4, 0),  # only the model is left to export
        ({"save_total_limit": 2}, 0, 3),  # the oldest is deleted after the newest is complete
        ({"save_total_limit": 9}, 0, 4),
        ({"save_total_limit": 2, "start": 1000}, 2, 1),
        ({"save_total_limit": 2, "start": 1000}, 5, 1),
    ],
)
def test_checkpoints_that_exist_at_a_time_are_counted(
    tmp_path: Path, flags: dict[str, Any], existing: int, expected: int
) -> None:
    for step in range(existing):
        (tmp_path / f"checkpoint-{step}").mkdir()
    sizes = sizes_of(OFFICIAL["3B"], TrainArguments(shards="shards"))
    assert disk_usage(plan_of(tmp_path, **flags), sizes).num_checkpoints == expected


def test_bytes_of_the_7b_worked_out_by_hand(tmp_path: Path) -> None:
    """8.292 billion parameters, all trained: 12 bytes each, and 2 more before ZeRO-3; the model has 2."""
    sizes = sizes_of(OFFICIAL["7B"], TrainArguments(shards="shards", tune_mm_vision=True))
    total = 8_292_166_656
    assert disk_usage(plan_of(tmp_path), sizes) == DiskUsage(num_checkpoints=4, checkpoint=14 * total, model=2 * total)
    assert disk_usage(plan_of(tmp_path, stage=3), sizes).checkpoint == 12 * total


def test_a_checkpoint_in_the_background_must_fit_next_to_what_is_offloaded() -> None:
    assert check_host(always_held(1000, 100), 2, 250, snapshots=50, export=0) == []
    (problem,) = check_host(always_held(0, 100 * GIB), 2, 249 * GIB, snapshots=50 * GIB, export=0)
    assert "--save_in_background holds 50.0 GiB in host memory next to 200.0 GiB that are offloaded" in problem


@pytest.mark.parametrize(
    ("stage", "ranks", "expected"),
    [(2, [0, 1], 2 * 16 // 4 + 2), (2, [2, 3], 2 * 16 // 4), (3, [0, 1], 2 * 16 // 4)],
)
def test_a_rank_holds_its_part_of_a_checkpoint_in_the_background(
    tmp_path: Path, stage: int, ranks: list[int], expected: int
) -> None:
    """A quarter of 12 bytes of each parameter and 4 in transit; the first rank also has the weights in bfloat16."""
    sizes = sizes_of(OFFICIAL["7B"], TrainArguments(shards="shards", tune_mm_vision=True))
    plan = plan_of(tmp_path, stage=stage, world=4, save_in_background=True)
    assert snapshot_bytes(plan, sizes, ranks) == expected * sizes.num_trained
    assert snapshot_bytes(plan_of(tmp_path, stage=stage, world=4), sizes, ranks) == 0


def test_the_export_gathers_all_weights_and_merges_adapters_in_place(tmp_path: Path) -> None:
    full = TrainArguments(shards="shards")
    adapted = TrainArguments(shards="shards", lora_enable=True, lora_target_modules="q_proj", tune_mm_mlp=False)
    plain, lora = (sizes_of(OFFICIAL["3B"], args) for args in (full, adapted))
    assert export_bytes(plan_of(tmp_path), plain) == 2 * 3_754_622_976
    assert export_bytes(plan_of(tmp_path, lora=True), lora) == 2 * (3_754_622_976 + lora.num_trained)


def test_with_adapters_checkpoints_are_small_and_the_adapters_are_written_too(tmp_path: Path) -> None:
    args = TrainArguments(shards="shards", lora_enable=True, lora_target_modules="q_proj", tune_mm_mlp=False)
    sizes = sizes_of(OFFICIAL["3B"], args)
    num_trained = 36 * 64 * (2048 + 2048)
    assert sizes.num_trained == num_trained
    usage = disk_usage(plan_of(tmp_path, lora=True), sizes)
    # the adapters are part of the model, and in a file of their own
    assert (usage.checkpoint, usage.model) == (14 * num_trained, 2 * (3_754_622_976 + 2 * num_trained))


def test_a_resharded_checkpoint_takes_room_once_and_next_to_the_original(tmp_path: Path) -> None:
    sizes = sizes_of(OFFICIAL["3B"], TrainArguments(shards="shards"))
    run = tmp_path / "run"
    here, elsewhere = run / "checkpoint-2", tmp_path / "other" / "checkpoint-2"
    here.mkdir(parents=True)
    plain, converting = disk_usage(plan_of(run), sizes), disk_usage(plan_of(run, converts=here), sizes)
    assert (plain.converted, converting.converted) == (0, 14 * sizes.num_trained)
    assert converting.num_bytes - plain.num_bytes == converting.converted
    assert disk_usage(plan_of(run, converts=elsewhere), sizes).converted == 0
    (here / "universal").mkdir()
    assert disk_usage(plan_of(run, converts=here), sizes).converted == 0


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_the_files_of_a_run_must_fit_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queried: list[Path] = []

    def fake_usage(path: Path) -> Usage:
        queried.append(path)
        return Usage(100 * GIB, 68 * GIB, 32 * GIB)

    monkeypatch.setattr(shutil, "disk_usage", fake_usage)
    run = tmp_path / "new" / "run"
    assert check_disk(run, DiskUsage(num_checkpoints=3, checkpoint=10 * GIB, model=2 * GIB)) == []
    (problem,) = check_disk(run, DiskUsage(num_checkpoints=3, checkpoint=10 * GIB, model=2 * GIB + 1))
    assert "3 x 10.00 GiB of checkpoints and 2.00 GiB of trained model do not fit" in problem
    assert "32.00 GiB free" in problem
    (problem,) = check_disk(run, DiskUsage(num_checkpoints=1, checkpoint=GIB, model=GIB, converted=31 * GIB))
    assert problem.startswith("31.00 GiB of resharded checkpoint, 1 x 1.00 GiB of checkpoints")
    assert queried == [tmp_path] * 3
