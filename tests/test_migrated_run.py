"""The two commands that ``vlprep migrate`` prints build shards, and plan a run on them."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from prep.cli import main
from tests.prep.corpus import write_corpus
from train.run.plan import make_plan
from train.settings.flags import parse_arguments

SCRIPT = """
swift sft --model {model} --dataset {corpus} --dataset_num_proc 1 --train_type full --max_length 1200 \\
    --max_pixels 50176 --attn_impl sdpa --torch_dtype float32 --learning_rate 1e-3 --max_steps 2 --warmup_steps 1 \\
    --gradient_accumulation_steps 2 --adam_beta1 0.8 --deepspeed zero3 --output_dir {folder}/run
"""


def printed_commands(text: str) -> list[list[str]]:
    """The words of the commands in a report."""
    code = "\n".join(line for line in text.splitlines() if not line.startswith("#"))
    return [shlex.split(command) for command in code.replace("\\\n", "").split("\n") if command.strip()]


def test_a_migrated_script_builds_shards_and_plans_a_run_on_them(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    corpus, *_ = write_corpus(tmp_path)
    script = tmp_path / "sft.sh"
    script.write_text(SCRIPT.format(model=tiny_checkpoint, corpus=corpus, folder=tmp_path))
    migrated = CliRunner().invoke(main, ["migrate", str(script), "--out", str(tmp_path / "shards")])
    assert migrated.exit_code == 0, migrated.output
    build, train = printed_commands(migrated.output)
    built = CliRunner().invoke(main, build[1:])
    assert built.exit_code == 0, built.output
    assert train[:3] == ["torchrun", "--nproc_per_node=1", "train/main.py"]
    plan = make_plan(parse_arguments(train[3:]))
    assert plan.index.max_length == 1200
    assert (plan.num_steps, plan.args.samples_per_step) == (2, 2)
    assert plan.batch.bins == max(1, round(2 / plan.index.samples_per_bin))
    assert plan.deepspeed["zero_optimization"]["stage"] == 3
