"""Every error is one sentence with the documented exit code, before anything expensive starts."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import msgspec
import numpy as np
import pytest
import torch

from schemas.checkpoints import read_config
from schemas.errors import ConfigError, ShardError
from schemas.qwen import tokenizer_fingerprint
from tests.train.synthetic import make_bins, write_shards
from train.arithmetic.cost import CostModel
from train.main import main
from train.model import pretrained
from train.model.attention import FLASH_ATTENTION
from train.model.sizes import sizes_of
from train.order.dealing import Grouping
from train.run.checks import read_settings, trained_folders
from train.run.loop import open_stream
from train.run.plan import Plan, make_plan
from train.run.resume import ResumePoint
from train.run.run_dir import RunState
from train.settings.flags import parse_arguments
from train.shards.index import open_shards
from train.shards.reader import ReadSettings


@pytest.fixture(autouse=True)
def one_process_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train.run.device.choose_device", lambda ranks: torch.device("cpu"))
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
    """A step of a rank has four bins."""
    run = str(tmp_path / "run")
    paths = ["--shards", str(shards), "--model_name_or_path", str(tiny_checkpoint), "--output_dir", run]
    return [*paths, "--gradient_accumulation_steps", "4"]


def only_error(argv: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and the last line of the error output, which must be the only one of ours."""
    code = main(argv)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error", "Traceback"))]
    assert len(lines) == 1
    return code, lines[0]


def test_a_folder_without_shards_is_wrong_use_and_an_unfinished_build_is_not(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    for folder, expected in (
        (empty, f"{empty} is not a folder. Give"),
        (empty, "Build one with `vlprep build annotations.jsonl --out DIR --model MODEL` (a registered"),
    ):
        code, line = only_error([*flags, "--shards", str(folder)], capsys)
        assert code == 2
        assert expected in line
        empty.mkdir(exist_ok=True)
    (empty / "bins-00000.tar").touch()
    code, line = only_error([*flags, "--shards", str(empty)], capsys)
    assert code == 1
    assert f"{empty} holds no manifest.json: a build into it failed" in line


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
    assert "cannot read " in line and "tokenizer.json" in line


def test_an_unknown_flag_is_wrong_use(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert only_error([*flags, "--frobnicate"], capsys) == (
        2,
        "error: unknown flag --frobnicate; --help lists the flags.",
    )


def test_debug_shows_the_traceback(flags: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no manifest\.json"):
        main([*flags, "--shards", str(tmp_path), "--debug"])


def test_only_the_first_rank_reports_a_wrong_command_line(
    flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert main([*flags, "--frobnicate"]) == 2
    assert capsys.readouterr().err == "error (rank 0): unknown flag --frobnicate; --help lists the flags.\n"


def test_ctrl_c_while_modules_are_imported_is_one_line(
    flags: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    events = []

    @contextmanager
    def keys_to_ranks(local_rank: int) -> Iterator[None]:
        events.append(f"keys of local rank {local_rank}")
        yield

    def interrupt(**_: bool) -> None:
        events.append("Ctrl-C")
        raise KeyboardInterrupt

    monkeypatch.setattr("train.main.keys_to_ranks", keys_to_ranks)
    monkeypatch.setattr("train.main._configure_output", interrupt)
    assert main(flags) == 130
    assert events == ["keys of local rank 0", "Ctrl-C"], "which a launcher would end at, if it got the key"
    expected = "stopped before the first step: nothing was trained; rerun the same command to start\n"
    assert capsys.readouterr().err.lstrip("\n") == expected


def test_nothing_is_written_before_a_run_starts(flags: list[str], tmp_path: Path) -> None:
    assert main([*flags, "--frobnicate"]) == 2
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def tokenizers_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skip the comparison that the tests above cover: it takes most of the time of a plan."""
    monkeypatch.setattr(pretrained, "check_fingerprints", lambda *_, **__: None)


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
    plan = make_plan(parse_arguments([*flags, *length]))
    assert plan.num_steps == num_steps
    assert plan.order.global_batch == plan.deepspeed["train_batch_size"] == 4
    assert (plan.resume, plan.start_step) == (None, 0)
    steps = sum(1 for _ in open_stream(plan))
    assert steps == num_steps


def test_a_sliding_window_is_beyond_sdpa(
    flags: list[str],
    tiny_checkpoint: Path,
    tmp_path: Path,
    tokenizers_agree: None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A window counts only if a layer uses it and it is switched on. The memory of such a model is known anyway."""
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "windowed"))
    config = json.loads((copy / "config.json").read_bytes())
    config["text_config"] |= {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 64}
    flags = [*flags, "--model_name_or_path", str(copy)]

    def write(use_sliding_window: bool) -> None:
        config["text_config"]["use_sliding_window"] = use_sliding_window
        (copy / "config.json").write_text(json.dumps(config))

    write(True)
    code, line = only_error(flags, capsys)
    assert code == 2
    assert "a sliding window of 64 tokens, which --attn_implementation sdpa cannot compute: use varlen or flash" in line
    args = parse_arguments(flags)
    assert sizes_of(config, args) == sizes_of(read_config(tiny_checkpoint), args)
    monkeypatch.setattr("train.run.device.choose_attention", lambda *_: FLASH_ATTENTION)
    assert make_plan(args).shape.sliding_window == 64
    write(False)
    assert pretrained.read_shape(copy).sliding_window is None


def test_a_run_on_a_cpu_computes_in_float32_with_sdpa(flags: list[str], tokenizers_agree: None) -> None:
    plan = make_plan(parse_arguments(flags))
    assert (plan.compute.device, plan.compute.dtype, plan.compute.attention) == (
        torch.device("cpu"),
        torch.float32,
        "sdpa",
    )


@pytest.fixture
def saved(flags: list[str], tokenizers_agree: None) -> Path:
    """A checkpoint of the run of ``flags`` after four of its six steps."""
    args = parse_arguments(flags)
    return save_state(make_plan(args), step=4)


def save_state(plan: Plan, *, step: int) -> Path:
    """Write the ``state.json`` that a checkpoint of this plan would have."""
    folder = plan.args.run_dir / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    state = RunState(stream=plan.order.state_dict(step), ranks=plan.ranks.world, settings=plan.settings)
    (folder / "state.json").write_bytes(msgspec.json.encode(state))
    return folder


def test_the_same_command_resumes_from_its_checkpoint(flags: list[str], saved: Path) -> None:
    plan = make_plan(parse_arguments(flags))
    assert plan.resume == ResumePoint(folder=saved, step=4, is_resharded=False)
    assert [batch.step for batch in open_stream(plan)] == [4, 5]


def test_a_run_may_end_at_its_checkpoint_or_later_but_not_before(flags: list[str], saved: Path) -> None:
    for num_steps, steps_left in ((9, [4, 5, 6, 7, 8]), (4, [])):
        plan = make_plan(parse_arguments([*flags, "--max_steps", str(num_steps)]))
        assert [batch.step for batch in open_stream(plan)] == steps_left
    with pytest.raises(ConfigError, match="has 4 steps done, but this run ends after 3"):
        make_plan(parse_arguments([*flags, "--max_steps", "3"]))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (["--seed", "1"], "seed"),
        (["--gradient_accumulation_steps", "2"], "bins of a step"),
        (["--group_steps", "2"], "group_steps"),
        (["--learning_rate", "1e-5"], "learning rate of language_model"),
        (["--tune_mm_vision"], "learning rate of vision_tower"),
        (["--lora_enable", "--learning_rate", "2e-7"], "adapters"),
        (["--bf16"], "precision"),
        (["--deepspeed", "zero3.json"], "ZeRO stage"),
        (["--weight_decay", "0.1"], "weight_decay"),
        (["--lr_scheduler_type", "linear"], "lr_scheduler_type"),
        (["--warmup_steps", "1"], "warmup_steps"),
        (["--lora_enable", "True"], "adapters"),
        (["--adam_beta2", "0.95"], "adam_beta2"),
    ],
)
def test_a_checkpoint_of_other_settings_is_refused(flags: list[str], saved: Path, change: list[str], name: str) -> None:
    with pytest.raises(ConfigError, match=f"{saved} was saved with {name} = "):
        make_plan(parse_arguments([*flags, *change]))


def test_a_checkpoint_of_other_shards_is_refused(flags: list[str], saved: Path, tmp_path: Path) -> None:
    other = write_shards(tmp_path / "other", make_bins(seed=1, num_bins=8))
    with pytest.raises(ConfigError, match="was saved with shards = "):
        make_plan(parse_arguments([*flags, "--shards", str(other)]))


def test_shards_other_than_those_of_the_checkpoint_are_named_with_both_folders(
    flags: list[str], saved: Path, tmp_path: Path
) -> None:
    path, shards = saved / "state.json", flags[flags.index("--shards") + 1]
    path.write_text(json.dumps({**json.loads(path.read_text()), "shards": shards}))
    other = write_shards(tmp_path / "other", make_bins(seed=1, num_bins=8))
    with pytest.raises(ConfigError) as raised:
        make_plan(parse_arguments([*flags, "--shards", str(other)]))
    assert str(raised.value).startswith(
        f"{saved} was saved with --shards {shards}, but this run has --shards {other}: "
    )
    path.write_text(json.dumps({**json.loads(path.read_text()), "shards": str(other)}))
    with pytest.raises(ConfigError, match=f"--shards {other}, but they were built again since then"):
        make_plan(parse_arguments([*flags, "--shards", str(other)]))


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
    plan = make_plan(args)
    assert plan.order.mixture == plan.index.mixture is not None
    with open_stream(plan) as stream:
        drawn = [bin_id for batch in stream for bin_id in batch.bins]
    assert sum(bin_id < 4 for bin_id in drawn) == 6


def test_bins_are_dealt_by_the_costs_of_the_trained_model(flags: list[str], tokenizers_agree: None) -> None:
    trained = {"tune_llm": False, "tune_vision": True, "gradient_checkpointing": False}
    plan = make_plan(
        parse_arguments([*flags, "--tune_mm_llm", "False", "--tune_mm_vision", "--gradient_checkpointing", "False"])
    )
    expected = plan.index.cost(CostModel.of(read_config(plan.source)).in_training(**trained))
    np.testing.assert_array_equal(plan.order.cost, expected)
    assert not np.array_equal(plan.order.cost, make_plan(parse_arguments(flags)).order.cost)


def test_grouped_steps_have_a_run_for_each_micro_step(flags: list[str], tokenizers_agree: None) -> None:
    assert make_plan(parse_arguments(flags)).order.grouping is None
    assert make_plan(parse_arguments([*flags, "--group_steps", "2"])).order.grouping == Grouping(steps=2, runs=4)


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world: int) -> None:
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("grouped", [[], ["--group_steps", "2"]])
def test_another_number_of_ranks_resumes_with_the_same_bins(
    flags: list[str], tokenizers_agree: None, monkeypatch: pytest.MonkeyPatch, grouped: list[str]
) -> None:
    """A rank with four micro-steps saves. Two ranks with two each resume, then four ranks with one each."""
    before = make_plan(parse_arguments([*flags, *grouped]))
    with open_stream(before) as stream:
        unbroken = [sorted(batch.bins) for batch in stream]
    save_state(before, step=2)
    for world in (2, 4):
        seen: dict[int, list[int]] = {}
        for rank in range(world):
            as_rank(monkeypatch, rank, world)
            plan = make_plan(parse_arguments([*flags, *grouped, "--gradient_accumulation_steps", str(4 // world)]))
            assert plan.resume is not None
            assert (plan.start_step, plan.resume.is_resharded) == (2, True)
            with open_stream(plan) as stream:
                for batch in stream:
                    mine = [bin_id for micro in batch.micro_batches for bin_id in micro.bins]
                    seen[batch.step] = sorted(seen.get(batch.step, []) + mine)
        assert seen == {step: unbroken[step] for step in range(2, 6)}


def test_another_number_of_ranks_must_keep_the_size_of_a_step(
    flags: list[str], saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_rank(monkeypatch, 0, 2)
    remedy = "--per_device_train_batch_size and --gradient_accumulation_steps whose product, times the ranks, is 4"
    with pytest.raises(ConfigError, match=f"{saved} was saved with bins of a step = 4, this run has 8.* Give {remedy}"):
        make_plan(parse_arguments(flags))


def test_a_state_of_another_order_is_refused(flags: list[str], saved: Path) -> None:
    state = msgspec.json.decode((saved / "state.json").read_bytes())
    state["stream"]["num_bins"] = 9
    (saved / "state.json").write_bytes(msgspec.json.encode(state))
    with pytest.raises(ConfigError, match=rf"{saved}: the saved stream belongs to another order \(num_bins 9, now 8"):
        make_plan(parse_arguments(flags))


@pytest.mark.parametrize(
    ("extra_flags", "name"),
    [(["--cache_dir", "c"], "cache_dir c"), (["--read_connections", "4"], "read_connections 4")],
)
def test_flags_for_remote_shards_are_an_error_with_local_ones(
    flags: list[str], tokenizers_agree: None, extra_flags: list[str], name: str
) -> None:
    with pytest.raises(ConfigError, match=f"--{name} has no effect: all shards lie on a file system"):
        make_plan(parse_arguments([*flags, *extra_flags]))


@pytest.fixture
def in_memory(shards: Path) -> str:
    """The same shards behind a URL."""
    system = fsspec.filesystem("memory")
    system.put(str(shards), "/plan/set", recursive=True)
    return "memory://plan/set"


def test_read_flags_reach_the_reader(flags: list[str], tokenizers_agree: None, in_memory: str, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    extra_flags = [
        *("--verify", "first", "--read_connections", "3"),
        *("--cache_dir", str(cache), "--cache_bytes", "1000000"),
    ]
    plan = make_plan(parse_arguments([*flags, "--shards", in_memory, *extra_flags]))
    assert read_settings(plan.args, plan.index) == ReadSettings(
        verify="first", connections=3, cache_dir=cache, cache_bytes=1_000_000
    )
    with open_stream(plan) as stream:
        next(stream)
    assert [path for path in cache.glob("??/*") if path.is_file()]


def test_read_flags_default_to_those_of_the_reader(flags: list[str], in_memory: str, shards: Path) -> None:
    args = parse_arguments(flags)
    for source in (in_memory, shards):
        assert read_settings(args, open_shards(source)) == ReadSettings()


def test_an_unknown_value_of_verify_is_wrong_use(flags: list[str]) -> None:
    with pytest.raises(ConfigError, match="verify is sometimes; allowed: always, first, never"):
        make_plan(parse_arguments([*flags, "--verify", "sometimes"]))


def test_a_stalled_read_stops_the_run_after_the_timeout(
    flags: list[str], tokenizers_agree: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(parse_arguments([*flags, "--read_timeout_s", "0.05"]))
    release = threading.Event()
    monkeypatch.setattr("train.batches.stream.BinReader.read", lambda reader, bin_id: release.wait())
    with open_stream(plan) as stream:
        with pytest.raises(ShardError, match=r"not read within 0\.05 s"):
            next(stream)
        release.set()


@pytest.mark.parametrize(("extra_flags", "expected"), [([], 8), (["--dataloader_prefetch_factor", "3"], 12)])
def test_the_prefetch_covers_two_steps_or_what_the_flag_says(
    flags: list[str],
    tokenizers_agree: None,
    monkeypatch: pytest.MonkeyPatch,
    extra_flags: list[str],
    expected: int,
) -> None:
    """Four threads, four forward passes in a step."""
    seen: dict[str, object] = {}
    monkeypatch.setattr("train.run.loop.BinStream", lambda *_, **settings: seen.update(settings))
    open_stream(make_plan(parse_arguments([*flags, *extra_flags])))
    assert (seen["num_threads"], seen["prefetch"]) == (4, expected)


def test_a_run_with_frozen_parts_does_not_resume_with_other_frozen_weights(
    flags: list[str], saved: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    """The vision tower is frozen, so no checkpoint holds it. A copy of the base checkpoint is as good."""
    copy = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    moved = [*flags, "--model_name_or_path", str(copy)]
    resume = make_plan(parse_arguments(moved)).resume
    assert resume is not None and resume.folder == saved
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    with pytest.raises(ConfigError, match=f"{saved} was saved with frozen weights = "):
        make_plan(parse_arguments(moved))


def test_without_frozen_parts_the_base_weights_do_not_matter_on_resume(
    flags: list[str], tokenizers_agree: None
) -> None:
    assert make_plan(parse_arguments([*flags, "--tune_mm_vision"])).settings["frozen weights"] is None


def test_eval_shards_take_no_weights(flags: list[str], shards: Path, tokenizers_agree: None) -> None:
    with pytest.raises(ConfigError, match=r"--eval_shards .*:1epochs gives weights or epochs"):
        make_plan(parse_arguments([*flags, "--eval_shards", f"{shards}:1epochs"]))


def test_eval_shards_must_have_the_same_tokenizer(flags: list[str], tmp_path: Path) -> None:
    other = write_shards(tmp_path / "other", make_bins(num_bins=2), tokenizer="f" * 32)
    with pytest.raises(ConfigError, match=f"differs from the one that {other} was built with"):
        make_plan(parse_arguments([*flags, "--eval_shards", str(other)]))


def test_eval_shards_must_have_their_ledger(
    flags: list[str], tiny_checkpoint: Path, tmp_path: Path, tokenizers_agree: None
) -> None:
    """The ledger has the dataset of every sample. A missing one is detected now, not after the last step."""
    path = tiny_checkpoint / "tokenizer.json"
    fingerprint = tokenizer_fingerprint(path.read_bytes(), where=str(path))
    held_out = write_shards(tmp_path / "held-out", make_bins(num_bins=2), tokenizer=fingerprint)
    plan = make_plan(parse_arguments([*flags, "--eval_shards", str(held_out)]))
    assert plan.held_out is not None and plan.held_out.datasets.names == ("synthetic",)
    (held_out / "samples.parquet").unlink()
    with pytest.raises(ShardError, match=r"held-out/samples\.parquet is missing"):
        make_plan(parse_arguments([*flags, "--eval_shards", str(held_out)]))


@pytest.mark.parametrize("name", ["final", "adapter"])
def test_a_trained_model_replaces_only_a_folder(
    flags: list[str], tmp_path: Path, name: str, tokenizers_agree: None
) -> None:
    """A link would fail only when training is done."""
    run = tmp_path / "run"
    run.mkdir()
    (run / name).symlink_to(tmp_path)
    with pytest.raises(ConfigError, match=f"{name} is a link.*another --output_dir"):
        make_plan(parse_arguments([*flags, "--output_dir", str(run)]))


def test_a_run_does_not_replace_its_base_checkpoint(
    flags: list[str], tiny_checkpoint: Path, tmp_path: Path, tokenizers_agree: None
) -> None:
    final = tmp_path / "run" / "final"
    shutil.copytree(tiny_checkpoint, final)
    with pytest.raises(ConfigError, match="is what this run would replace"):
        make_plan(parse_arguments([*flags, "--output_dir", str(final.parent), "--model_name_or_path", str(final)]))
    make_plan(parse_arguments([*flags, "--output_dir", str(tmp_path / "other"), "--model_name_or_path", str(final)]))


def test_shards_that_are_trained_and_evaluated_on_are_named(tmp_path: Path) -> None:
    for name in "ab":
        write_shards(tmp_path / "sets" / name, make_bins(num_bins=2))
    (tmp_path / "link").symlink_to(tmp_path / "sets" / "b")
    index, linked = open_shards(tmp_path / "sets"), open_shards(tmp_path / "link")
    assert trained_folders(index, linked) == [str(tmp_path / "link")]
    assert trained_folders(open_shards(tmp_path / "sets" / "a"), linked) == []
