"""A training step on a GPU, here and in the upstream trainer: ``python -m tests.benchmarks.gpu``.

One call of at most 9 minutes makes 2,000 samples (texts of 60 to 2,000 tokens, JPEG images of 150 to 1,500), builds
shards of them, and trains random models of the 3B (whole steps with AdamW) and the 7B (forward and backward): bins of
4k and 16k tokens, with the vision tower frozen and trained. Five contenders take turns on the same weights and on the
same bins of samples:

- ours with ``varlen``, and ours with ``sdpa``, from shards;
- upstream's padded batches, processed online by 4 workers and by as many as there are cores, with full logits;
- upstream's flattened batches, processed online, with full logits.

The upstream ways run on the attention kernel of ``varlen``, in place of flash-attn. They take the samples of one bin
per step, so that every contender computes the same in the same step.

Figures: tokens per second without padding, samples per second, model FLOPs by the one formula of
:class:`train.model.flops.ModelFlops`, times of steps, share of the time in which the device is busy and its longest gap
(profiler), how often a step waits for the device, waiting for data, peak memory against :mod:`train.memory`, losses of
the same bins; and single kernels. Tables appear as they become complete. A contender that runs out of memory is left
out of the rest of its case. The work runs in a process of its own (:mod:`.parts`). After 8 minutes and 50 seconds it is
killed, and what it measured of its case is printed with the names of the cases that were not reached
(:mod:`.supervisor`). If the process fails before, another one goes on with the cases that are left. ``--smoke`` runs
all of it on a tiny model in seconds, on a CPU too.

What the machine must have: one GPU with 80 GB or more; Python 3.12; 100 GB of memory; ``/dev/shm``
of 15 GB, or 0.9 GB per core, through which worker processes pass pixels; torch 2.11 or newer with CUDA, whose
``varlen_attn`` knows ``window_size`` and ``scale``; numpy, pillow, pyarrow, xxhash, fsspec; and what transformers 5.23
asks for: tokenizers 0.23.1, huggingface_hub 1.31, safetensors 0.8, regex, pyyaml, packaging, tqdm, typer. It needs no
flash-attn, no DeepSpeed (one GPU partitions nothing), no accelerate, no peft and no network. Wheels to carry where they
are missing, 57 MB in all: ``transformers==5.23.0``, ``msgspec``, ``zstandard``, ``click``, ``tenacity``,
``binpacking``, ``av`` (shards record its version; 36 MB), and ``dashscope`` (for the file of the tokenizer; it is never
imported). Install them with ``--no-deps``. The project itself need not be installed: start in its root.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import click

from tests.benchmarks.gpu.supervisor import supervise, work

LIMIT_S = 530.0
"""Seconds of a call, so that it ends within nine minutes."""


@click.command(name="python -m tests.benchmarks.gpu")
@click.option("--smoke", is_flag=True, help="Run everything on a tiny model, in seconds.")
@click.option(
    "--limit-s",
    type=click.FloatRange(min=0),
    default=LIMIT_S,
    show_default=True,
    help="Seconds after which everything ends, with the figures that there are.",
)
@click.option(
    "--checkpoint",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder with tokenizer files.  [default: made]",
)
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Empty folder where data are written.  [default: a temporary folder]",
)
def main(smoke: bool, limit_s: float, checkpoint: Path | None, folder: Path | None) -> None:
    """Compare training steps on a GPU with those of the upstream trainer."""
    until_s = time.monotonic() + limit_s
    if not (smoke or has_gpu()):
        raise click.ClickException("there is no GPU here: --smoke runs a tiny model on the CPU")
    if folder is not None and folder.exists() and any(folder.iterdir()):
        raise click.ClickException(f"--folder {folder} is not empty: give another one")
    with contextlib.ExitStack() as stack:
        data = folder
        if data is None:
            made = tempfile.TemporaryDirectory(prefix="vlprep-gpu-", ignore_cleanup_errors=True)
            data = Path(stack.enter_context(made))
        options = {"smoke": smoke, "folder": data, "checkpoint": checkpoint, "until_s": until_s}
        for line in supervise(partial(work, **options), until_s=until_s):
            click.echo(line)


def has_gpu() -> bool:
    """Whether torch has a GPU."""
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    # What ends the program ends the processes that it has started, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        main()
    except SystemExit as end:
        # Leave even if a process that was killed still waits for a driver: multiprocessing would wait for it.
        sys.stdout.flush()
        os._exit(end.code if isinstance(end.code, int) else 1)
