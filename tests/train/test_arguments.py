"""Flags: upstream names, one sentence for each mistake, and no flag without a reader."""

from __future__ import annotations

import importlib.metadata
import re
from dataclasses import fields
from pathlib import Path

import pytest

import train
from schemas.errors import ConfigError
from train.main import REPORT_TIMEOUT_S, main
from train.settings.arguments import TrainArguments
from train.settings.flags import FIELDS, parse_arguments

SHARDS = ["--shards", "shards/"]


def test_only_shards_are_required() -> None:
    args = parse_arguments(SHARDS)
    assert args.model_name_or_path == "Qwen/Qwen2.5-VL-3B-Instruct"
    assert args.run_dir == Path("runs/Qwen2.5-VL-3B-Instruct")
    assert (args.deepspeed, args.deepspeed_file) == (None, "zero2.json")
    assert (args.tune_mm_llm, args.tune_mm_mlp, args.tune_mm_vision) == (True, True, False)
    assert (args.learning_rate, args.num_train_epochs, args.gradient_accumulation_steps) == (None, None, None)


def test_flags_of_an_upstream_launch_script_are_understood() -> None:
    line = """--shards shards/ --model_name_or_path Qwen/Qwen2.5-VL-7B-Instruct --tune_mm_vision False
        --tune_mm_mlp True --tune_mm_llm True --bf16 --output_dir ./output --num_train_epochs 0.5
        --per_device_train_batch_size 4 --gradient_accumulation_steps 4 --save_steps 1000 --save_total_limit 1
        --learning_rate 2e-7 --mm_projector_lr 1e-5 --weight_decay 0 --warmup_ratio 0.03
        --max_grad_norm 1 --lr_scheduler_type cosine --logging_steps 1
        --gradient_checkpointing True --dataloader_num_workers 4 --run_name qwen2vl-baseline --report_to wandb
        --deepspeed ./scripts/zero3.json --attn_implementation flash_attention_2 --seed 3 --local_rank=0"""
    args = parse_arguments(line.split())
    assert (args.bf16, args.tune_mm_vision, args.gradient_checkpointing) == (True, False, True)
    assert (args.num_train_epochs, args.learning_rate, args.mm_projector_lr) == (0.5, 2e-7, 1e-5)
    assert (args.run_dir, args.name, args.local_rank) == (Path("output"), "qwen2vl-baseline", 0)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        (["--bf16"], True),
        (["--bf16", "True"], True),
        (["--bf16", "false"], False),
        (["--bf16=False"], False),
        ([], None),
    ],
)
def test_a_switch_can_be_written_in_several_ways(written: list[str], expected: bool | None) -> None:
    assert parse_arguments([*SHARDS, *written]).bf16 is expected


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("--learnin_rate 1e-5", "unknown flag --learnin_rate; did you mean --learning_rate?"),
        ("--frobnicate", "unknown flag --frobnicate; --help lists the flags."),
        ("--learning 1e-5", "unknown flag --learning; did you mean --learning_rate?"),
        ("--max_pixels=1000", "--max_pixels is not a flag of the trainer: it was decided when the shards were built"),
        ("--dataset_use mp_doc%50", "make shards DATASET="),
        ("--save_strategy epoch", "--save_strategy epoch cannot be done here: --save_steps says how often to save"),
        ("--push_to_hub", "--push_to_hub  cannot be done here: nothing is uploaded."),
        ("--video_fps 2", "(vlprep build --video-sampling fps --fps). Leave it out."),
        ("--torch_dtype int8", "--torch_dtype is int8; allowed: bfloat16, float16, float32, auto."),
        ("--torch_dtype float16 --fp16 False", "--torch_dtype and --fp16 False contradict each other"),
        ("--lora_enable --lora_rank 8 --lora_r 16", "--lora_rank and --lora_r 16 contradict each other"),
        ("--lora_enable --lora_rank eight", "argument --lora_r: invalid int value: 'eight'"),
        ("--warmup_steps 10 --warmup_ratio 0.1", "--warmup_steps and --warmup_ratio both say how long the rates rise"),
        ("--lr_scheduler_type constant --warmup_steps 1", "--warmup_steps 1 has no effect with --lr_scheduler_type"),
        ("--optim adafactor", "--optim is adafactor; allowed: adamw_torch_fused, adamw_torch."),
        ("--adam_beta1 1", "--adam_beta1 is 1.0; allowed: 0 to below 1."),
        ("--adam_epsilon 0", "--adam_epsilon is 0.0; allowed: more than 0."),
        ("stray", "unknown flag stray"),
        ("--max_steps ten", "argument --max_steps: invalid int value: 'ten'"),
        ("--bf16 maybe", "argument --bf16: found 'maybe', allowed: True or False"),
        (
            "--lr_scheduler_type wavy",
            "--lr_scheduler_type is wavy; allowed: cosine, linear, constant, constant_with_warmup.",
        ),
        ("--max_steps 0", "--max_steps is 0; allowed: 1 or more."),
        (
            "--seed 99999999999999999999999999",
            "--seed is 99999999999999999999999999; allowed: up to 9223372036854775807.",
        ),
        (
            "--max_skipped_steps 9223372036854775808",
            "--max_skipped_steps is 9223372036854775808; allowed: up to 9223372036854775807.",
        ),
        ("--num_train_epochs 1e300", "--num_train_epochs is 1e+300; allowed: more than 0, up to 1000000."),
        ("--dataloader_num_workers 5000", "--dataloader_num_workers is 5000; allowed: 1 to 1024 threads."),
        ("--lora_enable --lora_r 100000", "--lora_r is 100000; allowed: 1 to 8192."),
        ("--output_dir=", "argument --output_dir: is empty: give a value, or leave the flag out"),
        ("--model_name_or_path=", "argument --model_name_or_path: is empty"),
        ("--resume=", "argument --resume: is empty"),
        ("--num_train_epochs 0", "--num_train_epochs is 0.0; allowed: more than 0, up to 1000000."),
        ("--num_train_epochs nan", "--num_train_epochs is nan"),
        ("--per_device_train_batch_size 0", "--per_device_train_batch_size is 0"),
        ("--gradient_accumulation_steps 0", "--gradient_accumulation_steps is 0"),
        ("--dataloader_num_workers 0", "--dataloader_num_workers is 0"),
        ("--logging_steps 0", "--logging_steps is 0"),
        ("--learning_rate 0", "--learning_rate is 0.0; allowed: more than 0."),
        ("--learning_rate inf", "--learning_rate is inf"),
        ("--mm_projector_lr -1", "--mm_projector_lr is -1.0"),
        ("--tune_mm_vision --vision_tower_lr 0", "--vision_tower_lr is 0.0"),
        ("--warmup_ratio 1.5", "--warmup_ratio is 1.5; allowed: 0 to 1."),
        ("--weight_decay -0.1", "--weight_decay is -0.1; allowed: 0 or more."),
        ("--max_grad_norm -1", "--max_grad_norm is -1.0"),
        ("--save_steps -1", "--save_steps is -1"),
        ("--save_total_limit 0", "--save_total_limit is 0"),
        ("--seed -1", "--seed is -1"),
        ("--group_steps 0", "--group_steps is 0; allowed: 1 or more steps."),
        ("--read_connections 0", "--read_connections is 0; allowed: 1 or more requests."),
        ("--cache_dir c --cache_bytes 0", "--cache_bytes is 0; allowed: 1 or more bytes."),
        ("--cache_bytes 10", "--cache_bytes has no effect without --cache_dir"),
        ("--read_timeout_s 0", "--read_timeout_s is 0.0; allowed: more than 0 seconds."),
        ("--dataloader_prefetch_factor 0", "--dataloader_prefetch_factor is 0"),
        ("--peak_tflops 0", "--peak_tflops is 0.0; allowed: more than 0 TFLOPS."),
        ("--max_skipped_steps -1", "--max_skipped_steps is -1; allowed: 0 or more steps."),
        ("--eval_strategy steps", "--eval_strategy steps has nothing to evaluate on: give --eval_shards."),
        ("--eval_shards e --eval_strategy never", "--eval_strategy is never; allowed: no, steps, epoch."),
        ("--eval_shards e --eval_steps 5", "--eval_steps 5 has no effect without --eval_strategy steps."),
        ("--eval_shards e --eval_strategy steps --eval_steps 0", "--eval_steps is 0; allowed: 1 or more steps."),
        ("--bf16 --fp16", "--bf16 and --fp16 both say how to compute"),
        ("--max_steps 10 --num_train_epochs 1", "both say how long to train"),
        ("--tune_mm_llm False --tune_mm_mlp False", "nothing is trained"),
        ("--vision_tower_lr 1e-6", "--vision_tower_lr 1e-06 has no effect with --tune_mm_vision False"),
        (
            "--tune_mm_mlp False --mm_projector_lr 1e-5",
            "--mm_projector_lr 1e-05 has no effect with --tune_mm_mlp False",
        ),
        ("--tune_mm_llm False --mm_projector_lr 1e-5 --learning_rate 1e-5", "--learning_rate 1e-05 has no effect"),
        ("--save_in_background --save_steps 0", "--save_in_background has no effect with --save_steps 0: the only"),
        ("--save_steps 2.5", "--save_steps 2.5 is neither a number of steps nor a share of the run below 1."),
        (
            "--lr_scheduler_type constant --warmup_ratio 0.1",
            "--warmup_ratio 0.1 has no effect with --lr_scheduler_type constant, which has no warm-up: leave it out, "
            "or give constant_with_warmup.",
        ),
        ("--warmup_ratio nan", "--warmup_ratio is nan; allowed: 0 to 1."),
        ("--bf16 False --attn_implementation flash_attention_2", "computes in bfloat16 or float16"),
    ],
)
def test_a_mistake_is_explained_in_one_sentence(written: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_arguments([*SHARDS, *written.split()])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_all_mistakes_of_a_command_are_listed_at_once(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("max_steps = 1.5\nfrobnicate = 1\n")
    line = """stray --dataset_use a,b --data_flatten True --max_pixels 1000 --learnin_rate 1 --max_steps ten
        --bf16 maybe --lora_r 8 --save_steps -1"""
    with pytest.raises(ConfigError) as caught:
        parse_arguments(line.split())
    heading, *problems = str(caught.value).split("\n  - ")
    assert heading == "9 problems:"
    for expected in (
        "argument --max_steps: invalid int value: 'ten'",
        "argument --bf16: found 'maybe'",
        "unknown flag stray",
        "--dataset_use is not a flag of the trainer: it was decided when the shards were built (vlprep build DATASETS",
        "--max_pixels is not a flag of the trainer: it was decided when the shards were built (vlprep build --max-pix",
        "unknown flag --learnin_rate; did you mean --learning_rate?",
        "--shards is missing",
        "--save_steps is -1.0; allowed: 0 or more steps.",
        "--lora_r 8 has no effect without --lora_enable.",
    ):
        assert [problem for problem in problems if problem.startswith(expected)], expected
    with pytest.raises(ConfigError) as caught:
        parse_arguments([*SHARDS, "--learning_rate", "--save_steps", "-1", "--optim"])
    assert str(caught.value).split("\n  - ") == [
        "3 problems:",
        "argument --learning_rate: expected one argument; --help lists the flags.",
        "argument --optim: expected one argument; --help lists the flags.",
        "--save_steps is -1.0; allowed: 0 or more steps.",
    ]
    with pytest.raises(ConfigError, match=r"(?s)2 problems:.*max_steps is 1\.5.*unknown flag frobnicate"):
        parse_arguments([*SHARDS, "--config", str(path)])


@pytest.mark.parametrize(
    ("written", "expected", "note"),
    [
        ("--data_flatten True", {}, "--data_flatten has no effect here: bins are always packed"),
        ("--evaluation_strategy no", {"eval_strategy": "no"}, "--evaluation_strategy is --eval_strategy no here."),
        ("--data_packing False", {}, "--data_packing has no effect here: bins are always packed"),
        ("--save_strategy steps", {}, "--save_strategy has no effect here: --save_steps says how often to save"),
        ("--save-strategy=steps", {}, "--save-strategy has no effect here: --save_steps says how often to save"),
        ("--per_device_eval_batch_size 8", {}, "evaluation takes one bin at a time"),
        ("--remove_unused_columns False", {}, "--remove_unused_columns has no effect here"),
        ("--ddp_find_unused_parameters False", {}, "--ddp_find_unused_parameters has no effect here: DeepSpeed"),
        ("--lazy_preprocess True", {}, "--lazy_preprocess has no effect here: shards are preprocessed."),
        ("--dataloader_pin_memory", {}, "--dataloader_pin_memory has no effect here"),
        ("--run_name a --output_dir x", {"run_name": None}, "--run_name a has no effect here"),
        ("--run_name a --output_dir x --report_to tensorboard", {"run_name": None}, "--run_name a has no effect here"),
        ("--logging_dir logs", {"logging_dir": None}, "--logging_dir logs has no effect here"),
        (
            "--activation_checkpointing False",
            {"gradient_checkpointing": False},
            "is --gradient_checkpointing False here",
        ),
        ("--activation_checkpointing", {"gradient_checkpointing": True}, "--activation_checkpointing is"),
        ("--lora_enable --lora_rank 8", {"lora_r": 8}, "--lora_rank is --lora_r 8 here."),
        ("--torch_dtype bfloat16", {"bf16": True, "fp16": None}, "--torch_dtype bfloat16 is --bf16 True here."),
        ("--torch_dtype float32", {"bf16": False}, "--torch_dtype float32 is --bf16 False here."),
        ("--torch_dtype float16", {"fp16": True, "bf16": None}, "--torch_dtype float16 is --fp16 True here."),
        ("--torch_dtype auto", {"bf16": None}, "--torch_dtype auto has no effect here"),
        ("--torch_dtype bfloat16 --bf16", {"bf16": True}, "--torch_dtype bfloat16 is --bf16 True here."),
        ("--resume_from_checkpoint True", {"resume": "auto"}, "--resume_from_checkpoint is --resume auto here."),
        ("--resume_from_checkpoint False", {"resume": "none"}, "--resume_from_checkpoint is --resume none here."),
        ("--resume_from_checkpoint checkpoint-5", {"resume": "checkpoint-5"}, "is --resume checkpoint-5 here."),
    ],
)
def test_flags_of_other_trainers_are_taken_with_a_note(written: str, expected: dict[str, object], note: str) -> None:
    notes: list[str] = []
    args = parse_arguments([*SHARDS, *written.split()], note=notes.append)
    assert {name: getattr(args, name) for name in expected} == expected
    assert len(notes) == 1
    assert note in notes[0]


@pytest.mark.parametrize(("rank", "local_rank"), [("0", "0"), ("1", "1"), ("8", "0")])
def test_the_first_rank_of_a_machine_prints_all_errors_and_the_others_wait_for_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rank: str, local_rank: str
) -> None:
    """Launchers end all ranks when one ends: it must not be one that says nothing. Notes come from the first rank."""
    waits: list[float] = []
    monkeypatch.setattr("train.main.time.sleep", waits.append)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert main([*SHARDS, "--data_flatten", "True", "--frobnicate", "--max_steps", "0"]) == 2
    note = "note: --data_flatten has no effect here: bins are always packed, and their samples isolated.\n"
    errors = """\
error: 2 problems:
  - unknown flag --frobnicate; --help lists the flags.
  - --max_steps is 0; allowed: 1 or more.
"""
    assert capsys.readouterr().err == note * (rank == "0") + errors * (local_rank == "0")
    assert waits == ([] if local_rank == "0" else [REPORT_TIMEOUT_S])


def test_a_file_of_flags_takes_those_of_other_trainers_too(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("lora_enable = true\nlora_rank = 4\ndata_flatten = true\n")
    notes: list[str] = []
    assert parse_arguments([*SHARDS, "--config", str(path)], note=notes.append).lora_r == 4
    assert [note.split(" has ")[0] for note in notes] == ["lora_rank is lora_r 4 here.", "data_flatten"]


def test_the_optimizer_flags_of_transformers_are_our_own() -> None:
    notes: list[str] = []
    line = "--optim adamw_torch --adam_beta1 0.8 --adam_beta2 0.95 --adam_epsilon 1e-6 --tf32 True"
    line += " --warmup_steps 7 --report_to tensorboard --logging_dir logs"
    args = parse_arguments([*SHARDS, *line.split()], note=notes.append)
    assert (args.optim, args.adam_beta1, args.adam_beta2, args.adam_epsilon) == ("adamw_torch", 0.8, 0.95, 1e-6)
    assert (args.tf32, args.warmup_steps, args.warmup, args.logging_dir) == (True, 7, 0.0, Path("logs"))
    assert notes == []


def test_the_run_name_names_the_folder_or_the_report() -> None:
    assert parse_arguments([*SHARDS, "--run_name", "first"]).run_dir == Path("runs/first")
    named = parse_arguments([*SHARDS, "--run_name", "first", "--output_dir", "x", "--report_to", "wandb"])
    assert (named.run_dir, named.name) == (Path("x"), "first")


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("", 0.03),
        ("--lr_scheduler_type linear", 0.03),
        ("--lr_scheduler_type constant_with_warmup", 0.03),
        ("--lr_scheduler_type constant", 0.0),
        ("--lr_scheduler_type constant --warmup_ratio 0", 0.0),
        ("--lr_scheduler_type constant_with_warmup --warmup_ratio 0.2", 0.2),
        ("--warmup_ratio 0", 0.0),
    ],
)
def test_every_schedule_but_the_flat_one_has_a_default_warm_up(written: str, expected: float) -> None:
    assert parse_arguments([*SHARDS, *written.split()]).warmup == expected


def test_missing_shards_are_an_error() -> None:
    with pytest.raises(ConfigError, match="--shards"):
        parse_arguments([])


def test_choices_are_checked_without_the_parser() -> None:
    with pytest.raises(ConfigError, match="--report_to is mlflow; allowed: none, tensorboard, wandb"):
        TrainArguments(shards="shards/", report_to="mlflow")


def test_the_command_line_overrides_the_flags_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(
        """
        shards = "a:0.7,b:0.3"
        output_dir = "runs/x"
        learning_rate = 1      # an integer is fine for a float
        max_steps = 10
        bf16 = true
        tune_mm_vision = true
        """
    )
    args = parse_arguments(["--config", str(path), "--max_steps", "5", "--tune_mm_vision", "False"])
    expected = TrainArguments(
        shards="a:0.7,b:0.3", output_dir=Path("runs/x"), learning_rate=1.0, max_steps=5, bf16=True, tune_mm_vision=False
    )
    assert args == expected
    assert type(args.learning_rate) is float


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learnin_rate = 1e-5", "unknown flag learnin_rate; did you mean learning_rate?"),
        ("max_pixels = 1", "max_pixels is not a flag of the trainer: it was decided when the shards were built"),
        ("max_steps = 1.5", "max_steps is 1.5; a value of type int is expected."),
        ("max_steps = true", "max_steps is True; a value of type int is expected."),
        ("bf16 = 1", "bf16 is 1; a value of type bool is expected."),
        ("learning_rate = '1e-5'", "learning_rate is '1e-5'; a value of type float is expected."),
        ("output_dir = 3", "output_dir is 3; a value of type text is expected."),
        ("local_rank = 0", "local_rank is not allowed in a file: remove it."),
        ("[training]\nmax_steps = 1", "has a table [training]: write flags without tables, one line each."),
        ("max_steps = ", "is not valid TOML"),
        ("output_dir = ''", "output_dir is '': give a value, or remove the line."),
        ('shards = "a\\u0000b"', "shards is 'a\\x00b': give a value, or remove the line."),
        (f"learning_rate = 1{'0' * 400}", "a value of type float is expected."),
        ("config = 'other.toml'", "config is not allowed in a file: remove it."),
        ("max_steps = 0", "--max_steps is 0; allowed: 1 or more."),
        ("save_steps = 2.5", "--save_steps 2.5 is neither a number of steps nor a share of the run below 1."),
    ],
)
def test_a_file_is_checked_like_the_command_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        parse_arguments([*SHARDS, "--config", str(path)])
    assert message in str(caught.value)


def test_a_missing_file_of_flags_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no\.toml cannot be read: No such file"):
        parse_arguments([*SHARDS, "--config", str(tmp_path / "no.toml")])


def test_help_explains_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{item.name}" in text for item in fields(TrainArguments))


DECLARING = ("arguments.py", "contradictions.py", "declarations.py")


def test_every_flag_is_read_outside_the_settings() -> None:
    properties = {"output_dir": "run_dir", "run_name": "name", "warmup_ratio": "warmup", "save_steps": "save_interval"}
    package = Path(train.__file__).parent
    sources = "".join(path.read_text() for path in package.rglob("*.py") if path.name not in DECLARING)
    unread = [name for name in FIELDS if not re.search(rf"\bargs\.{properties.get(name, name)}\b", sources)]
    assert unread == []


def test_every_field_is_a_declared_setting_whose_help_is_a_sentence() -> None:
    assert list(FIELDS) == [item.name for item in fields(TrainArguments)]
    assert all(field.setting.help.endswith(".") for field in FIELDS.values())


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"vlprep, version {importlib.metadata.version('vlprep')}\n"
