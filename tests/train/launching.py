"""Real runs of the trainer in separate processes, and the files that they leave.

Importing the trainer takes longer than most of these runs. So :func:`run_ranks` forks its ranks from a process that has
only imported it, and :func:`start_forked` does so with launchers and their ranks. The other functions start the trainer
as a user does, with or without a launcher. They are for what forked processes cannot show: ranks whose sets and
dictionaries hash differently, and the start and the exit of an interpreter.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from schemas.qwen import tokenizer_fingerprint
from tests.train.forked import Forked, forget_disk

REPOSITORY = Path(__file__).resolve().parents[2]
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(16 * 2**30),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""Settings of glibc that keep freed memory for reuse, in huge pages. Otherwise the system clears the pages of hundreds
of megabytes of logits (151,936 per target) again and again, which takes almost half of a rank's processor time."""

ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **KEEP_MEMORY}
TIMINGS = {"tokens_per_s", "samples_per_s", "step_s", "data_wait_s", "tflops", "max_memory_bytes", "slowest"}
"""Metrics that differ between two equal runs."""

LIMIT_S, GRACE_S = 300, 60
"""Time limit of a run, and of the other ranks after one has failed."""

IMPORTED = (
    "tests.train.launching",
    "train.main",
    "train.run.loop",
    "train.preflight.dry_run",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # every run imports it, and with it torch's compiler
    "peft",
    "pyarrow.dataset",
    "torch.distributed.run",
    "deepspeed.launcher.launch",
    "deepspeed.launcher.runner",
    "deepspeed.checkpoint.ds_to_universal",
    "tests.train.preloaded",
)
"""Modules that ranks are forked with, if installed."""


def as_flags(settings: Mapping[str, object]) -> list[str]:
    """Settings as flags of the command line."""
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def run_ranks(
    num_ranks: int, *flags: str, prepare: Callable[[], object] | None = None, limit_s: float = LIMIT_S
) -> subprocess.CompletedProcess[str]:
    """Run the trainer on several ranks until it ends. The test fails if a rank does not end.

    Args:
        num_ranks: ranks on this machine.
        flags: of the trainer.
        prepare: a module-level function that each rank calls before the trainer.
        limit_s: time limit in seconds.

    Returns:
        The first exit code other than 0, if any, and the stderr of all ranks.
    """
    context, port = _forks(), free_port()
    with tempfile.TemporaryDirectory() as folder:
        stderr = Path(folder, "stderr")
        stderr.touch()
        ranks: list[ForkServerProcess] = []
        try:
            for rank in range(num_ranks):
                args = (rank, num_ranks, port, stderr, prepare, flags)
                process = context.Process(target=_be_rank, args=args, name=f"rank {rank}")
                process.start()
                ranks.append(process)
            stuck = _wait_for(ranks, limit_s)
        finally:
            for process in ranks:
                process.kill()
                process.join()
        errors = stderr.read_text(encoding="utf-8")
        if stuck:
            pytest.fail(f"{', '.join(stuck)} did not end:\n{errors}")
        code = next((process.exitcode for process in ranks if process.exitcode), 0)
        return subprocess.CompletedProcess(flags, code, stderr=errors)


def _forks() -> ForkServerContext:
    """Start the process that ranks are forked from, unless it is running."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        patch.chdir(REPOSITORY)  # a test may be in a folder that has a name of a package
        forkserver.ensure_running()
    return context


def _be_rank(
    rank: int, num_ranks: int, port: int, stderr: Path, prepare: Callable[[], object] | None, flags: Sequence[str]
) -> None:
    """Be a rank, with the environment that a launcher sets."""
    from train.main import main

    with stderr.open("ab") as errors, open(os.devnull, "wb") as output:
        os.dup2(errors.fileno(), 2)
        os.dup2(output.fileno(), 1)
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in variables.items()}, MASTER_ADDR="127.0.0.1")
    os.chdir(REPOSITORY)
    forget_disk()
    if prepare is not None:
        prepare()
    sys.exit(main([*flags]))


def _wait_for(ranks: Sequence[ForkServerProcess], limit_s: float) -> list[str]:
    """Wait until all ranks have ended, or a limit is over. Return the names of those that still run."""
    until = time.monotonic() + limit_s
    running = {rank.sentinel: rank for rank in ranks}
    while running and (left := until - time.monotonic()) > 0:
        for sentinel in wait(list(running), timeout=left):
            if running.pop(sentinel).exitcode:
                until = min(until, time.monotonic() + GRACE_S)
    return [rank.name for rank in running.values()]


def start_forked(*command: str, folder: Path = REPOSITORY, environment: Mapping[str, str] | None = None) -> Forked:
    """Fork a Python command, which does not import the trainer again, and do not wait for it.

    Args:
        command: a Python interpreter with its arguments, or a script with its own.
        folder: to run it in.
        environment: further variables.
    """
    return Forked(_forks(), command, folder, environment or {})


def launch_forked(
    *command: str, folder: Path = REPOSITORY, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Fork a Python command, and wait until it ends. If it does not, it is killed."""
    process = start_forked(*command, folder=folder, environment=environment)
    try:
        _, errors = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
    return subprocess.CompletedProcess(command, process.wait(), stderr=errors)


def launch(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command until it ends."""
    return subprocess.run(command, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT_S)


def alone(*flags: str) -> subprocess.CompletedProcess[str]:
    """Run the trainer without a launcher."""
    return launch(sys.executable, "train/main.py", *flags)


def start_alone(*flags: str) -> subprocess.Popen[str]:
    """Start the trainer without a launcher, and do not wait for it."""
    command = (sys.executable, "train/main.py", *flags)
    return subprocess.Popen(command, cwd=REPOSITORY, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)


def torchrun_command(num_ranks: int, *flags: str, script: str = "train/main.py") -> tuple[str, ...]:
    """Command that starts ranks on this machine with ``torchrun``."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks))
    return (*launcher, script, *flags)


def torchrun(num_ranks: int, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run the trainer with ``torchrun``."""
    return launch(*torchrun_command(num_ranks, *flags))


def deepspeed_command(num_ranks: int, *flags: str, script: str = "train/main.py") -> tuple[str, ...]:
    """Command that starts ranks on this machine with ``deepspeed``."""
    launcher = (str(Path(sys.executable).with_name("deepspeed")), "--master_port", str(free_port()))
    # On CPUs, unlike GPUs, it starts one rank by default.
    count = () if num_ranks == 1 else ("--num_accelerators", str(num_ranks))
    return (*launcher, *count, script, *flags)


def free_port() -> int:
    """A free port of this machine, below those that it gives to connections of other tests."""
    while True:
        port = random.SystemRandom().randrange(20_000, 30_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that is made once per test run, even if several workers need it at the same time."""
    base = factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    out = root / f"launch-{name}"
    with FileLock(root / f"launch-{name}.lock"):
        if not out.exists():
            part = out.with_name(f"{out.name}.part")
            shutil.rmtree(part, ignore_errors=True)  # a failed run must not be resumed
            make(part)
            part.rename(out)
    return out


def run_once(
    factory: pytest.TempPathFactory,
    name: str,
    num_ranks: int,
    *flags: str,
    launcher: Callable[..., subprocess.CompletedProcess[str]] = run_ranks,
) -> Path:
    """The folder of a training run that is made once per test run."""

    def run(out: Path) -> None:
        done = launcher(num_ranks, *flags, "--output_dir", str(out))
        assert done.returncode == 0, done.stderr

    return made_once(factory, name, run)


def resume(
    run: Path,
    out: Path,
    num_ranks: int,
    *flags: str,
    step: int = 2,
    launcher: Callable[..., subprocess.CompletedProcess[str]] = run_ranks,
) -> None:
    """Resume a copy of a run from a checkpoint, as if it had been killed while saving the next one.

    Args:
        run: folder of the run, all of whose steps are logged.
        out: folder of the copy, empty or missing.
        num_ranks: ranks of the resumed run.
        flags: its flags, without the folder.
        step: of the checkpoint.
        launcher: starts the resumed run.
    """
    folder = out / f"checkpoint-{step}"
    shutil.copytree(run / folder.name, folder)
    (out / f"checkpoint-{step + 1}.tmp").mkdir()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    logged_but_not_saved = json.dumps({"step": step + 1, "loss": -1.0})
    (out / "metrics.jsonl").write_text("".join([*lines[:step], f"{logged_but_not_saved}\n"]))
    done = launcher(num_ranks, *flags, "--output_dir", str(out))
    assert done.returncode == 0, done.stderr
    assert f"resuming from {folder}" in done.stderr


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The logged steps of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def read_untimed(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run without its timings."""
    return [{name: value for name, value in record.items() if name not in TIMINGS} for record in read_metrics(run)]


def read_weights(run: Path) -> dict[str, torch.Tensor]:
    """The weights that a run exported."""
    return load_file(run / "final" / "model.safetensors")


def assert_same_run(run: Path, expected: Path) -> None:
    """Two runs have equal metrics and weights, to the bit."""
    assert read_untimed(run) == read_untimed(expected)
    weights, expected_weights = read_weights(run), read_weights(expected)
    assert weights.keys() == expected_weights.keys()
    assert [name for name, weight in weights.items() if not torch.equal(weight, expected_weights[name])] == []


def assert_close_metrics(run: Path, expected: Path, *names: str, rel: float) -> None:
    """Two runs made the same steps of the same data, and the named metrics agree to rounding where they are logged."""
    assert {*names} <= read_metrics(expected)[-1].keys()
    for record, other in zip(read_metrics(run), read_metrics(expected), strict=True):
        for name in ("step", "epoch", "learning_rates", "num_tokens", "num_targets"):
            assert record[name] == other[name]
        for name in names:
            if name in other:
                assert record[name] == pytest.approx(other[name], rel=rel), name


def assert_close_weights(run: Path, expected: Path) -> None:
    """The weights of two runs differ by at most a hundredth of a step of Adam."""
    weights, expected_weights = read_weights(run), read_weights(expected)
    assert weights.keys() == expected_weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(
            weight, expected_weights[name], rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def fingerprint_of(checkpoint: Path) -> str:
    """Fingerprint of the tokenizer of a checkpoint, for shards that it can train on."""
    path = checkpoint / "tokenizer.json"
    return tokenizer_fingerprint(path.read_bytes(), where=str(path))
