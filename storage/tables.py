"""The Parquet tables of a set of shards: reading them, and checking their columns against :mod:`schemas.tables`.

Behind a URL, only the parts that are needed are requested.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from schemas.bounds import MAX_INT64, ColumnBounds, column_bounds
from schemas.errors import BUILD_AGAIN, COPY_AGAIN, ShardError
from schemas.manifest import StoredFile
from storage.arrow import arrow_schema
from storage.errors import NotThereError
from storage.files import regular_size
from storage.pages import uncompressed_bytes
from storage.reading import open_file, read_range, stat
from storage.urls import Location

_FREE_ROWS = 1_000_000
_FREE_TEXT_BYTES = 64 << 20
"""Rows and text of a column that a table of any size may have."""

_PART_BYTES = 1 << 20
"""A table behind a URL that is no larger is requested at once."""

_MAX_CODES, _CODES_PER_ROW = 256, 4
"""Most reason codes of an annotation, and their mean if there are as many annotations as there can be."""


def read_table(
    path: Location,
    columns: dict[str, str],
    *,
    names: Sequence[str] | None = None,
    filters: list[tuple[str, str, object]] | None = None,
    sealed: StoredFile | None = None,
) -> pa.Table:
    """Read one of the two tables.

    Its size is compared with that of the file first: a few kilobytes can stand for gigabytes of equal rows.

    Args:
        path: of the Parquet file.
        columns: names and types that it must have, as :mod:`schemas.tables` lists them.
        names: columns to read, or None for all.
        filters: rows to read, as (column, ``=`` or ``in``, value or values) that must all hold, or None for all.
        sealed: size and digest to compare the file with first. The file is then read completely.

    Raises:
        ShardError: it is missing, damaged, or has other columns, or more rows or text than its size allows.
        VlprepError: the store refuses, or does not answer.
    """
    texts = [name if kind == "string" else f"{name}.list.element" for name, kind in columns.items() if "string" in kind]
    try:
        with _open(path, sealed) as (source, num_bytes):
            metadata = pq.read_metadata(source)
            _check_schema(path, metadata.schema.to_arrow_schema(), arrow_schema(columns))
            _check_size(path, metadata, columns, num_bytes)
            needed = list(dict.fromkeys([*(names or columns), *(name for name, _, _ in filters or ())]))
            _check_pages(path, metadata, source, needed)
            # Threads of pyarrow release a Python file some time after the call. If the interpreter ends just then, it
            # aborts (apache/arrow, issue 34314).
            threads = isinstance(source, (Path, pa.BufferReader))
            # Texts as dictionaries: each different one once, until their size is known.
            with pq.ParquetFile(source, metadata=metadata, read_dictionary=texts, pre_buffer=threads) as file:
                table = pa.concat_tables(_read_groups(file, list(names or columns), needed, filters or [], threads))
        table.validate(full=True)
        return _with_plain_texts(path, table, columns, num_bytes)
    except (FileNotFoundError, NotThereError):
        raise ShardError(f"{path} is missing. {COPY_AGAIN}.") from None
    except MemoryError:
        raise
    # Names of columns in a damaged file need not be text.
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        strerror = error.strerror if isinstance(error, OSError) else None
        reason = (strerror or str(error)).splitlines()[0].rstrip(".")
        raise ShardError(f"{path} cannot be read as a Parquet table: {reason}. {COPY_AGAIN}.") from error


def _read_groups(
    file: pq.ParquetFile, names: list[str], needed: list[str], filters: Sequence[tuple[str, str, Any]], threads: bool
) -> Iterator[pa.Table]:
    """Columns and rows of a file, by row group: dictionaries inside lists cannot change within a table.

    The statistics of the row groups are not used: rows that they deny would be left out in silence, and the rows of a
    bin are spread over all groups.
    """
    yield file.schema_arrow.empty_table().select(names)
    for group in range(file.num_row_groups):
        table = file.read_row_group(group, columns=needed, use_threads=threads)
        for name, operator, value in filters:
            values = pa.array(value if operator == "in" else [value])
            table = table.filter(pc.is_in(table.column(name), value_set=values))
        yield table.select(names)


def column_problems(table: pa.Table, row: type[msgspec.Struct]) -> Iterator[tuple[int, str]]:
    """Values that are out of the bounds of their columns.

    Args:
        table: all or some columns of a table.
        row: the struct of its rows, which declares the bounds.

    Yields:
        For each such column, the first row that breaks a bound, and what is wrong with it.
    """
    for name, bounds in column_bounds(row).items():
        if name not in table.column_names:
            continue
        column = table.column(name)
        if column.null_count and not bounds.is_nullable:
            yield _first(pc.is_null(column)), f"{name} is null"
        if pa.types.is_list(column.type) and (texts := pc.list_flatten(column)).null_count:
            parents = pc.list_parent_indices(column)
            yield parents[_first(pc.is_null(texts))].as_py(), f"{name} has an entry that is null"
        for is_wrong in _out_of_bounds(column, bounds):
            if pc.any(is_wrong).as_py():
                at = _first(is_wrong)
                yield at, f"{name} is {repr(column[at].as_py())[:80]}; allowed: {bounds.allowed()}"


def check_columns(table: pa.Table, row: type[msgspec.Struct], path: Location) -> None:
    """Check that all values are within the bounds of their columns.

    Raises:
        ShardError: one is not.
    """
    for at, problem in column_problems(table, row):
        raise ShardError(f"{path}, row {at}: {problem}. {BUILD_AGAIN}.")


def _out_of_bounds(column: pa.ChunkedArray, bounds: ColumnBounds) -> Iterator[pa.ChunkedArray]:
    if bounds.choices:
        yield pc.invert(pc.is_in(column, value_set=pa.array(bounds.choices)))
    if bounds.low is not None:
        yield pc.less(column, pa.scalar(bounds.low, column.type))
    if bounds.high is not None and bounds.high < MAX_INT64:
        yield pc.greater(column, pa.scalar(bounds.high, column.type))


def _first(mask: pa.ChunkedArray) -> int:
    return int(pc.index(mask, True).as_py())


@contextmanager
def _open(path: Location, sealed: StoredFile | None) -> Iterator[tuple[Any, int]]:
    """A source that pyarrow reads from, and its size."""
    if sealed is not None:
        data = _read_sealed(path, sealed)
        yield pa.BufferReader(data), len(data)
    elif isinstance(path, Path):
        yield path, regular_size(path)
    elif (size := stat(path).num_bytes) <= _PART_BYTES:
        yield pa.BufferReader(read_range(path, 0, size) if size else b""), size
    else:
        with open_file(path) as file:
            yield file, size


def _read_sealed(path: Location, sealed: StoredFile) -> bytes:
    size = regular_size(path) if isinstance(path, Path) else stat(path).num_bytes
    if size != sealed.num_bytes:
        raise ShardError(f"{path} has {size} bytes, its manifest says {sealed.num_bytes}. {COPY_AGAIN}.")
    data = path.read_bytes() if isinstance(path, Path) else read_range(path, 0, size)
    if hashlib.sha256(data).hexdigest() != sealed.sha256:
        raise ShardError(f"{path} is not the file that its manifest seals (SHA-256 differs). {COPY_AGAIN}.")
    return data


def _check_size(path: Location, metadata: pq.FileMetaData, columns: dict[str, str], num_bytes: int) -> None:
    """Compare the rows that the footer announces with the size of the file."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    num_rows = sum(group.num_rows for group in groups)
    # Checksums do not compress. A ledger has at most 8 rows a byte, even with each annotation rejected 100 times.
    most = num_bytes // 8 if "xxh3" in columns else _FREE_ROWS + 16 * num_bytes
    if num_rows > most:
        raise ShardError(
            f"{path} announces {num_rows:,} rows in {num_bytes:,} bytes; allowed: at most {most:,}. {COPY_AGAIN}."
        )
    most_bytes = 2 * _max_text_bytes(num_bytes)
    uncompressed = 0
    for column in (group.column(index) for group in groups for index in range(group.num_columns)):
        if column.num_values > (most_values := min(_MAX_CODES * num_rows, _CODES_PER_ROW * most)):
            raise ShardError(
                f"{path} announces {column.num_values:,} values of {column.path_in_schema} in {num_rows:,} rows and "
                f"{num_bytes:,} bytes; allowed: at most {most_values:,}. {COPY_AGAIN}."
            )
        uncompressed += column.total_uncompressed_size
    if uncompressed > most_bytes:
        raise ShardError(
            f"{path} announces {uncompressed:,} bytes, uncompressed, in {num_bytes:,}; allowed: at most "
            f"{most_bytes:,}. {COPY_AGAIN}."
        )


def _check_pages(path: Location, metadata: pq.FileMetaData, source: Any, names: Sequence[str]) -> None:
    """Check that the pages of some columns are no larger than the footer says."""
    with source.open("rb") if isinstance(source, Path) else nullcontext(source) as file:
        for group in (metadata.row_group(index) for index in range(metadata.num_row_groups)):
            for column in (group.column(index) for index in range(group.num_columns)):
                if column.path_in_schema.partition(".")[0] not in names:
                    continue
                try:
                    size = uncompressed_bytes(file, column)
                except ValueError as error:
                    raise ShardError(
                        f"{path}: column {column.path_in_schema} cannot be read: {error}. {COPY_AGAIN}."
                    ) from error
                if size > column.total_uncompressed_size:
                    raise ShardError(
                        f"{path}: the pages of column {column.path_in_schema} hold {size:,} bytes, the end of the "
                        f"file announces {column.total_uncompressed_size:,}. {COPY_AGAIN}."
                    )


def _max_text_bytes(num_bytes: int) -> int:
    """Most text of a column in a file of some size."""
    return _FREE_TEXT_BYTES + 1024 * num_bytes


def _with_plain_texts(path: Location, table: pa.Table, columns: dict[str, str], num_bytes: int) -> pa.Table:
    """The table with columns of text instead of dictionaries, if that takes not much more than the file."""
    most = _max_text_bytes(num_bytes)
    for index, field in enumerate(table.schema):
        kind = arrow_schema({field.name: columns[field.name]}).field(0).type
        if field.type == kind:
            continue
        column = table.column(index)
        texts = pc.list_flatten(column) if pa.types.is_list(kind) else column
        total = sum(map(_text_bytes, texts.chunks))
        if total > most:
            raise ShardError(
                f"{path}: column {field.name} holds {total:,} bytes of text in a file of {num_bytes:,} bytes; allowed: "
                f"{most:,}. {COPY_AGAIN}."
            )
        table = table.set_column(index, field.name, column.cast(kind))
    return table


def _text_bytes(texts: pa.DictionaryArray) -> int:
    """Size of all texts of a dictionary array, each as often as it occurs."""
    lengths = pc.binary_length(texts.dictionary).fill_null(0).to_numpy().astype(np.int64)
    counts = np.bincount(texts.indices.drop_null().to_numpy(zero_copy_only=False), minlength=lengths.size)
    return int(np.dot(lengths, counts))


def _check_schema(path: Location, schema: pa.Schema, expected: pa.Schema) -> None:
    if not schema.equals(expected):
        raise ShardError(f"{path} has other columns than expected: {_difference(schema, expected)}. {BUILD_AGAIN}.")


def _difference(schema: pa.Schema, expected: pa.Schema) -> str:
    types = {field.name: str(field.type) for field in schema}
    wrong = [
        f"{field.name} is {types.get(field.name, 'missing')}, not {field.type}"
        for field in expected
        if types.get(field.name) != str(field.type)
    ]
    return "; ".join(wrong) or f"schema {', '.join(types)}"
