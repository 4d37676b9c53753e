"""Seal: writes the table of bins, checks that every annotation is accounted for, and writes the manifest last.

Input: the shard results and the statistics of the ledger, which is there already. Output: ``bins.parquet`` and
``manifest.json``.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prep.files import write_synced
from prep.tables import arrow_schema
from prep.write import ShardResult
from schemas.bins import shard_name
from schemas.errors import VlprepError
from schemas.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    Counts,
    DatasetStatistics,
    Fingerprints,
    InputDataset,
    Manifest,
    StoredFile,
    StoredShard,
    encode_manifest,
)
from schemas.settings import BuildSettings
from schemas.tables import BINS_COLUMNS, BINS_FILE, SAMPLES_FILE


def bins_table(results: Sequence[ShardResult]) -> pa.Table:
    """Contents of ``bins.parquet``."""
    rows = [{"shard": result.shard, **msgspec.structs.asdict(row)} for result in results for row in result.rows]
    schema = arrow_schema(BINS_COLUMNS)
    return pa.table({name: [row[name] for row in rows] for name in schema.names}, schema=schema)


def seal(
    out: Path,
    *,
    settings: BuildSettings,
    fingerprints: Fingerprints,
    software: dict[str, str],
    inputs: list[InputDataset],
    results: Sequence[ShardResult],
    statistics: list[DatasetStatistics],
) -> Manifest:
    """Check that the ledger balances, write ``bins.parquet`` and then the manifest. ``samples.parquet`` is there
    already.

    Raises:
        VlprepError: the ledger does not balance, or disagrees with the bins; nothing is sealed.
    """
    table = bins_table(results)
    pq.write_table(table, out / BINS_FILE, compression="zstd")
    total = {name: int(np.sum(table.column(name).to_numpy())) for name in BINS_COLUMNS if name.startswith("num_")}
    codes = Counter[str]()
    for dataset in statistics:
        codes.update(dataset.rejects_by_code)
    counts = Counts(
        num_annotations=sum(dataset.num_annotations for dataset in statistics),
        num_packed=sum(dataset.num_packed for dataset in statistics),
        num_rejected=sum(dataset.num_rejected for dataset in statistics),
        num_not_sampled=sum(dataset.num_not_sampled for dataset in statistics),
        rejects_by_code=dict(sorted(codes.items())),
        num_bins=len(table),
        num_tokens=total["num_tokens"],
        num_targets=total["num_targets"],
        num_patches=total["num_patches"],
        num_images=total["num_images"],
        num_videos=total["num_videos"],
    )
    expected = sum(_taken(dataset) for dataset in inputs)
    if not counts.balances() or counts.num_annotations != expected or counts.num_packed != total["num_samples"]:
        raise VlprepError(
            f"the ledger does not balance: {expected} annotations, {counts.num_packed} packed "
            f"({total['num_samples']} in bins), {counts.num_rejected} rejected, {counts.num_not_sampled} not sampled. "
            "Nothing was sealed; this is a bug of vlprep, please report it."
        )
    manifest = Manifest(
        version=FORMAT_VERSION,
        settings=settings,
        fingerprints=fingerprints,
        software=software,
        inputs=inputs,
        counts=counts,
        statistics=statistics,
        shards=list(_stored_shards(results)),
        tables=[_stored_file(out, name) for name in (BINS_FILE, SAMPLES_FILE)],
    )
    write_synced(out / MANIFEST_FILE, encode_manifest(manifest))
    return manifest


def _taken(dataset: InputDataset) -> int:
    """Rows of the ledger for a dataset: every annotation once, or as often as it is taken."""
    num_annotations = sum(file.num_annotations for file in dataset.files)
    return max(num_annotations, int(dataset.num_drawn))


def _stored_shards(results: Sequence[ShardResult]) -> Iterator[StoredShard]:
    for result in results:
        if result.rows:
            yield StoredShard(
                file=shard_name(result.shard),
                num_bytes=result.num_bytes,
                sha256=result.sha256,
                first_bin=result.rows[0].bin,
                num_bins=len(result.rows),
            )


def _stored_file(out: Path, name: str) -> StoredFile:
    data = (out / name).read_bytes()
    return StoredFile(file=name, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
