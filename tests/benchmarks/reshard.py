"""Resharding a checkpoint: the trainer's conversion to the universal form against DeepSpeed's own, by time and disk.

Ranks on CPUs make a checkpoint of random linear layers in bfloat16. Both converters then take turns on it. Time ends
when the files are on the disk; the folder's size is measured twenty times a second.

    python -m tests.benchmarks.reshard --folder DIR [--gigabytes 2.5] [--ranks 4] [--stage 2]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from storage.files import sync
from tests.benchmarks.machine import describe_machine
from train.run import process_group
from train.run.universal import convert

WIDTH = 2048
BYTES_PER_PARAMETER = {1: 14, 2: 14, 3: 12}
"""Of a checkpoint, by ZeRO stage."""


def save(rank: int, ranks: int, port: int, stage: int, num_layers: int, folder: str) -> None:
    """Be a rank that makes one step and saves."""
    import deepspeed

    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, DS_ACCELERATOR="cpu")
    torch.set_num_threads(1)
    config = {
        "train_batch_size": ranks,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage},
        "data_types": {"grad_accum_dtype": "fp32"},
        "zero_allow_untested_optimizer": True,
    }
    with process_group.joined(torch.device("cpu")):
        layers = [torch.nn.Linear(WIDTH, WIDTH, dtype=torch.bfloat16) for _ in range(num_layers)]
        model = torch.nn.Sequential(*layers)
        optimizer = torch.optim.AdamW(model.parameters())
        engine: Any = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        engine.backward(engine(torch.ones(1, WIDTH, dtype=torch.bfloat16)).float().sum())
        engine.step()
        engine.save_checkpoint(folder, tag="engine", save_latest=False)


def make_checkpoint(ranks: int, stage: int, num_layers: int, folder: Path) -> Path:
    """A checkpoint of several ranks, all on this machine."""
    context = multiprocessing.get_context("spawn")
    port = process_group._free_port()
    started = [
        context.Process(target=save, args=(rank, ranks, port, stage, num_layers, str(folder))) for rank in range(ranks)
    ]
    for process in started:
        process.start()
    for process in started:
        process.join()
    if any(process.exitcode for process in started):
        sys.exit("the ranks could not save")
    return folder / "engine"


def by_deepspeed(engine: Path, out: Path) -> None:
    """DeepSpeed's converter with one worker, as the trainer called it before."""
    command = (sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state")
    paths = ("--input_folder", str(engine), "--output_folder", str(out))
    workers = ("--num_extract_workers", "1", "--num_merge_workers", "1")
    subprocess.run([*command, *paths, *workers], check=True, capture_output=True)


def by_trainer(engine: Path, out: Path) -> None:
    """The trainer's conversion."""
    problem = convert(engine, out)
    if problem is not None:
        sys.exit(problem)


CONTENDERS: dict[str, Callable[[Path, Path], None]] = {"DeepSpeed, one worker": by_deepspeed, "trainer": by_trainer}


def size_of(folder: Path) -> int:
    """Bytes that a folder takes on the disk."""
    size = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                size += os.stat(os.path.join(root, name)).st_blocks * 512
            except FileNotFoundError:  # removed meanwhile
                continue
    return size


def processor_s() -> float:
    """Processor time of child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure(convert_to: Callable[[Path, Path], None], engine: Path, out: Path) -> tuple[float, float, int]:
    """Seconds and processor seconds of a conversion, and peak bytes of its folder."""
    shutil.rmtree(out, ignore_errors=True)
    peak, is_done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not is_done.wait(0.05):
            peak = max(peak, size_of(out))

    watcher = threading.Thread(target=watch)
    began, processor_began = time.perf_counter(), processor_s()
    watcher.start()
    try:
        convert_to(engine, out)
        for path in out.rglob("*"):
            sync(path)
        return time.perf_counter() - began, processor_s() - processor_began, max(peak, size_of(out))
    finally:
        is_done.set()
        watcher.join()


def differing_files(out: Path, expected: Path) -> list[str]:
    """Parameters whose files differ between two conversions."""
    paths = {path.relative_to(expected) for path in (expected / "zero").rglob("*.pt")}
    assert paths == {path.relative_to(out) for path in (out / "zero").rglob("*.pt")}
    differing = []
    for path in paths:
        a, b = (torch.load(folder / path, weights_only=False, mmap=True) for folder in (out, expected))
        tensors = [value["param"] if isinstance(value, dict) and "param" in value else value for value in (a, b)]
        if all(isinstance(tensor, torch.Tensor) for tensor in tensors) and not torch.equal(*tensors):
            differing.append(str(path))
    return differing


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="where to write; several times the checkpoint")
    parser.add_argument("--gigabytes", type=float, default=2.5, help="size of the checkpoint")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--stage", type=int, default=2, choices=(1, 2, 3))
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    num_layers = max(1, round(args.gigabytes * 1e9 / BYTES_PER_PARAMETER[args.stage] / WIDTH**2))
    folder = args.folder / "reshard"
    shutil.rmtree(folder, ignore_errors=True)
    engine = make_checkpoint(args.ranks, args.stage, num_layers, folder)
    lines = [
        describe_machine("torch", "deepspeed"),
        f"checkpoint: {size_of(engine) / 1e9:.2f} GB, ZeRO-{args.stage}, {args.ranks} ranks, {2 * num_layers} tensors",
    ]
    outs = {name: folder / f"universal-{index}" for index, name in enumerate(CONTENDERS)}
    for turn in range(args.rounds):
        for name, convert_to in CONTENDERS.items():
            seconds, processor, peak = measure(convert_to, engine, outs[name])
            lines.append(
                f"round {turn}: {name}: {seconds:.1f} s, processor {processor:.1f} s, peak disk {peak / 1e9:.2f} GB"
            )
    differing = differing_files(*reversed(outs.values()))
    lines.append(f"parameters whose files differ: {len(differing)}")
    shutil.rmtree(folder)
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
