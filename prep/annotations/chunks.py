"""Chunks, which annotation files are cut into, and their records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

MAX_RECORD_BYTES = 16 << 20
"""A longer record is rejected as ``bad_json`` without being read into memory."""


Kind = Literal["lines", "array", "rest", "rows", "oversized", "unclosed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A run of complete records of one file.

    Attributes:
        kind: ``lines`` of JSONL, elements of an ``array``, the ``rest`` after an array's last separator (one record),
            ``rows`` of a Parquet file, one ``oversized`` record that is too long to read, or ``unclosed``: the end
            of a file whose array lacks its closing bracket, which counts as one bad record.
        start: first byte (of ``rows``: first row) of the run.
        stop: first byte (row) after the run.
        first_line: line of ``start``, from 1; of ``rows``: the row, from 1.
        first_record: index of the first annotation within the file, from 0.
        num_records: annotations in the run.
    """

    kind: Kind
    start: int
    stop: int
    first_line: int
    first_record: int
    num_records: int


class Record(msgspec.Struct, frozen=True):
    """One annotation, not validated yet.

    Attributes:
        data: its JSON text; None if it cannot be read.
        line: line on which it starts, from 1.
        index: index among the annotations of the file, from 0.
        embedded: encoded media that came inside the record, by their names in ``data``.
        fault: why ``data`` is None.
        unread: names of fields that no dialect has and that are not in ``data``.
    """

    data: bytes | None
    line: int
    index: int
    embedded: dict[str, bytes] = {}
    fault: str = ""
    unread: tuple[str, ...] = ()
