"""Counts and foreign text in messages for people."""

from __future__ import annotations

import unicodedata


def counted(count: int, noun: str) -> str:
    """A count with its noun: ``1 shard``, ``1,024 shards``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def printable(text: str) -> str:
    """Escape control characters, except line breaks and tabs, so that text cannot control a terminal."""
    return "".join(
        character if character in "\n\t" or unicodedata.category(character) != "Cc" else f"\\x{ord(character):02x}"
        for character in text
    )
