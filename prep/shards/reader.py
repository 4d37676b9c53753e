"""Opens a finished set of shards: its manifest, its tables, single bins and their pictures.

Input: a folder, or a URL. Output: a :class:`ShardSet`. Opening reads the manifest and ``bins.parquet``; a bin costs one
positional read (two requests behind a URL) and its checksum; its frames cost the decompression and 0.2-0.4 GB/s for
undoing the residuals, or with JPEG its decoding at 0.3 GB/s.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
import zstandard
from numpy.typing import NDArray

import storage
from prep.shards.codecs import DECODER_ERRORS, decode_jpeg
from prep.shards.tables import arrow_schema
from prep.shards.writer import BinRow
from schemas.bins import Bin, frame_shape, read_bin, shard_name, stored_bytes
from schemas.errors import ConfigError, ShardError
from schemas.jpeg import split_streams
from schemas.manifest import MANIFEST_FILE, Manifest, decode_manifest, read_manifest
from schemas.pixels import decode_residuals
from schemas.tables import BINS_COLUMNS, BINS_FILE, SAMPLES_COLUMNS, SAMPLES_FILE
from storage.urls import Location, Url

BUILD_AGAIN = "Remove manifest.json and run the same `vlprep build` again"
COPY_AGAIN = f"Copy it again from where it was built, or r{BUILD_AGAIN[1:]}"


class StoredBin(BinRow, frozen=True, kw_only=True):
    """One row of ``bins.parquet``: where a bin lies and what it holds."""

    shard: int

    @property
    def where(self) -> str:
        """The place, as messages name it."""
        return f"{shard_name(self.shard)}, bin {self.bin} at offset {self.offset}"


class LedgerRow(msgspec.Struct, frozen=True, kw_only=True):
    """What the ledger says of one packed sample."""

    dataset: str
    file: str
    line: int
    record: int
    id: str | None
    bin: int
    slot: int
    num_tokens: int
    num_targets: int
    num_patches: int
    video_backend: str | None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ShardSet:
    """A finished set of shards.

    Attributes:
        folder: where it lies: a folder, or a URL.
        manifest: what it is.
        bins: contents of ``bins.parquet``.
    """

    folder: Location
    manifest: Manifest
    bins: pa.Table

    def row(self, number: int) -> StoredBin:
        """The row of bin ``number``.

        Raises:
            ConfigError: there is no such bin.
        """
        numbers = self.bins.column("bin").to_numpy()
        at = int(np.searchsorted(numbers, number))
        if at == len(numbers) or numbers[at] != number:
            held = f"bins {numbers[0]} to {numbers[-1]}" if len(numbers) else "no bins"
            raise ConfigError(f"{self.folder} has no bin {number}; it holds {held}.")
        return bin_rows(self.bins.slice(at, 1))[0]

    def read(self, number: int) -> Bin:
        """Bin ``number``, its checksum compared.

        Raises:
            ConfigError: there is no such bin.
            ShardError: the shard is missing or damaged.
        """
        row = self.row(number)
        data = read_bytes(self.folder / shard_name(row.shard), row)
        found = xxhash.xxh3_64_intdigest(data)
        if found != row.xxh3:
            raise ShardError(
                f"{self.folder / row.where}: its bytes have XXH3 {found:016x}, {BINS_FILE} says {row.xxh3:016x}. "
                f"{COPY_AGAIN}."
            )
        return read_bin(data, number, where=f"{self.folder / row.where}")

    def packed_in(self, number: int) -> list[LedgerRow]:
        """The ledger's rows of the samples in bin ``number``, by slot.

        Raises:
            ShardError: the ledger is missing or damaged.
        """
        path = self.folder / SAMPLES_FILE
        table = read_table(path, SAMPLES_COLUMNS, filters=[("bin", "=", number)])
        return ledger_rows(table.sort_by("slot"))


def open_set(folder: Location) -> ShardSet:
    """Open a folder or URL with a manifest.

    Raises:
        ShardError: no manifest, or a damaged manifest or table of bins.
        StorageError: the store does not answer.
    """
    manifest = open_manifest(folder)
    return ShardSet(folder=folder, manifest=manifest, bins=read_table(folder / BINS_FILE, BINS_COLUMNS))


def open_manifest(folder: Location) -> Manifest:
    """The manifest of a folder or URL.

    Raises:
        ShardError: there is none, or it is damaged.
        StorageError: the store does not answer.
    """
    if isinstance(folder, Path):
        return read_manifest(folder)
    try:
        data = storage.read(folder / MANIFEST_FILE)
    except storage.NotThereError as error:
        raise ShardError(
            f"{folder} holds no {MANIFEST_FILE}: it is not a complete set of shards. Run the same `vlprep build` again "
            "to complete it, or give the URL that holds the manifest."
        ) from error
    return decode_manifest(data, where=str(folder / MANIFEST_FILE))


def read_table(
    path: Location,
    columns: dict[str, str],
    *,
    names: Sequence[str] | None = None,
    filters: list[tuple[str, str, object]] | None = None,
) -> pa.Table:
    """Read one of the two tables.

    Args:
        path: of the Parquet file; behind a URL, only what is wanted is fetched.
        columns: names and types that it must have, as :mod:`schemas.tables` lists them.
        names: columns to read, or None for all.
        filters: rows to read, as pyarrow takes them, or None for all.

    Raises:
        ShardError: it is missing, damaged, or has other columns.
    """
    try:
        with nullcontext(path) if isinstance(path, Path) else storage.open_file(path) as file:
            found = pq.read_schema(file)
            expected = arrow_schema(columns)
            if not found.equals(expected):
                raise ShardError(
                    f"{path} has other columns than expected: {_difference(found, expected)}. {BUILD_AGAIN}."
                )
            # Threads of pyarrow let go of a Python file some time after the call; where the interpreter ends just then,
            # it aborts (apache/arrow, issue 34314).
            is_local = isinstance(path, Path)
            table = pq.read_table(file, columns=names, filters=filters, use_threads=is_local, pre_buffer=is_local)
        table.validate(full=True)
    except (FileNotFoundError, storage.NotThereError):
        raise ShardError(f"{path} is missing. {COPY_AGAIN}.") from None
    # Names of columns in a damaged file need not be text.
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise ShardError(f"{path} cannot be read as a Parquet table: {reason}. {COPY_AGAIN}.") from error
    return table


def _difference(found: pa.Schema, expected: pa.Schema) -> str:
    types = {field.name: str(field.type) for field in found}
    wrong = [
        f"{field.name} is {types.get(field.name, 'missing')}, not {field.type}"
        for field in expected
        if types.get(field.name) != str(field.type)
    ]
    return "; ".join(wrong) or f"found {', '.join(types)}"


def bin_rows(table: pa.Table) -> list[StoredBin]:
    """Rows of ``bins.parquet`` as structs."""
    return msgspec.convert(table.to_pylist(), list[StoredBin])


def ledger_rows(table: pa.Table) -> list[LedgerRow]:
    """Rows of packed samples of ``samples.parquet`` as structs."""
    return msgspec.convert(table.select(LedgerRow.__struct_fields__).to_pylist(), list[LedgerRow])


def read_bytes(path: Location, row: StoredBin) -> bytes:
    """The bytes of one bin.

    Raises:
        ShardError: the shard is missing or ends too early.
        StorageError: the store does not answer.
    """
    if isinstance(path, Url):
        try:
            _check_span(path, row, storage.stat(path).num_bytes)
        except storage.NotThereError as error:
            raise ShardError(f"{path} is missing. {COPY_AGAIN}.") from error
        return storage.read_range(path, row.offset, row.offset + row.num_bytes)
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise ShardError(f"{path} cannot be opened: {error.strerror}. {COPY_AGAIN}.") from error
    try:
        at, end = row.offset, row.offset + row.num_bytes
        _check_span(path, row, os.fstat(file).st_size)
        parts = []
        # One system call reads at most 2 GiB.
        while at < end and (part := os.pread(file, end - at, at)):
            parts.append(part)
            at += len(part)
    finally:
        os.close(file)
    return b"".join(parts) if len(parts) != 1 else parts[0]


def _check_span(path: Location, row: StoredBin, size: int) -> None:
    end = row.offset + row.num_bytes
    if not 0 <= row.offset < end:
        raise ShardError(f"{path.parent / row.where}: a bin of {row.num_bytes} bytes cannot be. {BUILD_AGAIN}.")
    if end > size:
        raise ShardError(
            f"{path.parent / row.where}: the shard ends {end - size} bytes before the bin does. {COPY_AGAIN}."
        )


def decode_pixels(found: Bin, *, where: str) -> NDArray[np.uint8]:
    """All stored frames of a bin, decompressed or decoded; the residuals of ``zstd`` are not undone.

    Args:
        found: the bin.
        where: how to name it in messages.

    Returns:
        ``found.num_pixel_bytes`` uint8.

    Raises:
        ShardError: the member does not decode to exactly that many bytes.
    """
    if found.codec == "jpeg":
        return _decode_jpegs(found, where)
    expected = found.num_pixel_bytes
    if found.codec == "zstd":
        try:
            frame = found.pixels.data
            size = zstandard.frame_content_size(frame)
            # Nothing is allocated for a size that the grids do not ask for.
            pixels = _decompress(frame) if size == expected else found.pixels
        except zstandard.ZstdError as error:
            raise ShardError(f"{where}: the pixels cannot be decompressed: {error}. {COPY_AGAIN}.") from error
    else:
        size, pixels = found.pixels.size, found.pixels
    if size != expected:
        raise ShardError(f"{where}: the pixels are {size:,} bytes, the grids ask for {expected:,}. {BUILD_AGAIN}.")
    return pixels


def _decompress(frame: memoryview) -> NDArray[np.uint8]:
    """Contents of one zstd frame of known size, with nothing behind it."""
    if zstandard.frame_content_size(frame):
        return np.frombuffer(zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False), dtype=np.uint8)
    # The call above does not look at a frame that says it is empty.
    stream = zstandard.ZstdDecompressor().decompressobj()
    content = stream.decompress(frame)
    if content or not stream.eof or stream.unused_data:
        raise zstandard.ZstdError("not one empty frame")
    return np.frombuffer(content, dtype=np.uint8)


def _decode_jpegs(found: Bin, where: str) -> NDArray[np.uint8]:
    """Planes of all frames; each stream was seen to be a JPEG of its frame's shape before room is made for any."""
    streams = split_streams(found, where=where)
    pixels = np.empty(found.num_pixel_bytes, dtype=np.uint8)
    at = 0
    for number, (shape, stream) in enumerate(streams):
        end = at + math.prod(shape)
        try:
            decode_jpeg(stream, pixels[at:end].reshape(shape))
        except DECODER_ERRORS as error:
            raise ShardError(
                f"{where}: frame {number} of the pixels is no whole JPEG: {error}. {COPY_AGAIN}."
            ) from error
        at = end
    return pixels


def decode_frames(found: Bin, *, where: str) -> list[NDArray[np.uint8]]:
    """Pictures of a bin.

    Returns:
        For every medium in sequence order its stored frames, (frames, 3, H, W) uint8, R G B.

    Raises:
        ShardError: the pixels do not decode to what the grids ask for.
    """
    pixels = decode_pixels(found, where=where)
    media: list[NDArray[np.uint8]] = []
    at = 0
    for grid, kind in found.grids():
        end = at + stored_bytes(grid, kind)
        frames = pixels[at:end].reshape(-1, *frame_shape(grid))
        media.append(np.stack([decode_residuals(frame) for frame in frames]) if found.codec == "zstd" else frames)
        at = end
    return media
