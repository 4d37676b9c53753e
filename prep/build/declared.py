"""A build stops after the scan if records hold boxes whose coordinates nobody declared: it never guesses."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow.compute as pc
import pyarrow.parquet as pq

from prep.annotations.undeclared import UndeclaredCounts
from prep.build.parts import ScannedPart, table_path
from schemas.errors import ConfigError


def require_declared_boxes(parts: Sequence[ScannedPart], names: Sequence[str]) -> None:
    """Stop if a scanned record has boxes whose coordinates nobody declared.

    Args:
        parts: of the scan.
        names: of the datasets.

    Raises:
        ConfigError: there are such records; it counts them, shows one and lists the choices.
    """
    counts = UndeclaredCounts()
    for part in parts:
        table = pq.read_table(table_path(part.path), columns=["line", "undeclared"])
        rows = table.filter(pc.is_valid(table.column("undeclared"))).to_pylist()
        counts.add(f"dataset {names[part.source]}", ((f"{part.file}:{row['line']}", row["undeclared"]) for row in rows))
    if counts:
        raise ConfigError(counts.message())
