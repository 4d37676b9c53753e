"""Recognizes files that are not JSON or JSONL as a whole, so that the cause is reported once, not for every record.

Input: an annotation file. Output: what it is instead, and how to fix it. A file in which only some records are broken
is left to the readers. Cost: the first 64 KiB of a file, and more of it only if the first record does not end there.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from prep.annotations.array_scanner import ArrayScanner
from prep.annotations.chunks import MAX_RECORD_BYTES
from prep.annotations.dialects import is_known, marks_record
from prep.annotations.file_kinds import EXPECTED
from storage.urls import Location

_HEAD_BYTES = 1 << 16
_MARK = b"\xef\xbb\xbf"
_UTF_16 = re.compile(rb"\xff\xfe|\xfe\xff|[{\[]\0|\0[{\[]")
_TRAILING_COMMA = "trailing comma in"

_CELL = rb'(?:[\w .:/?%#&()\x80-\xff-]*| *"[^"]*" *)'
_TABLE_HEADS = {
    name: re.compile(rb"(?=.*[\w\x80-\xff])%b(?:%b%b)+" % (_CELL, separator, _CELL))
    for name, separator in (("comma", b","), ("tab", b"\t"), ("semicolon", b";"))
}
"""First lines of tables: names of columns, some of which may be empty or in quotes."""

# The start of an object whose first nested value is a list of objects; strings, numbers and literals may precede it.
_TEXT = rb'"(?:[^"\\]|\\.)*"'
_OPENS_LIST = re.compile(rb"\{\s*(?:%b\s*:\s*(?:%b|[-+\w.]+)\s*,\s*)*(%b)\s*:\s*\[\s*\{" % (_TEXT, _TEXT, _TEXT))

_decoder = msgspec.json.Decoder(dict[str, Any])


def whole_file_fault(path: Path, location: Location) -> str | None:
    """What a file is instead of JSON or JSONL, and how to fix it. None if its records can be read one by one.

    Args:
        path: the file, decompressed.
        location: what commands in the message call it.
    """
    name = shlex.quote(str(location))
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if _UTF_16.match(head):
        return f"is UTF-16, but JSON is read as UTF-8. Convert it: `iconv -f UTF-16 -t UTF-8 {name} > new.jsonl`"
    text = head.removeprefix(_MARK).lstrip()
    if not text or text.startswith(b"["):
        return None
    if text.startswith(b"{"):
        return _line_commas(text, name) or _object_fault(path, len(head) - len(text), name)
    return _table(text) or _no_json(text)


def _lines(text: bytes) -> Iterator[bytes]:
    """The lines of a text that are not blank. The last one may be cut short."""
    return (line for line in text.splitlines() if line.strip())


def _line_commas(text: bytes, name: str) -> str | None:
    lines = [line.rstrip() for line in _lines(text)]
    # The last line of a list needs no comma, and the head may end inside a line.
    complete = lines[:-1] or lines
    if all(line.endswith(b",") and _decoded(line[:-1]) is not None for line in complete):
        return (
            "has a comma at the end of each line, but JSONL separates records by line breaks alone. Remove the commas: "
            f"`sed 's/,[[:space:]]*$//' {name} > new.jsonl`"
        )
    if all(_TRAILING_COMMA in _fault(line) for line in complete):
        return (
            "has a comma before a closing brace or bracket in each record, which JSON does not allow. Remove these "
            "commas, or write the file with a JSON library"
        )
    return None


def _object_fault(path: Path, start: int, name: str) -> str | None:
    """The fault of a file that starts with an object at ``start``: over several lines, or with the records inside."""
    with path.open("rb") as file:
        file.seek(start)
        line = file.readline(_HEAD_BYTES)
        if _decoded(line) is not None and file.read(_HEAD_BYTES).strip():
            return None
        file.seek(start)
        text = file.read(MAX_RECORD_BYTES)
    scanner = ArrayScanner()
    ends = scanner.element_ends(text[1:])
    if not scanner.closed:
        opening = _OPENS_LIST.match(text[:_HEAD_BYTES])
        key = None if opening is None else opening[1][1:-1].decode(errors="replace")
        return None if key is None or is_known(key) else _records_inside(key, name)
    stop = int(ends[-1]) + 1
    value = _decoded(text[:stop])
    if value is None:
        return None
    key = _list_of_records(value)
    if key is not None and not text[stop:].strip():
        return _records_inside(key, name)
    num_lines = text.count(b"\n", 0, stop) + 1
    # With other records that fill a line each, only the first one is broken.
    if num_lines > 1 and not any(line.startswith(b"{") and _decoded(line) for line in _lines(text[stop:])):
        return (
            f"spreads its first record over {num_lines} lines, but JSONL has one record per line. Rewrite it: "
            f"`jq -c . {name} > new.jsonl`"
        )
    return None


def _list_of_records(value: dict[str, Any]) -> str | None:
    """The field of an object that holds a list of records. None for an object that is a record."""
    if any(map(is_known, value)):
        return None
    for key, items in value.items():
        if isinstance(items, list) and items and isinstance(items[0], dict):
            return key if marks_record(items[0].keys()) else None
    return None


def _records_inside(key: str, name: str) -> str:
    query = shlex.quote(f".[{msgspec.json.encode(key).decode()}][]")
    return (
        f"is one object that holds its records in the field {key!r}; they must be an array or JSONL. Take them out: "
        f"`jq -c {query} {name} > new.jsonl`"
    )


def _table(text: bytes) -> str | None:
    lines = list(_lines(text))
    for separator, head in _TABLE_HEADS.items():
        if head.fullmatch(lines[0]) and not any(_decoded(line) for line in lines):
            return (
                f"is a table of {separator}-separated values, but annotations are JSON or Parquet. Convert it to one "
                "JSON object per line, with a field `conversations` in each"
            )
    return None


def _no_json(text: bytes) -> str | None:
    """The fault of a text without any JSON. A record that is only broken begins like one."""
    lines = list(_lines(text))
    if any(line.lstrip().startswith((b"{", b"[")) or _is_json(line) for line in lines):
        return None
    if b"\0" in text:
        return f"is binary data; {EXPECTED}"
    shown = lines[0].strip()[:40].decode(errors="replace")
    return (
        f"is not JSON: it begins with {shown!r}. Write one JSON object per line, with a field `conversations` in each"
    )


def _is_json(text: bytes) -> bool:
    try:
        msgspec.json.decode(text)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return False
    return True


def _fault(text: bytes) -> str:
    """What is wrong with the JSON of an object; empty if nothing is."""
    try:
        _decoder.decode(text)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        return str(error)
    return ""


def _decoded(text: bytes) -> dict[str, Any] | None:
    """The object that a text spells, or None."""
    try:
        return _decoder.decode(text)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError):
        return None
