"""Counts and foreign text in messages for people."""

from __future__ import annotations

import re
from collections.abc import Collection

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""The category Cc of Unicode, without line breaks and tabs."""


def counted(count: int, noun: str, plural: str = "") -> str:
    """A count with its noun: ``1 shard``, ``1,024 shards``. The plural is the noun with an s where it is left out."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def listed(noun: str, items: Collection[object]) -> str:
    """Items with their noun: ``bin 3``, ``bins 3, 5``, ``no bin``."""
    if not items:
        return f"no {noun}"
    return f"{noun}{'' if len(items) == 1 else 's'} {', '.join(map(str, items))}"


def one_line(text: str) -> str:
    """Escape all control characters, so that foreign text cannot pretend to be another line of a list."""
    return printable(text).replace("\n", "\\n")


def printable(text: str) -> str:
    """Escape control characters, except line breaks and tabs, so that text cannot control a terminal."""
    return _CONTROLS.sub(lambda match: f"\\x{ord(match[0]):02x}", text)


def source_name(*, dataset: str, file: str, line: int, record: int, id: str | None) -> str:
    """Where a sample comes from: ``demo, annotations.jsonl:3 (record 2, id a)``, without an id if it has none."""
    name = f", id {one_line(id)}" if id is not None else ""
    return f"{one_line(dataset)}, {one_line(file)}:{line} (record {record}{name})"
