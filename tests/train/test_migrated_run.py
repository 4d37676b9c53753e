"""The two commands that ``vlprep migrate`` prints for a script of another trainer build shards, and train on them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tomllib
from click.testing import CliRunner
from PIL import Image

from prep.cli import main
from prep.engines import SerialEngine
from tests.prep.corpus import turn
from tests.prep.launch_scripts import LLAMA_FACTORY_FILES, SWIFT_SCRIPTS, UPSTREAM_SCRIPTS
from tests.prep.test_videos import write_video
from tests.train.launching import ENVIRONMENT, LIMIT_S, REPOSITORY, read_metrics, run_ranks

pytestmark = pytest.mark.slow

SCRIPTS = {**UPSTREAM_SCRIPTS, **SWIFT_SCRIPTS, **LLAMA_FACTORY_FILES}

RECORD_WORDS = """
record() { local program=$1; shift; printf '%s\\0' "$@" >"words-$program"; }
vlprep() { record vlprep "$@"; }
torchrun() { record trainer "$@"; }
deepspeed() { record trainer "$@"; }
nvidia-smi() { echo "GPU 0"; }
"""
"""Programs of the printed commands that write down the words that they get, on a machine with one GPU."""

NOT_ON_A_CPU = {"vision.yaml": ("--use_liger_kernel", "True")}
"""A flag that the trainer refuses without a GPU. The rest of the command runs."""

LEFT = {"full.sh": "#   --save_strategy epoch: give --save_steps\n"}
"""What a script leaves to its reader."""


def write_datasets(folder: Path) -> None:
    """Write a few records in the form of each trainer, where the scripts look for them."""
    (folder / "data").mkdir()
    for place in (folder, folder / "data"):
        Image.new("RGB", (60, 40), (200, 30, 30)).save(place / "red.png")
    write_video(folder / "clip.mp4", 4, 2)
    chat = turn("<image>\nWhat is this?")
    upstream = [
        {"image": "red.png", "conversations": chat},
        {"video": "clip.mp4", "conversations": turn("<video>\nWhat happens?")},
    ]
    roles = {"human": "user", "gpt": "assistant"}
    messages = [{"role": roles[item["from"]], "content": item["value"]} for item in chat]
    others = [{"messages": messages, "images": ["red.png"]}] * 2
    (folder / "records.json").write_text(json.dumps(upstream))
    for name in ("data/ocr.jsonl", "a.jsonl", "b.jsonl", "my data.jsonl", "data/mllm.jsonl"):
        (folder / name).write_text("".join(f"{json.dumps(record)}\n" for record in others))
    (folder / "qwenvl/data").mkdir(parents=True)
    entry = {"annotation_path": str(folder / "records.json")}
    registry = f"data_dict = {dict.fromkeys(('mp_doc', 'clevr_mc'), entry)!r}\n"
    (folder / "qwenvl/data/__init__.py").write_text(registry)
    info = {"file_name": "mllm.jsonl", "formatting": "sharegpt", "columns": {"messages": "messages"}}
    (folder / "data/dataset_info.json").write_text(json.dumps(dict.fromkeys(("mllm_demo", "my_set"), info)))


def migrated(name: str, text: str) -> str:
    """The printed commands of a script, with the tables that are printed for ``datasets.toml`` in that file."""
    Path(name).write_text(text)
    result = CliRunner().invoke(main, ["migrate", name])
    assert result.exit_code == (1 if name in LEFT else 0), result.output
    assert result.output.partition("# Not understood, or left to you\n")[2] == LEFT.get(name, "")
    commands, _, tables = result.output.partition("# Tables for datasets.toml")
    Path("datasets.toml").write_text(f"# {tables}")
    return commands


def words_of_commands(commands: str) -> tuple[list[str], list[str]]:
    """The words that the two programs get when bash runs the printed text."""
    subprocess.run(["bash", "-euc", RECORD_WORDS + commands], check=True, timeout=60)
    build, train = (Path(f"words-{program}").read_text().split("\0")[:-1] for program in ("vlprep", "trainer"))
    return build, train


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_printed_commands_of_a_script_build_shards_and_train_on_them(
    name: str, tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They run word for word, with a tiny checkpoint in a local folder that has the name of the real one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("prep.cli.open_engine", lambda *_, **__: nullcontext(SerialEngine()))  # no processes
    write_datasets(tmp_path)
    Path("Qwen").mkdir()
    for size in ("3B", "7B", "32B"):
        Path(f"Qwen/Qwen2.5-VL-{size}-Instruct").symlink_to(tiny_checkpoint)
    build, train = words_of_commands(migrated(name, SCRIPTS[name]))

    built = CliRunner().invoke(main, build)
    assert built.exit_code == 0, built.output

    flags = train[train.index("train/main.py") + 1 :]
    here = partial(enter, tmp_path)
    if name in NOT_ON_A_CPU:
        refused = run_ranks(1, *flags, prepare=here)
        assert refused.returncode == 2
        assert "--use_liger_kernel needs a GPU" in refused.stderr
        flag, value = NOT_ON_A_CPU[name]
        at = flags.index(flag)
        assert flags[at : at + 2] == [flag, value]
        del flags[at : at + 2]
    done = run_ranks(1, *flags, prepare=here)
    assert done.returncode == 0, done.stderr
    assert "note: " not in done.stderr
    settings: dict[str, Any] = dict(zip(flags[0::2], flags[1::2], strict=True))
    (run,) = (path.parent for path in Path().rglob("settings.toml"))
    recorded = tomllib.loads((run / "settings.toml").read_text())
    assert recorded["samples_per_step"] == int(settings["--samples_per_step"])
    steps = [record["step"] for record in read_metrics(run)]
    assert steps[-1] == recorded["run"]["num_steps"]
    assert (run / "final" / "preprocessor_config.json").is_file()
    assert (run / "adapter").is_dir() == (settings.get("--lora_enable") == "True")


def enter(folder: Path) -> None:
    """Run in a folder, with wandb off."""
    os.chdir(folder)
    os.environ["WANDB_MODE"] = "disabled"


UPSTREAM_SCRIPT = r"""
nproc_per_node=1
batch_size=2
datasets=mp_doc%50
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


def test_what_is_printed_for_an_upstream_script_is_a_script_that_builds_and_trains(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report runs in bash as it is printed, with the programs themselves."""
    monkeypatch.chdir(tmp_path)
    write_datasets(tmp_path)
    commands = migrated("sft.sh", UPSTREAM_SCRIPT.format(model=tiny_checkpoint))
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
