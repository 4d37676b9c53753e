"""Real launches of the trainer in processes of their own, and what they leave."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

from schemas.qwen import tokenizer_fingerprint

REPOSITORY = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
TIMINGS = {"tokens_per_s", "samples_per_s", "step_s", "data_wait_s", "tflops", "max_memory_bytes"}
"""What differs between two runs that are the same."""


def as_flags(settings: Mapping[str, object]) -> list[str]:
    """Settings as the command line has them."""
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def launch(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end."""
    return subprocess.run(command, cwd=REPOSITORY, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)


def alone(*flags: str) -> subprocess.CompletedProcess[str]:
    """The trainer without a launcher."""
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


def deepspeed(*flags: str) -> subprocess.CompletedProcess[str]:
    """One rank by the launcher of DeepSpeed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = (str(Path(sys.executable).with_name("deepspeed")), "--master_port", str(port))
    return launch(*launcher, "train/main.py", *flags)


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The logged steps of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def read_weights(run: Path) -> dict[str, torch.Tensor]:
    """The weights that a run ended with."""
    return load_file(run / "final" / "model.safetensors")


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that is made once a test run, also when several workers ask for it at the same time."""
    base = factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    out = root / f"launch-{name}"
    with FileLock(root / f"launch-{name}.lock"):
        if not out.exists():
            part = out.with_name(f"{out.name}.part")
            make(part)
            part.rename(out)
    return out


def read_untimed(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run without its timings."""
    return [{name: value for name, value in record.items() if name not in TIMINGS} for record in read_metrics(run)]


def fingerprint_of(checkpoint: Path) -> str:
    """Of the tokenizer of a checkpoint, for shards that it can train on."""
    path = checkpoint / "tokenizer.json"
    return tokenizer_fingerprint(path.read_bytes(), where=str(path))
