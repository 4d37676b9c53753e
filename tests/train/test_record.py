"""``settings.toml`` of a run: it holds what was resolved, and a run that reads it is the same run."""

from __future__ import annotations

import dataclasses
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from schemas.errors import ConfigError
from tests.train.synthetic import make_bins, write_shards
from train.model import pretrained
from train.run.plan import Plan, make_plan
from train.run.record import record_run, resolved_arguments
from train.settings.arguments import TrainArguments
from train.settings.flags import parse_arguments
from train.settings.record import RunFacts, format_toml, read_record, write_record

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FACTS = RunFacts(checkpoint="checkpoints/tiny", world_size=2, global_batch=8, num_steps=5, accumulation=4, per_device=1)


@given(
    st.dictionaries(
        st.from_regex(r"[a-z][a-z0-9_]*", fullmatch=True),
        st.text() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False),
    )
)
def test_every_value_is_read_back_from_toml(values: dict[str, object]) -> None:
    read = tomllib.loads(format_toml(values))
    assert read == values
    assert {name: type(value) for name, value in read.items()} == {name: type(value) for name, value in values.items()}


def test_a_record_is_read_back_by_config_and_with_its_facts(tmp_path: Path) -> None:
    args = TrainArguments(
        shards="a:0.7,b:0.3",
        output_dir=tmp_path / 'run "x"',
        learning_rate=2e-7,
        max_steps=5,
        bf16=True,
        tune_mm_llm=False,
    )
    write_record(tmp_path, args, FACTS, {"torch": "2.13.0"})
    assert read_record(tmp_path) == (args, FACTS)
    path = tmp_path / "settings.toml"
    assert parse_arguments(["--config", str(path)]) == args
    assert parse_arguments(["--config", str(path), "--max_steps", "9"]) == dataclasses.replace(args, max_steps=9)
    assert tomllib.loads(path.read_text())["versions"] == {"torch": "2.13.0"}
    assert [item.name for item in tmp_path.iterdir()] == ["settings.toml"]


def test_flags_of_a_single_launch_are_not_recorded(tmp_path: Path) -> None:
    write_record(tmp_path, TrainArguments(shards="a", debug=True, dry_run=True, verbose=True, local_rank=3), FACTS, {})
    assert read_record(tmp_path)[0] == TrainArguments(shards="a")


def test_a_path_that_is_not_utf8_is_read_back(tmp_path: Path) -> None:
    args = TrainArguments(shards="a", output_dir=Path(os.fsdecode(b"runs/\xff")))
    write_record(tmp_path, args, FACTS, {})
    assert read_record(tmp_path)[0] == args


@pytest.mark.parametrize(
    ("shards", "is_secret"), [("https://host/set?X-Amz-Signature=SECRET", True), ("s3://bucket/set", False)]
)
def test_only_the_owner_reads_a_record_with_a_signed_url(tmp_path: Path, shards: str, is_secret: bool) -> None:
    write_record(tmp_path, TrainArguments(shards=shards), FACTS, {})
    mode = stat.S_IMODE((tmp_path / "settings.toml").stat().st_mode)
    assert (mode & 0o077 == 0) == is_secret
    assert read_record(tmp_path)[0].shards == shards


def test_a_folder_without_a_record_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"settings\.toml does not exist: give the folder of a run"):
        read_record(tmp_path)
    (tmp_path / "settings.toml").write_text('shards = "a"\n')
    with pytest.raises(ConfigError, match=r"settings\.toml does not record a run"):
        read_record(tmp_path)


@pytest.fixture
def flags(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr("train.run.device.choose_device", lambda ranks: torch.device("cpu"))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    # Comparing tokenizers is tested elsewhere and takes most of the time of a plan.
    monkeypatch.setattr(pretrained, "check_fingerprints", lambda *_, **__: None)
    shards = write_shards(tmp_path / "shards", make_bins(num_bins=8))
    run = str(tmp_path / "run")
    return ["--shards", str(shards), "--model_name_or_path", str(tiny_checkpoint), "--output_dir", run]


def decisions(plan: Plan) -> dict[str, object]:
    """What a plan decides, in values that compare."""
    return {
        "settings": plan.settings,
        "deepspeed": plan.deepspeed,
        "recipe": plan.recipe,
        "batch": (plan.batch.bins, plan.batch.per_device, plan.batch.accumulation),
        "computation": (plan.compute.device, plan.compute.dtype, plan.compute.attention),
        "num_steps": plan.num_steps,
        "costs": plan.order.cost.tolist(),
        "stream": plan.order.state_dict(1),
        "adapters": plan.adapters,
        "run": (plan.args.run_dir, plan.args.name, plan.args.warmup),
    }


@pytest.mark.parametrize(
    "changes",
    [
        "",
        "--max_steps 3 --bf16 --seed 7",
        "--samples_per_step 9 --max_tokens_per_forward 200",
        "--per_device_train_batch_size 2",
        "--group_steps 2 --num_train_epochs 2.5",
        "--lr_scheduler_type constant",
        "--warmup_steps 2 --adam_beta1 0.8 --optim adamw_torch",
        "--max_steps 30 --save_steps 0.1",
        "--tune_mm_llm False --mm_projector_lr 1e-5",
        "--lora_enable --lora_r 4",
    ],
)
def test_a_run_from_its_record_is_the_same_run(flags: list[str], changes: str) -> None:
    plan = make_plan(parse_arguments([*flags, *changes.split()]))
    plan.args.run_dir.mkdir()
    record_run(plan)
    path = plan.args.run_dir / "settings.toml"
    again = make_plan(parse_arguments(["--config", str(path)]))
    assert decisions(again) == decisions(plan)
    record_run(again)
    assert make_plan(parse_arguments(["--config", str(path)])).args == again.args == resolved_arguments(plan)


def test_a_record_names_the_command_and_the_commit_of_the_manifest(flags: list[str], tmp_path: Path) -> None:
    shards, folder = Path(flags[1]), tmp_path / "run"
    folder.mkdir()
    record_run(make_plan(parse_arguments(flags)), [*flags, "--local_rank=0"])
    facts = read_record(folder)[1]
    assert facts.command == f"train/main.py {' '.join(flags)}"
    assert facts.shards_commit is None

    def git(*words: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ("git", "-C", str(shards), *identity, *words)
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("add", "manifest.json")
    git("commit", "-qm", "shards")
    record_run(make_plan(parse_arguments(flags)))
    assert read_record(folder)[1].shards_commit == f"{shards}@{git('rev-parse', 'HEAD')}"

    manifest = shards / "manifest.json"
    manifest.write_text(manifest.read_text() + "\n")
    record_run(make_plan(parse_arguments(flags)))
    assert read_record(folder)[1].shards_commit is None, "the manifest is not the one of the commit"


def test_nothing_is_left_to_the_model_or_the_machine(flags: list[str]) -> None:
    args = resolved_arguments(make_plan(parse_arguments(flags)))
    assert (args.learning_rate, args.num_train_epochs, args.warmup_ratio) == (2e-7, 3.0, 0.03)
    assert (args.samples_per_step, args.per_device_train_batch_size, args.gradient_accumulation_steps) == (
        16,
        None,
        None,
    )
    assert args.max_tokens_per_forward is not None
    assert (args.bf16, args.attn_implementation, args.deepspeed) == (False, "sdpa", "zero2.json")
