"""Counts and foreign text in messages for people."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""The category Cc of Unicode, without line breaks and tabs."""

_KINDS = {
    "image": "with images",
    "image + video": "with images and videos",
    "image+video": "with images and videos",
    "text": "text only",
    "text only": "text only",
    "video": "with videos",
}
"""Samples in words, by the kinds of their media as the manifest and ``validate --json`` name them."""


def counted(count: int, noun: str, plural: str = "") -> str:
    """A count with its noun: ``1 shard``, ``1,024 shards``. The plural is the noun with an s where it is left out."""
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


def listed(noun: str, items: Collection[object]) -> str:
    """Items with their noun: ``bin 3``, ``bins 3, 5``, ``no bin``."""
    if not items:
        return f"no {noun}"
    return f"{noun}{'' if len(items) == 1 else 's'} {', '.join(map(str, items))}"


def kinds_text(samples: Mapping[str, int]) -> str:
    """Numbers of samples by the kinds of their media: ``10 with images, 15 text only``; empty without samples."""
    return ", ".join(f"{count:,} {_KINDS[kind]}" for kind, count in samples.items())


def size_text(num_bytes: int) -> str:
    """A size for people: ``3.2 kB``, ``1.4 MB``, ``2.5 GB``."""
    for size, unit in ((10**12, "TB"), (10**9, "GB")):
        if num_bytes >= size:
            return f"{num_bytes / size:.4g} {unit}"
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes >= 10**5 else f"{num_bytes / 1e3:.1f} kB"


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
