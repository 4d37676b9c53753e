"""Writes one shard: bins as tar members, to a temporary name, checked to disk, then renamed.

Input: encoded samples, bin by bin. Output: the tar file and one row of ``bins.parquet`` a bin. Headers carry no time,
owner or host: the same bins give the same bytes. The writer holds one bin at a time.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import msgspec
import numpy as np
import xxhash
import zstandard
from numpy.typing import NDArray

from prep.sample import EncodedSample
from schemas.annotation import SampleRef
from schemas.bins import ARRAY_MEMBERS, MEDIA_VIDEO, SAMPLES_MEMBER, TAR_BLOCK, bin_key
from schemas.pixels import PIXELS_MEMBER, encode_residuals
from schemas.qwen import IGNORE_INDEX

# Residuals want entropy coding, not matches: strategy "fast" with long minimum matches and a tiny hash table.
_ZSTD = zstandard.ZstdCompressionParameters.from_level(
    1, min_match=7, hash_log=6, strategy=zstandard.STRATEGY_FAST, write_content_size=True
)


class BinRow(msgspec.Struct, frozen=True, kw_only=True):
    """One row of ``bins.parquet``, without the number of the shard."""

    bin: int
    offset: int
    num_bytes: int
    xxh3: int
    num_tokens: int
    num_targets: int
    num_samples: int
    num_patches: int
    num_images: int
    num_videos: int
    sum_squared_lengths: int


class ShardWriter:
    """Writes a shard; use as a context manager, then :meth:`close` to keep the file.

    Args:
        path: final path of the shard.
        codec: ``zstd`` or ``raw``.
    """

    def __init__(self, path: Path, codec: str) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.tmp")
        self._codec = codec
        self._sha256 = hashlib.sha256()
        self._offset = 0
        self._file: io.BufferedWriter | None = None

    def __enter__(self) -> ShardWriter:
        self._file = self._temporary.open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
            self._temporary.unlink(missing_ok=True)

    def write_bin(self, index: int, samples: Sequence[tuple[SampleRef, EncodedSample]]) -> BinRow:
        """Append a bin of at least one sample; return its row."""
        members = _members(samples, self._codec)
        data = b"".join(_tar_member(f"{bin_key(index)}.{name}", content) for name, content in members.items())
        encoded = [sample for _, sample in samples]
        lengths = [int(sample.input_ids.size) for sample in encoded]
        media_types = [kind for sample in encoded for kind in sample.media_types]
        num_videos = sum(kind == MEDIA_VIDEO for kind in media_types)
        row = BinRow(
            bin=index,
            offset=self._offset,
            num_bytes=len(data),
            xxh3=xxhash.xxh3_64_intdigest(data),
            num_tokens=sum(lengths),
            num_targets=sum(int(np.count_nonzero(sample.labels != IGNORE_INDEX)) for sample in encoded),
            num_samples=len(samples),
            num_patches=sum(grid.num_patches for sample in encoded for grid in sample.grids),
            num_images=len(media_types) - num_videos,
            num_videos=num_videos,
            sum_squared_lengths=sum(length * length for length in lengths),
        )
        self._append(data)
        return row

    def close(self) -> tuple[int, str]:
        """End the archive, sync it to disk and give it its name; return its size and SHA-256."""
        self._append(bytes(2 * TAR_BLOCK))
        file = self._opened()
        file.flush()
        os.fsync(file.fileno())
        file.close()
        self._file = None
        self._temporary.replace(self._path)
        return self._offset, self._sha256.hexdigest()

    def _append(self, data: bytes) -> None:
        self._opened().write(data)
        self._sha256.update(data)
        self._offset += len(data)

    def _opened(self) -> io.BufferedWriter:
        if self._file is None:
            raise ValueError("the shard is not open")
        return self._file


def _members(samples: Sequence[tuple[SampleRef, EncodedSample]], codec: str) -> dict[str, bytes]:
    encoded = [sample for _, sample in samples]
    borders = np.cumsum([0, *(sample.input_ids.size for sample in encoded)])
    arrays: dict[str, NDArray[np.int32] | NDArray[np.uint8]] = {
        "input_ids.npy": np.concatenate([sample.input_ids for sample in encoded]),
        "labels.npy": np.concatenate([sample.labels for sample in encoded]),
        "position_ids.npy": np.concatenate([sample.position_ids for sample in encoded], axis=1),
        "cu_seqlens.npy": borders.astype(np.int32),
        "grid_thw.npy": np.asarray([grid for sample in encoded for grid in sample.grids], dtype=np.int32).reshape(
            -1, 3
        ),
        "media_type.npy": np.asarray([kind for sample in encoded for kind in sample.media_types], dtype=np.uint8),
    }
    members = {name: _npy(arrays[name].astype(dtype, copy=False)) for name, dtype in ARRAY_MEMBERS.items()}
    members[PIXELS_MEMBER[codec]] = encode_pixels([frame for sample in encoded for frame in sample.frames], codec)
    members[SAMPLES_MEMBER] = msgspec.json.encode([reference for reference, _ in samples])
    return members


def encode_pixels(frames: Sequence[NDArray[np.uint8]], codec: str) -> bytes:
    """All frames (3, H, W) uint8 of a bin, encoded one after the other: planes as they are, or residuals as one zstd
    frame.
    """
    if codec == "raw":
        return b"".join(frame.tobytes() for frame in frames)
    size = sum(frame.size for frame in frames)
    compressor = zstandard.ZstdCompressor(compression_params=_ZSTD).compressobj(size=size)
    parts = [compressor.compress(encode_residuals(frame).tobytes()) for frame in frames]
    return b"".join([*parts, compressor.flush()])


def _npy(array: NDArray[np.int32] | NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _tar_member(name: str, content: bytes) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    info.mode = 0o644
    padding = -len(content) % TAR_BLOCK
    return info.tobuf(format=tarfile.USTAR_FORMAT) + content + bytes(padding)
