"""What a command costs before its first record: ``python -m tests.benchmarks.startup``.

Three commands on next to no data, each in a fresh process: ``vlprep --help``, ``vlprep build`` of one image with one
worker, ``vlprep validate`` of 16 records with one worker. The figures are seconds of processor time of the command and
of all processes that it starts: the best and the median of several rounds, in which the commands take turns. A round
that is not counted fills the caches of the disk, lets vlprep remember the fingerprint of the tokenizer, and writes
the bytecode that an installation has from the start.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import click
import numpy as np
from PIL import Image

from demo.tiny_model import write_tiny_checkpoint
from tests.benchmarks.machine import describe_machine

NUM_RECORDS = 16
REPOSITORY = Path(__file__).resolve().parents[2]


def _write_records(folder: Path) -> None:
    """``one.json``, a record with an image, and ``16.json``, of images and texts in turns."""
    colours = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(colours).resize((1024, 768)).save(folder / "a.jpg")
    texts = [{"from": "human", "value": "What is this?"}, {"from": "gpt", "value": "An image."}]
    image = {"image": "a.jpg", "conversations": [{**texts[0], "value": "<image>What is this?"}, texts[1]]}
    (folder / "one.json").write_text(json.dumps([image]))
    (folder / f"{NUM_RECORDS}.json").write_text(json.dumps([image, {"conversations": texts}] * (NUM_RECORDS // 2)))


def _processor_seconds(arguments: Sequence[str], bytecode: Path) -> float:
    """Of one run of ``vlprep`` and of its children. ``bytecode`` is the folder that Python keeps it in."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    environment |= {"PYTHONPATH": str(REPOSITORY), "PYTHONPYCACHEPREFIX": str(bytecode), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", "from prep.cli import main; main()", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"vlprep {' '.join(arguments)} exits with {process.returncode}")
    return usage.ru_utime + usage.ru_stime


@click.command()
@click.option("--rounds", type=click.IntRange(min=1), default=7, show_default=True)
def main(rounds: int) -> None:
    """Measure what starts once."""
    click.echo(describe_machine("numpy", "pyarrow", "tokenizers", "pillow"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tiny_checkpoint(folder / "model")
        _write_records(folder)
        build = ["build", str(folder / "one.json"), "--model", str(folder / "model"), "--workers", "1", "--out"]
        validate = ["validate", str(folder / f"{NUM_RECORDS}.json"), "--workers", "1"]
        seconds: dict[str, list[float]] = {"--help": [], "build of one image": [], "validate of 16 records": []}
        for index in range(-1, rounds):
            commands = (["--help"], [*build, str(folder / f"out{index}")], validate)
            costs = [_processor_seconds(command, folder / "bytecode") for command in commands]
            if index >= 0:
                for of_command, cost in zip(seconds.values(), costs):
                    of_command.append(cost)
    click.echo(f"processor seconds, {rounds} rounds\n\n{'':<26}{'best':>8}{'median':>8}")
    for command, of_command in seconds.items():
        click.echo(f"{command:<26}{min(of_command):>8.2f}{median(of_command):>8.2f}")


if __name__ == "__main__":
    main()
