"""Reading a bin from its shard and parsing it, for both programs.

A location -> the bytes of the bin, compared with their checksum -> a :class:`~schemas.bins.Bin` whose arrays are views
of those bytes. Every failure names shard, bin and offset.

Cost: one positional read, or one range request; the checksum is taken while the bytes are in the processor's cache.
Parsing walks eight tar headers (5 us each) for any number of tokens, and copies nothing.
"""

from __future__ import annotations

import math
import re
import threading
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from schemas.bins import ARRAY_MEMBERS, MEDIA_IMAGE, MEDIA_VIDEO, SAMPLES_MEMBER, TAR_BLOCK, Bin, bin_key
from schemas.errors import BUILD_AGAIN, COPY_AGAIN, MEND_SHARDS, ShardError
from schemas.pixels import PIXELS_MEMBER
from schemas.qwen import IGNORE_INDEX, IMAGE_PAD, MERGE_SIZE, MERGED_PATCHES, NUM_TOKENS, VIDEO_PAD
from storage.errors import NotThereError
from storage.files import regular_size
from storage.reading import read_into, stat
from storage.request import RetryPolicy
from storage.urls import Location

_NPY_MAGIC = b"\x93NUMPY\x01\x00"
_NPY_PREFIX = len(_NPY_MAGIC) + 2
_NPY_HEADER = re.compile(rb"\{'descr': '([^']+)', 'fortran_order': (True|False), 'shape': \(([0-9, ]*)\),? ?\} *\n")


class BinLocation(NamedTuple):
    """Where a bin lies: ``num_bytes`` at ``offset`` of the shard at ``path``; ``local_bin`` is its number there."""

    path: Location
    offset: int
    num_bytes: int
    xxh3: int
    local_bin: int

    def __str__(self) -> str:
        return f"{self.path}, bin {self.local_bin} at offset {self.offset}"


def read_into_buffer(
    location: BinLocation,
    out: memoryview,
    *,
    verify: bool,
    policy: RetryPolicy | None = None,
    stop_event: threading.Event | None = None,
) -> None:
    """Fill ``out`` with the bytes of a bin.

    Args:
        location: of the bin.
        out: ``num_bytes`` bytes.
        verify: whether to compare their checksum.
        policy: of retries, behind a URL.
        stop_event: once set, no further attempt is made.

    Raises:
        ShardError: the shard is missing, short or unreadable, or the bytes have another checksum.
        VlprepError: the store refuses, or does not answer.
    """
    digest = xxhash.xxh3_64() if verify else None
    try:
        got = read_into(
            location.path,
            location.offset,
            out,
            digest=digest,
            where=location,
            policy=policy,
            stop_event=stop_event,
        )
    except (FileNotFoundError, NotThereError) as error:
        raise ShardError(f"{location}: the shard does not exist. {COPY_AGAIN}.") from error
    except OSError as error:
        raise ShardError(
            f"{location}: cannot be read: {error.strerror or error}. Check that the file system answers and the shard "
            "may be read, then run the same command again."
        ) from error
    if got < location.num_bytes:
        raise ShardError(
            f"{location}: the shard ends after {got} of the bin's {location.num_bytes} bytes. {COPY_AGAIN}."
        )
    if digest is not None:
        check_digest(location, digest.intdigest())


def check_digest(location: BinLocation, xxh3: int) -> None:
    """Compare the XXH3-64 of the bytes of a bin.

    Raises:
        ShardError: it differs.
    """
    if xxh3 != location.xxh3:
        raise ShardError(
            f"{location}: checksum is {xxh3:016x}, expected {location.xxh3:016x}: its bytes have changed, or the shard "
            f"is of another build. {COPY_AGAIN}; `vlprep verify` lists all damage."
        )


def read_bytes(location: BinLocation, *, verify: bool) -> bytearray:
    """Read the bytes of a bin whose location has not been compared with the size of its shard yet.

    Raises:
        ShardError: as :func:`read_into_buffer`.
        VlprepError: the store refuses, or does not answer.
    """
    path, end = location.path, location.offset + location.num_bytes
    try:
        size = regular_size(path) if isinstance(path, Path) else stat(path).num_bytes
    except (FileNotFoundError, NotADirectoryError, NotThereError) as error:
        raise ShardError(f"{location}: the shard does not exist. {COPY_AGAIN}.") from error
    except OSError as error:
        raise ShardError(f"{location}: the shard cannot be read: {error.strerror or error}. {COPY_AGAIN}.") from error
    if not 0 <= location.offset < end:
        raise ShardError(f"{location}: a bin cannot have {location.num_bytes} bytes. {BUILD_AGAIN}.")
    if end > size:
        raise ShardError(f"{location}: the shard ends {end - size} bytes before the bin does. {COPY_AGAIN}.")
    data = bytearray(location.num_bytes)
    read_into_buffer(location, memoryview(data), verify=verify)
    return data


def parse_bin(data: memoryview | bytes | bytearray, index: int, *, where: str) -> Bin:
    """Parse the run of tar members that ``bins.parquet`` points at.

    Args:
        data: the bytes of the bin: ``num_bytes`` at ``offset`` of its shard.
        index: number of the bin; the members must carry it as their key.
        where: how messages name the bin (shard, bin, offset).

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
    parsed = Bin(
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
    _check_shapes(parsed, where)
    return parsed


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
        member_key, _, member = name.partition(".")
        if member_key != key:
            raise ShardError(f"{where}: found a member of bin {member_key}, expected {key}. {MEND_SHARDS}")
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
            raise ValueError(
                f"dtype {np.dtype(description)}, Fortran order {fortran_order}; expected {dtype} in C order"
            )
        return np.frombuffer(data, dtype=dtype, count=math.prod(shape), offset=start).reshape(shape)
    except (ValueError, TypeError, OverflowError) as error:
        raise ShardError(f"{where}: not the expected array: {error}. {MEND_SHARDS}") from error


@lru_cache(maxsize=4096)
def _npy_header(header: bytes) -> tuple[str, bool, tuple[int, ...]]:
    """Dtype, Fortran order and shape of an array.

    numpy's own parser compiles the header as Python source: 0.2 ms an array, and before Python 3.13 it fails now and
    then when other threads compile at the same time (github.com/python/cpython/issues/106905).
    """
    match = _NPY_HEADER.fullmatch(header)
    if match is None:
        raise ValueError("no header of the .npy format, version 1.0")
    description, fortran_order, dimensions = (group.decode() for group in match.groups())
    return description, fortran_order == "True", tuple(int(size) for size in dimensions.split(",") if size.strip())


def _check_shapes(parsed: Bin, where: str) -> None:
    length, num_media = parsed.input_ids.size, parsed.media_type.size
    expected: dict[str, tuple[int, ...]] = {
        "input_ids": (length,),
        "labels": (length,),
        "position_ids": (3, length),
        "grid_thw": (num_media, 3),
        "media_type": (num_media,),
        "cu_seqlens": (parsed.cu_seqlens.size,),
    }
    for name, allowed in expected.items():
        shape = getattr(parsed, name).shape
        if shape != allowed:
            raise ShardError(f"{where}: {name} has shape {shape}, expected {allowed}. {MEND_SHARDS}")
    boundaries = parsed.cu_seqlens
    if boundaries.size < 2 or boundaries[0] != 0 or boundaries[-1] != length or bool(np.any(np.diff(boundaries) <= 0)):
        raise ShardError(
            f"{where}: cu_seqlens {boundaries.tolist()[:8]} do not cut {length} tokens into samples. {MEND_SHARDS}"
        )


def check_samples(parsed: Bin, *, where: str) -> None:
    """Check what training relies on: ids and labels are tokens of the model, no sample is predicted from the one before
    it, and pad tokens fit the media.

    Raises:
        ShardError: the bin breaks such a rule.
    """
    grids: list[list[int]] = parsed.grid_thw.tolist()
    if any(min(grid) < 1 or grid[1] % MERGE_SIZE or grid[2] % MERGE_SIZE for grid in grids):
        raise ShardError(
            f"{where}: grid_thw {grids[:4]} has a grid that is not positive with even rows and columns. "
            "Build the shards again."
        )
    if bool(np.any(parsed.media_type > MEDIA_VIDEO)):
        raise ShardError(
            f"{where}: media_type has {int(parsed.media_type.max())}; allowed: {MEDIA_IMAGE} (image), {MEDIA_VIDEO} "
            "(video). Build the shards again."
        )
    if bool(np.any((parsed.media_type == MEDIA_IMAGE) & (parsed.grid_thw[:, 0] != 1))):
        raise ShardError(f"{where}: grid_thw has an image of several temporal steps. Build the shards again.")
    ids, labels = parsed.input_ids, parsed.labels
    if bool((ids < 0).any() or (ids >= NUM_TOKENS).any()):
        raise ShardError(
            f"{where}: input_ids are {ids.min()} to {ids.max()}; allowed: 0 to {NUM_TOKENS - 1}. Build the shards "
            "again."
        )
    if bool(((labels != IGNORE_INDEX) & (labels != ids)).any()):
        raise ShardError(f"{where}: a label is neither {IGNORE_INDEX} nor the id of its token. Build the shards again.")
    trained_first = parsed.labels[parsed.cu_seqlens[:-1]] != IGNORE_INDEX
    if bool(trained_first.any()):
        raise ShardError(
            f"{where}: the first label of sample {int(trained_first.argmax())} is not {IGNORE_INDEX}: it would be "
            "predicted from the sample before it. Build the shards again."
        )
    num_pads = int(np.count_nonzero((parsed.input_ids == IMAGE_PAD) | (parsed.input_ids == VIDEO_PAD)))
    expected = sum(t * h * w for t, h, w in grids) // MERGED_PATCHES
    if num_pads != expected:
        raise ShardError(
            f"{where}: {num_pads} media pad tokens in input_ids, but its media have {expected}. Build the shards again."
        )
