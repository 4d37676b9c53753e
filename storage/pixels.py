"""The pixels of a bin -> planes: decompressed, or decoded from JPEG.

Cost: decompression, then 0.2 to 0.4 GB/s for undoing residuals; JPEG decodes at 0.3 GB/s on one core (4 ms for an image
of 576 tokens), nearly all of it outside the interpreter lock. Pillow is imported only for JPEG.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Sequence

import numpy as np
import zstandard
from numpy.typing import NDArray

from schemas.bins import Bin, frame_shape, stored_bytes
from schemas.errors import BUILD_AGAIN, COPY_AGAIN, MEND_SHARDS, ConfigError, ShardError
from schemas.jpeg import split_streams
from schemas.pixels import decode_residuals

_DECODER_ERRORS = (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, struct.error)
"""What Pillow raises for damaged streams, and nothing narrower."""


def require_pillow() -> None:
    """Check that JPEG can be decoded.

    Raises:
        ConfigError: Pillow is not installed.
    """
    try:
        import PIL.JpegImagePlugin  # noqa: F401 - only to check that it is installed
    except ImportError as error:
        raise ConfigError(
            "these shards hold pixels as JPEG, which needs Pillow: pip install 'pillow>=12.0', or build the shards "
            "with --pixels zstd."
        ) from error


def decode_jpeg(stream: bytes, out: NDArray[np.uint8]) -> None:
    """Decode a JPEG that :func:`schemas.jpeg.split_streams` accepted into ``out``, (3, H, W) uint8.

    Raises:
        OSError: or another of Pillow's errors: the stream is damaged.
    """
    from PIL.JpegImagePlugin import JpegImageFile

    for plane, band in zip(out, JpegImageFile(io.BytesIO(stream)).split()):
        plane[:] = np.asarray(band)


def decode_jpegs(streams: Sequence[tuple[tuple[int, int, int], bytes]], out: NDArray[np.uint8], where: str) -> None:
    """Decode all frames of a bin.

    Args:
        streams: shape and JPEG of every frame, from :func:`schemas.jpeg.split_streams`.
        out: (num_pixel_bytes,) uint8, receives the planes.
        where: how messages name the bin.

    Raises:
        ShardError: a stream is damaged.
    """
    at = 0
    for frame, (shape, stream) in enumerate(streams):
        end = at + math.prod(shape)
        try:
            decode_jpeg(stream, out[at:end].reshape(shape))
        except _DECODER_ERRORS as error:
            raise ShardError(f"{where}: frame {frame} of its pixels does not decode: {error}. {MEND_SHARDS}") from error
        at = end


def decode_pixels(bin_: Bin, *, where: str) -> NDArray[np.uint8]:
    """All stored frames of a bin, decompressed or decoded; the residuals of ``zstd`` are not undone.

    Args:
        bin_: the bin.
        where: how messages name it.

    Returns:
        ``bin_.num_pixel_bytes`` uint8.

    Raises:
        ShardError: the member does not decode to exactly that many bytes.
    """
    if bin_.codec == "jpeg":
        # Every stream is checked before memory for any frame is allocated.
        streams = split_streams(bin_, where=where)
        pixels = np.empty(bin_.num_pixel_bytes, dtype=np.uint8)
        decode_jpegs(streams, pixels, where)
        return pixels
    expected = bin_.num_pixel_bytes
    if bin_.codec == "zstd":
        try:
            frame = bin_.pixels.data
            size = zstandard.frame_content_size(frame)
            # Nothing is allocated for a size that the grids do not ask for.
            pixels = _decompress(frame) if size == expected else bin_.pixels
        except zstandard.ZstdError as error:
            raise ShardError(f"{where}: the pixels cannot be decompressed: {error}. {COPY_AGAIN}.") from error
    else:
        size, pixels = bin_.pixels.size, bin_.pixels
    if size != expected:
        raise ShardError(f"{where}: the pixels are {size:,} bytes, the grids ask for {expected:,}. {BUILD_AGAIN}.")
    return pixels


def _decompress(frame: memoryview) -> NDArray[np.uint8]:
    """Contents of one zstd frame of known size, with nothing behind it."""
    if zstandard.frame_content_size(frame):
        return np.frombuffer(zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False), dtype=np.uint8)
    # The call above does not read a frame whose header says that it is empty.
    stream = zstandard.ZstdDecompressor().decompressobj()
    content = stream.decompress(frame)
    if content or not stream.eof or stream.unused_data:
        raise zstandard.ZstdError("not one empty frame")
    return np.frombuffer(content, dtype=np.uint8)


def decode_frames(bin_: Bin, *, where: str) -> list[NDArray[np.uint8]]:
    """The stored frames of a bin.

    Returns:
        For every medium in sequence order (frames, 3, H, W) uint8, R G B.

    Raises:
        ShardError: the pixels do not decode to what the grids ask for.
    """
    pixels = decode_pixels(bin_, where=where)
    media: list[NDArray[np.uint8]] = []
    at = 0
    for grid, kind in bin_.grids():
        end = at + stored_bytes(grid, kind)
        frames = pixels[at:end].reshape(-1, *frame_shape(grid))
        media.append(np.stack([decode_residuals(frame) for frame in frames]) if bin_.codec == "zstd" else frames)
        at = end
    return media
