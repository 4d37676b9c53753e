"""Reading a bin from its shard and parsing it, for both programs.

A location -> the bytes of the bin, compared with their checksum -> a :class:`~schemas.bins.Bin` whose arrays are views
of those bytes. Every failure names shard, bin and offset.

Cost: one positional read, or one range request; the checksum is taken while the bytes are in the processor's cache.
Parsing walks eight tar headers (5 us each) for any number of tokens, and copies nothing.
"""

from __future__ import annotations

import math
import re
import struct
import threading
import zlib
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from schemas.bins import ARRAY_MEMBERS, MEDIA_IMAGE, MEDIA_VIDEO, SAMPLES_MEMBER, TAR_BLOCK, Bin, bin_key
from schemas.codecs import PIXELS_MEMBER
from schemas.errors import BUILD_AGAIN, COPY_AGAIN, MEND_SHARDS, ShardError
from schemas.qwen import IGNORE_INDEX, IMAGE_PAD, MERGE_SIZE, MERGED_PATCHES, NUM_TOKENS, VIDEO_PAD
from storage.errors import NotThereError
from storage.files import regular_size
from storage.reading import read_into, stat
from storage.request import RetryPolicy
from storage.urls import Location

_NPY_MAGIC = b"\x93NUMPY\x01\x00"
_NPY_PREFIX = len(_NPY_MAGIC) + 2
_MAX_NPY_HEADER = 1024
"""Those of the format's arrays have 128 bytes."""

_OTHER_MEMBERS = frozenset((*ARRAY_MEMBERS, SAMPLES_MEMBER))

_TAR_HEADER = struct.Struct("100s24x12s12x8s101x5s250x")
"""Name, size, checksum and magic number of a ustar header."""

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


def parse_bin(data: memoryview | bytes | bytearray, index: int, *, where: object) -> Bin:
    """Parse the run of tar members that ``bins.parquet`` points at.

    Args:
        data: the bytes of the bin: ``num_bytes`` at ``offset`` of its shard.
        index: number of the bin; the members must carry it as their key.
        where: how messages name the bin (shard, bin, offset): a :class:`BinLocation`, or text.

    Returns:
        The bin; its arrays are read-only views of ``data``.

    Raises:
        ShardError: the bytes are not a bin of this number and format.
    """
    members = _members(memoryview(data), bin_key(index), where)
    codec = _codec(members, where)
    ids, labels, positions, boundaries, grids, media_types = [
        _array(members[name], dtype, where, name) for name, dtype in ARRAY_MEMBERS.items()
    ]
    parsed = Bin(
        index=index,
        input_ids=ids,
        labels=labels,
        position_ids=positions,
        cu_seqlens=boundaries,
        grid_thw=grids,
        media_type=media_types,
        pixels=np.frombuffer(members[PIXELS_MEMBER[codec]], dtype=np.uint8),
        codec=codec,
        samples_json=bytes(members[SAMPLES_MEMBER]),
    )
    _check_shapes(parsed, where)
    return parsed


def _members(data: memoryview, key: str, where: object) -> dict[str, memoryview]:
    members: dict[str, memoryview] = {}
    position, num_bytes = 0, len(data)
    while position < num_bytes:
        start = position + TAR_BLOCK
        try:
            name, size = _tar_header(data[position:start])
        except ValueError as error:
            raise ShardError(
                f"{where}: no tar header at byte {position} of the bin ({error}). {MEND_SHARDS}"
            ) from error
        if not 0 <= size <= num_bytes - start:
            raise ShardError(f"{where}: member {name} is cut short. {MEND_SHARDS}")
        member_key, _, member = name.partition(".")
        if member_key != key:
            raise ShardError(f"{where}: found a member of bin {member_key}, expected {key}. {MEND_SHARDS}")
        members[member] = data[start : start + size]
        position = start + -(-size // TAR_BLOCK) * TAR_BLOCK
    return members


def _codec(members: Collection[str], where: object) -> str:
    """The codec of the pixels; no other member is missing."""
    codecs = [codec for codec, member in PIXELS_MEMBER.items() if member in members]
    if len(codecs) != 1 or not _OTHER_MEMBERS.issubset(members):
        missing = [name for name in (*ARRAY_MEMBERS, SAMPLES_MEMBER) if name not in members]
        absent = missing or [" or ".join(PIXELS_MEMBER.values())]
        raise ShardError(f"{where}: member {absent[0]} is missing; found {sorted(members)}. {MEND_SHARDS}")
    return codecs[0]


def _tar_header(block: memoryview) -> tuple[str, int]:
    """Name and size of a member. The ``tarfile`` module does the same in twenty times the time."""
    if len(block) < TAR_BLOCK:
        raise ValueError("no ustar header")
    name, size, stated, magic = _TAR_HEADER.unpack(block)
    if magic != b"ustar":
        raise ValueError("no ustar header")
    # The checksum is taken with its own eight bytes as spaces. The lower half of Adler-32 is 1 + the sum of the bytes
    # modulo 65521, ten times as fast as a sum in Python; headers sum up to far less.
    expected = 1 + int(stated.strip(b" \0"), 8) - 8 * ord(" ") + sum(stated)
    if zlib.adler32(block) & 0xFFFF != expected % 65521:
        raise ValueError("bad checksum")
    return name.rstrip(b"\0").decode(), int(size.strip(b" \0"), 8)


def _array(data: memoryview, dtype: np.dtype[Any], where: object, name: str) -> NDArray[Any]:
    start = _NPY_PREFIX + int.from_bytes(data[_NPY_PREFIX - 2 : _NPY_PREFIX], "little")
    try:
        if start > _MAX_NPY_HEADER:  # headers are kept in memory
            raise ValueError(f"a header of {start} bytes; allowed: at most {_MAX_NPY_HEADER}")
        size, shape = _npy_layout(bytes(data[:start]), dtype)
        array = np.frombuffer(data, dtype=dtype, count=size, offset=start)
        return array if len(shape) == 1 else array.reshape(shape)
    except (ValueError, TypeError, OverflowError) as error:
        raise ShardError(f"{where}, {name}: not the expected array: {error}. {MEND_SHARDS}") from error


@lru_cache(maxsize=4096)
def _npy_layout(header: bytes, dtype: np.dtype[Any]) -> tuple[int, tuple[int, ...]]:
    """Elements and shape of an array of ``dtype``, from its header with the prefix.

    numpy's own parser compiles the header as Python source: 0.2 ms an array, and before Python 3.13 it fails now and
    then when other threads compile at the same time (github.com/python/cpython/issues/106905).
    """
    match = _NPY_HEADER.fullmatch(header, _NPY_PREFIX) if header.startswith(_NPY_MAGIC) else None
    if match is None:
        raise ValueError("no header of the .npy format, version 1.0")
    description, order, dimensions = (group.decode() for group in match.groups())
    if order == "True" or description != dtype.str:
        raise ValueError(f"dtype {np.dtype(description)}, Fortran order {order}; expected {dtype} in C order")
    shape = tuple(int(size) for size in dimensions.split(",") if size.strip())
    return math.prod(shape), shape


def _check_shapes(parsed: Bin, where: object) -> None:
    length, num_media = parsed.input_ids.size, parsed.media_type.size
    boundaries = parsed.cu_seqlens
    shapes = {
        "input_ids": (parsed.input_ids.shape, (length,)),
        "labels": (parsed.labels.shape, (length,)),
        "position_ids": (parsed.position_ids.shape, (3, length)),
        "grid_thw": (parsed.grid_thw.shape, (num_media, 3)),
        "media_type": (parsed.media_type.shape, (num_media,)),
        "cu_seqlens": (boundaries.shape, (boundaries.size,)),
    }
    for name, (shape, allowed) in shapes.items():
        if shape != allowed:
            raise ShardError(f"{where}: {name} has shape {shape}, expected {allowed}. {MEND_SHARDS}")
    # Compared, not subtracted: differences of int32 can wrap around to positive ones.
    is_ascending = boundaries.size > 1 and bool((boundaries[1:] > boundaries[:-1]).all())
    if not is_ascending or boundaries[0] != 0 or boundaries[-1] != length:
        raise ShardError(
            f"{where}: cu_seqlens {boundaries.tolist()[:8]} do not cut {length} tokens into samples. {MEND_SHARDS}"
        )


class Counts(NamedTuple):
    """What a bin holds, in the words of messages."""

    tokens: int
    targets: int
    samples: int
    patches: int
    images: int
    videos: int


def check_samples(parsed: Bin, *, where: object, expected: Counts | None = None) -> None:
    """Check what training relies on: ids and labels are tokens of the model, no sample is predicted from the one before
    it, and pad tokens fit the media.

    Args:
        parsed: the bin.
        where: how messages name it.
        expected: its counts in the index.

    Raises:
        ShardError: the bin breaks such a rule, or has other counts.
    """
    ids, boundaries = parsed.input_ids, parsed.cu_seqlens
    grids: list[list[int]] = parsed.grid_thw.tolist()
    kinds: list[int] = parsed.media_type.tolist()
    is_target = parsed.labels != IGNORE_INDEX
    num_patches = sum([t * h * w for t, h, w in grids])
    if expected is not None:
        counts = Counts(
            tokens=ids.size,
            targets=int(np.count_nonzero(is_target)),
            samples=boundaries.size - 1,
            patches=num_patches,
            images=kinds.count(MEDIA_IMAGE),
            videos=kinds.count(MEDIA_VIDEO),
        )
        _check_counts(counts, expected, where)
    _check_media(grids, kinds, where)
    _check_tokens(parsed, is_target, where)
    num_pads = int(np.count_nonzero((ids == IMAGE_PAD) | (ids == VIDEO_PAD)))
    if num_pads != num_patches // MERGED_PATCHES:
        raise ShardError(
            f"{where}: {num_pads} media pad tokens in input_ids, but its media have {num_patches // MERGED_PATCHES}. "
            "Build the shards again."
        )


def _check_tokens(parsed: Bin, is_target: NDArray[np.bool_], where: object) -> None:
    """Check ids, labels and first labels of samples; ``is_target`` (n,) says which tokens are trained."""
    ids, labels = parsed.input_ids, parsed.labels
    # Negative ids are above all tokens as unsigned integers.
    if ids.view(np.uint32).max() >= NUM_TOKENS:
        raise ShardError(
            f"{where}: input_ids are {ids.min()} to {ids.max()}; allowed: 0 to {NUM_TOKENS - 1}. Build the shards "
            "again."
        )
    if (is_target & (labels != ids)).any():
        raise ShardError(f"{where}: a label is neither {IGNORE_INDEX} nor the id of its token. Build the shards again.")
    trained_first = is_target[parsed.cu_seqlens[:-1]]
    if trained_first.any():
        raise ShardError(
            f"{where}: the first label of sample {int(trained_first.argmax())} is not {IGNORE_INDEX}: it would be "
            "predicted from the sample before it. Build the shards again."
        )


def _check_counts(counts: Counts, expected: Counts, where: object) -> None:
    if counts != expected:
        name, count, allowed = next(row for row in zip(Counts._fields, counts, expected) if row[1] != row[2])
        raise ShardError(f"{where}: holds {count} {name}, the index says {allowed}. Build the shards again.")


def _check_media(grids: list[list[int]], kinds: list[int], where: object) -> None:
    for (t, h, w), kind in zip(grids, kinds):
        if t < 1 or h < 1 or w < 1 or h % MERGE_SIZE or w % MERGE_SIZE:
            raise ShardError(
                f"{where}: grid_thw {grids[:4]} has a grid that is not positive with even rows and columns. "
                "Build the shards again."
            )
        if kind > MEDIA_VIDEO:
            raise ShardError(
                f"{where}: media_type has {max(kinds)}; allowed: {MEDIA_IMAGE} (image), {MEDIA_VIDEO} (video). "
                "Build the shards again."
            )
        if kind == MEDIA_IMAGE and t != 1:
            raise ShardError(f"{where}: grid_thw has an image of several temporal steps. Build the shards again.")
