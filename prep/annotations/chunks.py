"""What annotation files are cut into: chunks of whole records, and the records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

MAX_RECORD_BYTES = 16 << 20
"""A record longer than this is rejected as ``bad_json`` without being held in memory."""


Kind = Literal["lines", "array", "rest", "rows", "oversized", "unclosed"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """A run of whole records of one file.

    Attributes:
        kind: ``lines`` of JSONL, elements of an ``array``, the ``rest`` behind an array's last separator (one record),
            ``rows`` of a Parquet file, one ``oversized`` record that is too long to be read, or ``unclosed``: the end
            of a file whose array lacks its closing bracket, which counts as one bad record.
        start: first byte (of ``rows``: first row) of the run.
        stop: byte (row) behind the run.
        first_line: line (from 1) that ``start`` lies in; of ``rows``: number of the row, from 1.
        first_record: number (from 0) of the first annotation, within the file.
        num_records: annotations in the run.
    """

    kind: Kind
    start: int
    stop: int
    first_line: int
    first_record: int
    num_records: int


class Record(msgspec.Struct, frozen=True):
    """One annotation as it was found.

    Attributes:
        data: its JSON text; None where it cannot be had.
        line: line (from 1) that it starts in.
        number: place (from 0) among the annotations of the file.
        embedded: encoded media that came inside the record, by the name that ``data`` gives them.
        fault: why ``data`` is None, in words.
    """

    data: bytes | None
    line: int
    number: int
    embedded: dict[str, bytes] = {}
    fault: str = ""
