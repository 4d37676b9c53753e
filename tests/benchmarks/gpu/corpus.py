"""Samples with the lengths of real ones, and shards of them: a scale -> annotations, JPEG files, sets of shards.

Cost: seconds on many cores. Images are written by threads, shards by ``vlprep build``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from schemas.qwen import FACTOR
from storage.shard_set import read_packed
from tests.benchmarks.gpu.scale import Scale
from tests.benchmarks.photographs import WORDS, photograph
from train.shards.index import ShardIndex, open_shards

REPOSITORY = Path(__file__).resolve().parents[3]
NUM_PHOTOGRAPHS = 8
"""Images that all others are cut from. Each sample has its own cut."""

MAX_ASPECT_RATIO = 2.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """Annotations and their images.

    Attributes:
        annotations: JSONL file; its folder holds the images.
        lines: its lines.
        max_pixels: pixels of the largest image.
    """

    annotations: Path
    lines: tuple[bytes, ...]
    max_pixels: int

    @property
    def media_root(self) -> Path:
        """Folder of the images."""
        return self.annotations.parent


def write_corpus(folder: Path, scale: Scale) -> Corpus:
    """Write samples of one image, one question and one answer each. Lengths are uniform on a logarithmic scale."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    largest = int(np.sqrt(scale.image_tokens[1] * MAX_ASPECT_RATIO)) * FACTOR
    photographs = [photograph(rng, largest, largest) for _ in range(NUM_PHOTOGRAPHS)]
    cuts = [draw_cut(rng, scale, largest) for _ in range(scale.num_samples)]

    def write(index: int) -> None:
        top, left, height, width = cuts[index]
        image = photographs[index % NUM_PHOTOGRAPHS][top : top + height, left : left + width]
        Image.fromarray(np.ascontiguousarray(image)).save(folder / f"{index}.jpg", quality=90)

    with ThreadPoolExecutor() as pool:
        list(pool.map(write, range(scale.num_samples)))
    lines = [json.dumps(_record(rng, scale, index)).encode() for index in range(scale.num_samples)]
    annotations = folder / "annotations.jsonl"
    annotations.write_bytes(b"".join(line + b"\n" for line in lines))
    max_pixels = max(height * width for _, _, height, width in cuts)
    return Corpus(annotations=annotations, lines=tuple(lines), max_pixels=max_pixels)


def draw_cut(rng: np.random.Generator, scale: Scale, largest: int) -> tuple[int, int, int, int]:
    """Top, left, height and width of a cut. Its sides are multiples of a merged patch, so it is not resized."""
    tokens, ratio = _draw(rng, *scale.image_tokens), np.exp(rng.uniform(-1, 1) * np.log(MAX_ASPECT_RATIO))
    rows = max(1, round(float(np.sqrt(tokens * ratio))))
    columns = max(1, min(scale.image_tokens[1], tokens) // rows)
    height, width = (min(side * FACTOR, largest) for side in (rows, columns))
    return int(rng.integers(largest - height + 1)), int(rng.integers(largest - width + 1)), height, width


def _record(rng: np.random.Generator, scale: Scale, index: int) -> dict[str, object]:
    num_words = _draw(rng, *scale.text_tokens)
    num_asked = max(1, int(num_words * rng.uniform(0.1, 0.9)))
    question, answer = (" ".join(rng.choice(WORDS, count)) for count in (num_asked, max(1, num_words - num_asked)))
    turns = [("human", f"<image>\n{question}?"), ("gpt", f"{answer}.")]
    conversations = [{"from": who, "value": text} for who, text in turns]
    return {"id": str(index), "image": f"{index}.jpg", "conversations": conversations}


def _draw(rng: np.random.Generator, low: int, high: int) -> int:
    return int(np.exp(rng.uniform(np.log(low), np.log(high))))


def build_shards(corpus: Corpus, model: Path, out: Path, max_length: int) -> float:
    """Build shards with ``vlprep build``; return the seconds it took.

    Raises:
        RuntimeError: it fails.
    """
    command = [sys.executable, "-c", "from prep.cli import main; main()", "build", str(corpus.annotations)]
    command += ["--out", str(out), "--model", str(model), "--max-length", str(max_length)]
    command += ["--min-pixels", str(FACTOR**2), "--max-pixels", str(corpus.max_pixels)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    start_s = time.perf_counter()
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return time.perf_counter() - start_s


def open_bins(shards: Path) -> tuple[ShardIndex, list[NDArray[np.int64]]]:
    """Open a set of shards; return its index, and the records of every bin in the order of their slots."""
    index = open_shards(shards)
    ledger = read_packed(index.folders[0], names=["bin", "slot", "record"])
    ledger = ledger.sort_by([("bin", "ascending"), ("slot", "ascending")])
    records = ledger["record"].to_numpy().astype(np.int64)
    ends: Sequence[int] = np.cumsum(index.num_samples)[:-1].tolist()
    return index, np.split(records, ends)
