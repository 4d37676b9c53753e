"""Writes the sets of shards that are kept in the repository, and what a reader must find in them.

``python -m tests.write_stored_set CHECKPOINT`` builds ``tests/data/shards_v1``, ``shards_v1_raw`` and so on, one set
per codec, with the tokenizer of a checkpoint that ``python -m train.tiny_model CHECKPOINT`` wrote. Run it for a new
version of the format only, which has new names: a set that exists stays as it is. The contents come from
:mod:`tests.format_reader`, which shares no code with the programs.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
import tempfile
from pathlib import Path

import msgspec
import numpy as np
from PIL import Image

from schemas.manifest import FORMAT_VERSION
from schemas.settings import BuildSettings, MediaSettings
from tests.format_reader import read_set
from tests.prep.corpus import turn
from tests.prep.finished import build_set
from tests.prep.test_videos import write_video

DATA = Path(__file__).resolve().parent / "data"
SETTINGS = BuildSettings(media=MediaSettings(min_pixels=784, video_min_frame_pixels=784), max_length=512)
CODEC_OF_SUFFIX = {"": "zstd", "_raw": "raw", "_jpeg": "jpeg"}
"""What the name of a set ends with, and the codec of its pixels."""


def squares() -> Image.Image:
    """Six squares of one colour each, in a size that is not resized: (56, 84, 3) uint8."""
    colours = np.random.default_rng(0).integers(0, 256, (2, 3, 3), dtype=np.uint8)
    return Image.fromarray(np.kron(colours, np.ones((28, 28, 1), np.uint8)))


def write_annotations(folder: Path) -> Path:
    """An image, a video, a text, and a record whose image is missing."""
    squares().save(folder / "a.png")
    write_video(folder / "clip.mp4", 8, 2)
    records = [
        {"id": "image", "image": "a.png", "conversations": turn("<image>\nWhat is it?", "Six colours.")},
        {"id": "video", "video": "clip.mp4", "conversations": turn("<video>What happens?", "It gets brighter.")},
        {"id": "text", "conversations": turn("你好", "Hello.")},
        {"id": "missing", "image": "none.png", "conversations": turn("<image>What is it?")},
    ]
    path = folder / "stored.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def contents(folder: Path) -> str:
    """JSON of all bins of a set: arrays as lists, samples, and the SHA-256 of the float32 rows for the model."""
    bins = [
        {
            "bin": page_bin.bin_index,
            "arrays": {name: array.tolist() for name, array in page_bin.arrays.items()},
            "samples": page_bin.samples,
            "num_patches": len(page_bin.pixel_values),
            "pixel_values": sha256(page_bin.pixel_values),
        }
        for page_bin in read_set(folder)
    ]
    return "[\n" + ",\n".join(json.dumps(stored, ensure_ascii=False) for stored in bins) + "\n]\n"


def main(checkpoint: Path) -> None:
    for suffix, codec in CODEC_OF_SUFFIX.items():
        out = DATA / f"shards_v{FORMAT_VERSION}{suffix}"
        if not out.exists():
            write_set(out, checkpoint, msgspec.structs.replace(SETTINGS, pixels=codec))


def write_set(out: Path, checkpoint: Path, settings: BuildSettings) -> None:
    out.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as folder:
        built = build_set(write_annotations(Path(folder)), Path(folder, "set"), checkpoint, settings)
        for name in ("bins-00000.tar", "bins.parquet", "samples.parquet", "manifest.json"):
            shutil.copyfile(built / name, out / name)
    out.with_suffix(".json").write_text(contents(out), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
