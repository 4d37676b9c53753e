"""Where the processor time of a build goes: stack samples of worker and decoder, by ``perf``.

Builds by one worker (images, document pages, large images, videos, texts) -> a table for each: the share of samples in
the libraries whose work cannot be avoided (Pillow with libjpeg, the resizing kernel, FFmpeg, the tokenizer), and in
everything else, by library or caller. Start-up (interpreter, imports, tokenizer, decoder) is measured by a build of a
single record of the kind, subtracted and reported. Samples count processor time, so waiting for a busy core is not
included.
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

from tests.benchmarks.pages import write_pages
from tests.benchmarks.photographs import photograph
from tests.benchmarks.validation import llava_record
from tests.benchmarks.videos import write_videos

_NUM_PAGES = 160
_NUM_LARGE = 80
_LARGE = (1728, 2304)
_NUM_VIDEOS = 24
_NUM_TEXTS = 20_000
_RATE = 199
_STACK_BYTES = 16384

_GROUPS = (
    ("resizing kernel", r"_bicubic"),
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
LIBRARIES = ("Pillow, libjpeg", "resizing kernel", "FFmpeg (decord, PyAV)", "tokenizer")


def _annotate(media: Sequence[Path], kind: str, question: str, answer: str) -> Path:
    """Write annotations beside media: one exchange about each."""
    turns = [{"from": "human", "value": f"<{kind}>\n{question}"}, {"from": "gpt", "value": answer}]
    path = media[0].with_name("annotations.jsonl")
    path.write_text("".join(json.dumps({kind: file.name, "conversations": turns}) + "\n" for file in media))
    return path


def _write_pages(folder: Path) -> Path:
    return _annotate(write_pages(folder, _NUM_PAGES), "image", "What does it say?", "Nothing of note.")


def _write_large_images(folder: Path) -> Path:
    """Images of 4 megapixels, like those of scanners and phones."""
    folder.mkdir()
    drawn = photograph(np.random.default_rng(0), *_LARGE)
    paths = [folder / f"{index}.jpg" for index in range(_NUM_LARGE)]
    for index, path in enumerate(paths):
        Image.fromarray(np.roll(drawn, (37 * index, 101 * index), axis=(0, 1))).save(path, quality=90)
    return _annotate(paths, "image", "What is this?", "A photograph.")


def _write_videos(folder: Path) -> Path:
    return _annotate(write_videos(folder, _NUM_VIDEOS), "video", "What happens?", "The camera moves.")


def _write_texts(folder: Path) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    path = folder / "annotations.jsonl"
    with path.open("wb") as file:
        for index in range(_NUM_TEXTS):
            record = json.loads(llava_record(rng, index))
            del record["image"]
            record["conversations"][0]["value"] = record["conversations"][0]["value"].removeprefix("<image>\n")
            file.write(json.dumps(record).encode() + b"\n")
    return path


def _samples(annotations: Path, media_root: Path, folder: Path, model: Path) -> Counter[str]:
    """Build under perf and count the samples by group."""
    if shutil.which("perf") is None:
        raise click.ClickException("--profile needs perf (linux-perf, linux-tools)")
    data = folder / f"{annotations.parent.name}-{annotations.stem}.perf"
    # With randomized addresses, perf cannot follow the stacks of a child started by vfork, such as the decoder.
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


def profile_builds(images: Path, media_root: Path, folder: Path, model: Path) -> None:
    """Build images, pages, large images, videos and texts under perf and print where the time goes."""
    pages, large = _write_pages(folder / "pages"), _write_large_images(folder / "large")
    videos, texts = _write_videos(folder / "videos"), _write_texts(folder / "texts")
    for name, path, root in (
        ("images", images, media_root),
        ("document pages", pages, pages.parent),
        ("large images", large, large.parent),
        ("videos", videos, videos.parent),
        ("texts", texts, texts.parent),
    ):
        single = path.with_name("single.jsonl")
        single.write_bytes(path.read_bytes().splitlines(keepends=True)[0])
        once = _samples(single, root, folder, model)
        # Sampling is noisy: a group may have fewer samples in the longer build.
        samples = Counter(
            {group: max(count - once[group], 0) for group, count in _samples(path, root, folder, model).items()}
        )
        inside = sum(samples[group] for group in LIBRARIES)
        click.echo(
            f"\n{name}: {inside / samples.total():.1%} of {samples.total() / _RATE:.1f} s in {', '.join(LIBRARIES)} "
            f"({once.total() / _RATE:.1f} s more for start-up)"
        )
        for group, count in samples.most_common():
            click.echo(f"  {count / samples.total():>6.1%}  {group}")
