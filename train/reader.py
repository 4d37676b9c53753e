"""Reads one bin of a set of shards, and trusts nothing: number of a bin -> checked arrays.

One positional read, XXH3-64 of what was read, the structure of the bin, its counts against the index, and what the
trainer relies on inside: no sample is predicted from the one before it, and pad tokens fit the media. Every failure
names shard, bin and offset.

Cost: one read and one pass of XXH3 (12 GB/s); the arrays are views of the bytes read.
"""

from __future__ import annotations

import os

import numpy as np
import xxhash

from schemas.bins import Bin, read_bin
from schemas.errors import ShardError
from schemas.qwen import IGNORE_INDEX, IMAGE_PAD, MERGE_SIZE, VIDEO_PAD
from train.index import BinLocation, ShardIndex


def read_checked_bin(index: ShardIndex, number: int) -> Bin:
    """Read bin ``number`` of a set of shards.

    Returns:
        The bin, with its number in its own folder; the arrays are writable views of one buffer.

    Raises:
        ShardError: the shard is missing, short or unreadable, its bytes have another checksum, or they are not the bin
            that the index describes.
    """
    location = index.locate(number)
    data = _read(location)
    checksum = xxhash.xxh3_64_intdigest(data)
    if checksum != location.xxh3:
        raise ShardError(
            f"{location}: checksum is {checksum:016x}, expected {location.xxh3:016x}: its bytes have changed. "
            "Copy the shard again; `vlprep verify` lists all damage."
        )
    one = read_bin(data, location.local_bin, where=str(location))
    counts = {
        "tokens": (one.input_ids.size, int(index.num_tokens[number])),
        "targets": (int(np.count_nonzero(one.labels != IGNORE_INDEX)), int(index.num_targets[number])),
        "samples": (one.cu_seqlens.size - 1, int(index.num_samples[number])),
        "patches": (int(one.grid_thw.prod(axis=1, dtype=np.int64).sum()), int(index.num_patches[number])),
    }
    for what, (found, expected) in counts.items():
        if found != expected:
            raise ShardError(f"{location}: holds {found} {what}, the index says {expected}. Build the shards again.")
    _check_samples(one, where=str(location))
    return one


def _read(location: BinLocation) -> memoryview:
    data = np.empty(location.num_bytes, dtype=np.uint8).data
    got = 0
    try:
        descriptor = os.open(location.path, os.O_RDONLY)
        try:
            while got < location.num_bytes and (count := os.preadv(descriptor, [data[got:]], location.offset + got)):
                got += count
        finally:
            os.close(descriptor)
    except OSError as error:
        raise ShardError(f"{location}: cannot be read: {error.strerror}. Copy the shard again.") from error
    if got < location.num_bytes:
        raise ShardError(
            f"{location}: the shard ends after {got} of the bin's {location.num_bytes} bytes. Copy the shard again."
        )
    return data


def _check_samples(one: Bin, *, where: str) -> None:
    grids = one.grid_thw
    if grids.size and (grids.min() < 1 or bool(np.any(grids[:, 1:] % MERGE_SIZE))):
        raise ShardError(
            f"{where}: grid_thw {grids.tolist()[:4]} has a grid that is not positive with even rows and columns. "
            "Build the shards again."
        )
    trained_first = one.labels[one.cu_seqlens[:-1]] != IGNORE_INDEX
    if bool(trained_first.any()):
        raise ShardError(
            f"{where}: the first label of sample {int(trained_first.argmax())} is not {IGNORE_INDEX}: it would be "
            "predicted from the sample before it. Build the shards again."
        )
    num_pads = int(np.count_nonzero((one.input_ids == IMAGE_PAD) | (one.input_ids == VIDEO_PAD)))
    expected = sum(grid.num_tokens for grid, _ in one.grids())
    if num_pads != expected:
        raise ShardError(
            f"{where}: {num_pads} media pad tokens in input_ids, but its media have {expected}. Build the shards again."
        )
