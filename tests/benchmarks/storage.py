"""Cost of pixels on disk and in time, by codec: ``python -m tests.benchmarks.storage``.

Images and videos, decoded and resized as by a build with default settings -> for every codec of ``--pixels``, and for
common image formats: bytes per token, time to encode and to decode a token, PSNR, and encoding as a share of decoding
and resizing. Then the size of the same planes with lossless codings other than ``zstd``.

The sets: generated photographs of about a megapixel, document pages of 2.2 megapixels, a video of 640×360, the drawn
pages of the demo, and the videos of the folder of real media, if that exists beside the repository. The last two are
so small that there is little to decode. ``--images`` adds a folder of your own. Contenders take turns. Each figure is
the best of several rounds (two for the slow file formats) in processor seconds, so that other load on the machine has
little effect. A run takes two to three minutes.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import zstandard
from numpy.typing import NDArray
from PIL import Image

from demo import write_demo
from prep.media.decode import decode
from prep.media.source import MediaSource
from prep.shards.codecs import PixelEncoder
from schemas.bins import MEDIA_IMAGE, MEDIA_VIDEO, Bin
from schemas.pixels import encode_residuals
from schemas.qwen import Grid
from schemas.settings import MediaSettings
from storage.pixels import decode_frames, decode_pixels
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.pages import write_pages
from tests.benchmarks.photographs import write_photographs
from tests.benchmarks.videos import write_videos

REAL_MEDIA = Path(__file__).resolve().parents[3] / "shared" / "data" / "qwen_demo"
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")

Planes = NDArray[np.uint8]
Encoded = list[bytes | memoryview]


@dataclass(frozen=True)
class Corpus:
    """Media as files, and as stored: every medium (frames, 3, H, W)."""

    name: str
    sources: list[tuple[MediaSource, int]]
    media: list[tuple[Grid, int, Planes]]

    @property
    def frames(self) -> list[Planes]:
        return [frame for _, _, frames in self.media for frame in frames]

    @property
    def num_tokens(self) -> int:
        return sum(grid.num_tokens for grid, _, _ in self.media)

    @property
    def num_bytes(self) -> int:
        return sum(frames.size for _, _, frames in self.media)


@dataclass(frozen=True)
class Contender:
    """A way to store frames.

    Attributes:
        encode: frames -> bytes on disk.
        decode: bytes on disk -> what the trainer hands to its device.
        undo: bytes on disk -> frames, on the processor.
        is_file: makes a file of every frame. Slow, so it takes part in two rounds only.
    """

    encode: Callable[[Sequence[Planes]], Encoded]
    decode: Callable[[Corpus, Encoded], Planes]
    undo: Callable[[Corpus, Encoded], Sequence[Planes]]
    is_file: bool = False


def read(name: str, paths: Sequence[Path]) -> Corpus:
    """Decode and resize images and videos, with the default settings."""
    kinds = [MEDIA_VIDEO if path.suffix == ".mp4" else MEDIA_IMAGE for path in paths]
    sources = [(MediaSource(path.name, path), kind) for path, kind in zip(paths, kinds)]
    media = [(source, kind, decode(source, kind, MediaSettings())) for source, kind in sources]
    return Corpus(name, sources, [(facts.grid, kind, frames) for _, kind, (facts, frames) in media])


def stored(corpus: Corpus, codec: str, parts: Encoded) -> Bin:
    """A bin around a pixels member. Only its media matter here."""
    ids = np.zeros(1, dtype=np.int32)
    return Bin(
        index=0,
        input_ids=ids,
        labels=ids,
        position_ids=np.zeros((3, 1), dtype=np.int32),
        cu_seqlens=np.array([0, 1], dtype=np.int32),
        grid_thw=np.array([grid for grid, _, _ in corpus.media], dtype=np.int32),
        media_type=np.array([kind for _, kind, _ in corpus.media], dtype=np.uint8),
        pixels=np.frombuffer(parts[0], dtype=np.uint8),
        codec=codec,
        samples_json=b"[]",
    )


def of_codec(codec: str, quality: int | None = None) -> Contender:
    """A codec of ``--pixels``, with the code of the build and the trainer."""

    def undo(corpus: Corpus, parts: Encoded) -> Sequence[Planes]:
        media = decode_frames(stored(corpus, codec, parts), where="benchmark")
        return [frame for frames in media for frame in frames]

    return Contender(
        encode=lambda frames: PixelEncoder(codec, quality).encode(frames),
        decode=lambda corpus, parts: decode_pixels(stored(corpus, codec, parts), where="benchmark"),
        undo=undo,
    )


def of_pillow(file_format: str, **settings: object) -> Contender:
    """A file format of Pillow, one file per frame."""

    def encode(frames: Sequence[Planes]) -> Encoded:
        return [as_file(Image.merge("RGB", [Image.fromarray(plane) for plane in frame])) for frame in frames]

    def as_file(image: Image.Image) -> bytes:
        buffer = io.BytesIO()
        image.save(buffer, file_format, **settings)
        return buffer.getvalue()

    def undo(corpus: Corpus, parts: Encoded) -> Sequence[Planes]:
        return [np.stack([np.asarray(band) for band in Image.open(io.BytesIO(part)).split()]) for part in parts]

    def flat(corpus: Corpus, parts: Encoded) -> Planes:
        return np.concatenate([frame.ravel() for frame in undo(corpus, parts)])

    return Contender(encode, flat, undo, is_file=True)


CONTENDERS = {
    "zstd": of_codec("zstd"),
    "raw": of_codec("raw"),
    "jpeg, quality 95": of_codec("jpeg", 95),
    "jpeg, quality 85": of_codec("jpeg", 85),
    "PNG": of_pillow("PNG"),
    "PNG, level 1": of_pillow("PNG", compress_level=1),
    "WebP lossless": of_pillow("WEBP", lossless=True),
    "WebP lossless, method 0": of_pillow("WEBP", lossless=True, method=0, quality=0),
}
"""Not QOI, which Pillow writes in Python: some 300 times slower than ``zstd``, and larger."""


@dataclass
class Figure:
    """Best times of a contender in seconds, its size, and the squared error of the decoded frames."""

    num_bytes: int = 0
    encode_s: float = float("inf")
    decode_s: float = float("inf")
    undo_s: float = float("inf")
    squared_error: int = 0

    def time(self, contender: Contender, corpus: Corpus) -> Encoded:
        """Encode and decode the frames, and keep the best times."""
        began = time.process_time()
        parts = contender.encode(corpus.frames)
        encoded = time.process_time()
        if not contender.is_file:
            parts = [b"".join(parts)]
        joined = time.process_time()
        contender.decode(corpus, parts)
        decoded = time.process_time()
        contender.undo(corpus, parts)
        undone = time.process_time()
        self.encode_s = min(self.encode_s, encoded - began)
        self.decode_s = min(self.decode_s, decoded - joined)
        self.undo_s = min(self.undo_s, undone - decoded)
        return parts

    def compare(self, contender: Contender, corpus: Corpus, parts: Encoded) -> None:
        """Record the size, and the error relative to the original frames."""
        self.num_bytes = sum(len(part) for part in parts)
        for original, back in zip(corpus.frames, contender.undo(corpus, parts), strict=True):
            self.squared_error += int(np.square(original.astype(np.int32) - back).sum(dtype=np.int64))


def measure(corpus: Corpus, rounds: int) -> tuple[float, dict[str, Figure]]:
    """Seconds to decode and resize the files, and a figure for every contender."""
    figures = {name: Figure() for name in CONTENDERS}
    prepare_s = float("inf")
    for turn in range(rounds):
        began = time.process_time()
        for source, kind in corpus.sources:
            decode(source, kind, MediaSettings())
        prepare_s = min(prepare_s, time.process_time() - began)
        for name, contender in CONTENDERS.items():
            if turn < 2 or not contender.is_file:
                parts = figures[name].time(contender, corpus)
                if turn == 0:
                    figures[name].compare(contender, corpus, parts)
    return prepare_s, figures


def lines_of(corpus: Corpus, rounds: int) -> Iterator[str]:
    """Lines of the table of one set."""
    prepare_s, figures = measure(corpus, rounds)
    per_token = 1e6 / corpus.num_tokens
    yield (
        f"\n{corpus.name}: {len(corpus.media)} media, {len(corpus.frames)} frames, {corpus.num_tokens:,} tokens, "
        f"{corpus.num_bytes / 1e6:.1f} MB of planes; decoding and resizing {prepare_s * per_token:.1f} us per token"
    )
    yield (
        f"{'':<24} {'bytes/token':>11} {'of raw':>7} {'encode':>8} {'decode':>8} {'to planes':>9} {'PSNR':>7} "
        f"{'encode/prepare':>14}"
    )
    for name, figure in figures.items():
        error = figure.squared_error / corpus.num_bytes
        drift = f"{10 * np.log10(255**2 / error):.1f} dB" if error else "exact"
        yield (
            f"{name:<24} {figure.num_bytes / corpus.num_tokens:11.0f} {figure.num_bytes / corpus.num_bytes:7.3f} "
            f"{figure.encode_s * per_token:8.2f} {figure.decode_s * per_token:8.2f} {figure.undo_s * per_token:9.2f} "
            f"{drift:>7} {figure.encode_s / prepare_s:14.3f}"
        )


# Other lossless codings, compared by size


def green_subtracted(frame: Planes) -> Planes:
    planes = frame.copy()
    planes[[0, 2]] -= frame[1]
    return planes


def neighbours(planes: Planes) -> tuple[NDArray[np.int16], NDArray[np.int16], NDArray[np.int16]]:
    """Left, upper and upper left neighbour of every value, 0 outside the frame."""
    padded = np.pad(planes, ((0, 0), (1, 0), (1, 0))).astype(np.int16)
    return padded[:, 1:, :-1], padded[:, :-1, 1:], padded[:, :-1, :-1]


def median_edge(frame: Planes) -> Planes:
    """Residuals of LOCO-I's predictor (M. Weinberger and others, 1996), as in JPEG-LS. Undone value by value."""
    planes = green_subtracted(frame)
    left, upper, corner = neighbours(planes)
    low, high = np.minimum(left, upper), np.maximum(left, upper)
    predicted = np.where(corner >= high, low, np.where(corner <= low, high, left + upper - corner))
    return (planes - predicted).astype(np.uint8)


def paeth(frame: Planes) -> Planes:
    """Residuals of PNG's fourth filter. Undone value by value."""
    planes = green_subtracted(frame)
    left, upper, corner = neighbours(planes)
    guess = left + upper - corner
    a, b, c = np.abs(guess - left), np.abs(guess - upper), np.abs(guess - corner)
    predicted = np.where((a <= b) & (a <= c), left, np.where(b <= c, upper, corner))
    return (planes - predicted).astype(np.uint8)


def temporal_differences(frames: Sequence[Planes]) -> list[Planes]:
    """Every frame of a video but the first, as the difference to the previous one."""
    return [frames[0], *(later - earlier for earlier, later in itertools.pairwise(frames))]


def by_frame(code: Callable[[Planes], Planes]) -> Callable[[Corpus], list[Planes]]:
    return lambda corpus: [code(frame) for frame in corpus.frames]


def along_rows(frame: Planes) -> Planes:
    return np.diff(green_subtracted(frame), axis=2, prepend=np.uint8(0))


def temporal(corpus: Corpus) -> list[Planes]:
    return [encode_residuals(frame) for _, _, frames in corpus.media for frame in temporal_differences(list(frames))]


def zstd(**changes: int) -> zstandard.ZstdCompressionParameters:
    return zstandard.ZstdCompressionParameters.from_level(
        1, **{"min_match": 7, "hash_log": 6, "window_log": 17, "strategy": 1, **changes}
    )


CODINGS: dict[str, tuple[Callable[[Corpus], list[Planes]], zstandard.ZstdCompressionParameters]] = {
    "as --pixels zstd": (by_frame(encode_residuals), zstd()),
    "difference to the previous frame first": (temporal, zstd()),
    "differences along rows only": (by_frame(along_rows), zstd()),
    "median edge predictor": (by_frame(median_edge), zstd()),
    "Paeth predictor": (by_frame(paeth), zstd()),
    "blocks of 32 KiB": (by_frame(encode_residuals), zstd(window_log=15)),
    "hash table of 2^12": (by_frame(encode_residuals), zstd(hash_log=12)),
    "plain level 1": (by_frame(encode_residuals), zstandard.ZstdCompressionParameters.from_level(1)),
    "plain level 3": (by_frame(encode_residuals), zstandard.ZstdCompressionParameters.from_level(3)),
    "level 19": (by_frame(encode_residuals), zstandard.ZstdCompressionParameters.from_level(19)),
    "unchanged planes, plain level 1": (
        by_frame(lambda frame: frame),
        zstandard.ZstdCompressionParameters.from_level(1),
    ),
}


def lossless_lines(corpora: Sequence[Corpus], rounds: int) -> Iterator[str]:
    """Size of the codings relative to raw, and speed of zstd alone over all sets."""
    yield "\nother lossless codings: size relative to raw; GB/s of zstd alone"
    yield f"{'':<38}" + "".join(f"{corpus.name[:16]:>17}" for corpus in corpora) + f"{'compress':>9}{'decompress':>11}"
    for name, (code, parameters) in CODINGS.items():
        data = [b"".join(plane.tobytes() for plane in code(corpus)) for corpus in corpora]
        compress_s = decompress_s = float("inf")
        for _ in range(1 if name == "level 19" else rounds):
            began = time.process_time()
            packed = [zstandard.ZstdCompressor(compression_params=parameters).compress(planes) for planes in data]
            middle = time.process_time()
            for blob in packed:
                zstandard.ZstdDecompressor().decompress(blob)
            compress_s = min(compress_s, middle - began)
            decompress_s = min(decompress_s, time.process_time() - middle)
        sizes = "".join(f"{len(small) / len(large):17.4f}" for small, large in zip(packed, data))
        total = sum(map(len, data)) / 1e9
        yield f"{name:<38}{sizes}{total / compress_s:9.3f}{total / decompress_s:11.2f}"


def corpora_of(folder: Path, images: Path | None, num_photographs: int) -> list[Corpus]:
    """Write or find the media, then decode and resize them."""
    write_photographs(folder / "photographs", num_photographs)
    write_demo(folder / "demo")
    drawn = sorted((folder / "demo" / "images").iterdir(), key=lambda path: (path.stat().st_size, path.name))
    corpora = [
        read("generated photographs", sorted((folder / "photographs").glob("*.jpg"))),
        read("document pages", write_pages(folder / "pages", num_photographs)),
        read("videos", write_videos(folder / "videos", 1)),
        read("small drawn pages", drawn[-num_photographs:]),
    ]
    if images is not None:
        own = sorted(path for path in images.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)
        corpora.append(read(f"images in {images.name}", own))
    if REAL_MEDIA.is_dir():
        corpora.append(read("small real videos", sorted((REAL_MEDIA / "videos").glob("*.mp4"))))
    return corpora


@click.command(name="python -m tests.benchmarks.storage")
@click.option("--images", type=click.Path(exists=True, file_okay=False, path_type=Path), help="Folder of your own.")
@click.option("--photographs", type=click.IntRange(min=1), default=31, show_default=True, help="Generated images.")
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
def main(images: Path | None, photographs: int, rounds: int) -> None:
    """Measure the cost of pixels by codec."""
    click.echo(describe_machine("numpy", "pillow", "zstandard"))
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vlprep-bench-")))
        corpora = corpora_of(folder, images, photographs)
        for corpus in corpora:
            for line in lines_of(corpus, rounds):
                click.echo(line)
        for line in lossless_lines(corpora, min(rounds, 2)):
            click.echo(line)


if __name__ == "__main__":
    main()
