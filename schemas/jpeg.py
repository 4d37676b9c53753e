"""The member ``pixels.jpeg``: a table of sizes, then one JPEG stream per frame.

F sizes as little-endian uint32, then F streams without gaps; F follows from grids and media types. A stream is baseline
JPEG as in JFIF: YCbCr, three components of 8 bits without subsampling, with the height and width of the frame, and only
the segments that decoding needs. This is checked before any decoder sees a stream: the most that a damaged or hostile
member can cause is the decoding of an image of the size in the grids.

Input: a bin. Output: the streams. No pixel is decoded here; a stream costs 20 us and a copy.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np

from schemas.bins import Bin, frame_shape, stored_frames
from schemas.errors import MEND_SHARDS, ShardError

MAX_SIDE = 65_500
"""Most pixels in a row or column that libjpeg encodes and decodes."""

_SIZE = np.dtype("<u4")
_START, _END = b"\xff\xd8", b"\xff\xd9"
_FRAME, _SCAN = b"\xff\xc0", b"\xff\xda"
_SEGMENTS = (b"\xff\xe0", b"\xff\xdb", _FRAME, b"\xff\xc4", _SCAN)
"""JFIF header, quantisation tables, frame, Huffman tables, scan."""
_FRAME_HEADER = struct.Struct(">BHHB9B")
"""Bits, height, width, number of components; of each its number, its sampling factors, its quantisation table."""
_BITS = 8
_COMPONENTS = (1, 2, 3)
_NOT_SUBSAMPLED = (0x11, 0x11, 0x11)


def join_streams(streams: Sequence[bytes]) -> list[bytes]:
    """The member, in parts that follow one another: the table of sizes, then the streams."""
    return [np.array([len(stream) for stream in streams], dtype=_SIZE).tobytes(), *streams]


def split_streams(bin_: Bin, *, where: str) -> list[tuple[tuple[int, int, int], bytes]]:
    """Shape (3, H, W) and stream of every stored frame of a bin whose codec is ``jpeg``.

    Args:
        bin_: the bin.
        where: how messages name the bin.

    Raises:
        ShardError: the sizes do not fill the member, or a stream is not a JPEG of its frame's shape.
    """
    member, num_frames = bin_.pixels, bin_.num_frames
    at = num_frames * _SIZE.itemsize
    if at > member.size:
        raise ShardError(
            f"{where}: pixels.jpeg has {member.size} bytes; the sizes of its {num_frames} frames alone take {at}. "
            f"{MEND_SHARDS}"
        )
    sizes: list[int] = member[:at].view(_SIZE).tolist()
    if at + sum(sizes) != member.size:
        raise ShardError(
            f"{where}: pixels.jpeg has {member.size} bytes, its table of {num_frames} sizes asks for "
            f"{at + sum(sizes)}. {MEND_SHARDS}"
        )
    shapes = [frame_shape(grid) for grid, kind in bin_.grids() for _ in range(stored_frames(grid, kind))]
    streams: list[tuple[tuple[int, int, int], bytes]] = []
    for frame, (size, shape) in enumerate(zip(sizes, shapes)):
        stream = member[at : at + size].tobytes()
        problem = _problem(stream, shape)
        if problem is not None:
            raise ShardError(f"{where}: frame {frame} of pixels.jpeg {problem}. {MEND_SHARDS}")
        streams.append((shape, stream))
        at += size
    return streams


def _problem(stream: bytes, shape: tuple[int, int, int]) -> str | None:
    """What keeps a stream from being a JPEG of this shape, or None."""
    if not stream.startswith(_START):
        return "is not a JPEG"
    at, marker = len(_START), b""
    headers: list[tuple[int, ...]] = []
    while marker != _SCAN:
        marker, length = stream[at : at + 2], int.from_bytes(stream[at + 2 : at + 4], "big")
        if marker not in _SEGMENTS or length < 2:
            return f"has the segment {marker.hex()!r} at byte {at}, which baseline JPEG does not need"
        if marker == _FRAME:
            if length != 2 + _FRAME_HEADER.size or at + 2 + length > len(stream):
                return f"has a frame header of {length} bytes; that of three components has {2 + _FRAME_HEADER.size}"
            headers.append(_FRAME_HEADER.unpack_from(stream, at + 4))
        at += 2 + length
    if stream[at - length + 2 : at - length + 3] != bytes([len(_COMPONENTS)]):
        return "begins with a scan of some components; all three are stored in one"
    if len(headers) != 1:
        return f"has {len(headers)} frame headers, not one"
    bits, height, width, components, *sampling = headers[0]
    if (components, height, width) != shape:
        return f"is {width}x{height} pixels in {components} components, its grid asks for {shape[2]}x{shape[1]} in 3"
    if bits != _BITS or (*sampling[0::3], *sampling[1::3]) != (*_COMPONENTS, *_NOT_SUBSAMPLED):
        return "is not YCbCr of 8 bits without subsampling"
    return None if stream.endswith(_END) else "has no end"
