"""Where the processor time of a build goes: samples of the stacks of worker and decoder, by ``perf``.

Builds by one worker (the pictures of the comparison, document pages, large pictures, clips, texts) -> a table each:
shares of the samples whose stack goes through the libraries that do the work that nobody can save (Pillow with
libjpeg, FFmpeg, the tokenizer), and of all others, by the library or the caller. What starts once (interpreter,
imports, tokenizer, decoder) is measured by a build of a single record of the kind, subtracted and stated. Samples are
of processor time, so that waiting for a busy core is not in.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np
from PIL import Image

from tests.benchmarks.clips import write_clips
from tests.benchmarks.pages import write_pages
from tests.benchmarks.photographs import photograph
from tests.benchmarks.validation import llava_record

_NUM_PAGES = 160
_NUM_LARGE = 80
_LARGE = (1728, 2304)
_NUM_CLIPS = 24
_NUM_TEXTS = 20_000
_RATE = 199
_STACK_BYTES = 16384

_GROUPS = (
    ("Pillow, libjpeg", r"_imaging|libjpeg|/pillow\.libs/|/pillow_simd\.libs/"),
    ("FFmpeg (decord, PyAV)", r"decord|libav|libsw"),
    ("tokenizer", r"tokenizers\."),
    ("zstd", r"zstd|zstandard"),
    ("checksums", r"libcrypto|_hashlib|_sha2|xxhash"),
    ("Parquet", r"libarrow|libparquet|pyarrow"),
    ("msgspec", r"/msgspec/"),
    ("numpy: residuals, planes, positions, labels", r"/numpy/"),
    ("the kernel: files, pipes, memory", r"\[kernel"),
)
LIBRARIES = ("Pillow, libjpeg", "FFmpeg (decord, PyAV)", "tokenizer")


def _annotate(media: Sequence[Path], kind: str, question: str, answer: str) -> Path:
    """Write annotations beside media: one exchange about each."""
    turns = [{"from": "human", "value": f"<{kind}>\n{question}"}, {"from": "gpt", "value": answer}]
    path = media[0].with_name("annotations.jsonl")
    path.write_text("".join(json.dumps({kind: file.name, "conversations": turns}) + "\n" for file in media))
    return path


def _write_pages(folder: Path) -> Path:
    return _annotate(write_pages(folder, _NUM_PAGES), "image", "What does it say?", "Nothing of note.")


def _write_large_pictures(folder: Path) -> Path:
    """Pictures of 4 megapixels, as scanned pages and telephones have them."""
    folder.mkdir()
    drawn = photograph(np.random.default_rng(0), *_LARGE)
    paths = [folder / f"{number}.jpg" for number in range(_NUM_LARGE)]
    for number, path in enumerate(paths):
        Image.fromarray(np.roll(drawn, (37 * number, 101 * number), axis=(0, 1))).save(path, quality=90)
    return _annotate(paths, "image", "What is this?", "A photograph.")


def _write_clips(folder: Path) -> Path:
    return _annotate(write_clips(folder, _NUM_CLIPS), "video", "What happens?", "The camera moves.")


def _write_texts(folder: Path) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    path = folder / "annotations.jsonl"
    with path.open("wb") as file:
        for number in range(_NUM_TEXTS):
            record = json.loads(llava_record(rng, number))
            del record["image"]
            record["conversations"][0]["value"] = record["conversations"][0]["value"].removeprefix("<image>\n")
            file.write(json.dumps(record).encode() + b"\n")
    return path


def _samples(annotations: Path, media_root: Path, folder: Path, model: Path) -> Counter[str]:
    """Build under perf; returns samples by what they are for."""
    if shutil.which("perf") is None:
        raise click.ClickException("--profile needs perf (linux-perf, linux-tools)")
    data = folder / f"{annotations.parent.name}-{annotations.stem}.perf"
    # With addresses at random, perf cannot follow the stacks of a child that was started by vfork, as the decoder is.
    command = [
        "setarch",
        "--addr-no-randomize",
        "perf",
        "record",
        "--freq",
        str(_RATE),
        "--call-graph",
        f"dwarf,{_STACK_BYTES}",
        "--output",
        str(data),
    ]
    command += ["--", sys.executable, "-c", "from prep.cli import main; main()", "build", str(annotations)]
    command += ["--media-root", str(media_root), "--model", str(model), "--max-length", "8192", "--workers", "1"]
    done = subprocess.run([*command, "--out", str(data.with_suffix(""))], capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    script = ["perf", "script", "--input", str(data), "--fields", "ip,sym,dso"]
    stacks = subprocess.run(script, check=True, capture_output=True, text=True).stdout.split("\n\n")
    data.unlink()
    return Counter(_group(stack) for stack in stacks if stack.strip())


def _group(stack: str) -> str:
    return next((name for name, pattern in _GROUPS if re.search(pattern, stack)), "Python")


def profile_builds(pictures: Path, media_root: Path, folder: Path, model: Path) -> None:
    """Build pictures, pages, large pictures, clips and texts under perf and print where the time goes."""
    pages, large = _write_pages(folder / "pages"), _write_large_pictures(folder / "large")
    clips, texts = _write_clips(folder / "clips"), _write_texts(folder / "texts")
    for name, path, root in (
        ("pictures", pictures, media_root),
        ("document pages", pages, pages.parent),
        ("large pictures", large, large.parent),
        ("clips", clips, clips.parent),
        ("texts", texts, texts.parent),
    ):
        single = path.with_name("single.jsonl")
        single.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
        once = _samples(single, root, folder, model)
        # What is measured but once cannot be told from noise: a group may have fewer samples in the longer build.
        found = Counter(
            {group: max(number - once[group], 0) for group, number in _samples(path, root, folder, model).items()}
        )
        inside = sum(found[group] for group in LIBRARIES)
        click.echo(
            f"\n{name}: {inside / found.total():.1%} of {found.total() / _RATE:.1f} s in {', '.join(LIBRARIES)} "
            f"({once.total() / _RATE:.1f} s more for what starts once)"
        )
        for group, number in found.most_common():
            click.echo(f"  {number / found.total():>6.1%}  {group}")
