"""A step has the samples that a recipe asks for, in bins that the shards and a budget of tokens decide."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.checkpoints import read_config
from schemas.errors import ConfigError, ConfigErrors
from tests.train.launching import as_flags, assert_close_metrics, fingerprint_of, resume, run_ranks
from tests.train.synthetic import make_bins, write_shards
from train.arithmetic.dimensions import OFFICIAL
from train.memory.budget import USABLE, bins_that_fit, rank_memory
from train.memory.loads import loads_of_length, loads_of_shards
from train.model import pretrained
from train.model.sizes import sizes_of
from train.order.cli import main as order
from train.run.device import Compute
from train.run.loop import open_stream
from train.run.plan import Plan, make_plan
from train.run.record import record_run
from train.run.run_dir import RunState
from train.run.strategy import plan_batch
from train.settings.arguments import TrainArguments
from train.settings.batch import TOLERANCE, Aim, Batch, choose_batch, choose_bins, describe_batch, split_bins
from train.settings.deepspeed_file import read_deepspeed_config
from train.settings.flags import parse_arguments
from train.settings.recipe import PRESETS, choose_recipe
from train.shards.index import open_shards


def batch_of(*flags: str, world: int = 8, samples_per_bin: float = 5.5, **more: object) -> Batch:
    """The batch of the 7B, with bins of up to 8192 tokens."""
    args = parse_arguments(["--shards", "s", *flags])
    contents: dict[str, object] = {"samples_per_bin": samples_per_bin, "largest_bin": 8192, "world": world, **more}
    return choose_batch(args, choose_recipe(args, OFFICIAL["7B"]), **contents)  # type: ignore[arg-type]


def test_the_recommended_samples_become_the_bins_that_hold_them() -> None:
    """The 7B on 8 GPUs: 128 samples are 23.3 bins of 5.5, and 24 is nearest among the multiples of 8."""
    batch = batch_of("--max_tokens_per_forward", "8192")
    aim = Aim(samples=128, is_recommended=True)
    assert batch == Batch(bins=24, per_device=1, accumulation=3, aim=aim)
    line = describe_batch(
        batch, samples_per_bin=5.5, world=8, device="cuda", steps_per_epoch=5512, reference="upstream: 128"
    )
    assert line == (
        "132 samples a step in expectation (upstream: 128): 24 bins on 8 GPUs, 3 forward passes of 1 bin each; 5,512 "
        "steps an epoch"
    )


@pytest.mark.parametrize(("size", "samples"), [("3B", 32), ("7B", 16), ("32B", 16), ("72B", 16)])
def test_a_size_has_the_samples_of_upstream_on_any_number_of_ranks(size: str, samples: int) -> None:
    args = parse_arguments(["--shards", "s"])
    for world in (1, 3, 64):
        batch = choose_batch(args, PRESETS[size], samples_per_bin=1.0, largest_bin=512, world=world)
        assert batch.bins == samples * world


@settings(deadline=None)
@given(st.integers(1, 5000), st.floats(1, 60), st.integers(1, 64))
def test_no_multiple_of_the_ranks_and_no_other_number_of_bins_is_much_nearer(
    samples: int, samples_per_bin: float, world: int
) -> None:
    def error(bins: int) -> float:
        return abs(bins * samples_per_bin - samples)

    bins = choose_bins(samples, samples_per_bin=samples_per_bin, world=world)
    nearest = max(1, round(samples / samples_per_bin))
    if bins % world:
        assert error(bins) <= min(map(error, range(max(1, nearest - 3), nearest + 3))) + 1e-6
        even = [unit * world for unit in range(1, nearest // world + 2)]
        assert min(map(error, even)) > TOLERANCE * samples
    else:
        others = [bins - world, bins + world] if bins > world else [bins + world]
        assert error(bins) <= min(map(error, others)) + 1e-6


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(1, 16), st.integers(1, 9))
def test_a_step_has_as_few_and_as_equal_forward_passes_as_the_budget_allows(bins: int, world: int, limit: int) -> None:
    batch = split_bins(bins, Aim(samples=bins), world=world, limit=limit)
    positions = batch.per_device * batch.accumulation * world
    assert batch.per_device <= limit
    assert positions >= batch.bins > positions - batch.accumulation * world
    assert (batch.accumulation - 1) * limit * world < batch.bins


def test_the_budget_of_a_device_is_what_fits_and_a_flag_overrides_it() -> None:
    limits: list[int] = []

    def fitting(most: int) -> int:
        limits.append(most)
        return 3

    assert batch_of(fitting=fitting).per_device == 3
    assert limits == [3]
    assert batch_of("--max_tokens_per_forward", "16384", fitting=fitting).per_device == 2
    assert batch_of().per_device == 2  # 16k on a CPU
    with pytest.raises(ConfigError, match="--max_tokens_per_forward 8191 is less than the largest bin has, 8192"):
        batch_of("--max_tokens_per_forward", "8191")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--per_device_train_batch_size 2 --gradient_accumulation_steps 4", (64, 2, 4)),
        ("--per_device_train_batch_size 2", (16, 2, 1)),
        ("--gradient_accumulation_steps 4", (32, 1, 4)),
    ],
)
def test_flags_that_count_bins_keep_counting_bins(flags: str, expected: tuple[int, int, int]) -> None:
    batch = batch_of(*flags.split())
    assert (batch.bins, batch.per_device, batch.accumulation) == expected
    assert batch.aim is None


@pytest.mark.parametrize("name", ["samples_per_step", "max_tokens_per_forward"])
def test_samples_and_bins_are_not_both_counted(name: str) -> None:
    with pytest.raises(ConfigErrors, match=f"--{name} 9 has no effect with --gradient_accumulation_steps 2, which"):
        parse_arguments(["--shards", "s", f"--{name}", "9", "--gradient_accumulation_steps", "2"])


def test_the_bins_that_fit_are_as_many_as_the_estimate_admits() -> None:
    args = TrainArguments(shards="s")
    sizes, load_of = sizes_of(OFFICIAL["3B"], args), loads_of_length(4096, checkpointed=True)
    run = {"deepspeed": read_deepspeed_config("zero2.json"), "world": 8, "dtype": torch.bfloat16}

    def peak(num_bins: int) -> int:
        return rank_memory(sizes, args, load_of(num_bins, sizes), **run).peak()  # type: ignore[arg-type]

    for num_bins in (1, 2, 5, 9):
        available = int(peak(num_bins) / USABLE) + 1
        fit = bins_that_fit(sizes, args, load_of, **run, available=available, most=9)  # type: ignore[arg-type]
        assert fit == num_bins
    assert bins_that_fit(sizes, args, load_of, **run, available=1, most=9) == 1  # type: ignore[arg-type]


def test_the_mean_bin_follows_the_proportions_of_a_mixture(tmp_path: Path) -> None:
    few = write_shards(tmp_path / "few", [[sample] for samples in make_bins(num_bins=4) for sample in samples])
    many = write_shards(tmp_path / "many", make_bins(num_bins=1))  # three samples in its bin
    assert open_shards(few).samples_per_bin == 1
    assert open_shards(f"{few},{many}").samples_per_bin == pytest.approx((9 + 3) / 10)
    assert open_shards(f"{few}:0.25,{many}:0.75").samples_per_bin == pytest.approx(0.25 * 1 + 0.75 * 3)


@pytest.fixture
def flags(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """12 bins with 2.25 samples on average."""
    monkeypatch.setattr("train.run.device.choose_device", lambda ranks: torch.device("cpu"))
    monkeypatch.setattr(pretrained, "check_fingerprints", lambda *_, **__: None)
    as_rank(monkeypatch, 0, 1)
    shards = write_shards(tmp_path / "shards", make_bins(num_bins=12))
    run = str(tmp_path / "run")
    return ["--shards", str(shards), "--model_name_or_path", str(tiny_checkpoint), "--output_dir", run]


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}.items():
        monkeypatch.setenv(name, str(value))


def bins_by_step(
    flags: list[str], world: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[int, list[int]], list[Plan]]:
    """The bins that all ranks get in each step, and their plans."""
    seen: dict[int, list[int]] = {}
    plans = []
    for rank in range(world):
        as_rank(monkeypatch, rank, world)
        plans.append(make_plan(parse_arguments(flags)))
        with open_stream(plans[-1]) as stream:
            for batch in stream:
                mine = [bin_id for micro in batch.micro_batches for bin_id in micro.bins]
                seen[batch.step] = sorted(seen.get(batch.step, []) + mine)
    return seen, plans


@pytest.mark.parametrize("sized", [["--samples_per_step", "9"], []])
def test_a_run_keeps_its_steps_on_another_number_of_ranks(
    flags: list[str], sized: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two ranks begin, with 4 bins for 9 samples, or with 14 for the recommended 32; three resume.

    A run of three ranks that began itself would have other steps. Resumed again, it still has those of two.
    """
    flags = [*flags, "--num_train_epochs", "4", *sized]
    before, (plan, _) = bins_by_step(flags, 2, monkeypatch)
    assert plan.batch.bins == (4 if sized else 14)
    for saved, world in ((1, 3), (2, 1)):
        folder = plan.args.run_dir / f"checkpoint-{saved}"
        folder.mkdir(parents=True)
        state = RunState(
            stream=plan.order.state_dict(saved), ranks=plan.ranks.world, settings=plan.settings, aim=plan.batch.aim
        )
        (folder / "state.json").write_bytes(msgspec.json.encode(state))
        seen, (plan, *_) = bins_by_step(flags, world, monkeypatch)
        assert seen == {step: bins for step, bins in before.items() if step >= saved}
        record_run(plan)
        for step in (saved, plan.num_steps - 1):
            words = ["--run", str(plan.args.run_dir), "--step", str(step)]
            shown = CliRunner().invoke(order, words).output
            assert [bin_id for bin_id in range(12) if f"bin {bin_id} (" in shown] == sorted(set(before[step]))


@pytest.mark.slow
def test_two_ranks_train_an_odd_number_of_bins_and_one_resumes(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """5 bins hold 11 samples. Two passes of two bins leave places empty on two ranks; one rank needs one pass."""
    shards = write_shards(tmp_path / "shards", make_bins(num_bins=12), tokenizer=fingerprint_of(tiny_checkpoint))
    run: dict[str, object] = {
        "shards": shards,
        "model_name_or_path": tiny_checkpoint,
        "samples_per_step": 11,
        "max_steps": 3,
        "save_steps": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
    }
    two_ranks, one_rank = tmp_path / "two", tmp_path / "one"
    flags = as_flags(run)
    done = run_ranks(2, *flags, "--max_tokens_per_forward", "200", "--output_dir", str(two_ranks))
    assert done.returncode == 0, done.stderr
    assert "5 bins on 2 ranks, 2 forward passes of up to 2 bins each" in done.stderr
    assert done.stderr.count(": warning: this run makes 3 optimizer steps, and little is learnt") == 1
    resume(two_ranks, one_rank, 1, *flags)
    assert_close_metrics(one_rank, two_ranks, "loss", rel=1e-5)


def test_a_run_does_not_resume_with_other_samples_a_step(flags: list[str]) -> None:
    plan = make_plan(parse_arguments([*flags, "--samples_per_step", "9"]))
    folder = plan.args.run_dir / "checkpoint-1"
    folder.mkdir(parents=True)
    state = RunState(stream=plan.order.state_dict(1), ranks=1, settings=plan.settings, aim=plan.batch.aim)
    (folder / "state.json").write_bytes(msgspec.json.encode(state))
    for other in (["--samples_per_step", "20"], [], ["--per_device_train_batch_size", "2"]):
        with pytest.raises(ConfigError, match=r"bins of a step = 4, this run has .* Give --samples_per_step 9"):
            make_plan(parse_arguments([*flags, *other]))
    same = make_plan(parse_arguments([*flags, "--gradient_accumulation_steps", "4"]))
    assert same.start_step == 1


def test_on_a_gpu_a_forward_pass_takes_the_bins_that_its_memory_holds(flags: list[str]) -> None:
    """Three of the largest bins fit, so the 7 bins of a step take three passes."""
    args, world = parse_arguments([*flags, "--tune_mm_vision"]), 1
    plan = make_plan(args)
    config, dtype = read_config(plan.source), torch.bfloat16
    sizes, deepspeed = sizes_of(config, args), read_deepspeed_config(args.deepspeed_file)
    load = loads_of_shards(plan.index, checkpointed=True, dtype=dtype)(3, sizes)
    memory = rank_memory(sizes, args, load, deepspeed=deepspeed, world=world, dtype=dtype)
    compute = Compute(
        device=torch.device("cuda", 0),
        dtype=dtype,
        attention="varlen",
        peak_tflops=None,
        capacity=int(memory.peak() / USABLE) + 1,
    )
    batch = plan_batch(args, plan.recipe, plan.index, config, None, compute=compute, deepspeed=deepspeed, world=world)
    assert (plan.batch.bins, plan.batch.accumulation) == (7, 1)
    assert (batch.bins, batch.per_device, batch.accumulation) == (7, 3, 3)


def test_a_planned_step_has_the_bins_that_the_trainer_would_choose(flags: list[str]) -> None:
    plan = make_plan(parse_arguments([*flags, "--samples_per_step", "9"]))
    words = ["--shards", flags[1], "--model", flags[3], "--samples-per-step", "9", "--world-size", "1", "--step", "2"]
    shown = CliRunner().invoke(order, words).output
    assert sorted(plan.order.global_bins(2).tolist()) == [bin_id for bin_id in range(12) if f"bin {bin_id} (" in shown]


def test_the_line_says_what_flags_come_to(flags: list[str]) -> None:
    lines = {
        "": "16 samples a step in expectation (recommended: 16): 7 bins on 1 rank, 1 forward pass of 7 bins; 1.71",
        "--samples_per_step 9 --max_tokens_per_forward 300": "9 samples a step in expectation (--samples_per_step 9): "
        "4 bins on 1 rank, 2 forward passes of 2 bins each; 3 steps an epoch",
        "--gradient_accumulation_steps 3": "7 samples a step in expectation (recommended: 16): 3 bins on 1 rank, 3 "
        "forward passes of 1 bin each; 4 steps an epoch",
        "--gradient_accumulation_steps 24": "54 samples a step in expectation (recommended: 16): 24 bins on 1 rank, 24 "
        "forward passes of 1 bin each; 2 epochs a step: it has more bins than an epoch",
    }
    for words, line in lines.items():
        assert make_plan(parse_arguments([*flags, *words.split()])).batch_line.startswith(line)


def test_the_expected_samples_are_those_of_the_mean_step(flags: list[str]) -> None:
    plan = make_plan(parse_arguments([*flags, "--samples_per_step", "9", "--num_train_epochs", "1"]))
    with open_stream(plan) as stream:
        assert np.mean([batch.num_samples for batch in stream]) == 9
