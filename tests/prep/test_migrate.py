"""Launch scripts of other trainers become two commands that our own parsers accept, and no flag gets lost."""

from __future__ import annotations

import ast
import importlib.util
import json
import random
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from prep.cli import build_command, main
from prep.migrate.launch import _find_launch, read_words
from prep.migrate.rewrite import rewrite
from prep.migrate.shell import ShellError, quote, read_commands
from prep.migrate.tools import COMMON, LLAMA_FACTORY, SWIFT, TRAINER_SWITCHES, TRAINER_VALUES, UPSTREAM, Tool
from tests.guides import table_rows
from tests.prep.launch_scripts import LLAMA_FACTORY_FILES, SWIFT_SCRIPTS, UPSTREAM_SCRIPTS, upstream
from train.settings.arguments import TrainArguments
from train.settings.flags import FIELDS, parse_arguments

REGISTRY = '''
"""Datasets."""
import re

ROOT = "/data"
MP_DOC = {"annotation_path": ROOT + "/mp_doc/all.json", "data_path": f"{ROOT}/mp_doc"}
CLEVR = {
    "annotation_path": "/data/clevr.json",
    "data_path": "",
}
data_dict = {"mp_doc": MP_DOC, "clevr_mc": CLEVR, "set:3": {"annotation_path": "c.json", "data_path": "c"}}


def data_list(names):
    raise SystemExit("must never run")
'''


def migrate(*words: str) -> Result:
    return CliRunner().invoke(main, ["migrate", *words])


def section(text: str, heading: str) -> str:
    blocks = {block.partition("\n")[0].lstrip("# "): block.partition("\n")[2] for block in text.split("\n\n")}
    return next((block for name, block in blocks.items() if name.startswith(heading)), "")


def build_options(text: str) -> dict[str, object]:
    """The options of the printed build, as the command parses them."""
    program, command, *words = shlex.split(section(text, "1. Build").replace("\\\n", ""))
    assert (program, command) == ("vlprep", "build")
    with build_command.make_context("build", words) as context:
        assert isinstance(context, click.Context)
        return context.params


def train_command(text: str) -> tuple[list[str], TrainArguments]:
    """The words in front of the printed trainer, and its flags as it parses them, without a note."""
    words = shlex.split(section(text, "2. Train").replace("\\\n", ""))
    at = words.index("train/main.py")
    notes: list[str] = []
    args = parse_arguments([as_shell(word) for word in words[at + 1 :]], note=notes.append)
    assert notes == []
    return words[:at], args


def as_shell(word: str) -> str:
    """A word as bash passes it on, on a machine with two GPUs."""
    if "$((" not in word:
        return word
    program = f'nvidia-smi() {{ printf "GPU 0\\nGPU 1\\n"; }}; printf %s "{word}"'
    return subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with scripts beside the registries of the other trainers."""
    (tmp_path / "qwenvl" / "data").mkdir(parents=True)
    (tmp_path / "qwenvl" / "data" / "__init__.py").write_text(REGISTRY)
    (tmp_path / "data").mkdir()
    info = {
        "mllm_demo": {
            "file_name": "mllm_demo.json",
            "formatting": "sharegpt",
            "columns": {"messages": "messages", "images": "images"},
            "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
        },
        "my_set": {"file_name": "sub/my set.jsonl", "formatting": "sharegpt"},
    }
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    (tmp_path / "scripts").mkdir()
    for name, text in {**UPSTREAM_SCRIPTS, **SWIFT_SCRIPTS, **LLAMA_FACTORY_FILES}.items():
        (tmp_path / "scripts" / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", UPSTREAM_SCRIPTS)
def test_an_upstream_script_becomes_two_commands_that_are_accepted(folder: Path, name: str) -> None:
    result = migrate(f"scripts/{name}")
    assert result.exit_code == 0, result.output
    options = build_options(result.output)
    launcher, args = train_command(result.output)
    assert options["datasets"] == ("mp_doc%50,clevr_mc",)
    assert (options["max_length"], options["max_pixels"], options["min_pixels"]) == (8192, 50176, 784)
    assert options["model"] == args.model_name_or_path
    assert str(options["out"]) == args.shards == "shards/mp_doc-50+clevr_mc"
    assert launcher[:3] == ["torchrun", "--nproc_per_node=8", "--master_addr=127.0.0.1"]
    assert launcher[3] == "--master_port=$(shuf -i 20001-29999 -n 1)"
    is_lora = name == "sft_today.sh"
    assert (args.tune_mm_llm, args.tune_mm_mlp, args.tune_mm_vision) == (True, not is_lora, False)
    assert args.lora_target_modules == ("q_proj,k_proj,v_proj,o_proj" if is_lora else None)
    assert args.bf16 is True
    assert (args.num_train_epochs, args.weight_decay, args.warmup_ratio) == (0.5, 0.0, 0.03)
    assert (args.save_steps, args.save_total_limit, args.logging_steps) == (1000, 1, 1)
    assert (args.report_to, args.run_name, str(args.output_dir)) == ("wandb", "qwen2vl-baseline", "output")


def test_the_sizes_of_upstream_keep_their_samples_rate_and_zero_stage(folder: Path) -> None:
    arguments = {}
    for name in ("sft_3b.sh", "sft_7b.sh", "sft_32b.sh"):
        _, args = train_command(migrate(f"scripts/{name}").output)
        assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (None, None)
        arguments[name] = (args.learning_rate, args.samples_per_step, args.deepspeed)
    assert arguments == {
        "sft_3b.sh": (2e-7, 8 * 4 * 8, "zero2.json"),
        "sft_7b.sh": (2e-7, 4 * 4 * 8, "zero3.json"),
        "sft_32b.sh": (1e-7, 2 * 8 * 8, "zero3_offload.json"),
    }


def test_video_settings_move_to_the_build(folder: Path) -> None:
    options = build_options(migrate("scripts/sft_video_packed.sh").output)
    assert (options["base_interval"], options["video_max_frames"], options["video_min_frames"]) == (2.0, 16, 4)
    assert (options["video_max_frame_pixels"], options["video_min_frame_pixels"]) == (1304576, 200704)
    assert options["video_sampling"] == "interval"
    today = build_options(migrate("scripts/sft_today.sh").output)
    assert (today["video_sampling"], today["fps"], today["fps_max_frames"], today["fps_min_frames"]) == ("fps", 2, 8, 4)
    assert (today["video_max_frame_pixels"], today["video_min_frame_pixels"]) == (802816, 200704)


def test_every_flag_of_a_script_has_a_line(folder: Path) -> None:
    for name, text in UPSTREAM_SCRIPTS.items():
        lines = section(migrate(f"scripts/{name}").output, "What became").splitlines()
        flags = {word for word in text.split() if word.startswith("--")} - {"--list-gpus"}
        launcher = {flag for flag in flags if flag.partition("=")[0] in ("--nproc_per_node", "--master_addr")}
        for flag in flags - launcher - {"--master_port=${MASTER_PORT}"}:
            assert [line for line in lines if line.split()[1] == flag], (name, flag)


def test_each_line_says_what_became_of_its_flag(folder: Path) -> None:
    output = migrate("scripts/sft_today.sh").output
    for line in (
        "--tune_mm_llm True  kept",
        "--bf16  kept",
        "--model_max_length 8192  moved to the build, --max-length 8192: the capacity of a bin",
        "--deepspeed ./scripts/zero3.json  replaced by --deepspeed zero3.json",
        "--per_device_train_batch_size 4  replaced by --samples_per_step 128: 4 samples x 4 forward passes x 8 ranks",
        "--gradient_accumulation_steps 4  counted in --samples_per_step 128",
        "--data_flatten True  has no effect here: bins are always packed, and their samples isolated",
        "--cache_dir ./cache  has no effect here: it is the cache of the Hub there; set HF_HOME",
        "--save_strategy steps  has no effect here: --save_steps says how often to save",
    ):
        assert f"#   {line}" in output


@pytest.mark.parametrize("name", SWIFT_SCRIPTS)
def test_a_swift_script_becomes_two_commands_that_are_accepted(folder: Path, name: str) -> None:
    result = migrate(f"scripts/{name}")
    options = build_options(result.output)
    launcher, args = train_command(result.output)
    assert options["min_pixels"] == 3136  # a default that differs from ours
    assert (options["video_sampling"], options["fps"]) == ("fps", 2.0)
    assert args.adam_beta2 == 0.95
    assert args.weight_decay == 0.1
    if name == "lora.sh":
        assert launcher == ["CUDA_VISIBLE_DEVICES=0", "torchrun", "--nproc_per_node=1"]
        assert options["datasets"] == ("data/ocr.jsonl",)
        assert (options["max_pixels"], options["max_length"]) == (1003520, 2048)
        assert (args.lora_enable, args.lora_r, args.lora_alpha, args.lora_dropout) == (True, 8, 32, 0.05)
        assert (args.tune_mm_llm, args.tune_mm_mlp, args.tune_mm_vision, args.bf16) == (True, False, False, True)
        assert result.exit_code == 0, result.output
    if name == "full.sh":
        assert launcher == ["CUDA_VISIBLE_DEVICES=0,1", "torchrun", "--nproc_per_node=2"]
        assert options["datasets"] == ("a.jsonl", "b.jsonl")
        assert (options["video_max_frame_pixels"], options["fps_max_frames"]) == (105369, 12)
        assert "raises it to 1.05 x the lower bound, 100352" in result.output
        assert (args.vision_tower_lr, args.tune_mm_mlp, args.lora_enable) == (1e-6, False, False)
        assert args.deepspeed == "zero3.json"
        assert args.samples_per_step == 16  # at least, by default
        assert result.exit_code == 1
        assert section(result.output, "Not understood") == "#   --save_strategy epoch: give --save_steps\n"
    if name == "merger.sh":
        assert options["datasets"] == ("my data.jsonl",)
        assert options["workers"] == 4
        assert (args.tune_mm_llm, args.tune_mm_mlp, args.tune_mm_vision) == (False, True, False)
        assert (args.max_steps, args.num_train_epochs, args.warmup_ratio) == (2, None, None)
        assert (args.learning_rate, args.report_to, str(args.logging_dir)) == (1e-5, "tensorboard", "logs")
        assert result.exit_code == 0, result.output


@pytest.mark.parametrize("name", LLAMA_FACTORY_FILES)
def test_a_yaml_of_llama_factory_becomes_two_commands_that_are_accepted(folder: Path, name: str) -> None:
    result = migrate(f"scripts/{name}")
    assert result.exit_code == 0, result.output
    options = build_options(result.output)
    launcher, args = train_command(result.output)
    assert launcher == ["deepspeed"]
    assert options["datasets"] == ("mllm_demo,my_set",)
    assert (options["max_length"], options["workers"], options["max_pixels"]) == (2048, 16, 262144)
    assert (options["min_pixels"], options["video_min_frame_pixels"]) == (1024, 784)
    assert (args.samples_per_step, args.warmup_ratio, args.bf16) == (1 * 8 * 2, 0.1, True)
    if name == "lora.yaml":
        assert (args.lora_enable, args.lora_r, args.lora_alpha, args.learning_rate) == (True, 8, 16, 1e-4)
        assert options["base_interval"] == 0.5
    if name == "full.yaml":
        assert (args.lora_enable, args.tune_mm_vision, args.tune_mm_mlp, args.tune_mm_llm) == (
            False,
            False,
            False,
            True,
        )
        assert args.deepspeed == "zero3.json"
    if name == "vision.yaml":
        assert (args.tune_mm_vision, args.tune_mm_mlp, args.use_liger_kernel) == (True, True, True)
        assert (options["base_interval"], options["video_max_frames"]) == (0.25, 32)


def test_a_shell_script_around_a_yaml_reads_it_and_its_overrides(folder: Path) -> None:
    (folder / "run.sh").write_text(
        "FORCE_TORCHRUN=1 llamafactory-cli train scripts/full.yaml learning_rate=3e-6 save_steps=0.1\n"
    )
    result = migrate("run.sh")
    assert result.exit_code == 0, result.output
    args = train_command(result.output)[1]
    assert (args.learning_rate, args.save_steps) == (3e-6, 0.1)


def test_datasets_become_tables_of_the_registry(folder: Path) -> None:
    tables = section(migrate("scripts/sft.sh").output, "Tables for datasets.toml")
    assert tables == '[mp_doc]\nannotation_path = "/data/mp_doc/all.json"\nmedia_root = "/data/mp_doc"'
    of_module = migrate("qwenvl/data/__init__.py")
    assert of_module.exit_code == 0
    assert (
        '[clevr_mc]\nannotation_path = "/data/clevr.json"\n\n["set:3"]\nannotation_path = "c.json"' in of_module.output
    )
    of_yaml = migrate("scripts/lora.yaml").output
    assert '[my_set]\nannotation_path = "' in of_yaml
    assert 'data/sub/my set.jsonl"\nmedia_root = "' in of_yaml


def test_a_registry_with_code_is_read_as_far_as_it_has_none(folder: Path) -> None:
    code = "import os\nA = {'annotation_path': os.environ['A'], 'data_path': 'a'}\nopen('made', 'w')\n"
    code += "B = {'annotation_path': 'b.json', 'data_path': 'b'}\ndata_dict = {'a': A, 'b': B}\n"
    (folder / "registry.py").write_text(code)
    result = migrate("registry.py")
    assert result.exit_code == 1
    assert '[b]\nannotation_path = "b.json"\nmedia_root = "b"' in result.output
    assert "registry.py:3: code that is not run here: open('made', 'w')" in result.output
    assert "the dataset a has no annotation_path that can be read" in result.output
    assert not (folder / "made").exists()


def test_a_dictionary_with_code_keeps_its_other_entries_and_lists_what_needs_code(folder: Path) -> None:
    code = "BASE = {'data_path': 'b'}\nA = {'annotation_path': 'a.json', **BASE, 'data_path': ROOT(), **more()}\n"
    code += "B = {'annotation_path': 'b.json', **BASE}\n"
    code += "data_dict = {'a': A, **{'b': B}, **{name: B for name in 'cd'}, name('e'): B}\n"
    (folder / "registry.py").write_text(code)
    result = migrate("registry.py")
    assert result.exit_code == 1
    tables, _, left = result.output.partition("# Not understood\n")
    assert tables == '[a]\nannotation_path = "a.json"\n\n[b]\nannotation_path = "b.json"\nmedia_root = "b"\n\n'
    assert left.splitlines() == [
        "#   registry.py: **more() of the dataset a",
        "#   registry.py: data_path of the dataset a",
        "#   registry.py: entries of data_dict need code that is not run here: **{name: B for name in 'cd'}",
        "#   registry.py: entries of data_dict need code that is not run here: name('e')",
    ]


def test_a_script_whose_registry_has_code_is_rewritten_and_each_piece_of_code_has_a_line(folder: Path) -> None:
    path = folder / "qwenvl" / "data" / "__init__.py"
    code = "for name in data_dict:\n    data_dict[name] = {}\nif open('made', 'w'):\n    data_dict = {}\n"
    path.write_text(f"{REGISTRY}\n{code}\nif __name__ == '__main__':\n    data_list(['a'])\n")
    result = migrate("scripts/sft.sh")
    assert result.exit_code == 1
    assert train_command(result.output)[1].num_train_epochs == 0.5
    assert '[mp_doc]\nannotation_path = "/data/mp_doc/all.json"' in result.output
    left = section(result.output, "Not understood").splitlines()
    assert [line.partition("code that is not run here: ")[2] for line in left] == [
        "for name in data_dict: data_dict[name] = {}",
        "if open('made', 'w'): data_dict = {}",
    ]
    assert not (folder / "made").exists()


def test_texts_of_a_registry_that_grow_without_bound_are_not_read(folder: Path) -> None:
    for grown in ("x + x", "f'{x}{x}'"):
        lines = [
            "x = 'aaaa'",
            *[f"x = {grown}"] * 40,
            "data_dict = {'a': {'annotation_path': 'a', 'sampling_rate': 2}}",
        ]
        (folder / "registry.py").write_text("\n".join(lines))
        result = migrate("registry.py")
        assert result.exit_code == 1
        assert f"registry.py:16: x needs code that is not run here: {grown}" in result.output
        assert '[a]\nannotation_path = "a"\nsampling_rate = 2.0\n' in result.output


def test_dictionaries_that_hold_the_one_before_twice_are_no_texts(folder: Path) -> None:
    lines = ["x = {}", *["x = {'a': x, 'b': x}"] * 40, "A = {'annotation_path': 'a', 'data_path': x}"]
    (folder / "registry.py").write_text("\n".join([*lines, "data_dict = {'a': A, 'b': {'annotation_path': f'{x}'}}"]))
    result = migrate("registry.py")
    assert result.exit_code == 1
    assert result.output.startswith('[a]\nannotation_path = "a"\n\n#')
    assert "registry.py: data_path of the dataset a\n" in result.output
    assert "the dataset b has no annotation_path that can be read" in result.output


def test_datasets_of_another_kind_are_listed(folder: Path) -> None:
    info = {
        "hub": {"hf_hub_url": "someone/set"},
        "pairs": {"file_name": "p.json", "ranking": True},
        "odd": {"file_name": "o.json", "columns": {"messages": "dialogue"}},
    }
    (folder / "dataset_info.json").write_text(json.dumps(info))
    result = migrate("dataset_info.json")
    assert result.exit_code == 1
    assert "the dataset hub has no file_name: download it and register its annotation file" in result.output
    assert "the dataset pairs has ranking = true, which is not supported here" in result.output
    assert 'the dataset odd has columns.messages = "dialogue": rename the field in its records' in result.output


def test_an_unknown_flag_is_listed_and_never_dropped(folder: Path) -> None:
    (folder / "odd.sh").write_text(upstream(more="--frobnicate 3 --eval_strategy epoch --optim adafactor"))
    result = migrate("odd.sh")
    assert result.exit_code == 1
    train_command(result.output)
    left = section(result.output, "Not understood")
    assert "--frobnicate 3: not a known flag of qwen-vl-finetune" in left
    assert "--eval_strategy epoch: build shards to evaluate on, and give it with --eval_shards DIR" in left
    assert "--optim adafactor: allowed here: adamw_torch, adamw_torch_fused" in left
    (folder / "odd.yaml").write_text(
        LLAMA_FACTORY_FILES["lora.yaml"] + "galore_rank: 4\nnested: {a: 1}\nval_size: 0.1\n"
    )
    result = migrate("odd.yaml")
    assert result.exit_code == 1
    assert train_command(result.output)[1].lora_r == 8, "what was understood is printed"
    left = section(result.output, "Not understood")
    assert "galore_rank: 4: not a known flag of LLaMA-Factory" in left
    assert "nested in odd.yaml, a table or a nested list" in left
    assert "val_size: 0.1: build a second set of shards from it and give --eval_shards DIR" in left


def test_a_command_line_after_two_hyphens_is_read(folder: Path) -> None:
    result = migrate(
        "--", "torchrun", "--nproc_per_node", "2", "train_qwen.py", "--dataset_use", "mp_doc", "--tune_mm_mlp"
    )
    launcher, args = train_command(result.output)
    assert launcher == ["torchrun", "--nproc_per_node", "2"]
    assert (args.tune_mm_llm, args.tune_mm_mlp, args.samples_per_step) == (False, True, 8 * 1 * 2)
    frozen = migrate("--", "--dataset_use", "mp_doc")
    assert frozen.exit_code == 1
    assert "nothing is trained: give --tune_mm_llm, --tune_mm_mlp or both" in frozen.output
    flags_alone = migrate(
        "--out", "s", "--", "--dataset_use", "mp_doc", "--tune_mm_llm", "True", "--max_pixels", "9999"
    )
    assert flags_alone.exit_code == 0, flags_alone.output
    assert build_options(flags_alone.output)["max_pixels"] == 9999
    assert train_command(flags_alone.output)[1].shards == "s"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("notes.sh", "echo hello\n", "starts no training that is known here"),
        ("broken.sh", 'torchrun train.py --a "b\n', "is not a shell script: a double quote is not closed"),
        (
            "nested.sh",
            "srun bash -c 'torchrun \"a'\n",
            "srun bash -c: what it runs is not a script: a double quote is not",
        ),
        ("binary.sh", "\udcff\udcfe", "cannot be read as a script"),
        ("list.yaml", "- 1\n- 2\n", "holds no settings"),
        ("broken.yaml", "a: [1\n", "is not valid YAML"),
        ("date.yaml", "a: 2024-13-45\n", "is not valid YAML: month must be in 1..12"),
        ("digits.yaml", f"a: {'9' * 5000}\n", "is not valid YAML: Exceeds the limit"),
    ],
)
def test_a_file_that_is_not_a_script_is_refused_in_a_sentence(folder: Path, name: str, text: str, message: str) -> None:
    (folder / name).write_bytes(text.encode("utf-8", errors="surrogateescape"))
    result = migrate(name)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output


def test_a_missing_package_for_yaml_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "yaml", None)
    assert "needs the pyyaml package: pip install pyyaml" in migrate("scripts/lora.yaml").output


def test_a_script_is_never_run(folder: Path) -> None:
    (folder / "evil.sh").write_text("touch made; X=$(touch made) `touch made`\n" + UPSTREAM_SCRIPTS["sft.sh"])
    migrate("evil.sh")
    assert not (folder / "made").exists()


@pytest.mark.parametrize("name", ["nowhere.sh", "nowhere.yaml", "nowhere.py", "nowhere/dataset_info.json", "scripts"])
def test_a_missing_file_is_wrong_use(folder: Path, name: str) -> None:
    result = migrate(name)
    assert result.exit_code == 2
    fault = "cannot be read: Is a directory" if name == "scripts" else "does not exist"
    assert result.stderr == (
        f"vlprep: {name} {fault}. Give a launch script, a YAML of settings or a registry of datasets, or a command "
        "line after --.\n"
    )
    assert migrate("scripts/sft.sh", "--registry", "nowhere.py").exit_code == 2


@pytest.mark.parametrize(
    ("command", "launcher", "tool"),
    [
        ("torchrun --nproc_per_node 8 -m qwenvl.train.train_qwen", "torchrun --nproc_per_node 8", UPSTREAM),
        ("deepspeed --num_gpus 2 --module qwenvl.train.train_qwen", "deepspeed --num_gpus 2", UPSTREAM),
        ("accelerate launch --num_processes 4 -m qwenvl.train", "torchrun --nproc_per_node=4", UPSTREAM),
        ("python -u train_qwen.py", "python -u", UPSTREAM),
        ("python -m swift.cli.main sft", "torchrun --nproc_per_node=1", SWIFT),
        ("NPROC_PER_NODE=4 python -m swift.cli.main sft", "torchrun --nproc_per_node=4", SWIFT),
        ("python -m torch.distributed.run --nproc_per_node 4 -m swift.cli.sft", "torchrun --nproc_per_node 4", SWIFT),
        ("python -m llamafactory.cli train", "deepspeed", LLAMA_FACTORY),
        ("torchrun --nproc_per_node 2 src/train.py --stage sft", "torchrun --nproc_per_node 2", LLAMA_FACTORY),
        ("python -m pip install x; python convert.py --to x; torchrun train.py", "torchrun", UPSTREAM),
    ],
)
def test_a_training_may_be_a_module_and_stand_among_other_programs(command: str, launcher: str, tool: Tool) -> None:
    launch = _find_launch(read_commands(f"{command} --learning_rate 1e-5\n"), Path())
    assert launch is not None
    assert (" ".join(launch.launcher), launch.tool, launch.not_understood) == (launcher, tool, [])
    assert "--learning_rate 1e-5" in [flag.text() for flag in launch.flags]


def test_a_command_for_another_shell_is_read_and_what_is_in_front_of_it_is_listed(folder: Path) -> None:
    text = (
        "N=2\nsrun -N $N bash -lc 'CUDA_VISIBLE_DEVICES=0,1 torchrun --nproc_per_node 2 train.py --max_steps $STEPS'\n"
    )
    launch = _find_launch(read_commands(text), Path())
    assert launch is not None
    assert launch.environment == {"CUDA_VISIBLE_DEVICES": "0,1"}
    assert [flag.text() for flag in launch.flags] == ["--max_steps $STEPS"]
    assert launch.not_understood == ["srun -N 2: put it in front of the commands if they need it"]


@pytest.mark.parametrize(
    ("launch", "samples"),
    [
        ("torchrun --nproc_per_node=8 --nnodes 2", "128"),
        ("torchrun --nproc-per-node 8", "64"),
        ("torchrun", "8"),
        ("torchrun --nproc_per_node gpu", "$((8*$(nvidia-smi --list-gpus | wc -l)))"),
        ("torchrun --nproc_per_node=$N --nnodes=$(hosts)", "$((8*$(hosts)*$N))"),
        ("torchrun --nnodes 1:4 --nproc_per_node 8", None),
        ("python", "8"),
        ("python -m torch.distributed.run --nproc_per_node 4", "32"),
        ("accelerate launch --num_processes 4", "32"),
        ("accelerate launch --num_processes 8 --num_machines 2", "64"),
        ("deepspeed --num_gpus 4 --num_nodes 2", "64"),
        ("deepspeed", "$((8*$(nvidia-smi --list-gpus | wc -l)))"),
        ("CUDA_VISIBLE_DEVICES=0,3,5 deepspeed", "24"),
        ("CUDA_VISIBLE_DEVICES=$ids deepspeed", "$((8*$(nvidia-smi --list-gpus | wc -l)))"),
        ("deepspeed --hostfile hosts", None),
        ("deepspeed --include localhost:0,1", None),
    ],
)
def test_the_samples_of_a_step_are_those_of_all_ranks(folder: Path, launch: str, samples: str | None) -> None:
    flags = "--dataset_use mp_doc --tune_mm_llm True --per_device_train_batch_size 4 --gradient_accumulation_steps 2"
    (folder / "run.sh").write_text(f"{launch} qwenvl/train/train_qwen.py {flags}\n")
    result = migrate("run.sh")
    assert result.exit_code == (samples is None), result.output
    words = shlex.split(section(result.output, "2. Train").replace("\\\n", ""))
    if samples is not None:
        assert words[words.index("--samples_per_step") + 1] == samples
    else:
        assert "--samples_per_step" not in words
        rest = "give --samples_per_step, which is 4 x 2 x the number of ranks"
        assert section(result.output, "Not understood").strip() == f"#   the samples of a step: {rest}"


@pytest.mark.parametrize(
    ("datasets", "out"),
    [
        ("mp_doc", "mp_doc"),
        ("mp_doc%50", "mp_doc-50"),
        ("mp_doc%100", "mp_doc-100"),
        ("mp_doc%12.5,clevr_mc", "mp_doc-12.5+clevr_mc"),
        ("a,b%10,c,d,e", "a+b-10+c+2"),
        ("data/my.set.jsonl%50", "my-50"),
    ],
)
def test_the_folder_of_the_shards_names_the_datasets_and_their_shares(folder: Path, datasets: str, out: str) -> None:
    flags = f"--dataset_use {datasets} --tune_mm_llm True --samples_per_step 8"
    result = migrate("--", "torchrun", "train_qwen.py", *flags.split())
    assert str(build_options(result.output)["out"]) == train_command(result.output)[1].shards == f"shards/{out}"


@pytest.mark.parametrize("flag", ["--per_device_train_batch_size auto", "--gradient_accumulation_steps auto"])
def test_a_batch_size_that_is_not_a_number_is_listed(folder: Path, flag: str) -> None:
    result = migrate(
        "--", "torchrun", "train_qwen.py", "--dataset_use", "mp_doc", "--tune_mm_llm", "True", *flag.split()
    )
    assert result.exit_code == 1
    assert f"{flag}: give a number" in section(result.output, "Not understood")
    assert train_command(result.output)[1].samples_per_step is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a=1; run $a ${a} '$a' \"$a\"", ["run", "1", "1", r"\$a", "1"]),
        ("run ${x:-d} ${x-$y} $x ${#x}", ["run", "d", "$y", "$x", "${#x}"]),
        ("a='b  c'; run $a \"$a\" x$a", ["run", "b", "c", "b  c", "xb", "c"]),
        ("a=(1 '2 3'); a+=(4); run \"${a[@]}\"", ["run", "1", "2 3", "4"]),
        ("run a\\\nb \\\n c # comment\n", ["run", "ab", "c"]),
        ("run $(x y) `x y` $((1+2)) >log 2>&1", ["run", "$(x y)", "`x y`", "3"]),
        ("export A=1; run $A#b", ["run", "1#b"]),
        (
            "n=2; run $(expr 16 / $n) `expr 16 / ${n}` $((16/n - $n)) $(x $m)",
            ["run", "$(expr 16 / 2)", "`expr 16 / 2`", "6", "$(x $m)"],
        ),
        ("b=4; g=$((b*2)); run $((g*${N:-8}/3)) $((-7/2)) $((-7%2))", ["run", "21", "-3", "-1"]),
        (
            "b=4; run $((b*$N)) $((b<<2)) $((b**2)) $((010*b)) $((b/0)) $(((b+1)*2))",
            [
                "run",
                "$((4*$N))",
                "$((4<<2))",
                "$((4**2))",
                "$((010*4))",
                "$((4/0))",
                "10",
            ],
        ),
        ("n=$(x y); a=b; run $((16/n)) $(a $(n))", ["run", "$((16/$(x y)))", "$(a $(n))"]),
        (
            "d=~/d; run ~/x $d ~ '~/x' \"~/x\" ~root x~/ --o=~/x",
            ["run", "$HOME/x", "$HOME/d", "$HOME", "~/x", "~/x", "~root", "x~/", "--o=~/x"],
        ),
        ("# old \\\n#  --a \\\nrun \\\n  # --b \\\n --c\n", ["run", "--c"]),
        ("run <<'END' a\nit's \"text\nEND\n", ["run", "a"]),
    ],
)
def test_a_shell_command_is_read_as_a_shell_would(text: str, words: list[str]) -> None:
    (command,) = read_commands(text)
    assert list(command.words) == words


def test_a_loop_and_a_script_that_is_read_into_another_are_listed(folder: Path) -> None:
    launch = "deepspeed train_qwen.py --model_name_or_path Qwen/$size --dataset_use a"
    (folder / "sft.sh").write_text(f"source common.sh\n. ./more.sh\nfor size in 3B 7B; do\n  {launch}\ndone\n")
    result = migrate("sft.sh")
    assert result.exit_code == 1
    assert "--model Qwen/$size" in result.output
    left = section(result.output, "Not understood")
    assert "#   source common.sh: it may set variables, and is not read" in left
    assert "#   . ./more.sh: it may set variables, and is not read" in left
    assert "#   for size in 3B 7B: the commands stand here once, and its variable is left to the shell" in left


def test_a_word_that_needs_more_of_a_variable_than_its_value_is_listed(folder: Path) -> None:
    (folder / "run.sh").write_text(
        "sets=(mp_doc clevr_mc)\n"
        'torchrun train.py --dataset_use ${sets[0]} --tune_mm_llm True --output_dir $OUT --run_name r "$@"\n'
    )
    result = migrate("run.sh", "--registry", "qwenvl/data/__init__.py")
    assert result.exit_code == 1
    left = section(result.output, "Not understood")
    assert "the word ${sets[0]}: it needs a variable of the script in a way that only a shell works out" in left
    assert "the word $@ after --run_name" in left
    assert "$OUT" not in left


@pytest.mark.parametrize("text", ["run 'a", 'run "a', "run $(a", "a=(b", "run ${a"])
def test_an_open_quote_or_bracket_is_an_error(text: str) -> None:
    with pytest.raises(ShellError, match="is not closed"):
        read_commands(text)


def test_values_that_grow_without_bound_are_refused() -> None:
    with pytest.raises(ShellError, match="a is longer than 65,536 characters"):
        read_commands("a=xxxx\n" + "a=$a$a\n" * 100)
    with pytest.raises(ShellError, match="a is longer than 65,536 characters"):
        read_commands("a=(xxxx)\n" + 'a+=("${a[@]}")\n' * 100)
    with pytest.raises(ShellError, match="nested too deeply"):
        read_commands("run " + "${x:-" * 5000 + "}" * 5000)


@pytest.mark.parametrize("word", ["a b", "it's", "$HOME/x", "$(a b)", r"\$5", 'a"b $c', "mp%50", "--p=$(a b)"])
def test_a_quoted_word_is_read_back_as_it_was(word: str) -> None:
    (command,) = read_commands(f"run {quote(word)}")
    assert list(command.words) == ["run", word]


def test_the_trainer_has_the_flags_that_migrate_knows() -> None:
    assert sorted((*TRAINER_SWITCHES, *TRAINER_VALUES)) == sorted(FIELDS)
    assert {name for name, field in FIELDS.items() if field.kind is bool} == set(TRAINER_SWITCHES)


def test_every_flag_of_transformers_is_known() -> None:
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    module = ast.parse(Path(spec.origin).with_name("training_args.py").read_text())
    (arguments,) = (node for node in module.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments")
    fields = [node.target.id for node in arguments.body if isinstance(node, ast.AnnAssign)]
    assert len(fields) > 100
    assert [name for name in fields if name not in COMMON and not name.startswith("ddp_")] == []


def test_every_rule_names_an_option_that_exists() -> None:
    options = {option.name for option in build_command.params}
    for tool in (UPSTREAM, SWIFT, LLAMA_FACTORY):
        for name, rule in tool.rules.items():
            assert rule.name in {"train": set(FIELDS), "build": options, "": {""}}[rule.program], (tool.name, name)
        assert tool.defaults.keys() <= tool.rules.keys()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--warmup_steps 0.05", (0.05, None)),
        ("--warmup_steps 50 --warmup_ratio 0.1", (None, 50)),
        ("--warmup_steps 0 --warmup_ratio 0.1", (0.1, None)),
        ("--warmup_steps 0.05 --warmup_ratio 0.1", (0.05, None)),
        ("--lr_scheduler_type constant --warmup_steps 5", (None, None)),
    ],
)
def test_the_warm_up_is_a_share_or_a_number_of_steps(words: str, expected: tuple[float | None, int | None]) -> None:
    migration = rewrite(read_words(["--dataset_use", "a", "--tune_mm_llm", "True", *words.split()]))
    args = parse_arguments([as_shell(word) for word in migration.train_words()[2:]])
    assert (args.warmup_ratio, args.warmup_steps) == expected


def test_older_and_newer_names_of_transformers_are_known() -> None:
    migration = rewrite(read_words(["--evaluation_strategy", "no", "--dtype", "bfloat16", "--tune_mm_llm", "True"]))
    assert migration.value("train", "bf16") == "True"
    lines = [entry.line() for entry in migration.entries]
    assert "--evaluation_strategy no  has no effect here: no evaluation is the default" in lines
    assert not [entry for entry in migration.entries if entry.is_left]


def test_the_last_value_of_a_repeated_flag_counts() -> None:
    migration = rewrite(read_words(["--learning_rate", "1e-5", "--learning_rate", "2e-5", "--tune_mm_llm", "True"]))
    assert migration.train_words().count("--learning_rate") == 1
    assert migration.value("train", "learning_rate") == "2e-5"


@pytest.mark.parametrize(
    ("line", "listed"),
    [
        ("video_fps: 0", "video_fps: 0: allowed here: more than 0"),
        ("cutoff_len: many", "cutoff_len: many: 'many' is not a number"),
        ("cutoff_len: .inf", "cutoff_len: inf: give a number"),
        ("learning_rate: yes", "learning_rate: True: 'True' is not a number"),
        ("weight_decay: heavy", "weight_decay: heavy: 'heavy' is not a number"),
        ("bf16: perhaps", "bf16: perhaps: allowed here: True or False"),
        ("finetuning_type: freeze", "finetuning_type: freeze: allowed here: lora (--lora_enable), full"),
        ("quantization_bit: 4", "quantization_bit: 4: not a known flag of LLaMA-Factory"),
        ("eval_steps: [[1]]", "eval_steps in odd.yaml, a table or a nested list"),
        ("eval_steps: 5\neval_steps: 7", "eval_steps in odd.yaml, which is there 2 times: the last one was read"),
        (
            "report_to: [tensorboard, wandb]",
            "report_to: tensorboard,wandb: a run here reports to one of tensorboard and wandb: choose with --report_to",
        ),
        ("galore_rank:", "galore_rank: null: not a known flag of LLaMA-Factory"),
        ("dataset:", "no dataset is named: give DATASETS to vlprep build"),
    ],
)
def test_a_value_that_means_nothing_here_is_listed(folder: Path, line: str, listed: str) -> None:
    name = line.partition(":")[0]
    text = "\n".join(old for old in LLAMA_FACTORY_FILES["vision.yaml"].splitlines() if not old.startswith(f"{name}:"))
    (folder / "odd.yaml").write_text(f"{text}\n{line}\n")
    result = migrate("odd.yaml")
    assert result.exit_code == 1
    assert section(result.output, "Not understood").strip() == f"#   {listed}"


def test_the_table_of_the_guide_lists_flags_that_migrate_knows() -> None:
    rules = {**UPSTREAM.rules, **SWIFT.rules, **LLAMA_FACTORY.rules}
    for there, here in table_rows("moving_over.md", "Flags"):
        names = re.findall(r"`(?:--(\w+)|([a-z_]+):)", there)
        assert {flag or key for flag, key in names if not (flag or key).endswith("_")} <= rules.keys(), there
        options = {word[2:].replace("-", "_") for word in re.findall(r"--[\w-]+", here)}
        assert options <= {*FIELDS, *(option.name for option in build_command.params)}, here


def test_a_script_with_typing_mistakes_never_ends_in_a_traceback(folder: Path) -> None:
    dice = random.Random(0)
    scripts = {**UPSTREAM_SCRIPTS, **SWIFT_SCRIPTS, **LLAMA_FACTORY_FILES, "registry.py": REGISTRY}
    for name, text in [dice.choice(sorted(scripts.items())) for _ in range(60)]:
        mistyped = list(text)
        for _ in range(dice.choice([1, 3, 10])):
            mistyped[dice.randrange(len(mistyped))] = dice.choice("'\"$`(){}<>|&;#\\\n =-%[]*")
        (folder / name).write_text("".join(mistyped))
        result = migrate(name)
        assert result.exit_code in (0, 1), (name, "".join(mistyped))
        assert result.exception is None or isinstance(result.exception, SystemExit)
