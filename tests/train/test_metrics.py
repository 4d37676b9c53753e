"""Metrics of a run: complete lines, every step once, and values that add up."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from schemas.errors import ConfigError
from tests.train.synthetic import as_bin, make_sample
from train.batches.batch import build_micro_batch
from train.batches.stream import StepBatch
from train.model.flops import ModelFlops
from train.order.dealing import DataOrder
from train.run import metrics
from train.run.metrics import (
    Record,
    Window,
    drop_later_steps,
    flatten,
    format_record,
    grouped,
    open_log,
    require_reporter,
)
from train.settings.arguments import TrainArguments
from train.settings.flags import parse_arguments

TEN_TOKENS = build_micro_batch([as_bin([make_sample(np.random.default_rng(0), num_text=8)])])
TEN_TERAFLOPS = ModelFlops(
    per_patch=0,
    per_merged_patch=0,
    per_token=1e12,
    per_target=0,
    per_squared_length=0,
    per_squared_window=0,
    per_squared_frame=0,
)
"""For each forward and backward pass of :data:`TEN_TOKENS`."""


def batch(step: int, num_targets: int = 10) -> StepBatch:
    """A step of two micro-steps."""
    return StepBatch(
        step=step,
        micro_batches=(TEN_TOKENS, TEN_TOKENS),
        num_targets=num_targets,
        num_tokens=100,
        max_tokens=125,
        num_samples=6,
        efficiency=0.9,
        bins=(3, 7),
        data_wait_s=0.25,
    )


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def no_deal(step: int) -> NDArray[np.int64]:
    """With one rank, no rank is the slowest and nobody asks for its bins."""
    raise AssertionError(step)


@pytest.fixture
def window(process_group: None, monkeypatch: pytest.MonkeyPatch) -> Window:
    """A window whose clock advances one second at each look."""
    ticks = iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    order = DataOrder(np.ones(12), seed=0, global_batch=3, epochs=0.8)
    return Window(order, torch.device("cpu"), TEN_TERAFLOPS, deal=no_deal, peak_tflops=160.0)


def test_loss_and_counts_are_those_of_the_step_and_times_are_means_over_the_window(window: Window) -> None:
    for step in range(2):
        window.add(batch(step))
    rates = {"language_model": 1e-5, "merger": 1e-4}
    record = window.summarise(batch(1), torch.tensor([5.0, 20.0]), rates, torch.tensor(1.5), 3)
    memory_bytes = record.pop("max_memory_bytes")
    assert memory_bytes > 1 << 20
    assert record == {
        "step": 2,
        "epoch": 0.5,
        "loss": 2.5,
        "learning_rate": 1e-5,
        "learning_rates": rates,
        "grad_norm": 1.5,
        "tokens_per_s": 200.0,
        "samples_per_s": 12.0,
        "num_tokens": 100,
        "num_targets": 10,
        "padding": pytest.approx(0.2),
        "efficiency": pytest.approx(0.9),
        "step_s": 0.5,
        "data_wait_s": 0.25,
        # two steps of twice ten in a second
        "tflops": pytest.approx(40.0),
        "mfu": pytest.approx(0.25),
        "skipped_steps": 3,
    }
    json.dumps(record)


def test_mfu_is_absent_if_the_peak_of_the_device_is_unknown(window: Window) -> None:
    unknown = Window(window._order, torch.device("cpu"), TEN_TERAFLOPS, deal=no_deal, peak_tflops=None)
    unknown.add(batch(0))
    record = unknown.summarise(batch(0), torch.ones(1), {"merger": 1.0}, 0.0, 0)
    assert record["tflops"] == pytest.approx(20.0)
    assert "mfu" not in record


def test_the_last_step_ends_the_last_epoch_even_with_fewer_bins(window: Window) -> None:
    """Four steps an epoch, but the run ends after 0.8 of one."""
    window.add(batch(3))
    assert window.summarise(batch(3), torch.ones(1), {"merger": 1.0}, 0.0, 0)["epoch"] == 0.8


def test_time_that_a_window_is_paused_counts_for_no_step(window: Window) -> None:
    window.add(batch(0))
    with window.paused():
        time.perf_counter()
    # looks at the clock: begin, two of the pause with one between, end: 4 - 2 seconds
    assert window.summarise(batch(0), torch.ones(1), {"merger": 1.0}, 0.0, 0)["step_s"] == 2.0


def test_a_new_window_begins_after_each_record(window: Window) -> None:
    window.add(batch(0))
    first = window.summarise(batch(0), torch.ones(1), {"merger": 1.0}, 0.0, 0)
    window.add(batch(1))
    second = window.summarise(batch(1), torch.ones(1), {"merger": 1.0}, 0.0, 0)
    assert (first["tokens_per_s"], first["step_s"]) == (second["tokens_per_s"], second["step_s"])


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_or_norm_that_is_not_finite_is_null(window: Window, loss: float) -> None:
    window.add(batch(4))
    record = window.summarise(batch(4), torch.tensor([loss, 1.0]), {"merger": 1.0}, float("inf"), 1)
    assert (record["loss"], record["grad_norm"]) == (None, None)
    assert "NaN" not in json.dumps(record)


def test_resuming_drops_the_lines_of_later_steps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    drop_later_steps(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_dropping_later_steps_of_a_missing_file_does_nothing(tmp_path: Path) -> None:
    drop_later_steps(tmp_path / "metrics.jsonl", 2)
    assert list(tmp_path.iterdir()) == []


def record_of(step: int) -> Record:
    speeds = {"tokens_per_s": 10.0, "data_wait_s": 0.1, "step_s": 2.0, "efficiency": 0.9, "padding": 0.1}
    speeds["samples_per_s"] = 2.5
    sizes = {
        "grad_norm": 0.5,
        "num_targets": 7,
        "tflops": 300.0,
        "mfu": 0.31,
        "max_memory_bytes": 3 << 30,
        "skipped_steps": 0,
    }
    return {"step": step, "loss": 1.0, "learning_rate": 1e-5, "learning_rates": {"merger": 1e-5}, **speeds, **sizes}


def test_only_the_first_rank_writes_metrics(tmp_path: Path) -> None:
    args = TrainArguments(shards="shards", output_dir=tmp_path / "run")
    for is_first in (False, True):
        with open_log(args, is_first=is_first, start_step=0, num_steps=2) as log:
            log.advance()
            log.write(record_of(1))
        assert (tmp_path / "run").exists() == is_first
    with open_log(args, is_first=True, start_step=1, num_steps=2) as log:
        log.write(record_of(2))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [record_of(1), record_of(2)]


def test_the_screen_shows_the_main_metrics_and_the_time_left(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = TrainArguments(shards="shards", output_dir=tmp_path / "run")
    # the screen truncates a bar, but not the metrics
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((40, 24)))
    with open_log(args, is_first=True, start_step=0, num_steps=2001) as log:
        log.write({**record_of(1), "loss": None})
    line = "step 1/2001: loss=not finite, lr=1.00e-05, tokens_per_s=10, data_wait=5.0%, left=1:06:40\n"
    assert capfd.readouterr().err == line


@pytest.mark.parametrize("known", [True, False])
def test_a_verbose_screen_shows_all_metrics(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    args = parse_arguments(["-v", "--shards", "s", "--output_dir", str(tmp_path / "run")])
    record = record_of(1)
    if not known:
        del record["mfu"]
    with open_log(args, is_first=True, start_step=0, num_steps=2) as log:
        log.write(record)
    shown = capfd.readouterr().err
    speeds = ["tokens_per_s=10", "samples_per_s=2.5", "data_wait=5.0%", "efficiency=0.900", "padding=10.0%"]
    use = "mfu=31.0%" if known else "tflops=300"
    main = ["step 1/2", "loss=1.0000", "norm=0.5", "lr=1.00e-05", "targets=7", "skipped=0", "memory=3.0GiB"]
    for part in [*main, *speeds, use]:
        assert part in shown


def test_a_redirected_log_has_a_line_for_each_logged_step_and_none_for_the_others(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    args = TrainArguments(shards="shards", output_dir=tmp_path / "run")
    with open_log(args, is_first=True, start_step=0, num_steps=100) as log:
        for step in range(1, 101):
            log.advance()
            if step % 50 == 0:
                log.write(record_of(step))
    shown = capfd.readouterr().err
    assert [line.partition(":")[0] for line in shown.splitlines()] == ["step 50/100", "step 100/100"]
    assert "\r" not in shown


def test_the_screen_shows_every_learning_rate_only_if_they_differ() -> None:
    rates = {"language_model": 2e-7, "merger": 1e-5, "vision_tower": 1e-6}
    shown = format_record({**record_of(3), "learning_rates": rates}, num_steps=9, is_verbose=False)
    assert shown.startswith("step 3/9: loss=1.0000, ")
    assert ", lr_language_model=2.00e-07, lr_merger=1.00e-05, lr_vision_tower=1.00e-06, " in shown
    rates = dict.fromkeys(rates, 2e-7)
    shown = format_record({**record_of(3), "learning_rates": rates}, num_steps=9, is_verbose=False)
    assert ", lr=2.00e-07, " in shown
    assert "lr_" not in shown


def test_other_ranks_show_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = TrainArguments(shards="shards", output_dir=tmp_path / "run")
    with open_log(args, is_first=False, start_step=0, num_steps=2) as log:
        log.advance()
        log.write(record_of(1))
    assert capsys.readouterr() == ("", "")


def test_nested_metrics_are_flattened() -> None:
    record: Record = {"loss": 1.0, "grad_norm": None, "rates": {"merger": 1e-5}, "eval_datasets": {"a": {"loss": 2.0}}}
    record["slowest"] = {"rank": 3, "bins": (7, 8)}
    assert flatten(record) == {"loss": 1.0, "rates/merger": 1e-5, "eval_datasets/a/loss": 2.0, "slowest/rank": 3}


def test_reports_show_metrics_in_groups() -> None:
    record = {
        **record_of(1),
        "eval_loss": 2.0,
        "eval_datasets": {"a": {"loss": 3.0}},
    }
    assert grouped(record) == {
        "train/step": 1,
        "train/loss": 1.0,
        "train/learning_rate": 1e-5,
        "train/learning_rates/merger": 1e-5,
        "train/grad_norm": 0.5,
        "train/skipped_steps": 0,
        "data/num_targets": 7,
        "data/padding": 0.1,
        "data/data_wait_s": 0.1,
        "perf/tokens_per_s": 10.0,
        "perf/samples_per_s": 2.5,
        "perf/step_s": 2.0,
        "perf/efficiency": 0.9,
        "perf/tflops": 300.0,
        "perf/mfu": 0.31,
        "perf/max_memory_bytes": 3 << 30,
        "eval/loss": 2.0,
        "eval/datasets/a/loss": 3.0,
    }


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_reporter_package_is_an_error_with_the_pip_command(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    require_reporter("none")
    with pytest.raises(ConfigError, match=f"--report_to {package} needs the {package} package: pip install {package}"):
        require_reporter(package)


def test_tensorboard_gets_every_metric(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = TrainArguments(shards="shards", output_dir=tmp_path, report_to="tensorboard")
    with open_log(args, is_first=True, start_step=0, num_steps=1) as log:
        log.write(record_of(1))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert set(events.Tags()["scalars"]) == set(grouped(record_of(1)))
    (loss,) = events.Scalars("train/loss")
    assert (loss.step, loss.value) == (1, 1.0)


def test_tensorboard_purges_steps_that_are_trained_again(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = TrainArguments(shards="shards", output_dir=tmp_path, report_to="tensorboard")
    for start_step, losses in ((0, {1: 9.0, 2: 8.0, 3: 7.0}), (2, {4: 6.0})):
        with open_log(args, is_first=True, start_step=start_step, num_steps=4) as log:
            for step, loss in losses.items():
                log.write({**record_of(step), "loss": loss})
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 9.0), (2, 8.0), (4, 6.0)]


@pytest.mark.slow
def test_wandb_gets_every_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    # Nothing leaves the machine.
    for name, value in {"MODE": "offline", "SILENT": "true", "ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    args = TrainArguments(shards="shards", output_dir=tmp_path, report_to="wandb", run_name="trial")
    with open_log(args, is_first=True, start_step=0, num_steps=1) as log:
        assert wandb.run.name == "trial"
        assert wandb.run.config["learning_rate"] is None
        log.write(record_of(1))
        assert {name: wandb.run.summary[name] for name in grouped(record_of(1))} == grouped(record_of(1))
    assert list(tmp_path.glob("wandb/offline-run-*"))


@pytest.mark.slow
def test_wandb_without_a_login_is_wrong_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    import wandb

    wandb.teardown()  # forgets the settings of earlier runs
    args = TrainArguments(shards="shards", output_dir=tmp_path, report_to="wandb")
    with (
        pytest.raises(ConfigError, match=r"--report_to wandb: .*Run `wandb login`, or set WANDB_MODE=offline"),
        open_log(args, is_first=True, start_step=0, num_steps=1),
    ):
        pass


def test_log_lines_do_not_run_into_the_progress_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [logging.StreamHandler(sys.stderr)])
    args = TrainArguments(shards="s", output_dir=tmp_path)
    with open_log(args, is_first=True, start_step=0, num_steps=2) as log:
        log.advance()
        logging.getLogger("train").warning("evaluation after step 1")
        log.advance()
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    assert "evaluation after step 1" in lines
    assert len(root.handlers) == 1
