"""A run that names no DeepSpeed file takes ZeRO-1 where that saves communication and fits the smallest device."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import msgspec
import pytest
import torch

from schemas.checkpoints import read_config
from schemas.errors import ConfigError
from tests.train.synthetic import make_bins, write_shards
from train.arithmetic.dimensions import OFFICIAL
from train.memory.budget import USABLE, rank_memory
from train.memory.loads import loads_of_shards
from train.model import pretrained
from train.model.sizes import sizes_of
from train.run.plan import Plan, agree_on_capacity, make_plan
from train.run.record import record_run
from train.run.run_dir import ZERO_STAGE, RunState
from train.run.strategy import choose_strategy
from train.settings.deepspeed_file import read_deepspeed_config
from train.settings.flags import parse_arguments
from train.settings.record import read_record

PLENTY = 2**40
THREE_PASSES = ("--gradient_accumulation_steps", "3")


@pytest.fixture
def flags(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr("train.run.device.choose_device", lambda ranks: torch.device("cpu"))
    monkeypatch.setattr(pretrained, "check_fingerprints", lambda *_, **__: None)
    shards = write_shards(tmp_path / "shards", make_bins(num_bins=12))
    run = str(tmp_path / "run")
    return ["--shards", str(shards), "--model_name_or_path", str(tiny_checkpoint), "--output_dir", run, "--bf16"]


def plan_of(flags: list[str], capacity: int | None, monkeypatch: pytest.MonkeyPatch, *, world: int = 2) -> Plan:
    """The plan of the first rank, on a device of this many bytes."""
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": world}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr("train.run.device.device_capacity", lambda _: capacity)
    return make_plan(parse_arguments(flags))


def capacity_for(plan: Plan, file: str, num_bins: int) -> int:
    """Bytes of the smallest device with room for forward passes of this many bins under a DeepSpeed file."""
    sizes = sizes_of(read_config(plan.source), plan.args)
    load = loads_of_shards(plan.index, checkpointed=True, dtype=torch.bfloat16)(num_bins, sizes)
    config = read_deepspeed_config(file)
    memory = rank_memory(sizes, plan.args, load, deepspeed=config, world=plan.ranks.world, dtype=torch.bfloat16)
    return int(memory.peak() / USABLE) + 1


def test_zero_1_is_taken_where_it_fits_to_the_byte(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [*flags, *THREE_PASSES]
    before = plan_of(flags, None, monkeypatch)
    capacity = capacity_for(before, "zero1.json", 1)
    taken, refused = (plan_of(flags, capacity - short, monkeypatch) for short in (0, 3))
    assert [plan.args.deepspeed for plan in (before, taken, refused)] == ["zero2.json", "zero1.json", "zero2.json"]
    assert [plan.settings[ZERO_STAGE] for plan in (before, taken, refused)] == [2, 1, 2]
    assert before.batch == taken.batch == refused.batch
    assert before.strategy_note is refused.strategy_note is None
    assert taken.strategy_note is not None
    assert taken.strategy_note.startswith("DeepSpeed: zero1.json, which fits (0.")
    assert "exchange gradients once a step; --deepspeed zero2.json takes less memory, for 3" in taken.strategy_note
    taken.args.run_dir.mkdir()
    record_run(taken)
    assert read_record(taken.args.run_dir)[0].deepspeed == "zero1.json"


@pytest.mark.parametrize(
    ("more", "world", "capacity"),
    [
        ([*THREE_PASSES, "--deepspeed", "zero2.json"], 2, PLENTY),
        (THREE_PASSES, 1, PLENTY),
        (["--gradient_accumulation_steps", "1"], 2, PLENTY),
        (THREE_PASSES, 2, None),
    ],
    ids=["a file is named", "one rank", "one forward pass", "memory unknown"],
)
def test_zero_2_stays(
    flags: list[str], more: list[str], world: int, capacity: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of([*flags, *more], capacity, monkeypatch, world=world)
    assert (plan.args.deepspeed, plan.settings[ZERO_STAGE], plan.strategy_note) == ("zero2.json", 2, None)


def test_zero_1_is_taken_even_if_it_needs_more_forward_passes(
    flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The 3B with long bins, and room for one of them under ZeRO-1: ZeRO-2 then has room for several."""
    plan = plan_of(flags, None, monkeypatch)
    config, args = OFFICIAL["3B"], parse_arguments(flags)
    index = dataclasses.replace(plan.index, num_tokens=200 * plan.index.num_tokens)
    sizes = sizes_of(config, args)
    load = loads_of_shards(index, checkpointed=True, dtype=torch.bfloat16)(1, sizes)
    zero1 = read_deepspeed_config("zero1.json")
    peak = rank_memory(sizes, args, load, deepspeed=zero1, world=2, dtype=torch.bfloat16).peak()
    taken, refused = (
        choose_strategy(
            args,
            plan.recipe,
            index,
            config,
            None,
            compute=dataclasses.replace(plan.compute, capacity=int(peak / USABLE) + 1 - short),
            world=2,
        )
        for short in (0, 3)
    )
    assert (taken.args.deepspeed, taken.batch.accumulation) == ("zero1.json", 7)
    assert refused.args.deepspeed == "zero2.json"
    assert 1 < refused.batch.accumulation < 7


def test_a_resumed_run_keeps_its_stage_whatever_fits(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [*flags, *THREE_PASSES]
    for stage, capacity, now in ((1, PLENTY, None), (2, None, PLENTY)):
        flags[flags.index("--output_dir") + 1] += str(stage)
        plan = plan_of(flags, capacity, monkeypatch)
        folder = plan.args.run_dir / "checkpoint-1"
        folder.mkdir(parents=True)
        state = RunState(stream=plan.order.state_dict(1), ranks=2, settings=plan.settings, aim=plan.batch.aim)
        (folder / "state.json").write_bytes(msgspec.json.encode(state))
        resumed = plan_of(flags, now, monkeypatch)
        assert resumed.start_step == 1
        assert (resumed.args.deepspeed, resumed.settings[ZERO_STAGE]) == (f"zero{stage}.json", stage)
        assert resumed.deepspeed == plan.deepspeed
        with pytest.raises(ConfigError, match=f"was saved with ZeRO stage = {stage}, this run has {3 - stage}"):
            plan_of([*flags, "--deepspeed", f"zero{3 - stage}.json"], now, monkeypatch)


def test_the_smallest_device_decides_for_all_ranks(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    flags = [*flags, *THREE_PASSES]
    small = capacity_for(plan_of(flags, None, monkeypatch), "zero1.json", 1) - 3

    def gather(of_ranks: list[int | None], _: int | None) -> None:
        of_ranks[:] = [PLENTY, small]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    args = parse_arguments(flags)
    plans = [plan_of(flags, capacity, monkeypatch) for capacity in (PLENTY, small)]
    assert [plan.args.deepspeed for plan in plans] == ["zero1.json", "zero2.json"]
    agreed = [agree_on_capacity(plan, args) for plan in plans]
    assert [plan.deepspeed for plan in agreed] == 2 * [plans[1].deepspeed]
    assert [plan.compute.capacity for plan in agreed] == [small, small]
    assert agreed[1] is plans[1]
