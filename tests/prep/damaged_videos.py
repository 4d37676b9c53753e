"""Tiny videos of every codec with a few bits flipped, and what decoding them gives. The same in every run.

``python -m tests.prep.damaged_videos [NUMBER]`` decodes 300 (or NUMBER) of each codec five times and prints a table.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import click
import numpy as np
import xxhash

from prep.media.sandbox import Sandbox
from prep.media.source import MediaSource
from schemas.bins import MEDIA_VIDEO
from schemas.errors import MediaError
from schemas.settings import MediaSettings

SETTINGS = MediaSettings(video_min_frame_pixels=784, video_max_frame_pixels=4 * 784)

CODECS = {
    # name: encoder, file name, container, side in pixels
    "H.264 MP4": ("libx264", "x.mp4", "mp4", 32),
    "H.264 MOV": ("libx264", "x.mov", "mov", 32),
    "HEVC MP4": ("libx265", "x.mp4", "mp4", 32),
    "AV1 MP4": ("libsvtav1", "x.mp4", "mp4", 64),
    "VP8 WebM": ("libvpx", "x.webm", "webm", 32),
    "VP9 WebM": ("libvpx-vp9", "x.webm", "webm", 32),
    "MPEG-4 AVI": ("mpeg4", "x.avi", "avi", 32),
    "MPEG-2 TS": ("mpeg2video", "x.ts", "mpegts", 32),
    "FLV1 FLV": ("flv1", "x.flv", "flv", 32),
    "WMV2 WMV": ("wmv2", "x.wmv", "asf", 32),
    "MJPEG AVI": ("mjpeg", "x.avi", "avi", 32),
}
_QUIET = {"libx265": {"x265-params": "log-level=none:pools=none:frame-threads=1"}}
_NUM_FRAMES = 12
_KEY_INTERVAL = 4


def encoded(codec: str, folder: Path) -> tuple[str, bytes]:
    """Name and content of an intact video: 12 frames, at most 4 from one key frame to the next."""
    encoder, name, container, side = CODECS[codec]
    rng = np.random.default_rng(3)
    view = rng.integers(0, 256, (side // 4 + 6, side // 4 + 6, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    path = folder / name
    with av.open(str(path), "w", format=container, options={"fflags": "+bitexact"}) as file:
        stream = file.add_stream(encoder, rate=Fraction(4), options=_QUIET.get(encoder, {}))
        stream.width, stream.height = side, side
        stream.pix_fmt = "yuvj420p" if encoder == "mjpeg" else "yuv420p"
        stream.gop_size = _KEY_INTERVAL
        stream.codec_context.thread_count = 1
        for index in range(_NUM_FRAMES):
            pixels = np.ascontiguousarray(view[2 * index : 2 * index + side, index : index + side])
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode())
    return name, path.read_bytes()


def flipped(name: str, content: bytes, count: int) -> Iterator[MediaSource]:
    """``count`` copies of a video with 1 to 5 bits flipped in each."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        changed = bytearray(content)
        for position in rng.integers(0, len(content), int(rng.integers(1, 6))).tolist():
            changed[position] ^= 1 << int(rng.integers(0, 8))
        yield MediaSource(name, data=bytes(changed))


def outcome(box: Sandbox, source: MediaSource) -> str:
    """What decoding gives: the backend and a hash of the frames, or the error."""
    try:
        info, frames = box.decode(source, MEDIA_VIDEO, SETTINGS)
    except MediaError as error:
        return f"{error.code.value}: {error.message}"
    return f"{info.backend} {info.grid} {xxhash.xxh3_64_hexdigest(frames)}"


def outcomes(box: Sandbox, sources: Sequence[MediaSource], rounds: int, seed: int = 0) -> list[Counter[str]]:
    """What each source gave in ``rounds`` rounds, every one in another order, so that a decoder meets other memory."""
    rng = np.random.default_rng(seed)
    counts: list[Counter[str]] = [Counter() for _ in sources]
    for _ in range(rounds):
        for index in rng.permutation(len(sources)).tolist():
            counts[index][outcome(box, sources[index])] += 1
    return counts


def main(count: int = 300, rounds: int = 5) -> None:
    """Print, for every codec, how many videos are decoded, and how many not the same each time."""
    unequal = 0
    with tempfile.TemporaryDirectory() as folder:
        for codec in CODECS:
            began = time.monotonic()
            box = Sandbox()
            counts = outcomes(box, list(flipped(*encoded(codec, Path(folder)), count)), rounds)
            box.close()
            num_unequal = sum(len(seen) > 1 for seen in counts)
            num_decoded = sum(not next(iter(seen)).startswith(("media_", "unsupported_", "bad_")) for seen in counts)
            unequal += num_unequal
            click.echo(
                f"{codec:<12}{count:>6} videos, {num_decoded:>4} decoded, {num_unequal} not the same in {rounds} "
                f"rounds ({time.monotonic() - began:.0f} s)"
            )
    sys.exit(unequal > 0)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
