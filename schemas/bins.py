"""A bin inside a shard: its members, and the reader that turns its bytes into arrays.

A shard is an uncompressed POSIX (ustar) tar file. The members of a bin follow one another, named
``{bin:08d}.<member>``, so that plain ``webdataset`` sees one sample a bin. ``bins.parquet`` gives offset and length of
that run of members: one positional read brings a whole bin. The arrays of :class:`Bin` are views of the bytes read.

Cost of reading: one walk over eight tar headers (5 us each), independent of the number of tokens; nothing is copied.
"""

from __future__ import annotations

import math
import re
import zlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from schemas.annotation import SampleRef
from schemas.errors import MEND_SHARDS, ShardError
from schemas.pixels import PIXELS_MEMBER
from schemas.qwen import PATCH_SIZE, TEMPORAL_PATCH_SIZE, Grid

TAR_BLOCK = 512

ARRAY_MEMBERS: dict[str, np.dtype[Any]] = {
    "input_ids.npy": np.dtype("<i4"),
    "labels.npy": np.dtype("<i4"),
    "position_ids.npy": np.dtype("<i4"),
    "cu_seqlens.npy": np.dtype("<i4"),
    "grid_thw.npy": np.dtype("<i4"),
    "media_type.npy": np.dtype("u1"),
}
"""Array members in the order they are written, with their dtypes."""

SAMPLES_MEMBER = "samples.json"

_NPY_MAGIC = b"\x93NUMPY\x01\x00"
_NPY_PREFIX = len(_NPY_MAGIC) + 2
_NPY_HEADER = re.compile(rb"\{'descr': '([^']+)', 'fortran_order': (True|False), 'shape': \(([0-9, ]*)\),? ?\} *\n")

MEDIA_IMAGE = 0
MEDIA_VIDEO = 1


def bin_key(index: int) -> str:
    """Key of bin ``index`` inside its shard, as ``webdataset`` sees it."""
    return f"{index:08d}"


def shard_name(index: int) -> str:
    """File name of shard ``index``."""
    return f"bins-{index:05d}.tar"


def stored_frames(grid: Grid, media_type: int) -> int:
    """Frames of a medium in the pixels member: one for an image, two for each temporal step of a video."""
    return 1 if media_type == MEDIA_IMAGE else TEMPORAL_PATCH_SIZE * grid.t


def frame_shape(grid: Grid) -> tuple[int, int, int]:
    """Shape (3, H, W) of one stored frame."""
    return 3, PATCH_SIZE * grid.h, PATCH_SIZE * grid.w


def stored_bytes(grid: Grid, media_type: int) -> int:
    """Bytes of a medium in the decoded pixels member."""
    return stored_frames(grid, media_type) * 3 * PATCH_SIZE * PATCH_SIZE * grid.h * grid.w


@dataclass(frozen=True, kw_only=True, slots=True)
class Bin:
    """One training sequence: several samples one after the other.

    Attributes:
        index: number of the bin in its set of shards.
        input_ids: (L,) int32, no padding.
        labels: (L,) int32, not shifted, -100 where nothing is trained.
        position_ids: (3, L) int32, mRoPE t, h, w; restarts with every sample.
        cu_seqlens: (S+1,) int32, borders of the samples in the bin.
        grid_thw: (M, 3) int32, media in sequence order, in patches of 14 pixels.
        media_type: (M,) uint8, 0 image, 1 video.
        pixels: encoded planes of all media in sequence order, uint8.
        codec: how ``pixels`` is encoded, one of :data:`schemas.pixels.CODECS`.
        samples_json: contents of ``samples.json``; decoded by :meth:`samples`.
    """

    index: int
    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    position_ids: NDArray[np.int32]
    cu_seqlens: NDArray[np.int32]
    grid_thw: NDArray[np.int32]
    media_type: NDArray[np.uint8]
    pixels: NDArray[np.uint8]
    codec: str
    samples_json: bytes

    def samples(self) -> list[SampleRef]:
        """Where the samples come from, in order."""
        return msgspec.json.decode(self.samples_json, type=list[SampleRef])

    def grids(self) -> list[tuple[Grid, int]]:
        """Grid and media type of every medium, in sequence order."""
        return [(Grid(*row), kind) for row, kind in zip(self.grid_thw.tolist(), self.media_type.tolist())]

    @property
    def num_frames(self) -> int:
        """Stored frames of all media."""
        return sum(stored_frames(grid, kind) for grid, kind in self.grids())

    @property
    def num_pixel_bytes(self) -> int:
        """Bytes of the decoded pixels member."""
        return sum(stored_bytes(grid, kind) for grid, kind in self.grids())


def read_bin(data: memoryview | bytes, index: int, *, where: str) -> Bin:
    """Read one bin from the run of tar members that ``bins.parquet`` points at.

    Args:
        data: the bytes of the bin: ``num_bytes`` at ``offset`` of its shard.
        index: number of the bin; the members must carry it as their key.
        where: how to name the place in messages (shard, bin, offset).

    Returns:
        The bin; its arrays are read-only views of ``data``.

    Raises:
        ShardError: the bytes are not a bin of this number and format.
    """
    members = _members(memoryview(data), bin_key(index), where)
    codecs = [codec for codec, member in PIXELS_MEMBER.items() if member in members]
    missing = [name for name in (*ARRAY_MEMBERS, SAMPLES_MEMBER) if name not in members]
    if missing or len(codecs) != 1:
        absent = missing or [" or ".join(PIXELS_MEMBER.values())]
        raise ShardError(f"{where}: member {absent[0]} is missing; found {sorted(members)}. {MEND_SHARDS}")
    arrays = {name: _array(members[name], dtype, f"{where}, {name}") for name, dtype in ARRAY_MEMBERS.items()}
    found = Bin(
        index=index,
        input_ids=arrays["input_ids.npy"],
        labels=arrays["labels.npy"],
        position_ids=arrays["position_ids.npy"],
        cu_seqlens=arrays["cu_seqlens.npy"],
        grid_thw=arrays["grid_thw.npy"],
        media_type=arrays["media_type.npy"],
        pixels=np.frombuffer(members[PIXELS_MEMBER[codecs[0]]], dtype=np.uint8),
        codec=codecs[0],
        samples_json=bytes(members[SAMPLES_MEMBER]),
    )
    _check_shapes(found, where)
    return found


def _members(data: memoryview, key: str, where: str) -> dict[str, memoryview]:
    members: dict[str, memoryview] = {}
    position = 0
    while position < len(data):
        try:
            name, size = _tar_header(bytes(data[position : position + TAR_BLOCK]))
        except ValueError as error:
            raise ShardError(
                f"{where}: no tar header at byte {position} of the bin ({error}). {MEND_SHARDS}"
            ) from error
        start = position + TAR_BLOCK
        if not 0 <= size <= len(data) - start:
            raise ShardError(f"{where}: member {name} is cut short. {MEND_SHARDS}")
        found_key, _, member = name.partition(".")
        if found_key != key:
            raise ShardError(f"{where}: found a member of bin {found_key}, expected {key}. {MEND_SHARDS}")
        members[member] = data[start : start + size]
        position = start + -(-size // TAR_BLOCK) * TAR_BLOCK
    return members


def _tar_header(block: bytes) -> tuple[str, int]:
    """Name and size of a member. The ``tarfile`` module does the same in twenty times the time."""
    if len(block) < TAR_BLOCK or block[257:262] != b"ustar":
        raise ValueError("no ustar header")
    # The checksum is taken with its own eight bytes as spaces. The lower half of Adler-32 is 1 + the sum of the bytes
    # modulo 65521, ten times as fast as a sum in Python; headers sum up to far less.
    stated = int(block[148:156].strip(b" \0"), 8)
    if zlib.adler32(block) & 0xFFFF != (1 + stated - 8 * ord(" ") + sum(block[148:156])) % 65521:
        raise ValueError("bad checksum")
    return block[:100].rstrip(b"\0").decode(), int(block[124:136].strip(b" \0"), 8)


def _array(data: memoryview, dtype: np.dtype[Any], where: str) -> NDArray[Any]:
    start = _NPY_PREFIX + int.from_bytes(data[_NPY_PREFIX - 2 : _NPY_PREFIX], "little")
    try:
        if data[: len(_NPY_MAGIC)] != _NPY_MAGIC:
            raise ValueError("no header of the .npy format, version 1.0")
        description, fortran_order, shape = _npy_header(bytes(data[_NPY_PREFIX:start]))
        if fortran_order or description != dtype.str:
            found = np.dtype(description)
            raise ValueError(f"dtype {found}, Fortran order {fortran_order}; expected {dtype} in C order")
        return np.frombuffer(data, dtype=dtype, count=math.prod(shape), offset=start).reshape(shape)
    except (ValueError, TypeError) as error:
        raise ShardError(f"{where}: not the expected array: {error}. {MEND_SHARDS}") from error


@lru_cache(maxsize=4096)
def _npy_header(header: bytes) -> tuple[str, bool, tuple[int, ...]]:
    """Dtype, Fortran order and shape of an array.

    numpy's own parser compiles the header as Python source: 0.2 ms an array, and before Python 3.13 it fails now and
    then when other threads compile at the same time (github.com/python/cpython/issues/106905).
    """
    found = _NPY_HEADER.fullmatch(header)
    if found is None:
        raise ValueError("no header of the .npy format, version 1.0")
    description, fortran_order, dimensions = (group.decode() for group in found.groups())
    return description, fortran_order == "True", tuple(int(size) for size in dimensions.split(",") if size.strip())


def _check_shapes(found: Bin, where: str) -> None:
    length, num_media = found.input_ids.size, found.media_type.size
    expected: dict[str, tuple[int, ...]] = {
        "input_ids": (length,),
        "labels": (length,),
        "position_ids": (3, length),
        "grid_thw": (num_media, 3),
        "media_type": (num_media,),
        "cu_seqlens": (found.cu_seqlens.size,),
    }
    for name, allowed in expected.items():
        shape = getattr(found, name).shape
        if shape != allowed:
            raise ShardError(f"{where}: {name} has shape {shape}, expected {allowed}. {MEND_SHARDS}")
    borders = found.cu_seqlens
    if borders.size < 2 or borders[0] != 0 or borders[-1] != length or bool(np.any(np.diff(borders) <= 0)):
        raise ShardError(f"{where}: cu_seqlens {borders.tolist()[:8]} do not cut {length} tokens into samples.")
