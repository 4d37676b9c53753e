"""Real runs of the trainer in processes of their own, and what they leave.

Importing what a rank needs takes longer than most of these runs. So :func:`run_ranks` forks its ranks from a process
that has imported it and done nothing else; the other functions start the trainer as a user does, with a launcher or
without. What forked ranks cannot show is left to those: ranks whose sets and dictionaries hash differently, and what
happens when an interpreter ends.
"""

from __future__ import annotations

import json
import multiprocessing
import os
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

REPOSITORY = Path(__file__).resolve().parents[2]
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(16 * 2**30),
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""For glibc: what is freed is kept for what comes next, in huge pages. Otherwise the system clears the pages of
hundreds of megabytes of logits (151,936 a target) over and over, almost half of a rank's processor time."""

ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", **KEEP_MEMORY}
TIMINGS = {"tokens_per_s", "samples_per_s", "step_s", "data_wait_s", "tflops", "max_memory_bytes"}
"""What differs between two runs that are the same."""

LIMIT_S, GRACE_S = 300, 60
"""How long a run may take, and how long the other ranks may go on when one has failed."""

IMPORTED = (
    "tests.train.launching",
    "train.main",
    "train.run.loop",
    "train.preflight.dry_run",
    "deepspeed",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # which every run imports, and with it all of torch's compiler
    "peft",
    "pyarrow.dataset",
)
"""What ranks are forked with; one that is not installed is left out."""


def as_flags(settings: Mapping[str, object]) -> list[str]:
    """Settings as the command line has them."""
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def run_ranks(
    num_ranks: int, *flags: str, prepare: Callable[[], object] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the trainer with ranks on this machine to its end. The test fails where a rank does not come to an end.

    Args:
        num_ranks: how many.
        flags: of the trainer.
        prepare: called in each rank before the trainer, a function of a module.

    Returns:
        The first exit code that is not 0, if any, and what all ranks wrote to stderr.
    """
    context, port = _forks(), free_port()
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder, "stderr")
        told.touch()
        ranks: list[ForkServerProcess] = []
        try:
            for number in range(num_ranks):
                args = (number, num_ranks, port, told, prepare, flags)
                rank = context.Process(target=_be_rank, args=args, name=f"rank {number}")
                rank.start()
                ranks.append(rank)
            stuck = _wait_for(ranks)
        finally:
            for rank in ranks:
                rank.kill()
                rank.join()
        errors = told.read_text(encoding="utf-8")
        if stuck:
            pytest.fail(f"{', '.join(stuck)} did not end:\n{errors}")
        code = next((rank.exitcode for rank in ranks if rank.exitcode), 0)
        return subprocess.CompletedProcess(flags, code, stderr=errors)


def _forks() -> ForkServerContext:
    """Start the process that ranks are forked from, where it does not run already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        forkserver.ensure_running()
    return context


def _be_rank(
    number: int, num_ranks: int, port: int, told: Path, prepare: Callable[[], object] | None, flags: Sequence[str]
) -> None:
    """Become a rank as launchers start it."""
    from train.main import main

    with told.open("ab") as errors, open(os.devnull, "wb") as output:
        os.dup2(errors.fileno(), 2)
        os.dup2(output.fileno(), 1)
    places = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": num_ranks, "MASTER_PORT": port}
    os.environ.update({name: str(place) for name, place in places.items()}, MASTER_ADDR="127.0.0.1")
    os.chdir(REPOSITORY)
    if prepare is not None:
        prepare()
    sys.exit(main([*flags]))


def _wait_for(ranks: Sequence[ForkServerProcess]) -> list[str]:
    """Wait until all have ended, or one has failed and others still go on; give the names of these."""
    until = time.monotonic() + LIMIT_S
    running = {rank.sentinel: rank for rank in ranks}
    while running and (left := until - time.monotonic()) > 0:
        for sentinel in wait(list(running), timeout=left):
            if running.pop(sentinel).exitcode:
                until = min(until, time.monotonic() + GRACE_S)
    return [rank.name for rank in running.values()]


def launch(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(command, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True, timeout=LIMIT_S)


def alone(*flags: str) -> subprocess.CompletedProcess[str]:
    """The trainer as a program, without a launcher."""
    return launch(sys.executable, "train/main.py", *flags)


def start_alone(*flags: str) -> subprocess.Popen[str]:
    """The same, without waiting for its end."""
    command = (sys.executable, "train/main.py", *flags)
    return subprocess.Popen(command, cwd=REPOSITORY, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)


def torchrun_command(num_ranks: int, *flags: str) -> tuple[str, ...]:
    """Ranks on this machine by ``torchrun``."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_ranks))
    return (*launcher, "train/main.py", *flags)


def torchrun(num_ranks: int, *flags: str) -> subprocess.CompletedProcess[str]:
    """Run it to its end."""
    return launch(*torchrun_command(num_ranks, *flags))


def deepspeed_command(num_ranks: int, *flags: str) -> tuple[str, ...]:
    """Ranks on this machine by ``deepspeed``."""
    launcher = (str(Path(sys.executable).with_name("deepspeed")), "--master_port", str(free_port()))
    # Of processors, unlike GPUs, it takes one where it is not told.
    number = () if num_ranks == 1 else ("--num_accelerators", str(num_ranks))
    return (*launcher, *number, "train/main.py", *flags)


def deepspeed(*flags: str) -> subprocess.CompletedProcess[str]:
    """One rank by it, to its end."""
    return launch(*deepspeed_command(1, *flags))


def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that is made once a test run, also when several workers ask for it at the same time."""
    base = factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    out = root / f"launch-{name}"
    with FileLock(root / f"launch-{name}.lock"):
        if not out.exists():
            part = out.with_name(f"{out.name}.part")
            shutil.rmtree(part, ignore_errors=True)  # a run that failed must not go on from its checkpoints
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
    """The folder of a run that is made once a test run."""

    def run(out: Path) -> None:
        done = launcher(num_ranks, *flags, "--output_dir", str(out))
        assert done.returncode == 0, done.stderr

    return made_once(factory, name, run)


def go_on(run: Path, out: Path, num_ranks: int, *flags: str, step: int = 2) -> None:
    """Do the steps of a run after a checkpoint once more, as if it had been killed while it saved the next one.

    Args:
        run: folder of the run, all of whose steps are logged.
        out: folder to go on in, empty or not there.
        num_ranks: of the run that goes on.
        flags: its flags, but for the folder.
        step: of the checkpoint.
    """
    folder = out / f"checkpoint-{step}"
    shutil.copytree(run / folder.name, folder)
    (out / f"checkpoint-{step + 1}.tmp").mkdir()
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    logged_but_not_saved = json.dumps({"step": step + 1, "loss": -1.0})
    (out / "metrics.jsonl").write_text("".join([*lines[:step], f"{logged_but_not_saved}\n"]))
    done = run_ranks(num_ranks, *flags, "--output_dir", str(out))
    assert done.returncode == 0, done.stderr
    assert f"resuming from {folder}" in done.stderr


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The logged steps of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def read_untimed(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run without its timings."""
    return [{name: value for name, value in record.items() if name not in TIMINGS} for record in read_metrics(run)]


def read_weights(run: Path) -> dict[str, torch.Tensor]:
    """The weights that a run ended with."""
    return load_file(run / "final" / "model.safetensors")


def assert_same_run(found: Path, expected: Path) -> None:
    """Two runs logged the same and ended with the same weights, to the bit."""
    assert read_untimed(found) == read_untimed(expected)
    weights, found_weights = read_weights(expected), read_weights(found)
    assert found_weights.keys() == weights.keys()
    assert [name for name, weight in weights.items() if not torch.equal(found_weights[name], weight)] == []


def assert_close_metrics(found: Path, expected: Path, *names: str, rel: float) -> None:
    """Two runs made the same steps of the same data, and what else is named agrees to rounding where it is logged."""
    assert {*names} <= read_metrics(expected)[-1].keys()
    for one, other in zip(read_metrics(found), read_metrics(expected), strict=True):
        for name in ("step", "epoch", "learning_rates", "num_tokens", "num_targets"):
            assert one[name] == other[name]
        for name in names:
            if name in other:
                assert one[name] == pytest.approx(other[name], rel=rel), name


def assert_close_weights(found: Path, expected: Path) -> None:
    """Two runs ended with weights that are a hundredth of the way of a step of Adam apart at most."""
    weights, found_weights = read_weights(expected), read_weights(found)
    assert found_weights.keys() == weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(
            found_weights[name], weight, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def fingerprint_of(checkpoint: Path) -> str:
    """Of the tokenizer of a checkpoint, for shards that it can train on."""
    path = checkpoint / "tokenizer.json"
    return tokenizer_fingerprint(path.read_bytes(), where=str(path))
