"""One seed for one purpose, so that no two uses of a run's seed draw the same numbers."""

from __future__ import annotations

import hashlib


def seed_for(seed: int, *purpose: str) -> int:
    """A 128-bit seed for one purpose: the SHA-256 of seed and purpose."""
    text = "\0".join((str(seed), *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")
