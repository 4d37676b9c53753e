"""Whatever is wrong is said in one sentence with the documented exit code, before anything expensive starts."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest
import torch

from schemas.errors import ConfigError, ShardError
from schemas.qwen import tokenizer_fingerprint
from tests.train.synthetic import make_bins, write_shards
from train import loop
from train.arguments import parse_arguments
from train.checkpoint import RunState
from train.main import main


@pytest.fixture(autouse=True)
def one_process_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop.engine, "choose_device", lambda ranks: torch.device("cpu"))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def shards(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tiny_checkpoint / "tokenizer.json"
    fingerprint = tokenizer_fingerprint(path.read_bytes(), where=str(path))
    return write_shards(tmp_path_factory.mktemp("loop") / "shards", make_bins(num_bins=8), tokenizer=fingerprint)


@pytest.fixture
def flags(shards: Path, tiny_checkpoint: Path, tmp_path: Path) -> list[str]:
    run = str(tmp_path / "run")
    return ["--shards", str(shards), "--model_name_or_path", str(tiny_checkpoint), "--output_dir", run]


def only_error(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and the last line of the error output, which must be the only one of ours."""
    code = main(argv)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error", "Traceback"))]
    assert len(lines) == 1
    return code, lines[0]


def test_shards_without_a_manifest_are_an_error_in_the_data(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, line = only_error([*flags, "--shards", str(tmp_path)], capsys)
    assert code == 1
    assert f"{tmp_path} holds no manifest.json" in line


def test_shards_of_another_tokenizer_are_wrong_use(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_shards(tmp_path / "other", make_bins(num_bins=2), tokenizer="f" * 32)
    code, line = only_error([*flags, "--shards", str(other)], capsys)
    assert code == 2
    assert "the tokenizer of" in line
    assert "f" * 32 in line


def test_a_checkpoint_without_a_tokenizer_is_wrong_use(
    flags: list[str], tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = Path(shutil.copytree(tiny_checkpoint, tmp_path / "bare"))
    (bare / "tokenizer.json").unlink()
    code, line = only_error([*flags, "--model_name_or_path", str(bare)], capsys)
    assert code == 2
    assert "tokenizer.json cannot be read" in line


def test_an_unknown_flag_is_wrong_use(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert only_error([*flags, "--frobnicate"], capsys) == (
        2,
        "error: unknown flag --frobnicate; --help lists the flags.",
    )


def test_debug_shows_the_traceback(flags: list[str], tmp_path: Path) -> None:
    with pytest.raises(ShardError):
        main([*flags, "--shards", str(tmp_path), "--debug"])


def test_one_rank_says_for_all_that_the_command_line_is_wrong(
    flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert main([*flags, "--frobnicate"]) == 2
    assert capsys.readouterr().err == "error (rank 0): unknown flag --frobnicate; --help lists the flags.\n"


def test_nothing_is_written_before_a_run_starts(flags: list[str], tmp_path: Path) -> None:
    assert main([*flags, "--frobnicate"]) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def tokenizers_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what is tested above: it takes most of the time of a plan."""
    monkeypatch.setattr(loop.pretrained, "check_fingerprints", lambda *_, **__: None)


@pytest.mark.parametrize(
    ("length", "num_steps"),
    [
        (["--max_steps", "5"], 5),
        (["--num_train_epochs", "1"], 2),
        (["--num_train_epochs", "1.25"], 3),
        (["--num_train_epochs", "0.5"], 1),
        ([], 6),
    ],
)
def test_the_number_of_steps_follows_from_steps_or_epochs(
    flags: list[str], tokenizers_agree: None, length: list[str], num_steps: int
) -> None:
    """Eight bins, four in a step."""
    plan = loop.make_plan(parse_arguments([*flags, *length]))
    assert plan.num_steps == num_steps
    assert plan.order.global_batch == plan.deepspeed["train_batch_size"] == 4
    assert (plan.resume_from, plan.start_step) == (None, 0)
    steps = sum(1 for _ in loop.open_stream(plan))
    assert steps == num_steps


def test_a_run_on_a_cpu_computes_in_float32_with_sdpa(flags: list[str], tokenizers_agree: None) -> None:
    plan = loop.make_plan(parse_arguments(flags))
    assert (plan.device, plan.bf16, plan.attention) == (torch.device("cpu"), False, "sdpa")


@pytest.fixture
def saved(flags: list[str], tokenizers_agree: None) -> Path:
    """A checkpoint that the run of ``flags`` left after four of its six steps."""
    args = parse_arguments(flags)
    settings = loop.make_plan(args).settings
    folder = args.run_dir / "checkpoint-4"
    folder.mkdir(parents=True)
    (folder / "state.json").write_bytes(msgspec.json.encode(RunState(step=4, settings=settings)))
    return folder


def test_the_same_command_goes_on_from_its_checkpoint(flags: list[str], saved: Path) -> None:
    plan = loop.make_plan(parse_arguments(flags))
    assert (plan.resume_from, plan.start_step) == (saved, 4)
    assert [batch.step for batch in loop.open_stream(plan)] == [4, 5]


def test_a_run_may_end_where_its_checkpoint_is_or_later_but_not_before(flags: list[str], saved: Path) -> None:
    for num_steps, steps_left in ((9, [4, 5, 6, 7, 8]), (4, [])):
        plan = loop.make_plan(parse_arguments([*flags, "--max_steps", str(num_steps)]))
        assert [batch.step for batch in loop.open_stream(plan)] == steps_left
    with pytest.raises(ConfigError, match="has 4 steps done, but this run ends after 3"):
        loop.make_plan(parse_arguments([*flags, "--max_steps", "3"]))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (["--seed", "1"], "seed"),
        (["--gradient_accumulation_steps", "2"], "gradient_accumulation_steps"),
        (["--learning_rate", "1e-5"], "learning rate of language_model"),
        (["--tune_mm_vision"], "learning rate of vision_tower"),
        (["--bf16"], "bf16"),
        (["--deepspeed", "zero3.json"], "ZeRO stage"),
        (["--weight_decay", "0.1"], "weight_decay"),
        (["--lr_scheduler_type", "linear"], "lr_scheduler_type"),
    ],
)
def test_other_settings_do_not_go_on_from_a_checkpoint(
    flags: list[str], saved: Path, change: list[str], name: str
) -> None:
    with pytest.raises(ConfigError, match=f"{saved} was saved with {name} = "):
        loop.make_plan(parse_arguments([*flags, *change]))


def test_other_shards_do_not_go_on_from_a_checkpoint(flags: list[str], saved: Path, tmp_path: Path) -> None:
    other = write_shards(tmp_path / "other", make_bins(seed=1, num_bins=8))
    with pytest.raises(ConfigError, match="was saved with shards = "):
        loop.make_plan(parse_arguments([*flags, "--shards", str(other)]))


def test_weighted_sets_of_shards_reach_the_order_of_the_run(tmp_path: Path, tiny_checkpoint: Path) -> None:
    path = tiny_checkpoint / "tokenizer.json"
    fingerprint = tokenizer_fingerprint(path.read_bytes(), where=str(path))
    for name in ("a", "b"):
        write_shards(tmp_path / name, make_bins(num_bins=4), tokenizer=fingerprint, dataset=name)
    args = parse_arguments(
        [
            *("--shards", f"{tmp_path / 'a'}:0.75,{tmp_path / 'b'}:0.25"),
            *("--model_name_or_path", str(tiny_checkpoint), "--output_dir", str(tmp_path / "run")),
            *("--max_steps", "2", "--gradient_accumulation_steps", "4"),
        ]
    )
    plan = loop.make_plan(args)
    assert plan.order.mixture == plan.index.mixture is not None
    with loop.open_stream(plan) as stream:
        drawn = [number for batch in stream for number in batch.bins]
    assert sum(number < 4 for number in drawn) == 6
