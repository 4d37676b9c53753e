"""A run that is told to stop, or killed, goes on from where it was and ends as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from tests.train.launching import (
    ENVIRONMENT,
    REPOSITORY,
    as_flags,
    assert_same_run,
    deepspeed_command,
    fingerprint_of,
    made_once,
    read_metrics,
    run_once,
    run_ranks,
    start_alone,
    torchrun_command,
)
from tests.train.synthetic import make_bins, write_shards
from train.run import loop
from train.run.evaluation import Evaluation
from train.run.interrupt import REQUEUE_EXIT_CODE, SAME_REQUEST_S, SIGNALS, StopRequest
from train.run.metrics import Record
from train.run.plan import Plan
from train.run.run_dir import list_checkpoints, read_state

NUM_STEPS = 24


@pytest.fixture(scope="module")
def flags(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Many short steps, all of them logged."""
    fingerprint = fingerprint_of(tiny_checkpoint)
    shards = made_once(
        tmp_path_factory, "short", lambda out: write_shards(out, make_bins(num_bins=8), tokenizer=fingerprint)
    )
    settings = {
        "shards": shards,
        "model_name_or_path": tiny_checkpoint,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "gradient_accumulation_steps": 1,
    }
    return as_flags(settings)


@pytest.fixture(scope="module")
def unbroken(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    length = ("--max_steps", str(NUM_STEPS), "--save_steps", "0")
    return run_once(tmp_path_factory, "unbroken", 1, *flags, *length)


def wait_until(is_true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 240
    while not is_true():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.001)


def has_logged(run: Path) -> bool:
    path = run / "metrics.jsonl"
    return path.is_file() and path.stat().st_size > 0


def test_a_run_told_to_stop_saves_and_the_same_command_ends_as_the_unbroken_run(
    flags: list[str], unbroken: Path, tmp_path: Path
) -> None:
    command = [*flags, "--max_steps", str(NUM_STEPS), "--save_steps", "0", "--output_dir", str(tmp_path)]
    process = start_alone(*command)
    wait_until(lambda: has_logged(tmp_path), process)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == REQUEUE_EXIT_CODE == 85, errors
    ((step, folder),) = list_checkpoints(tmp_path)
    assert 1 <= step < NUM_STEPS
    assert read_state(folder).step == step == read_metrics(tmp_path)[-1]["step"]
    assert f"stop requested: checkpoint saved at step {step}/{NUM_STEPS}; rerun the same command to resume" in errors
    assert not (tmp_path / "final").exists()

    done = run_ranks(1, *command)

    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path, unbroken)


@contextmanager
def launched(command: tuple[str, ...], run: Path) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """A launcher and its ranks by their numbers, which have logged a step. Whatever goes on in the end is killed."""
    launcher = subprocess.Popen(
        command, cwd=REPOSITORY, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    started: list[psutil.Process] = [psutil.Process(launcher.pid)]
    try:
        wait_until(lambda: has_logged(run), launcher)
        started += started[0].children(recursive=True)
        numbers = {process.environ().get("RANK"): process for process in started}
        yield launcher, [numbers[number] for number in ("0", "1")]
    finally:
        for process in started:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        launcher.wait()


def saved_by_two_ranks(run: Path) -> tuple[int, Path]:
    """The only checkpoint of a run of two ranks, and its step, after which nothing was trained."""
    ((step, folder),) = list_checkpoints(run)
    state = read_state(folder)
    assert (state.step, state.ranks) == (step, 2)
    assert sorted(path.name for path in folder.glob("random-*.pt")) == ["random-00000.pt", "random-00001.pt"]
    assert read_metrics(run)[-1]["step"] == step
    assert not (run / "final").exists()
    return step, folder


def test_a_signal_to_one_rank_stops_all_at_the_same_step_and_torchrun_tells_of_it(
    flags: list[str], tmp_path: Path
) -> None:
    command = torchrun_command(2, *flags, "--max_steps", "1000", "--output_dir", str(tmp_path))
    with launched(command, tmp_path) as (launcher, ranks):
        ranks[1].send_signal(signal.SIGUSR1)
        _, errors = launcher.communicate(timeout=240)
    assert launcher.returncode == 1, "torchrun has a code of its own, and ends the other ranks when one has ended so"
    assert f"exitcode  : {REQUEUE_EXIT_CODE}" in errors
    saved_by_two_ranks(tmp_path)


def test_deepspeed_ends_with_the_code_of_its_ranks_when_one_was_told_to_stop(flags: list[str], tmp_path: Path) -> None:
    command = deepspeed_command(2, *flags, "--max_steps", "1000", "--output_dir", str(tmp_path))
    with launched(command, tmp_path) as (launcher, ranks):
        ranks[1].send_signal(signal.SIGUSR1)
        _, errors = launcher.communicate(timeout=240)
    assert launcher.returncode == REQUEUE_EXIT_CODE, errors
    saved_by_two_ranks(tmp_path)


def test_torchrun_told_to_stop_lets_its_ranks_save_and_the_same_command_goes_on(
    flags: list[str], tmp_path: Path
) -> None:
    command = [*flags, "--max_steps", str(NUM_STEPS), "--save_steps", "0", "--output_dir", str(tmp_path)]
    with launched(torchrun_command(2, *command), tmp_path) as (launcher, _):
        launcher.send_signal(signal.SIGTERM)
        _, errors = launcher.communicate(timeout=240)
    assert launcher.returncode == 1, errors
    step, folder = saved_by_two_ranks(tmp_path)
    assert f"stop requested: checkpoint saved at step {step}/{NUM_STEPS}; rerun the same command to resume" in errors

    done = run_ranks(2, *command)

    assert done.returncode == 0, done.stderr
    assert f"resuming from {folder}" in done.stderr
    assert [record["step"] for record in read_metrics(tmp_path)] == list(range(1, NUM_STEPS + 1))
    assert (tmp_path / "final").is_dir()


def test_a_run_killed_while_it_saves_goes_on_from_the_checkpoint_before(
    flags: list[str], unbroken: Path, tmp_path: Path
) -> None:
    command = [*flags, "--max_steps", str(NUM_STEPS), "--save_steps", "2", "--output_dir", str(tmp_path)]
    process = start_alone(*command)
    wait_until(lambda: (tmp_path / "checkpoint-4.tmp").is_dir(), process)
    process.kill()
    process.communicate()
    assert (tmp_path / "checkpoint-4.tmp").is_dir()
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2]

    done = run_ranks(1, *command, "--save_total_limit", "1")

    assert done.returncode == 0, done.stderr
    assert f"resuming from {tmp_path / 'checkpoint-2'}" in done.stderr
    assert not list(tmp_path.glob("*.tmp"))
    assert_same_run(tmp_path, unbroken)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_has_its_usual_effect_unless_it_comes_at_once(
    process_group: None, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once it is the same request: a launcher passes on what its ranks were told as well."""
    now = 100.0
    monkeypatch.setattr("train.run.interrupt.time", SimpleNamespace(monotonic=lambda: now))
    usual = []
    before = signal.signal(number, lambda *_: usual.append("usual"))
    try:
        with StopRequest() as stop:
            assert not stop.is_agreed(torch.device("cpu"))
            os.kill(os.getpid(), number)
            assert stop.is_agreed(torch.device("cpu"))
            now += SAME_REQUEST_S
            os.kill(os.getpid(), number)
            assert usual == []
            now += 1
            os.kill(os.getpid(), number)
            assert usual == ["usual"]
        os.kill(os.getpid(), number)
        assert usual == ["usual", "usual"]
    finally:
        signal.signal(number, before)


def stop_while_exporting() -> None:
    """What a scheduler does that wants the machines back when training is just done."""
    export = loop.export

    def told(running: Any, plan: Plan) -> None:
        for number in SIGNALS:
            signal.raise_signal(number)
        export(running, plan)

    pytest.MonkeyPatch().setattr(loop, "export", told)


def test_a_signal_while_the_model_is_written_lets_it_be_written(flags: list[str], tmp_path: Path) -> None:
    length = ("--max_steps", "2", "--save_steps", "0", "--output_dir", str(tmp_path / "run"))
    done = run_ranks(2, *flags, *length, prepare=stop_while_exporting)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "final" / "config.json").is_file()


def stop_while_evaluating() -> None:
    """One rank is told to stop while the model is evaluated."""
    run = Evaluation.run

    def told(evaluation: Evaluation, running: Any) -> Record:
        if os.environ["RANK"] == "1":
            signal.raise_signal(signal.SIGTERM)
        return run(evaluation, running)

    pytest.MonkeyPatch().setattr(Evaluation, "run", told)


def test_a_signal_during_evaluation_stops_right_after_it(flags: list[str], tmp_path: Path) -> None:
    evaluates = ("--eval_shards", flags[flags.index("--shards") + 1], "--eval_strategy", "steps", "--eval_steps", "2")
    length = ("--max_steps", "6", "--save_steps", "0", "--output_dir", str(tmp_path / "run"))
    done = run_ranks(2, *flags, *evaluates, *length, prepare=stop_while_evaluating)
    assert done.returncode == REQUEUE_EXIT_CODE, done.stderr
    assert [step for step, _ in list_checkpoints(tmp_path / "run")] == [2]
    assert "eval_loss" in read_metrics(tmp_path / "run")[-1]
