"""A model of real size, from shards to an exported checkpoint, on a CPU: ``python -m tests.benchmarks.real_size``.

Writes a checkpoint of the 3B with random bfloat16 weights and shards of a few samples. Then, for the merger alone
(``--tune_mm_mlp``) and for LoRA: a dry run, two training steps with export, and ``from_pretrained`` of what was
exported. Prints seconds and peak memory of every process, the memory that the dry run works out, and sizes of files.
Nothing is learned; it shows that names, shapes, memory and files of a real size fit together.

Needs 24 GiB of memory and 25 GB of disk. Cost: a dry run and two steps are some forty passes of a 3B over one bin:
minutes on two cores with ``--max-length 128``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch
import xxhash
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.utils import logging as transformers_logging

from demo.qwen_tokenizer import write_json, write_tokenizer_files
from demo.tiny_model import preprocessor_config
from tests.benchmarks.gpu.corpus import build_shards, open_bins, write_corpus
from tests.benchmarks.gpu.scale import SMOKE, official_config
from tests.benchmarks.machine import describe_machine
from train.memory.terms import GIB
from train.model.pretrained import load_model
from train.run.run_dir import ADAPTER_DIR, FINAL_DIR

REPOSITORY = Path(__file__).resolve().parents[2]
SIZE = "3B"
NUM_STEPS = 2
NUM_SAMPLES = 12
BLOCK = 1 << 22
"""Random values that fill all weights, again and again: drawing 3.75e9 of them would take minutes."""

MERGER = "model.visual.merger."

RUNS = {
    "merger": ["--tune_mm_llm", "False", "--tune_mm_mlp", "True"],
    "LoRA": ["--lora_enable", "--lora_r", "8", "--lora_alpha", "16"],
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """A process that succeeded.

    Attributes:
        seconds: wall time.
        cpu_s: processor time over all threads.
        peak_bytes: largest resident set.
        log: what it wrote to stderr.
    """

    seconds: float
    cpu_s: float
    peak_bytes: int
    log: str

    @property
    def figures(self) -> str:
        """All but the log."""
        return f"{self.cpu_s:.0f} s of processor time, {self.seconds:.0f} s, peak {self.peak_bytes / GIB:.2f} GiB"


def run(*command: str) -> Done:
    """Run a Python program and measure it.

    Raises:
        ClickException: it fails.
    """
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "DS_ACCELERATOR": "cpu"}
    start_s = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL, stderr=log
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        text = log.read()
    if process.returncode:
        raise click.ClickException(f"{' '.join(command)} ended with {process.returncode}:\n{text[-3000:]}")
    return Done(
        seconds=time.perf_counter() - start_s,
        cpu_s=usage.ru_utime + usage.ru_stime,
        peak_bytes=usage.ru_maxrss * 1024,
        log=text,
    )


def write_checkpoint(out: Path) -> None:
    """Write a complete checkpoint with random bfloat16 weights, which keep the scale of their input."""
    out.mkdir(parents=True)
    write_tokenizer_files(out, None)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration._from_config(official_config(SIZE), dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    model.tie_weights()
    values = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            scaled = (values / parameter[0].numel() ** 0.5).to(torch.bfloat16)
            for part in parameter.view(-1).split(BLOCK):
                part.copy_(scaled[: part.numel()])
    model.save_pretrained(out)
    write_json(out / "preprocessor_config.json", preprocessor_config())


def folder_bytes(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def fingerprints(checkpoint: Path) -> dict[str, str]:
    """Load a model as a user does, which fails if it is not complete, and hash its weights."""
    model = load_model(checkpoint, dtype=torch.bfloat16, attn_implementation="sdpa")
    weights = model.state_dict().items()
    return {name: xxhash.xxh3_128_hexdigest(weight.view(torch.uint8).numpy()) for name, weight in weights}


def train(name: str, base: Path, shards: Path, out: Path) -> None:
    """Dry run, two steps with export."""
    command = ["train/main.py", "--shards", str(shards), "--model_name_or_path", str(base), "--output_dir", str(out)]
    command += ["--bf16", "--max_steps", str(NUM_STEPS), "--per_device_train_batch_size", "1"]
    command += ["--gradient_accumulation_steps", "1", "--learning_rate", "1e-2", "--warmup_ratio", "0", *RUNS[name]]
    dry = run(*command, "--dry_run")
    estimates = re.findall(r"([\d.]+) GiB +device, peak", dry.log)
    click.echo(f"{name}\n  dry run: {dry.figures}")
    click.echo(f"  train.memory: {estimates[0]} GiB for weights, gradients, states and activations")
    done = run(*command)
    click.echo(f"  {NUM_STEPS} steps and export: {done.figures}")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    click.echo(
        f"  losses {', '.join(format(line['loss'], '.4f') for line in lines)}; {lines[-1]['step_s']:.1f} s a step"
    )
    for part in (FINAL_DIR, ADAPTER_DIR, *sorted(path.name for path in out.glob("checkpoint-*"))):
        if (out / part).exists():
            click.echo(f"  {part}: {folder_bytes(out / part) / GIB:.3f} GiB")


def compare(name: str, base: dict[str, str], out: Path) -> None:
    """Load what was exported, and compare its weights with those that the run started from.

    Raises:
        ClickException: a frozen weight changed, or no trained one did.
    """
    start_s = time.perf_counter()
    final = fingerprints(out / FINAL_DIR)
    changed = sorted(weight for weight in final if final[weight] != base[weight])
    if not changed or (name == "merger" and not all(weight.startswith(MERGER) for weight in changed)):
        raise click.ClickException(f"weights that changed: {changed[:8]}")
    seconds = time.perf_counter() - start_s
    click.echo(f"  from_pretrained: complete, {len(changed)} of {len(final)} tensors changed; {seconds:.0f} s")


@click.command(name="python -m tests.benchmarks.real_size")
@click.option("--max-length", type=click.IntRange(64), default=128, show_default=True, help="Tokens of a bin.")
@click.option("--base", type=click.Path(path_type=Path, exists=True), help="Checkpoint of an earlier run.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where data are written.  [default: a temporary one]")
def main(max_length: int, base: Path | None, folder: Path | None) -> None:
    """Train a 3B with random weights for two steps, on a CPU."""
    transformers_logging.disable_progress_bar()
    click.echo(describe_machine("torch", "transformers", "deepspeed", "peft"))
    with tempfile.TemporaryDirectory(dir=folder, prefix="vlprep-3b-") as name:
        root = Path(name)
        shards = root / "shards"
        if base is None:
            base = root / "base"
            write_checkpoint(base)
        click.echo(f"checkpoint: {folder_bytes(base) / GIB:.2f} GiB")
        corpus = write_corpus(root / "corpus", replace(SMOKE, num_samples=NUM_SAMPLES))
        taken_s = build_shards(corpus, base, shards, max_length)
        index, _ = open_bins(shards)
        click.echo(f"shards: {index.num_bins} bins, {int(index.num_tokens.sum())} tokens, {taken_s:.0f} s")
        weights = fingerprints(base)
        for kind in RUNS:
            out = root / "run"
            train(kind, base, shards, out)
            compare(kind, weights, out)
            shutil.rmtree(out)


if __name__ == "__main__":
    main()
