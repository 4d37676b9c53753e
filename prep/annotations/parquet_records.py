"""Parquet: rows as records, including Hugging Face datasets with embedded images.

Input: a Parquet file. Output: chunks (ranges of rows within a row group), and the records of a chunk as JSON text. A
media column has names, or ``{bytes, path}`` as ``datasets.Image`` stores images, or bare bytes. Bytes travel beside the
record under a generated name (``images[0]``). Memory is bounded by the row groups of the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq

from prep.annotations.chunks import MAX_RECORD_BYTES, Chunk, Record
from prep.annotations.dialects import is_known
from schemas.errors import ConfigError

CHUNK_ROWS = 8192
"""Most rows in a chunk. A chunk does not cross row groups."""

_MEDIA_COLUMNS = ("image", "images", "video", "videos")


def whole_file_fault(path: Path) -> str | None:
    """Why the rows of a file are not records, and how to fix it. None if they are."""
    names = [name for name in pq.read_schema(path).names if is_known(name)]
    twice = sorted({name for name in names if names.count(name) > 1})
    return f"has several columns named {twice[0]!r}. Remove or rename all but one" if twice else None


def cut(path: Path) -> Iterator[Chunk]:
    """Cut a file into chunks. Reads only its footer."""
    metadata = pq.read_metadata(path)
    first = 0
    for group in range(metadata.num_row_groups):
        end = first + metadata.row_group(group).num_rows
        for start in range(first, end, CHUNK_ROWS):
            stop = min(start + CHUNK_ROWS, end)
            yield Chunk(
                kind="rows", start=start, stop=stop, first_line=start + 1, first_record=start, num_records=stop - start
            )
        first = end


def read_chunk(path: Path, chunk: Chunk) -> Iterator[Record]:
    """Yield the rows of a chunk.

    Raises:
        ConfigError: the file changed since it was cut.
    """
    with pq.ParquetFile(path) as file:
        group, first = _row_group(file.metadata, chunk.start)
        if group is None or chunk.stop > file.metadata.num_rows:
            raise ConfigError(f"annotation file {path} changed while it was being read; run the command again.")
        columns = [name for name in file.schema_arrow.names if is_known(name)]
        unread = _unread_columns(file.schema_arrow, file.metadata.row_group(group))
        # Some writers do not mark bytes as text. msgspec would encode them in base64.
        has_bytes = any(
            "binary" in str(file.schema_arrow.field(name).type) for name in columns if name not in _MEDIA_COLUMNS
        )
        start = first
        for batch in file.iter_batches(batch_size=64, row_groups=[group], columns=columns):
            if start >= chunk.stop:
                return
            for offset in range(max(chunk.start - start, 0), min(chunk.stop - start, len(batch))):
                yield _record(batch.slice(offset, 1), start + offset, has_bytes, unread)
            start += len(batch)


def _row_group(metadata: Any, row: int) -> tuple[int | None, int]:
    """The row group that holds ``row``, and its first row."""
    first = 0
    for group in range(metadata.num_row_groups):
        end = first + metadata.row_group(group).num_rows
        if row < end:
            return group, first
        first = end
    return None, first


def _unread_columns(schema: pa.Schema, group: Any) -> tuple[str, ...]:
    """Names of the columns of a row group that no dialect has and that hold something. They are not read."""
    types = {field.name: field.type for field in schema}
    names: dict[str, None] = {}
    for index in range(group.num_columns):
        column = group.column(index)
        # A name may contain dots, which also separate the names of nested fields.
        parts = column.path_in_schema.split(".")
        name = next(name for end in range(len(parts), -1, -1) if (name := ".".join(parts[:end])) in types or not end)
        statistics = column.statistics
        is_null = types.get(name) == pa.null() or (
            statistics is not None and statistics.has_null_count and statistics.null_count >= column.num_values
        )
        if not is_known(name) and not is_null:
            names[name] = None
    return tuple(names)


def _record(batch: pa.RecordBatch, index: int, has_bytes: bool, unread: tuple[str, ...]) -> Record:
    try:
        (row,) = batch.to_pylist()
        if has_bytes:
            row = {name: value if name in _MEDIA_COLUMNS else _text(value) for name, value in row.items()}
    except UnicodeDecodeError as error:
        return Record(None, index + 1, index, fault=f"text that is not UTF-8: {error.reason}")
    except (ValueError, OverflowError):
        # Times in nanoseconds, or beyond the year 9999; two fields of a struct with one name.
        return Record(None, index + 1, index, fault=_unreadable(batch))
    embedded: dict[str, bytes] = {}
    for column in _MEDIA_COLUMNS:
        value = row.get(column)
        if value is not None:
            row[column] = _named(value, column, embedded)
    data = msgspec.json.encode(row, enc_hook=str)
    if len(data) > MAX_RECORD_BYTES:
        return Record(None, index + 1, index, fault=f"the row has more than {MAX_RECORD_BYTES:,} bytes of text")
    return Record(data, index + 1, index, embedded, unread=unread)


def _unreadable(batch: pa.RecordBatch) -> str:
    """Names the columns of a row whose values Python has no object for."""
    columns = []
    for name, column in zip(batch.schema.names, batch.columns):
        try:
            column.to_pylist()
        except (ValueError, OverflowError):
            columns.append(f"{name!r} ({column.type})")
    return f"a value that JSON cannot express, in column {', '.join(columns)}: convert it to text"


def _text(value: Any) -> Any:
    """A value with its bytes decoded to text, except for the encoded media in ``{bytes, path}``."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, list):
        return [_text(item) for item in value]
    if isinstance(value, dict):
        return {name: item if name == "bytes" else _text(item) for name, item in value.items()}
    return value


def _named(value: Any, field: str, embedded: dict[str, bytes]) -> Any:
    """The name of a medium, or the names of several. Their bytes, if any, go to ``embedded``."""
    if isinstance(value, list):
        return [_named(item, f"{field}[{index}]", embedded) for index, item in enumerate(value)]
    path = None
    if isinstance(value, dict) and set(value) <= {"bytes", "path"}:
        value, path = value.get("bytes"), value.get("path")
        if value is None:
            return path
    if isinstance(value, (bytes, bytearray)):
        name = f"{field} {path}" if path else field
        embedded[name] = bytes(value)
        return name
    return value
