"""Reads annotation files record by record, in bounded memory.

Two steps. :func:`index_file` walks a file once and cuts it into chunks of whole records (byte ranges), counting
annotations, lines and a checksum on the way: 0.5-1 GB/s. :func:`read_chunk` reads one chunk again and yields its
records as bytes, each with its line and its number; chunks are independent, so that any worker can take any of them.

A JSON array is cut by its structure alone (quotes, brackets, commas), vectorised over blocks: a record that is not
valid JSON does not spoil its neighbours as long as its brackets close. A record that is itself a list (the upstream
framework's "packed" form) counts as that many annotations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from prep.array_scanner import ArrayScanner
from schemas.errors import ConfigError

MAX_RECORD_BYTES = 64 << 20
"""A record longer than this is rejected as ``bad_json`` without being held in memory."""

CHUNK_RECORDS = 4096
"""Most records in a chunk; a chunk also ends with the block of bytes that it was read in."""

_BLOCK_BYTES = 4 << 20

_raw_list_decoder = msgspec.json.Decoder(list[msgspec.Raw])


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A run of whole records of one file.

    Attributes:
        offset, num_bytes: byte range of the file.
        first_line: line (from 1) that ``offset`` lies in.
        first_record: number (from 0) of the first annotation, within the file.
        num_records: annotations in the chunk.
        is_array: whether the records are elements of a JSON array, or lines.
        oversized: the chunk is one record that is too long to be read.
    """

    offset: int
    num_bytes: int
    first_line: int
    first_record: int
    num_records: int
    is_array: bool
    oversized: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class FileIndex:
    """What one walk over an annotation file finds out: its size, XXH3-128, annotations, and the chunks it is cut
    into.
    """

    num_bytes: int
    xxh3: str
    num_records: int
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Record:
    """JSON text of one annotation; ``line`` counts from 1, ``number`` from 0 within the file.

    ``data`` is None where the text is longer than :data:`MAX_RECORD_BYTES`.
    """

    data: bytes | None
    line: int
    number: int


def index_file(path: Path) -> FileIndex:
    """Walk a file once and cut it into chunks.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            is_array = _is_array(file.read(1 << 16))
        digest = xxhash.xxh3_128()
        chunks = tuple(_chunks(path, is_array, digest))
    except OSError as error:
        raise ConfigError(f"annotation file {path} cannot be read: {error.strerror}.") from error
    return FileIndex(
        num_bytes=path.stat().st_size,
        xxh3=digest.hexdigest(),
        num_records=sum(chunk.num_records for chunk in chunks),
        chunks=chunks,
    )


def read_chunk(path: Path, chunk: Chunk) -> Iterator[Record]:
    """Yield the annotations of a chunk.

    Raises:
        ConfigError: the file became shorter since it was indexed.
    """
    if chunk.oversized:
        yield Record(None, chunk.first_line, chunk.first_record)
        return
    with path.open("rb") as file:
        file.seek(chunk.offset)
        data = file.read(chunk.num_bytes)
    if len(data) != chunk.num_bytes:
        raise ConfigError(f"annotation file {path} changed while it was being read; run the command again.")
    pieces = _array_pieces(data) if chunk.is_array else _line_pieces(data)
    number = chunk.first_record
    for line, piece in pieces:
        for part in _annotations(piece):
            yield Record(part, chunk.first_line + line, number)
            number += 1


def _is_array(head: bytes) -> bool:
    """Whether a file is one JSON array: it starts with ``[`` and its first line is not a complete array by itself."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not start.startswith(b"["):
        return False
    line, _, rest = start.partition(b"\n")
    if not rest.strip():
        return True
    try:
        msgspec.json.decode(line, type=list[msgspec.Raw])
    except msgspec.MsgspecError:
        return True
    return False


def _annotations(piece: bytes) -> list[bytes]:
    """The annotations in one record: itself, or the elements of the upstream framework's packed form."""
    if not piece.startswith(b"["):
        return [piece]
    try:
        parts = _raw_list_decoder.decode(piece)
    except (msgspec.MsgspecError, RecursionError):
        return [piece]
    return [bytes(part) for part in parts] or [piece]


def _chunks(path: Path, is_array: bool, digest: xxhash.xxh3_128) -> Iterator[Chunk]:
    """Group records into chunks, holding one block and one unfinished record at a time."""
    with path.open("rb") as file:
        cutter = _Cutter(is_array)
        if is_array:
            opening = file.read(1 << 16)
            opening = opening[: opening.index(b"[") + 1]
            file.seek(len(opening))
            digest.update(opening)
            cutter.skip(opening)
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            yield from cutter.feed(block)
        yield from cutter.finish()


class _Cutter:
    """Cuts a stream of blocks into chunks of whole records."""

    def __init__(self, is_array: bool) -> None:
        self._scanner = ArrayScanner() if is_array else None
        self._carried = bytearray()
        self._dropped_bytes = 0
        self._dropped_lines = 0
        self._offset, self._line, self._record = 0, 1, 0

    def skip(self, data: bytes) -> None:
        """Pass over bytes that belong to no record."""
        self._offset += len(data)
        self._line += data.count(b"\n")

    def feed(self, block: bytes) -> Iterator[Chunk]:
        """Take a block; yield the chunks that are complete."""
        if self._scanner is None:
            ends = np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == 0x0A) + 1
        else:
            ends = self._scanner.element_ends(block)
        ends = ends + len(self._carried)
        self._carried += block
        start = 0
        if self._dropped_bytes and ends.size:
            start = int(ends[0])
            yield self._chunk(bytes(self._carried[:start]), oversized=True)
            ends = ends[1:]
        for cut in _cuts(ends):
            yield from self._counted(bytes(memoryview(self._carried)[start:cut]))
            start = cut
        del self._carried[:start]
        if len(self._carried) > MAX_RECORD_BYTES or (self._dropped_bytes and not ends.size):
            self._dropped_bytes += len(self._carried)
            self._dropped_lines += self._carried.count(b"\n")
            self._carried.clear()

    def finish(self) -> Iterator[Chunk]:
        """Yield what is left at the end of the file."""
        if self._dropped_bytes:
            yield self._chunk(bytes(self._carried), oversized=True)
        elif self._carried:
            yield from self._counted(bytes(self._carried))

    def _counted(self, data: bytes) -> Iterator[Chunk]:
        chunk = self._chunk(data, oversized=False)
        if chunk.num_records:
            yield chunk

    def _chunk(self, data: bytes, *, oversized: bool) -> Chunk:
        if oversized:
            num_records = 1
        else:
            pieces = _line_pieces(data) if self._scanner is None else _array_pieces(data)
            num_records = sum(len(_annotations(piece)) for _, piece in pieces)
        chunk = Chunk(
            offset=self._offset,
            num_bytes=self._dropped_bytes + len(data),
            first_line=self._line,
            first_record=self._record,
            num_records=num_records,
            is_array=self._scanner is not None,
            oversized=oversized,
        )
        self._offset += chunk.num_bytes
        self._line += self._dropped_lines + data.count(b"\n")
        self._record += num_records
        self._dropped_bytes = self._dropped_lines = 0
        return chunk


def _cuts(ends: NDArray[np.int64]) -> list[int]:
    """Where to cut, given the ends of the records in a block: every so many records, and at the last end."""
    if not ends.size:
        return []
    return [*ends[CHUNK_RECORDS - 1 : -1 : CHUNK_RECORDS].tolist(), int(ends[-1])]


def _line_pieces(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Records of JSONL: (lines before it, its text)."""
    for number, line in enumerate(data.split(b"\n")):
        piece = line.removeprefix(b"\xef\xbb\xbf").strip()
        if piece:
            yield number, piece


def _array_pieces(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Elements of a run of a JSON array: (line breaks before it, its text)."""
    scanner = ArrayScanner()
    start, lines = 0, 0
    ends = scanner.element_ends(data).tolist()
    for end in [*ends, len(data)]:
        text = data[start:end]
        # The separator belongs to the array, not to the element; after the array's end nothing is a separator.
        element = text[:-1] if end != len(data) or (ends and ends[-1] == len(data)) else text
        piece = element.strip()
        if piece:
            leading = element[: len(element) - len(element.lstrip())].count(b"\n")
            yield lines + leading, piece
        lines += text.count(b"\n")
        start = end
