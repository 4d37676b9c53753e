"""A set of shards with any number of bins and no contents, to measure start-up.

A number of bins -> a folder with the manifest and tables of a build of that size; its shards are sparse files of the
right size, which take no blocks on disk.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from schemas.manifest import StoredShard, encode_manifest
from storage.shard_set import read_manifest
from tests.train.synthetic import BINS_SCHEMA, make_bins, stored_file, write_shards

_BINS_PER_SHARD = 500
_BIN_BYTES = 1 << 20


def write_many_bins(folder: Path, num_bins: int) -> Path:
    """Write a set of ``num_bins`` bins of 1 MiB each; return the folder."""
    write_shards(folder, make_bins(num_bins=1))
    columns = _columns(num_bins)
    table = pa.table(
        {field.name: pa.array(columns[field.name].astype(field.type.to_pandas_dtype())) for field in BINS_SCHEMA}
    )
    pq.write_table(table.cast(BINS_SCHEMA), folder / "bins.parquet")
    manifest = read_manifest(folder)
    tables = [
        stored_file(folder / "bins.parquet"),
        *(table for table in manifest.tables if table.file != "bins.parquet"),
    ]
    manifest = msgspec.structs.replace(manifest, shards=_write_sparse_shards(folder, num_bins), tables=tables)
    (folder / "manifest.json").write_bytes(encode_manifest(manifest))
    return folder


def _columns(num_bins: int) -> dict[str, NDArray[np.generic]]:
    """Random columns (num_bins,) of ``bins.parquet``."""
    rng = np.random.default_rng(0)
    bins = np.arange(num_bins)
    tokens = rng.integers(3900, 4097, num_bins)
    return {
        "bin": bins,
        "shard": bins // _BINS_PER_SHARD,
        "offset": bins % _BINS_PER_SHARD * _BIN_BYTES,
        "num_bytes": np.full(num_bins, _BIN_BYTES),
        "xxh3": rng.integers(0, 2**63, num_bins, dtype=np.uint64),
        "num_tokens": tokens,
        "num_targets": rng.integers(200, 1500, num_bins),
        "num_samples": rng.integers(1, 40, num_bins),
        "num_patches": rng.integers(0, 12_000, num_bins),
        "num_images": rng.integers(0, 10, num_bins),
        "num_videos": rng.integers(0, 3, num_bins),
        "sum_squared_lengths": tokens.astype(np.int64) ** 2 // 7,
    }


def _write_sparse_shards(folder: Path, num_bins: int) -> list[StoredShard]:
    shards = []
    for first in range(0, num_bins, _BINS_PER_SHARD):
        bins_of_shard = min(_BINS_PER_SHARD, num_bins - first)
        path = folder / f"bins-{first // _BINS_PER_SHARD:05d}.tar"
        path.touch()
        num_bytes = bins_of_shard * _BIN_BYTES + 1024
        os.truncate(path, num_bytes)
        shards.append(
            StoredShard(file=path.name, num_bytes=num_bytes, sha256="0" * 64, first_bin=first, num_bins=bins_of_shard)
        )
    return shards
