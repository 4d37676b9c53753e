"""Seal: writes the table of bins, checks that every annotation is accounted for, and writes the manifest last.

Input: the results of the shards and the statistics of the ledger, which is already written. Output: ``bins.parquet``
and ``manifest.json``.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from msgspec import UNSET

from prep.build.output import Output
from prep.build.written import WrittenShards
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
    encode_manifest,
)
from schemas.settings import BuildSettings
from schemas.tables import BINS_COLUMNS, BINS_FILE, SAMPLES_FILE
from storage.files import naming, write_synced

_BLOCK_BYTES = 4 << 20


def seal(
    output: Output,
    *,
    settings: BuildSettings,
    fingerprints: Fingerprints,
    software: dict[str, str],
    inputs: list[InputDataset],
    written: WrittenShards,
    statistics: list[DatasetStatistics],
) -> Manifest:
    """Check that the ledger balances, then publish the tables and, last, the manifest.

    ``samples.parquet`` must already be in the output's folder.

    Raises:
        VlprepError: the ledger does not balance, or disagrees with the bins. Nothing is sealed.
    """
    table = written.bins_table()
    with naming(output.folder / BINS_FILE):
        pq.write_table(table, output.folder / BINS_FILE, compression="zstd")
    counts = _balanced_counts(table, inputs, statistics)
    manifest = Manifest(
        version=FORMAT_VERSION,
        settings=settings,
        fingerprints=fingerprints,
        software=software,
        inputs=inputs,
        counts=counts,
        statistics=statistics,
        drift=UNSET if written.drift is None else written.drift.drift(),
        shards=written.shards,
        tables=[_stored_file(output.folder / name) for name in (BINS_FILE, SAMPLES_FILE)],
    )
    write_synced(output.folder / MANIFEST_FILE, encode_manifest(manifest))
    for name in (BINS_FILE, SAMPLES_FILE, MANIFEST_FILE):
        output.put(name)
    return manifest


def _balanced_counts(table: pa.Table, inputs: list[InputDataset], statistics: list[DatasetStatistics]) -> Counts:
    """Totals of the set, which the bins, the ledger and the inputs must agree on."""
    total = {name: int(np.sum(table.column(name).to_numpy())) for name in BINS_COLUMNS if name.startswith("num_")}
    codes = sum((Counter(dataset.rejects_by_code) for dataset in statistics), Counter[str]())
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
    expected = sum(map(_num_ledger_rows, inputs))
    if not counts.balances() or counts.num_annotations != expected or counts.num_packed != total["num_samples"]:
        raise VlprepError(
            f"the ledger does not balance: {expected} annotations, {counts.num_packed} packed "
            f"({total['num_samples']} in bins), {counts.num_rejected} rejected, {counts.num_not_sampled} not sampled. "
            "Nothing was sealed; this is a bug of vlprep, please report it."
        )
    return counts


def _num_ledger_rows(dataset: InputDataset) -> int:
    """Rows of the ledger for a dataset: every annotation once, or as often as it is drawn."""
    num_annotations = sum(file.num_annotations for file in dataset.files)
    return max(num_annotations, int(dataset.num_drawn))


def _stored_file(path: Path) -> StoredFile:
    digest, num_bytes = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            num_bytes += len(block)
    return StoredFile(file=path.name, num_bytes=num_bytes, sha256=digest.hexdigest())
