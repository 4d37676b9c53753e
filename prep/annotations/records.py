"""Reads annotation files of every format record by record, in bounded memory.

Two steps. :func:`index_file` walks a file once and cuts it into chunks of whole records, counting annotations and
lines. :func:`read_chunk` reads one chunk again and yields its records as JSON text, each with its line and index;
chunks are independent, so that any worker can take any of them.

========================================  ===========================================================
``.json``, ``.jsonl`` (by content)        :mod:`prep.annotations.json_records`: chunks are byte ranges
the same with ``.gz`` or ``.zst``         decompressed once into the spool folder, then as above
``.parquet``                              :mod:`prep.annotations.parquet_records`: chunks are ranges of rows
a URL of any of these                     fetched once into the spool folder, then as above
========================================  ===========================================================
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import xxhash
import zstandard

import storage
from prep.annotations import json_records, parquet_records
from prep.annotations.chunks import Chunk, Record
from prep.annotations.file_faults import whole_file_fault
from prep.annotations.file_kinds import folder_fault, kind_fault
from schemas.errors import ConfigError, VlprepError
from storage.files import temporary_path
from storage.urls import Location, Url

_BLOCK_BYTES = 4 << 20
_ZSTD_BYTES = 1 << 10
"""Compressed bytes passed to zstd at a time. At its highest ratio, 1 to 32768, they become 32 MiB."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileIndex:
    """What one walk over an annotation file finds out.

    Attributes:
        num_bytes: of the file.
        xxh3: XXH3-128 of the file.
        modified_ns: time of its last change; of what was fetched, that of the copy.
        num_records: annotations in it.
        data: the file that the chunks refer to: the file itself, or what was fetched or decompressed from it.
        chunks: runs of whole records that cover it.
    """

    num_bytes: int
    xxh3: str
    modified_ns: int
    num_records: int
    data: Path
    chunks: tuple[Chunk, ...]


def index_file(path: Location, spool: Path) -> FileIndex:
    """Walk a file once and cut it into chunks.

    Args:
        path: annotation file, or its URL.
        spool: existing folder that a remote file is fetched and a compressed one decompressed into.

    Raises:
        ConfigError: the file cannot be read.
        VlprepError: it is damaged or of another format than its ending says; or its store does not answer.
    """
    if isinstance(path, Url):
        return _index_remote(path, spool)
    if path.is_dir():
        raise ConfigError(f"annotation file {path} {folder_fault(path)}.")
    if path.exists() and not path.is_file():
        raise ConfigError(f"annotation file {path} is not a regular file. Give the path of a file.")
    return _index(path, spool, path)


def _index_remote(url: Url, spool: Path) -> FileIndex:
    copy = _copy_path(url, storage.stat(url), spool)
    if not copy.exists():
        fetched = temporary_path(copy)
        copy = _copy_path(url, storage.download(url, fetched), spool)
        fetched.replace(copy)
    return _index(copy, spool, url)


def _copy_path(url: Url, stored: storage.Stored, spool: Path) -> Path:
    identity = f"{url.url}\0{stored.num_bytes}\0{stored.tag}"
    return spool / f"{xxhash.xxh3_128_hexdigest(identity.encode())}{url.suffix}"


def _index(path: Path, spool: Path, name: Location) -> FileIndex:
    """Index a file that is here; ``name`` is what messages call it."""
    with _failures(name):
        modified_ns = path.stat().st_mtime_ns
        digest = _digest(path)
        is_parquet, is_compressed = path.suffix == ".parquet", path.suffix in _DECOMPRESSORS
        fault = kind_fault(path)
        data = path
        if fault is None and is_compressed:
            data = _decompressed(path, spool / f"{digest}.jsonl")
            fault = kind_fault(data)
        if fault is None:
            fault = parquet_records.whole_file_fault(data) if is_parquet else whole_file_fault(data, name)
        if fault is not None:
            raise VlprepError(f"annotation file {name} {fault}.")
        chunks = tuple(parquet_records.cut(data) if is_parquet else json_records.cut(data))
    return FileIndex(
        num_bytes=path.stat().st_size,
        xxh3=digest,
        modified_ns=modified_ns,
        num_records=sum(chunk.num_records for chunk in chunks),
        data=data,
        chunks=chunks,
    )


def is_read_in_place(path: Location) -> bool:
    """Whether chunks are read from the file itself, not from what :func:`index_file` puts into the spool."""
    return isinstance(path, Path) and path.suffix not in _DECOMPRESSORS


def read_chunk(data: Path, chunk: Chunk) -> Iterator[Record]:
    """Yield the annotations of a chunk of the file that was indexed as ``data``.

    Raises:
        ConfigError: the file changed since it was indexed, or cannot be read.
        VlprepError: it is damaged in a place that indexing does not look at.
    """
    with _failures(data):
        yield from (
            parquet_records.read_chunk(data, chunk) if chunk.kind == "rows" else json_records.read_chunk(data, chunk)
        )


_DAMAGE_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError, pa.ArrowException, UnicodeDecodeError)
"""What the readers raise for damaged files. The last is for names of columns that are not text."""


@contextmanager
def _failures(path: Location) -> Iterator[None]:
    """Turn what the readers raise into errors that name the file."""
    try:
        yield
    except MemoryError:
        raise
    except _DAMAGE_ERRORS as error:
        raise _damaged(path, error) from error
    except FileNotFoundError as error:
        raise ConfigError(f"annotation file {path} does not exist. Check the path.") from error
    except OSError as error:
        if error.errno is None:
            # Arrow's decompressors, not the operating system.
            raise _damaged(path, error) from error
        raise ConfigError(f"annotation file {path} cannot be read: {error.strerror}. Check its permissions.") from error


def _damaged(path: Location, error: Exception) -> VlprepError:
    reason = str(error).strip().rstrip(".") or type(error).__name__
    return VlprepError(f"annotation file {path} is damaged: {reason}. Fetch or write it again.")


def _digest(path: Path) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _decompressed(path: Path, target: Path) -> Path:
    if not target.exists():
        temporary = temporary_path(target)
        with path.open("rb") as source, temporary.open("wb") as sink:
            if not source.peek(1):
                raise EOFError("the compressed file has 0 bytes")
            for block in _DECOMPRESSORS[path.suffix](source):
                sink.write(block)
        temporary.replace(target)
    return target


def _gunzip(source: BinaryIO) -> Iterator[bytes]:
    with gzip.open(source, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            yield block


def _unzstd(source: BinaryIO) -> Iterator[bytes]:
    """What one or several zstd frames hold. The package's own reader takes the end of a file that is cut short for the
    end of the data.
    """
    frame = zstandard.ZstdDecompressor().decompressobj()
    while block := source.read(_ZSTD_BYTES):
        while block:
            if frame.eof:
                frame = zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(block)
            block = frame.unused_data if frame.eof else b""
    if not frame.eof:
        raise EOFError("the file ends inside a zstd frame")


_DECOMPRESSORS: dict[str, Callable[[BinaryIO], Iterator[bytes]]] = {".gz": _gunzip, ".zst": _unzstd}
