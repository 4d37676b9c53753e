"""Reads annotations: registered datasets and annotation files in, checked records out.

In: ``datasets.toml`` (:mod:`~prep.annotations.registry`) and JSON, JSONL or Parquet files, plain, compressed or remote.
Out: chunks of records (:mod:`~prep.annotations.records`) and, for each record, an
:class:`~schemas.annotation.Annotation` or all of its problems (:mod:`~prep.annotations.validation`).
"""

from __future__ import annotations

from pathlib import Path

DEFAULT_REGISTRY = Path("datasets.toml")
"""The registry of commands that are given none."""
