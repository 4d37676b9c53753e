"""A build stops after the scan if records hold boxes whose coordinates nobody declared: it never guesses."""

from __future__ import annotations

from collections.abc import Sequence

from prep.annotations.undeclared import UndeclaredCounts
from prep.build.parts import ScannedPart, read_rows
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
        table = read_rows(part.path, ["line", "undeclared"])
        undeclared = table.column("undeclared")
        if undeclared.null_count < len(undeclared):
            rows = table.filter(undeclared.is_valid()).to_pylist()
            excerpts = ((f"{part.file}:{row['line']}", row["undeclared"]) for row in rows)
            counts.add(f"dataset {names[part.source]}", excerpts)
    if counts:
        raise ConfigError(counts.message())
