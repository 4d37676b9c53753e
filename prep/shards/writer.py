"""Writes one shard: bins as tar members, under a temporary name, synced to disk, then renamed.

Input: encoded samples, bin by bin. Output: the tar file and one row of ``bins.parquet`` per bin. Headers have no time,
owner or host, so the same bins give the same bytes. Memory: one bin.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from prep.samples.sample import EncodedSample
from prep.shards.codecs import PixelEncoder
from prep.shards.drift import DriftSums
from schemas.annotation import SampleRef
from schemas.bins import ARRAY_MEMBERS, MEDIA_VIDEO, SAMPLES_MEMBER, TAR_BLOCK, bin_key
from schemas.codecs import PIXELS_MEMBER
from schemas.qwen import IGNORE_INDEX
from schemas.tables import BinRow
from storage.files import naming, temporary_path

_BUFFER_BYTES = 4 << 20
"""Bytes written at once. The page cache keeps them in pages as large, which are read up to four times as fast as pages
of 4 KiB."""

_Parts = list[bytes | memoryview]
"""Contents of a member, in consecutive pieces."""


class ShardWriter:
    """Writes a shard. A context manager; without :meth:`close`, the file is removed at its end.

    Args:
        path: final path of the shard.
        codec: of the pixels, one of :data:`schemas.codecs.CODECS`.
        jpeg_quality: for the codec ``jpeg``.
    """

    def __init__(self, path: Path, codec: str, jpeg_quality: int | None = None) -> None:
        self._path = path
        self._temporary = temporary_path(path)
        self._encoder = PixelEncoder(codec, jpeg_quality)
        self._sha256 = hashlib.sha256()
        self._offset = 0
        self._file: io.BufferedWriter | None = None

    def __enter__(self) -> ShardWriter:
        self._file = io.BufferedWriter(io.FileIO(self._temporary, "wb"), _BUFFER_BYTES)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            try:
                # On a full disk, flushing the rest fails once more.
                with naming(self._path):
                    self._file.close()
            finally:
                self._temporary.unlink(missing_ok=True)

    @property
    def drift(self) -> DriftSums | None:
        """Drift of a lossy codec over the bins so far; None with a lossless codec."""
        return self._encoder.drift

    def write_bin(self, index: int, samples: Sequence[tuple[SampleRef, EncodedSample]]) -> BinRow:
        """Append a bin of at least one sample; returns its row."""
        encoded = [sample for _, sample in samples]
        members = _members(samples)
        members[PIXELS_MEMBER[self._encoder.codec]] = self._encoder.encode(
            [frame for sample in encoded for frame in sample.frames]
        )
        members[SAMPLES_MEMBER] = [msgspec.json.encode([reference for reference, _ in samples])]
        offset, digest = self._offset, xxhash.xxh3_64()
        for name, parts in members.items():
            for part in _tar_member(f"{bin_key(index)}.{name}", parts):
                digest.update(part)
                self._append(part)
        lengths = [int(sample.input_ids.size) for sample in encoded]
        media_types = [kind for sample in encoded for kind in sample.media_types]
        num_videos = sum(kind == MEDIA_VIDEO for kind in media_types)
        return BinRow(
            bin=index,
            offset=offset,
            num_bytes=self._offset - offset,
            xxh3=digest.intdigest(),
            num_tokens=sum(lengths),
            num_targets=sum(int(np.count_nonzero(sample.labels != IGNORE_INDEX)) for sample in encoded),
            num_samples=len(samples),
            num_patches=sum(grid.num_patches for sample in encoded for grid in sample.grids),
            num_images=len(media_types) - num_videos,
            num_videos=num_videos,
            sum_squared_lengths=sum(length * length for length in lengths),
        )

    def close(self) -> tuple[int, str]:
        """Finish the archive, sync it to disk and rename it; returns its size and SHA-256."""
        self._append(bytes(2 * TAR_BLOCK))
        file = self._opened()
        with naming(self._path):
            file.flush()
            os.fsync(file.fileno())
            file.close()
        self._file = None
        self._temporary.replace(self._path)
        return self._offset, self._sha256.hexdigest()

    def _append(self, data: bytes | memoryview) -> None:
        with naming(self._path):
            self._opened().write(data)
        self._sha256.update(data)
        self._offset += len(data)

    def _opened(self) -> io.BufferedWriter:
        if self._file is None:
            raise ValueError("the shard is not open")
        return self._file


def _members(samples: Sequence[tuple[SampleRef, EncodedSample]]) -> dict[str, _Parts]:
    """The arrays of a bin, by member name."""
    encoded = [sample for _, sample in samples]
    boundaries = np.cumsum([0, *(sample.input_ids.size for sample in encoded)])
    arrays: dict[str, NDArray[np.int32] | NDArray[np.uint8]] = {
        "input_ids.npy": np.concatenate([sample.input_ids for sample in encoded]),
        "labels.npy": np.concatenate([sample.labels for sample in encoded]),
        "position_ids.npy": np.concatenate([sample.position_ids for sample in encoded], axis=1),
        "cu_seqlens.npy": boundaries.astype(np.int32),
        "grid_thw.npy": np.asarray([grid for sample in encoded for grid in sample.grids], dtype=np.int32).reshape(
            -1, 3
        ),
        "media_type.npy": np.asarray([kind for sample in encoded for kind in sample.media_types], dtype=np.uint8),
    }
    return {name: [_npy(arrays[name].astype(dtype, copy=False))] for name, dtype in ARRAY_MEMBERS.items()}


def _npy(array: NDArray[np.int32] | NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    return buffer.getvalue()


def _tar_member(name: str, parts: _Parts) -> Iterator[bytes | memoryview]:
    """Header, contents and padding of a member."""
    info = tarfile.TarInfo(name)
    info.size = sum(len(part) for part in parts)
    info.mode = 0o644
    yield info.tobuf(format=tarfile.USTAR_FORMAT)
    yield from parts
    yield bytes(-info.size % TAR_BLOCK)
