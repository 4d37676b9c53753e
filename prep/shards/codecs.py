"""Pixels of a bin -> its pixels member, by one of the three codecs, and JPEG back to planes.

Input: frames (3, H, W) uint8. Output: the member in parts, nothing copied that need not be. Encoding takes no memory
beside a frame's residuals, which are overwritten by the next frame, and what is handed out.

Cost, one core and 1.3 MB of planes (an image of 576 tokens): ``zstd`` about 2 ms, ``jpeg`` about 3 ms, ``raw`` none;
decoding and resizing the image takes 15 to 20 ms. ``docs/benchmarks.md`` has the figures.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import zstandard
from numpy.typing import NDArray
from PIL import Image

from prep.samples.media import Medium
from prep.shards.drift import DRIFT_EVERY, DriftSums
from schemas.annotation import ReasonCode
from schemas.errors import MediaError
from schemas.jpeg import MAX_SIDE, join_streams
from schemas.pixels import encode_residuals
from schemas.qwen import PATCH_SIZE
from storage.pixels import decode_jpeg

# Residuals want entropy coding, not matches: strategy "fast" with long minimum matches, a tiny hash table, and a window
# of one block (128 KiB), so that the compressor's buffers stay in the processor's cache.
_ZSTD = zstandard.ZstdCompressionParameters.from_level(
    1, min_match=7, hash_log=6, window_log=17, strategy=zstandard.STRATEGY_FAST, write_content_size=True
)


class PixelEncoder:
    """Encodes the pixels of the bins of one shard, bin by bin.

    Attributes:
        codec: one of :data:`schemas.codecs.CODECS`.
        drift: what a lossy codec did to the frames measured so far; None with a lossless one.
    """

    def __init__(self, codec: str, jpeg_quality: int | None = None) -> None:
        """Describe an encoder.

        Args:
            codec: one of :data:`schemas.codecs.CODECS`.
            jpeg_quality: for the codec ``jpeg``.
        """
        if (codec == "jpeg") != (jpeg_quality is not None):
            raise ValueError(f"codec {codec} with a JPEG quality of {jpeg_quality}")
        self.codec = codec
        self.drift = DriftSums() if codec == "jpeg" else None
        self._jpeg_quality = jpeg_quality
        self._num_frames = 0
        self._scratch = np.empty(0, dtype=np.uint8)

    def encode(self, frames: Sequence[NDArray[np.uint8]]) -> list[bytes | memoryview]:
        """The pixels member of one bin, in parts that follow one another.

        Args:
            frames: all stored frames, each (3, H, W) uint8 in C order. With the codec ``raw``, the parts are these.
        """
        if self.codec == "raw":
            return [frame.reshape(-1).data for frame in frames]
        if self.codec == "zstd":
            return list(self._compressed(frames))
        return list(join_streams([self._jpeg(frame) for frame in frames]))

    def _compressed(self, frames: Sequence[NDArray[np.uint8]]) -> list[bytes]:
        compressor = zstandard.ZstdCompressor(compression_params=_ZSTD).compressobj(size=sum(f.size for f in frames))
        largest = max((frame.size for frame in frames), default=0)
        if largest > self._scratch.size:
            self._scratch = np.empty(largest, dtype=np.uint8)
        parts: list[bytes] = []
        for frame in frames:
            residuals = self._scratch[: frame.size]
            encode_residuals(frame, residuals.reshape(frame.shape))
            parts.append(compressor.compress(residuals.data))
        return [*parts, compressor.flush()]

    def _jpeg(self, frame: NDArray[np.uint8]) -> bytes:
        assert self.drift is not None
        assert self._jpeg_quality is not None
        stream = encode_jpeg(frame, self._jpeg_quality)
        if self._num_frames % DRIFT_EVERY == 0:
            decoded = np.empty_like(frame)
            decode_jpeg(stream, decoded)
            self.drift.measure(frame, decoded)
        self._num_frames += 1
        return stream


def encode_jpeg(frame: NDArray[np.uint8], quality: int) -> bytes:
    """One frame (3, H, W) uint8 as a baseline JPEG without chroma subsampling."""
    image = Image.merge("RGB", [Image.fromarray(plane) for plane in frame])
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=quality, subsampling="4:4:4")
    return buffer.getvalue()


def require_storable(media: Sequence[Medium], codec: str) -> None:
    """Refuse media that a codec cannot hold, before they are decoded.

    Args:
        media: of a sample.
        codec: of the build.

    Raises:
        MediaError: ``media_too_large``.
    """
    for medium in media if codec == "jpeg" else ():
        height, width = PATCH_SIZE * medium.grid.h, PATCH_SIZE * medium.grid.w
        if max(height, width) > MAX_SIDE:
            raise MediaError(
                ReasonCode.MEDIA_TOO_LARGE,
                f"{medium.name!r} becomes {width}x{height} pixels; a JPEG has at most {MAX_SIDE:,} in a row or column: "
                "lower the greatest number of pixels, or build with --pixels zstd",
            )
