"""JSON and JSONL: cuts files into chunks of complete records, and chunks into records.

Input: the bytes of a file, in blocks. Output: chunks (byte ranges with their lines and numbers), and the text of each
record. Holds one block and one incomplete record at a time. Indexing JSONL runs at about 0.7 GB/s, JSON arrays at
0.2 GB/s.

A JSON array is cut by its structure alone (quotes, brackets, commas): a record that is not valid JSON does not spoil
its neighbours as long as its quotes and brackets close. A record that is itself a list (the upstream framework's
"packed" form) counts as that many annotations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np
from numpy.typing import NDArray

from prep.annotations.array_scanner import ArrayScanner
from prep.annotations.chunks import MAX_RECORD_BYTES, Chunk, Kind, Record
from schemas.errors import ConfigError

CHUNK_RECORDS = 4096
"""Maximum number of records in a chunk. A chunk also ends with the block of bytes that it was read from."""

FIRST_CHUNKS, FIRST_CHUNK_RECORDS = 64, 64
"""The first block is cut into up to so many chunks of at least so many records: enough tasks for all workers, also in a
small file, of which each record may be a long video."""

MAX_PACKED_RECORDS = 1 << 16
"""A record that is a list of more annotations stays one record, and is rejected as ``not_an_object``."""

_BLOCK_BYTES = 4 << 20
_OPENING_BYTES = 1 << 16
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

_FAULTS = {
    "oversized": f"the record is longer than {MAX_RECORD_BYTES:,} bytes; is a line break, a comma or a quote missing?",
    "unclosed": "the file ends inside its JSON array: the closing bracket is missing, and maybe more; fetch or write "
    "the file again",
}

_raw_list_decoder = msgspec.json.Decoder(list[msgspec.Raw])


def _is_array(file: BinaryIO) -> bool:
    """Whether a file is one JSON array: it starts with ``[``, and its first line is not a list before other lines."""
    head = file.read(_OPENING_BYTES)
    start = head.removeprefix(_BYTE_ORDER_MARK).lstrip()
    if not start.startswith(b"["):
        return False
    file.seek(len(head) - len(start) + 1)
    scanner = ArrayScanner()
    scanner.element_ends(file.readline(MAX_RECORD_BYTES))
    return not scanner.closed or not file.read(_OPENING_BYTES).strip()


def _annotations(piece: bytes) -> list[bytes]:
    """The annotations in one record: itself, or the elements of the upstream framework's packed form."""
    if not piece.startswith(b"["):
        return [piece]
    # Count first, so that a long list of tiny elements does not become millions of objects.
    if len(piece) > 2 * MAX_PACKED_RECORDS and ArrayScanner().element_ends(piece[1:]).size > MAX_PACKED_RECORDS:
        return [piece]
    try:
        parts = _raw_list_decoder.decode(piece)
    except (msgspec.MsgspecError, RecursionError):
        return [piece]
    return [bytes(part) for part in parts] or [piece]


def cut(path: Path) -> Iterator[Chunk]:
    """Cut a file into chunks. Memory: one block and one incomplete record."""
    with path.open("rb") as file:
        is_array = _is_array(file)
        file.seek(0)
        cutter = _Cutter(is_array)
        if is_array:
            opening = file.read(_OPENING_BYTES)
            opening = opening[: opening.index(b"[") + 1]
            file.seek(len(opening))
            cutter.skip(opening)
        while block := file.read(_BLOCK_BYTES):
            yield from cutter.feed(block)
        yield from cutter.finish()


def read_chunk(path: Path, chunk: Chunk) -> Iterator[Record]:
    """Yield the annotations of a chunk.

    Raises:
        ConfigError: the file changed since it was cut.
    """
    if chunk.kind in _FAULTS:
        yield Record(None, chunk.first_line, chunk.first_record, fault=_FAULTS[chunk.kind])
        return
    with path.open("rb") as file:
        file.seek(chunk.start)
        data = file.read(chunk.stop - chunk.start)
    records: list[Record] = []
    line, seen = chunk.first_line, 0
    for start, piece in _pieces(data, _ends_within(data, chunk)):
        line += data.count(b"\n", seen, start)
        seen = start
        for part in _annotations(piece):
            records.append(Record(part, line, chunk.first_record + len(records)))
    if len(data) != chunk.stop - chunk.start or len(records) != chunk.num_records:
        raise ConfigError(f"annotation file {path} changed while it was being read; run the command again.")
    yield from records


class _Cutter:
    """Cuts a stream of blocks into chunks of complete records."""

    def __init__(self, is_array: bool) -> None:
        self._scanner = ArrayScanner() if is_array else None
        self._carried = bytearray()
        self._dropped_bytes = 0
        self._dropped_lines = 0
        self._offset, self._line, self._record = 0, 1, 0

    def skip(self, data: bytes) -> None:
        """Skip bytes that belong to no record."""
        self._offset += len(data)
        self._line += data.count(b"\n")

    def feed(self, block: bytes) -> Iterator[Chunk]:
        """Add a block; yields the chunks that are complete."""
        ends = _line_ends(block) if self._scanner is None else self._scanner.element_ends(block)
        ends = ends + len(self._carried)
        self._carried += block
        start = 0
        if self._dropped_bytes and ends.size:
            start = int(ends[0])
            yield self._chunk("oversized", bytes(self._carried[:start]), num_records=1)
            ends = ends[1:]
        at_once = self._records_at_once(ends.size)
        for first in range(0, ends.size, at_once):
            group = ends[first : first + at_once]
            stop = int(group[-1])
            data = bytes(memoryview(self._carried)[start:stop])
            yield from self._counted("lines" if self._scanner is None else "array", data, (group - start).tolist())
            start = stop
        del self._carried[:start]
        if len(self._carried) > MAX_RECORD_BYTES and not self._dropped_bytes:
            blank = len(self._carried) - len(self._carried.lstrip())
            self.skip(bytes(self._carried[:blank]))
            del self._carried[:blank]
        if len(self._carried) > MAX_RECORD_BYTES or (self._dropped_bytes and not ends.size):
            self._dropped_bytes += len(self._carried)
            self._dropped_lines += self._carried.count(b"\n")
            self._carried.clear()

    def _records_at_once(self, num_records: int) -> int:
        """Records of a chunk, in a block of so many."""
        if self._record:
            return CHUNK_RECORDS
        return min(CHUNK_RECORDS, max(FIRST_CHUNK_RECORDS, -(-num_records // FIRST_CHUNKS)))

    def finish(self) -> Iterator[Chunk]:
        """Yield the rest at the end of the file."""
        data = bytes(self._carried)
        if self._dropped_bytes:
            yield self._chunk("oversized", data, num_records=1)
        else:
            yield from self._counted("rest", data, [])
        if self._scanner is not None and self._scanner.between_elements:
            yield self._chunk("unclosed", b"", num_records=1)

    def _counted(self, kind: Kind, data: bytes, ends: Sequence[int]) -> Iterator[Chunk]:
        num_records = sum(len(_annotations(piece)) for _, piece in _pieces(data, ends))
        chunk = self._chunk(kind, data, num_records=num_records)
        if num_records:
            yield chunk

    def _chunk(self, kind: Kind, data: bytes, *, num_records: int) -> Chunk:
        stop = self._offset + self._dropped_bytes + len(data)
        chunk = Chunk(
            kind=kind,
            start=self._offset,
            stop=stop,
            first_line=self._line,
            first_record=self._record,
            num_records=num_records,
        )
        self._offset = stop
        self._line += self._dropped_lines + data.count(b"\n")
        self._record += num_records
        self._dropped_bytes = self._dropped_lines = 0
        return chunk


def _line_ends(data: bytes) -> NDArray[np.int64]:
    """Positions just after each line break."""
    return np.flatnonzero(np.frombuffer(data, dtype=np.uint8) == 0x0A) + 1


def _ends_within(data: bytes, chunk: Chunk) -> list[int]:
    """Positions after the separators in the data of a chunk."""
    if chunk.kind == "rest":
        return []
    ends: list[int] = (ArrayScanner().element_ends(data) if chunk.kind == "array" else _line_ends(data)).tolist()
    return ends


def _pieces(data: bytes, ends: Sequence[int]) -> Iterator[tuple[int, bytes]]:
    """Start and text of each record of a run, given the positions after their separators. Blank records are skipped."""
    start = 0
    for end in [*ends, len(data) + 1]:
        text = data[start : end - 1].removeprefix(_BYTE_ORDER_MARK)
        piece = text.strip()
        if piece:
            yield end - 1 - len(text.lstrip()), piece
        start = end
