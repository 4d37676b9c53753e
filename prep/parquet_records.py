"""Parquet: rows as records, also as Hugging Face datasets store them, with pictures inside.

Input: a Parquet file. Output: chunks (ranges of rows within a row group), and the records of a chunk as JSON text. A
media column holds names, or ``{bytes, path}`` as ``datasets.Image`` stores pictures, or bare bytes; bytes travel
beside the record under a name of their own (``images[0]``). Memory is bounded by the file's own row groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pyarrow.parquet as pq

from prep.chunks import Chunk, Record
from schemas.errors import ConfigError

CHUNK_ROWS = 8192
"""Most rows in a chunk. A chunk does not cross row groups."""

_MEDIA_COLUMNS = ("image", "images", "video", "videos")
_COLUMNS = ("id", "conversations", "messages", "texts", *_MEDIA_COLUMNS)


def cut(path: Path) -> Iterator[Chunk]:
    """Cut a file into chunks from its footer alone."""
    metadata = pq.read_metadata(path)
    first = 0
    for group in range(metadata.num_row_groups):
        behind = first + metadata.row_group(group).num_rows
        for start in range(first, behind, CHUNK_ROWS):
            stop = min(start + CHUNK_ROWS, behind)
            yield Chunk(
                kind="rows", start=start, stop=stop, first_line=start + 1, first_record=start, num_records=stop - start
            )
        first = behind


def read_chunk(path: Path, chunk: Chunk) -> Iterator[Record]:
    """Yield the rows of a chunk.

    Raises:
        ConfigError: the file changed since it was cut.
    """
    with pq.ParquetFile(path) as file:
        group, first = _row_group(file.metadata, chunk.start)
        if group is None or chunk.stop > file.metadata.num_rows:
            raise ConfigError(f"annotation file {path} changed while it was being read; run the command again.")
        columns = [name for name in file.schema_arrow.names if name in _COLUMNS]
        number = first
        for batch in file.iter_batches(batch_size=64, row_groups=[group], columns=columns):
            if number >= chunk.stop:
                return
            if number + len(batch) > chunk.start:
                for offset, row in enumerate(batch.to_pylist()):
                    if chunk.start <= number + offset < chunk.stop:
                        yield _record(row, number + offset)
            number += len(batch)


def _row_group(metadata: Any, row: int) -> tuple[int | None, int]:
    """The row group that holds ``row``, and its first row."""
    first = 0
    for group in range(metadata.num_row_groups):
        behind = first + metadata.row_group(group).num_rows
        if row < behind:
            return group, first
        first = behind
    return None, first


def _record(row: dict[str, Any], number: int) -> Record:
    embedded: dict[str, bytes] = {}
    for column in _MEDIA_COLUMNS:
        value = row.get(column)
        if isinstance(value, list):
            row[column] = [_named(item, f"{column}[{place}]", embedded) for place, item in enumerate(value)]
        elif value is not None:
            row[column] = _named(value, column, embedded)
    return Record(msgspec.json.encode(row, enc_hook=str), number + 1, number, embedded)


def _named(value: Any, place: str, embedded: dict[str, bytes]) -> Any:
    """The name of a medium; its bytes, if it has any, go to ``embedded``."""
    path = None
    if isinstance(value, dict) and set(value) <= {"bytes", "path"}:
        value, path = value.get("bytes"), value.get("path")
        if value is None:
            return path
    if isinstance(value, (bytes, bytearray)):
        name = f"{place} {path}" if path else place
        embedded[name] = bytes(value)
        return name
    return value
