"""Counts in messages for people."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """A count with its noun: ``1 shard``, ``1,024 shards``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
