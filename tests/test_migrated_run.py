"""The two commands that ``vlprep migrate`` prints build shards, and train on them."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from prep.cli import main
from tests.prep.corpus import write_corpus
from tests.train.launching import ENVIRONMENT, LIMIT_S, REPOSITORY
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


UPSTREAM_SCRIPT = r"""
nproc_per_node=1
batch_size=2
datasets=mine%50
args="
    --deepspeed ./scripts/zero2.json \
    --model_name_or_path "{model}" \
    --dataset_use ${{datasets}} \
    --data_flatten True \
    --tune_mm_vision False \
    --tune_mm_mlp True \
    --tune_mm_llm True \
    --bf16 False \
    --output_dir ./output \
    --max_steps 2 \
    --per_device_train_batch_size ${{batch_size}} \
    --gradient_accumulation_steps $(expr 4 / $nproc_per_node) \
    --max_pixels 50176 \
    --save_strategy "steps" \
    --learning_rate 1e-3 \
    --logging_steps 1 \
    --model_max_length 1200 \
    --report_to none"
torchrun --nproc_per_node=${{nproc_per_node}} qwenvl/train/train_qwen.py ${{args}}
"""


@pytest.mark.slow
def test_what_is_printed_for_an_upstream_script_is_a_script_that_builds_and_trains(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report runs in bash as it is printed, beside the tables that it prints for ``datasets.toml``."""
    corpus, *_ = write_corpus(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    Path("registry.py").write_text(f"data_dict = {{'mine': {{'annotation_path': {str(corpus)!r}}}}}\n")
    Path("sft.sh").write_text(UPSTREAM_SCRIPT.format(model=tiny_checkpoint))
    migrated = CliRunner().invoke(main, ["migrate", "sft.sh", "--registry", "registry.py"])
    assert migrated.exit_code == 0, migrated.output
    commands, _, tables = migrated.output.partition("# Tables for datasets.toml")
    Path("datasets.toml").write_text(f"# {tables}")
    Path("train").symlink_to(REPOSITORY / "train")
    programs = str(Path(sys.executable).parent)
    environment = {**ENVIRONMENT, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        ["bash", "-ec", commands], env=environment, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    assert " samples a step in expectation (--samples_per_step 8): " in done.stderr
    lines = Path("output/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert Path("output/checkpoint-2/state.json").is_file()
    assert Path("output/final/preprocessor_config.json").is_file()
