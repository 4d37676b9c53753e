"""The Parquet tables of a set of shards: reading them, and checking their columns against :mod:`schemas.tables`.

Behind a URL, only the parts that are needed are requested.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from schemas.errors import BUILD_AGAIN, COPY_AGAIN, ShardError
from storage.errors import NotThereError
from storage.reading import open_file, read
from storage.urls import Location


def arrow_schema(columns: dict[str, str]) -> pa.Schema:
    """Arrow schema of a table of :mod:`schemas.tables`."""
    types = {
        "int32": pa.int32(),
        "int64": pa.int64(),
        "uint64": pa.uint64(),
        "string": pa.string(),
        "list<string>": pa.list_(pa.string()),
    }
    return pa.schema([(name, types[kind]) for name, kind in columns.items()])


def read_table(
    path: Location,
    columns: dict[str, str],
    *,
    names: Sequence[str] | None = None,
    filters: list[tuple[str, str, object]] | None = None,
    sha256: str | None = None,
) -> pa.Table:
    """Read one of the two tables.

    Args:
        path: of the Parquet file.
        columns: names and types that it must have, as :mod:`schemas.tables` lists them.
        names: columns to read, or None for all.
        filters: rows to read, as pyarrow takes them, or None for all.
        sha256: digest to compare the file with first. The file is then read completely.

    Raises:
        ShardError: it is missing, damaged, or has other columns.
        VlprepError: the store refuses, or does not answer.
    """
    try:
        with nullcontext(_sealed(path, sha256)) if sha256 else _open(path) as source:
            schema, expected = pq.read_schema(source), arrow_schema(columns)
            if not schema.equals(expected):
                raise ShardError(
                    f"{path} has other columns than expected: {_difference(schema, expected)}. {BUILD_AGAIN}."
                )
            # Threads of pyarrow release a Python file some time after the call. If the interpreter ends just then, it
            # aborts (apache/arrow, issue 34314).
            threads = isinstance(source, (Path, pa.BufferReader))
            table = pq.read_table(source, columns=names, filters=filters, use_threads=threads, pre_buffer=threads)
        table.validate(full=True)
    except (FileNotFoundError, NotThereError):
        raise ShardError(f"{path} is missing. {COPY_AGAIN}.") from None
    # Names of columns in a damaged file need not be text.
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise ShardError(f"{path} cannot be read as a Parquet table: {reason}. {COPY_AGAIN}.") from error
    return table


def _open(path: Location) -> Any:
    return nullcontext(path) if isinstance(path, Path) else open_file(path)


def _sealed(path: Location, sha256: str) -> pa.BufferReader:
    data = path.read_bytes() if isinstance(path, Path) else read(path)
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ShardError(f"{path} is not the file that its manifest seals (SHA-256 differs). {COPY_AGAIN}.")
    return pa.BufferReader(data)


def _difference(schema: pa.Schema, expected: pa.Schema) -> str:
    types = {field.name: str(field.type) for field in schema}
    wrong = [
        f"{field.name} is {types.get(field.name, 'missing')}, not {field.type}"
        for field in expected
        if types.get(field.name) != str(field.type)
    ]
    return "; ".join(wrong) or f"schema {', '.join(types)}"
