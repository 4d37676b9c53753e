"""Arrow schemas of the tables of a set. They stand apart from the functions that pyarrow makes when it computes."""

from __future__ import annotations

import pyarrow as pa


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
