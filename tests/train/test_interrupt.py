"""A run that is stopped or killed resumes where it was and ends as if it had not been interrupted."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from tests.train.forked import Forked
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
    start_forked,
    torchrun_command,
)
from tests.train.pseudo_terminal import CTRL_C, helper_of, shell_in_terminal
from tests.train.synthetic import make_bins, write_shards
from train.run import loop
from train.run.engine import Engine
from train.run.evaluation import Evaluation
from train.run.interrupt import (
    END_AT_ONCE,
    INTERRUPTED_EXIT_CODE,
    REQUEUE_EXIT_CODE,
    SAME_KEY_S,
    SAME_REQUEST_S,
    SIGNALS,
    StopRequest,
    is_copy,
)
from train.run.metrics import Record
from train.run.plan import Plan
from train.run.run_dir import list_checkpoints, read_state

pytestmark = pytest.mark.slow

NUM_STEPS = 24
SLOW_SAVING = "tests/train/slow_saving.py"
"""The trainer with checkpoints that take minutes."""


@pytest.fixture(scope="module")
def flags(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a run with many short steps, all of them logged."""
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
def uninterrupted(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    length = ("--max_steps", str(NUM_STEPS), "--save_steps", "0")
    return run_once(tmp_path_factory, "uninterrupted", 1, *flags, *length)


def wait_until(is_true: Callable[[], bool], process: subprocess.Popen[str] | Forked) -> None:
    deadline = time.monotonic() + 240
    while not is_true():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def has_logged(run: Path) -> bool:
    path = run / "metrics.jsonl"
    return path.is_file() and path.stat().st_size > 0


def test_ctrl_c_finishes_the_step_and_saves_and_the_resumed_run_equals_the_uninterrupted_one(
    flags: list[str], uninterrupted: Path, tmp_path: Path
) -> None:
    command = [*flags, "--max_steps", str(NUM_STEPS), "--save_steps", "0", "--output_dir", str(tmp_path)]
    process = start_alone(*command)
    wait_until(lambda: has_logged(tmp_path), process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == REQUEUE_EXIT_CODE == 85, errors
    assert f"SIGINT: finishing the step, then saving; {END_AT_ONCE}\n" in errors
    assert "Traceback" not in errors
    assert "step/s" not in errors, "a redirected log has no progress bar"
    ((step, folder),) = list_checkpoints(tmp_path)
    assert 1 <= step < NUM_STEPS
    assert read_state(folder).step == step == read_metrics(tmp_path)[-1]["step"]
    assert f"stop requested: checkpoint saved at step {step}/{NUM_STEPS}; rerun the same command to resume" in errors
    assert not (tmp_path / "final").exists()

    done = run_ranks(1, *command)

    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path, uninterrupted)


@contextmanager
def launched(command: tuple[str, ...], run: Path) -> Iterator[tuple[Forked, list[psutil.Process]]]:
    """A launcher and its two ranks, after they have logged a step. Processes that outlive the block are killed."""
    launcher = start_forked(*command)
    started: list[psutil.Process] = [psutil.Process(launcher.pid)]
    try:
        wait_until(lambda: has_logged(run), launcher)
        started += started[0].children(recursive=True)
        # Launchers start the ranks in their order, and ranks start nothing.
        first, second = sorted((each for each in started if not each.children()), key=lambda each: each.pid)
        yield launcher, [first, second]
    finally:
        for process in started:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        launcher.wait()


def saved_by_two_ranks(run: Path) -> tuple[int, Path]:
    """Step and folder of the only checkpoint of a run of two ranks, which trained no step after it."""
    ((step, folder),) = list_checkpoints(run)
    state = read_state(folder)
    assert (state.step, state.ranks) == (step, 2)
    assert sorted(path.name for path in folder.glob("random-*.pt")) == ["random-00000.pt", "random-00001.pt"]
    assert read_metrics(run)[-1]["step"] == step
    assert not (run / "final").exists()
    return step, folder


def test_a_signal_to_one_rank_stops_all_at_the_same_step_and_torchrun_reports_it(
    flags: list[str], tmp_path: Path
) -> None:
    command = torchrun_command(2, *flags, "--max_steps", "1000", "--output_dir", str(tmp_path))
    with launched(command, tmp_path) as (launcher, ranks):
        ranks[1].send_signal(signal.SIGUSR1)
        _, errors = launcher.communicate(timeout=240)
    assert launcher.returncode == 1, (
        "torchrun has an exit code of its own, and ends the other ranks when one has ended with another code than 0"
    )
    assert f"exitcode  : {REQUEUE_EXIT_CODE}" in errors
    assert "traceback : stopped on request, with a checkpoint: rerun the same command to resume\n" in errors
    saved_by_two_ranks(tmp_path)


def ranks_of_deepspeed(run: Path) -> list[psutil.Process]:
    """The ranks of a run that `deepspeed` has started."""
    ranks = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if str(run) in words and any(word.startswith("--local_rank=") for word in words):
            ranks.append(process)
    return ranks


def test_ctrl_c_under_deepspeed_saves_and_the_launcher_exits_with_the_code_of_its_ranks(
    flags: list[str], tmp_path: Path
) -> None:
    """It does so in a script that keeps a log with ``tee``, too.

    Another Ctrl-C, before the launcher has seen that its ranks have ended, changes nothing.
    """
    command = deepspeed_command(2, *flags, "--max_steps", "1000", "--output_dir", str(tmp_path))
    script = f"{shlex.join(command)} 2>&1 | tee {tmp_path}/log; exit ${{PIPESTATUS[0]}}"
    with shell_in_terminal(REPOSITORY, ENVIRONMENT, limit_s=240) as shell:
        shell.run("bash", "-c", script)
        shell.wait_until(lambda: has_logged(tmp_path) and helper_of(shell))
        shell.type(CTRL_C)
        shell.wait_until(lambda: list_checkpoints(tmp_path) and not ranks_of_deepspeed(tmp_path))
        shell.type(CTRL_C)
        shell.wait_for(f"exit code: {REQUEUE_EXIT_CODE}\n")
    log = (tmp_path / "log").read_text()
    step, _ = saved_by_two_ranks(tmp_path)
    assert log.count(f"SIGINT: finishing the step, then saving; {END_AT_ONCE}\n") == 1
    assert f"stop requested: checkpoint saved at step {step}/1000; rerun the same command to resume\n" in log
    assert "Traceback" not in log


def test_the_second_ctrl_c_under_deepspeed_ends_the_run_at_once(flags: list[str], tmp_path: Path) -> None:
    command = deepspeed_command(1, *flags, "--max_steps", "1000", "--output_dir", str(tmp_path), script=SLOW_SAVING)
    with shell_in_terminal(REPOSITORY, ENVIRONMENT, limit_s=240) as shell:
        shell.run(*command)
        shell.wait_until(lambda: has_logged(tmp_path) and helper_of(shell))
        shell.type(CTRL_C)
        shell.wait_until(lambda: any(tmp_path.glob("checkpoint-*.tmp")))
        time.sleep(SAME_KEY_S)
        shell.type(CTRL_C)
        shell.wait_for("stopped at once: rerun the same command to resume from the newest checkpoint\n")
        shell.wait_for(f"exit code: {INTERRUPTED_EXIT_CODE}\n")
    assert list_checkpoints(tmp_path) == []


def test_stopping_torchrun_lets_its_ranks_save_and_the_same_command_resumes(flags: list[str], tmp_path: Path) -> None:
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


def press_ctrl_c(launcher: Forked) -> None:
    """A terminal sends SIGINT to all processes of the command that runs in it."""
    os.killpg(launcher.pid, signal.SIGINT)


def test_the_second_ctrl_c_under_torchrun_ends_the_ranks_at_once(flags: list[str], tmp_path: Path) -> None:
    """The ranks get the first as SIGINT, and the second as SIGTERM."""
    command = torchrun_command(2, *flags, "--max_steps", "1000", "--output_dir", str(tmp_path), script=SLOW_SAVING)
    with launched(command, tmp_path) as (launcher, ranks):
        press_ctrl_c(launcher)
        wait_until(lambda: any(tmp_path.glob("checkpoint-*.tmp")), launcher)
        time.sleep(SAME_KEY_S)
        press_ctrl_c(launcher)
        _, errors = launcher.communicate(timeout=60)
        gone, _ = psutil.wait_procs(ranks, timeout=10)
    assert len(gone) == 2
    assert list_checkpoints(tmp_path) == []
    assert f"SIGINT: finishing the step, then saving; {END_AT_ONCE}\n" in errors
    assert "stopped at once: rerun the same command to resume from the newest checkpoint\n" in errors


@pytest.mark.parametrize("in_background", ["False", "True"])
def test_a_run_killed_while_it_saves_resumes_from_the_checkpoint_before(
    flags: list[str], uninterrupted: Path, tmp_path: Path, in_background: str
) -> None:
    command = [*flags, "--max_steps", str(NUM_STEPS), "--save_steps", "8", "--output_dir", str(tmp_path)]
    command += ["--save_in_background", in_background]
    process = start_forked(sys.executable, SLOW_SAVING, "--quick_checkpoints", "1", *command)
    wait_until(lambda: (tmp_path / "checkpoint-16.tmp").is_dir(), process)
    process.kill()
    process.wait()
    assert (tmp_path / "checkpoint-16.tmp").is_dir()
    assert [step for step, _ in list_checkpoints(tmp_path)] == [8]

    done = run_ranks(1, *command, "--save_total_limit", "1")

    assert done.returncode == 0, done.stderr
    assert f"resuming from {tmp_path / 'checkpoint-8'}" in done.stderr
    assert not list(tmp_path.glob("*.tmp"))
    assert_same_run(tmp_path, uninterrupted)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGUSR1])
def test_a_second_signal_has_its_default_effect_unless_it_is_the_same_request(
    process_group: None, signum: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within seconds it is the same request: a launcher forwards a signal that its ranks have received as well."""
    now = 100.0
    monkeypatch.setattr("train.run.interrupt.time", SimpleNamespace(monotonic=lambda: now))
    usual = []
    before = signal.signal(signum, lambda *_: usual.append("usual"))
    try:
        with StopRequest() as stop:
            assert not stop.is_agreed(torch.device("cpu"))
            os.kill(os.getpid(), signum)
            assert stop.is_agreed(torch.device("cpu"))
            now += SAME_REQUEST_S
            os.kill(os.getpid(), signum)
            assert usual == []
            now += 1
            os.kill(os.getpid(), signum)
            assert usual == ["usual"]
        os.kill(os.getpid(), signum)
        assert usual == ["usual", "usual"]
    finally:
        signal.signal(signum, before)


@pytest.mark.parametrize(
    ("launcher", "first", "second", "seconds_later", "ends"),
    [
        ("none", signal.SIGINT, signal.SIGINT, SAME_KEY_S, False),
        ("none", signal.SIGINT, signal.SIGINT, SAME_KEY_S + 0.1, True),
        ("deepspeed", signal.SIGINT, signal.SIGTERM, SAME_REQUEST_S, False),
        ("torchrun", signal.SIGINT, signal.SIGTERM, SAME_KEY_S, False),
        ("torchrun", signal.SIGINT, signal.SIGTERM, SAME_KEY_S + 0.1, True),
        ("torchrun", signal.SIGTERM, signal.SIGTERM, SAME_REQUEST_S, False),
        ("none", signal.SIGTERM, signal.SIGINT, SAME_KEY_S + 0.1, True),
    ],
)
def test_a_second_ctrl_c_is_told_from_a_copy_of_the_first_one(
    launcher: str,
    first: signal.Signals,
    second: signal.Signals,
    seconds_later: float,
    ends: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    if launcher == "torchrun":
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert is_copy(first, second, seconds_later) == (not ends)


def press_twice_while_waiting() -> None:
    """The main thread waits outside of Python, where no handler runs, and Ctrl-C is pressed twice."""

    def wait(engine: Engine, plan: Plan) -> None:
        for seconds in (1, 1 + 2 * SAME_KEY_S):
            threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()
        # Another thread takes the signals, so that the main thread keeps waiting, as inside a library.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        threading.Event().wait(60)

    pytest.MonkeyPatch().setattr(loop, "export", wait)


def test_the_second_ctrl_c_ends_a_run_whose_main_thread_waits(flags: list[str], tmp_path: Path) -> None:
    length = ("--max_steps", "1", "--output_dir", str(tmp_path))
    done = run_ranks(1, *flags, *length, prepare=press_twice_while_waiting, limit_s=50)
    assert done.returncode == INTERRUPTED_EXIT_CODE == 130, done.stderr
    assert f"SIGINT: finishing the step, then saving; {END_AT_ONCE}\n" in done.stderr
    assert "stopped at once: rerun the same command to resume from the newest checkpoint\n" in done.stderr


def test_other_ranks_do_not_repeat_what_the_first_one_says(capfd: pytest.CaptureFixture[str]) -> None:
    for is_first in (True, False):
        with StopRequest(is_first=is_first):
            signal.raise_signal(signal.SIGTERM)
        assert ("SIGTERM: finishing the step, then saving\n" in capfd.readouterr().err) == is_first


def stop_while_exporting() -> None:
    """A scheduler reclaims the machines when training has just ended."""
    export = loop.export

    def signalled(engine: Engine, plan: Plan) -> None:
        for signum in SIGNALS:
            signal.raise_signal(signum)
        export(engine, plan)

    pytest.MonkeyPatch().setattr(loop, "export", signalled)


def test_a_signal_during_the_export_does_not_stop_it(flags: list[str], tmp_path: Path) -> None:
    length = ("--max_steps", "2", "--save_steps", "0", "--output_dir", str(tmp_path / "run"))
    done = run_ranks(2, *flags, *length, prepare=stop_while_exporting)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "final" / "config.json").is_file()


def stop_while_evaluating() -> None:
    """One rank receives a signal during an evaluation."""
    run = Evaluation.run

    def signalled(evaluation: Evaluation, engine: Engine) -> Record:
        if os.environ["RANK"] == "1":
            signal.raise_signal(signal.SIGTERM)
        return run(evaluation, engine)

    pytest.MonkeyPatch().setattr(Evaluation, "run", signalled)


def test_a_signal_during_evaluation_stops_right_after_it(flags: list[str], tmp_path: Path) -> None:
    evaluates = ("--eval_shards", flags[flags.index("--shards") + 1], "--eval_strategy", "steps", "--eval_steps", "2")
    length = ("--max_steps", "6", "--save_steps", "0", "--output_dir", str(tmp_path / "run"))
    done = run_ranks(2, *flags, *evaluates, *length, prepare=stop_while_evaluating)
    assert done.returncode == REQUEUE_EXIT_CODE, done.stderr
    assert [step for step, _ in list_checkpoints(tmp_path / "run")] == [2]
    assert "eval_loss" in read_metrics(tmp_path / "run")[-1]
