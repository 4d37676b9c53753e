"""Speed of the stream compared with other ways to the same batches: ``python -m tests.benchmarks.stream``.

One run generates a corpus, builds it with both codecs through the command line, and measures in turns, on warm files:

- the stream of the trainer, up to micro-batches ready to copy to the device. It continues from round to round, as in a
  run, so that its memory is allocated once: in a virtual machine fresh memory can cost more than reading;
- reading the same files only: bin by bin into as much memory as the stream keeps ready, and repeatedly into one buffer
  of 1 MiB, which stays in the processor's cache but is useless for training;
- plain ``webdataset`` over the same shards, decoded; then also with pixels decompressed, then with residuals undone;
- LitData and MosaicML Streaming, where they are installed, over the same arrays in their own formats, unchecked
  (Streaming imports torchvision); as they are, with one sample at a time, and with as many samples as the stream keeps
  ready, as tensors. Both leave to the training loop what the stream computes: targets, sample boundaries, windows and
  rotary positions;
- online preprocessing of each sample: open the image, run the Hugging Face image processor, tokenize;
- opening a set of a million bins.

Each figure is the best of several rounds, in seconds of processor time over all threads, so that other load on the
machine has little effect. A run takes about two minutes; ``--samples`` changes the size of the corpus.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import click
import numpy as np
import torch
import webdataset
import zstandard
from PIL import Image, ImageOps
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from storage import read_into
from tests.benchmarks.index import write_many_bins
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.other_formats import OTHER_FORMATS, kept_name, other_formats
from tests.benchmarks.photographs import write_photographs
from tests.benchmarks.turns import Figure, Prepare, Work, measure, run_apart
from train.batches.stream import BinStream
from train.order.dealing import DataOrder
from train.shards.index import ShardIndex, open_shards
from train.shards.reader import ReadSettings

REPOSITORY = Path(__file__).resolve().parents[2]
CODECS = ("raw", "zstd")
NUM_HELD = 8
"""Micro-batches of a step, and prefetched ones: so many the stream keeps ready."""

SIZE = {"shortest_edge": 16 * 28 * 28, "longest_edge": 576 * 28 * 28}


class Stream:
    """The trainer's stream with one thread and four micro-steps per step; a step is dropped before the next."""

    def __init__(self, folder: Path, verify: str) -> None:
        index = open_shards(folder)
        order = DataOrder(index.cost(), seed=0, global_batch=4)
        layout = {"rank": 0, "world_size": 1, "accumulation": 4, "per_device": 1}
        self._steps = BinStream(index, order, **layout, num_threads=1, prefetch=4, read=ReadSettings(verify=verify))
        self._index = index

    def __call__(self, epochs: int = 6) -> Work:
        """Take as many steps as there are in some epochs, and prepare as many."""
        tokens = num_bytes = 0
        for _ in range(epochs * self._index.num_bins // 4):
            batch = next(self._steps)
            tokens += batch.num_tokens
            num_bytes += int(self._index.num_bytes[list(batch.bins)].sum())
            del batch
        while not all(work.is_done() for work in self._steps._steps):
            time.sleep(0.001)
        return Work(tokens, num_bytes)


class BinByBin:
    """Reads all bins, each by one positional read, into alternating buffers."""

    def __init__(self, folder: Path) -> None:
        self._index = open_shards(folder)
        self._buffers = [bytearray(int(self._index.num_bytes.max())) for _ in range(NUM_HELD)]

    def __call__(self, epochs: int = 6) -> Work:
        """Read the bins of some epochs."""
        num_bytes = 0
        for read in range(epochs * self._index.num_bins):
            location = self._index.locate(read % self._index.num_bins)
            data = memoryview(self._buffers[read % NUM_HELD])[: location.num_bytes]
            num_bytes += read_into(location.path, location.offset, data)
        return Work(epochs * int(self._index.num_tokens.sum()), num_bytes)


def read_over(index: ShardIndex) -> Work:
    """Read all bytes of the shards into one buffer of 1 MiB."""
    buffer = bytearray(1 << 20)
    num_bytes = 0
    for path in index.shard_paths:
        with open(str(path), "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                num_bytes += count
    return Work(int(index.num_tokens.sum()), num_bytes)


def plain_webdataset(index: ShardIndex, *, decompressed: bool = False, undone: bool = False) -> Work:
    """Read all bins with ``webdataset`` and its decoders; the remaining steps follow ``docs/format.md``."""
    tokens = 0
    for sample in webdataset.WebDataset([str(path) for path in index.shard_paths], shardshuffle=False).decode():
        tokens += sample["input_ids.npy"].size
        if not decompressed:
            continue
        planes = np.frombuffer(zstandard.decompress(sample["pixels.zst"]), np.uint8)
        at = 0
        for (t, h, w), kind in zip(sample["grid_thw.npy"].tolist() if undone else (), sample["media_type.npy"]):
            num_frames = 2 * t if kind else 1
            size = num_frames * 3 * 14 * h * 14 * w
            frames = planes[at : at + size].reshape(num_frames, 3, 14 * h, 14 * w)
            frames = frames.cumsum(axis=3, dtype=np.uint8).cumsum(axis=2, dtype=np.uint8)
            frames[:, [0, 2]] += frames[:, [1]]
            at += size
    return Work(tokens, int(index.num_bytes.sum()))


class Online:
    """The work of a data loader that starts from annotations and images."""

    def __init__(self, annotations: Path, checkpoint: Path, num_samples: int) -> None:
        self._folder = annotations.parent
        self._records = [json.loads(line) for line in annotations.read_text().splitlines()[:num_samples]]
        self._processor = Qwen2VLImageProcessorPil.from_pretrained(checkpoint)
        self._tokenizer = PreTrainedTokenizerFast.from_pretrained(checkpoint)

    def __call__(self) -> Work:
        tokens = 0
        for record in self._records:
            with Image.open(self._folder / record["image"]) as opened:
                image = ImageOps.exif_transpose(opened).convert("RGB")
            pixels = self._processor(images=[image], size=SIZE, return_tensors="pt")
            num_pads = int(pixels["image_grid_thw"].prod()) // 4
            question, answer = (turn["value"] for turn in record["conversations"])
            pads = f"<|vision_start|>{'<|image_pad|>' * num_pads}<|vision_end|>"
            text = (
                "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
                f"<|im_start|>user\n{question.replace('<image>', pads)}<|im_end|>\n"
                f"<|im_start|>assistant\n{answer}<|im_end|>\n"
            )
            tokens += self._tokenizer(text, return_tensors="pt")["input_ids"].shape[1]
        return Work(tokens)


def make_shards(folder: Path, num_samples: int) -> tuple[Path, Path]:
    """Generate corpus, tokenizer and both sets of shards; return the annotation file and the checkpoint."""
    annotations = write_photographs(folder / "corpus", num_samples)
    checkpoint = folder / "checkpoint"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    commands = [["-m", "train.tiny_model", str(checkpoint)]]
    for codec in CODECS:
        build = ["build", str(annotations), "--out", str(folder / codec), "--model", str(checkpoint), "--pixels", codec]
        commands.append(["-c", "from prep.cli import main; main()", *build])
    for command in commands:
        subprocess.run([sys.executable, *command], env=environment, cwd=REPOSITORY, check=True, capture_output=True)
    return annotations, checkpoint


def run(folder: Path, *, num_samples: int, rounds: int, num_bins: int) -> Iterator[tuple[str, float | None]]:
    """Measure everything; yield the lines of a report, comparisons with their ratio."""
    torch.set_num_threads(1)
    annotations, checkpoint = run_apart(make_shards, folder, num_samples)
    others = dict(other_formats(folder / "raw", folder, NUM_HELD))
    figures = measure(contenders(folder) | others, rounds)
    figures |= measure({"online": lambda: Online(annotations, checkpoint, min(num_samples, 32))}, 2)
    raw, zstd = (open_shards(folder / codec) for codec in CODECS)
    planes, num_tokens = int(raw.num_patches.sum()) * 588, int(raw.num_tokens.sum())
    yield f"corpus: {num_samples} images of about a megapixel, {num_tokens:,} tokens, {raw.num_bins} bins", None
    yield f"planes: {planes / 1e6:.0f} MB, as zstd {int(zstd.num_bytes.sum()) / planes:.2f} of that", None
    for name, figure in figures.items():
        speed = f"{figure.bytes_per_s / 1e9:7.2f} GB/s of file" if figure.work.num_bytes else ""
        yield f"{name:<30} {figure.tokens_per_s / 1e6:9.4f} M tokens/s per core {speed}", None
    yield from compare(figures)
    write_many_bins(folder / "many", num_bins)
    start_s = time.perf_counter()
    index = open_shards(folder / "many")
    DataOrder(index.cost(), seed=0, global_batch=256).bins_of_step(0, world_size=64, accumulation=4, per_device=1)
    yield f"start-up with {num_bins:,} bins, seconds", time.perf_counter() - start_s


def contenders(folder: Path) -> dict[str, Prepare]:
    """The ways to read the two sets of shards."""

    def files(read: Callable[..., Work], codec: str, **options: bool) -> Prepare:
        return lambda: partial(read, open_shards(folder / codec), **options)

    return {
        "raw": lambda: Stream(folder / "raw", "always"),
        "raw, unchecked": lambda: Stream(folder / "raw", "never"),
        "files, bin by bin": lambda: BinByBin(folder / "raw"),
        "files, into one buffer": files(read_over, "raw"),
        "webdataset raw": files(plain_webdataset, "raw"),
        "zstd": lambda: Stream(folder / "zstd", "always"),
        "webdataset zstd": files(plain_webdataset, "zstd"),
        "webdataset zstd, decompressed": files(plain_webdataset, "zstd", decompressed=True),
        "webdataset zstd, undone": files(plain_webdataset, "zstd", decompressed=True, undone=True),
    }


def compare(figures: dict[str, Figure]) -> Iterator[tuple[str, float]]:
    """Yield the ratios of interest."""

    def tokens(name: str, other: str) -> float:
        return figures[name].tokens_per_s / figures[other].tokens_per_s

    for name in ("files, bin by bin", "files, into one buffer"):
        yield f"raw against {name}", figures["raw"].bytes_per_s / figures[name].bytes_per_s
    yield "raw against plain webdataset", tokens("raw", "webdataset raw")
    for name in (kept_name(name, num_kept) for name in OTHER_FORMATS for num_kept in (0, NUM_HELD)):
        if name in figures:
            yield f"raw against {name}", tokens("raw", name)
            yield f"raw, unchecked, against {name}", tokens("raw, unchecked", name)
    unchecked, files = figures["raw, unchecked"], figures["files, bin by bin"]
    yield "raw, unchecked, against files, bin by bin", unchecked.bytes_per_s / files.bytes_per_s
    yield "raw, unchecked, against plain webdataset", tokens("raw, unchecked", "webdataset raw")
    yield "zstd against plain webdataset, decompressed", tokens("zstd", "webdataset zstd, decompressed")
    yield "zstd against plain webdataset, residuals undone", tokens("zstd", "webdataset zstd, undone")
    yield "raw against online", tokens("raw", "online")
    yield "zstd against online", tokens("zstd", "online")


@click.command(name="python -m tests.benchmarks.stream")
@click.option("--samples", type=click.IntRange(min=8), default=256, show_default=True, help="Images of the corpus.")
@click.option("--rounds", type=click.IntRange(min=1), default=7, show_default=True)
@click.option(
    "--bins", type=click.IntRange(min=1), default=1_000_000, show_default=True, help="Bins of the start-up measurement."
)
@click.option("--work", type=click.Path(path_type=Path), help="Folder for files.  [default: a temporary folder]")
def main(samples: int, rounds: int, bins: int, work: Path | None) -> None:
    """Compare the stream with other ways to the same batches."""
    click.echo(describe_machine("numpy", "torch", "transformers", "webdataset", "zstandard", "xxhash", "pillow"))
    with contextlib.ExitStack() as stack:
        folder = work or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vlprep-bench-")))
        for line, ratio in run(folder, num_samples=samples, rounds=rounds, num_bins=bins):
            click.echo(line if ratio is None else f"{line:<50} {ratio:8.2f}")


if __name__ == "__main__":
    main()
