"""``python -m train.order`` prints what a run does, be it started or planned."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from tests.train.synthetic import make_bins, write_shards
from train.model import pretrained
from train.order.cli import main
from train.order.explain import deal_step, explain_step
from train.run.plan import make_plan
from train.run.record import record_run
from train.settings.flags import parse_arguments


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    # Comparing tokenizers is tested elsewhere and takes most of the time of a plan.
    monkeypatch.setattr(pretrained, "check_fingerprints", lambda *_, **__: None)
    parts = (write_shards(tmp_path / name, make_bins(seed=seed, num_bins=12)) for seed, name in enumerate("ab"))
    return ",".join(f"{part}:{weight}" for part, weight in zip(parts, (2, 1)))


def order(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("run_flags", "planned"),
    [
        ([], []),
        (["--seed", "7", "--group_steps", "2"], ["--seed", "7", "--group-steps", "2"]),
        (["--tune_mm_vision", "True", "--gradient_checkpointing", "False"], None),
        (["--tune_mm_llm", "False"], None),
        (["--lora_enable", "True"], None),
    ],
)
def test_steps_are_those_of_the_run(
    shards: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    run_flags: list[str],
    planned: list[str] | None,
) -> None:
    """The first step, one that spans epochs, and the short last one: bins, ranks, and costs to the last digit.

    A planned run trains what is trained by default, so its numbers reproduce only such a run.
    """
    monkeypatch.setattr("train.run.device.choose_device", lambda ranks: torch.device("cpu"))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    run_dir = tmp_path / "a run"
    batch = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4", "--num_train_epochs", "1.2"]
    flags = ["--shards", shards, "--model_name_or_path", str(tiny_checkpoint), "--output_dir", str(run_dir)]
    plan = make_plan(parse_arguments([*flags, *batch, *run_flags]))
    assert plan.num_steps == 4
    run_dir.mkdir()
    record_run(plan)
    python, m, module, *words = shlex.split(plan.order_command)
    assert (python, m, module, words) == ("python", "-m", "train.order", ["--run", str(run_dir)])
    commands = [words]
    if planned is not None:
        batch_flags = ["--global-batch", "8", "--world-size", "1", "--accumulation", "4", "--epochs", "1.2"]
        commands.append(["--shards", shards, "--model_name_or_path", str(tiny_checkpoint), *batch_flags, *planned])
    for step in range(plan.num_steps):
        expected = list(
            explain_step(plan.index, plan.order, step, deal_step(plan.order, step, world_size=1, accumulation=4))
        )
        for command in commands:
            result = order(*command, "--step", step)
            assert result.exit_code == 0, result.output
            assert result.output.splitlines() == expected
    dealt = deal_step(plan.order, 1, world_size=1, accumulation=4)
    listed = json.loads(order(*words, "--step", 1, "--json").output)
    assert [(row["micro_step"], row["rank"]) for row in listed] == [(index // 2, 0) for index in range(8)]
    global_bins = [12 * (Path(row["folder"]).name == "b") + row["bin"] for row in listed]
    assert global_bins == dealt.ravel().tolist()


def test_a_run_bounded_by_steps_alone_ends_there_and_shows_nothing_once_its_shards_are_built_again(
    shards: str, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("train.run.device.choose_device", lambda ranks: torch.device("cpu"))
    flags = ["--shards", shards, "--model_name_or_path", str(tiny_checkpoint), "--output_dir", str(tmp_path / "run")]
    plan = make_plan(parse_arguments([*flags, "--max_steps", "2"]))
    assert plan.order.num_steps is None
    run_dir = plan.args.run_dir
    run_dir.mkdir()
    record_run(plan)
    assert order("--run", run_dir, "--step", 1).exit_code == 0
    for extra in ([], ["--json"]):
        result = order("--run", run_dir, "--step", 2, *extra)
        assert result.exit_code == 2
        assert "step is 2, but the run ends after 2 steps: steps count from 0, so the last is 1.\n" in result.stderr
    simulated = order("--run", run_dir, "--simulate").output.splitlines()
    assert simulated[0].startswith("all 2 steps of the run, each of ")
    assert simulated[-1].endswith("; 2 steps in all")

    rebuilt = tmp_path / "a"
    shutil.rmtree(rebuilt)
    write_shards(rebuilt, make_bins(seed=7, num_bins=12))
    for words in (["--step", 1], ["--simulate"]):
        result = order("--run", run_dir, *words)
        assert result.exit_code == 2
        assert f"{run_dir} was started with --shards {shards}, but they were built again since, with" in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--step 1",
            "give --run FOLDER, or all of --shards, --world-size and either --global-batch or --samples-per-step.",
        ),
        ("--step 1 --shards a --global-batch 4", "give --run FOLDER, or all of --shards, --world-size"),
        (
            "--step 1 --shards a --world-size 2 --global-batch 4 --samples-per-step 9",
            "give --run FOLDER, or all of --shards, --world-size and either --global-batch or --samples-per-step.",
        ),
        ("--step 1 --run a --shards b --seed 3", "--run a has settings of its own: leave out --seed, --shards."),
        ("--simulate --json --run a", "--json has no effect with --simulate. Leave it out, or give --step N."),
        ("--step 1 --run nowhere", "settings.toml does not exist: give the folder of a run that has started"),
        ("--step 1 --shards a --global-batch 4 --world-size 2 --seed -1", "--seed is -1; allowed: 0 or more."),
        ("--step 1 --shards a --global-batch 4 --world-size 2 --epochs 0", "--num_train_epochs is 0.0; allowed: more"),
        ("--step 1 --shards a --global-batch 4 --world-size 2 --group-steps 0", "--group_steps is 0; allowed: 1 or"),
        ("--run a", "give either --step N or --simulate."),
    ],
)
def test_wrong_use_is_explained_in_one_sentence(words: str, message: str) -> None:
    result = order(*words.split())
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
