"""What ``python -m train.order`` prints is what a run with these numbers does."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from schemas.qwen import tokenizer_fingerprint
from tests.train.synthetic import make_bins, write_shards
from train.order.cli import main
from train.order.explain import explain_step
from train.run import engine
from train.run.plan import make_plan
from train.settings.flags import parse_arguments


@pytest.fixture
def shards(tiny_checkpoint: Path, tmp_path: Path) -> str:
    path = tiny_checkpoint / "tokenizer.json"
    fingerprint = tokenizer_fingerprint(path.read_bytes(), where=str(path))
    parts = (
        write_shards(tmp_path / name, make_bins(seed=seed, num_bins=12), tokenizer=fingerprint)
        for seed, name in enumerate("ab")
    )
    return ",".join(f"{part}:{weight}" for part, weight in zip(parts, (2, 1)))


@pytest.mark.parametrize(
    ("of_the_run", "of_the_order"),
    [
        ([], []),
        (["--seed", "7", "--group_steps", "2"], ["--seed", "7", "--group-steps", "2"]),
        (
            ["--tune_mm_vision", "True", "--gradient_checkpointing", "False"],
            ["--tune-vision", "--no-gradient-checkpointing"],
        ),
        (["--tune_mm_llm", "False"], ["--freeze-llm"]),
        (["--lora_enable", "True"], ["--lora"]),
    ],
)
def test_steps_are_those_of_the_run(
    shards: str,
    tiny_checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    of_the_run: list[str],
    of_the_order: list[str],
) -> None:
    """The first step, one that spans epochs, and the last, short one: bins, ranks, and costs to the last digit."""
    monkeypatch.setattr(engine, "choose_device", lambda ranks: torch.device("cpu"))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    batch = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4", "--num_train_epochs", "1.2"]
    flags = ["--shards", shards, "--model_name_or_path", str(tiny_checkpoint), "--output_dir", str(tmp_path / "run")]
    plan = make_plan(parse_arguments([*flags, *batch, *of_the_run]))
    assert plan.num_steps == 4
    command = ["--shards", shards, "--model_name_or_path", str(tiny_checkpoint), "--global-batch", "8"]
    command += ["--world-size", "1", "--accumulation", "4", "--epochs", "1.2", *of_the_order]
    # What the run itself would say to type.
    python, m, module, *told = shlex.split(plan.order_command)
    assert (python, m, module) == ("python", "-m", "train.order") and set(told) >= set(command)
    for step in range(plan.num_steps):
        wanted = list(explain_step(plan.index, plan.order, step, world_size=1, accumulation=4))
        for flags in (command, told):
            done = CliRunner().invoke(main, [*flags, "--step", str(step)])
            assert done.exit_code == 0, done.output
            assert done.output.splitlines() == wanted
