"""Uses a cache that other processes use and that is never too large: ``cache_user.py FOLDER LIMIT SEED TURNS``.

It imports the cache alone, which takes a hundredth of what the tests of it import.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from train.shards.cache import BinCache, cache_key


def key_of(bin_id: int) -> str:
    return cache_key("0" * 64, bin_id, 1000)


def data_of(bin_id: int, size: int = 1000) -> bytes:
    return bytes([bin_id % 256]) * size


def use(folder: Path, limit: int, seed: int, turns: int) -> None:
    """Read bins, and write those that are missing."""
    cache, rng = BinCache(folder, limit), random.Random(seed)
    for _ in range(turns):
        bin_id = rng.randrange(60)
        out = bytearray(1000)
        if cache.read(key_of(bin_id), memoryview(out)):
            assert out == data_of(bin_id), bin_id
        else:
            cache.write(key_of(bin_id), memoryview(data_of(bin_id)))
        with cache._locked():  # no other process evicts, reserves or renames now
            size = cache.size()
        assert size <= limit, size


if __name__ == "__main__":
    use(Path(sys.argv[1]), *map(int, sys.argv[2:]))
