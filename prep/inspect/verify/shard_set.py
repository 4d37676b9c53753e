"""Checks a complete set of shards: the manifest and the tables in this process, the shards in parallel.

Input: a folder or URL. Output: a :class:`Verification`. Cost: SHA-256 of every byte, and decompressing the pixels
(with JPEG: decoding every frame). A set behind a URL is downloaded, one shard at a time per worker.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

import storage
from prep.engines import Engine
from prep.engines.progress import progress
from prep.inspect.verify.drift import check_drift
from prep.inspect.verify.findings import Finding, damaged, unreadable
from prep.inspect.verify.shard import ShardOutcome, ShardTask, check_shard, file_digest
from prep.inspect.verify.statistics import check_modalities, check_statistics
from prep.inspect.verify.tables import check_bins_table, check_ledger, check_manifest, shard_numbers
from prep.shards.drift import drift_lines
from prep.shards.reader import LedgerRow, bin_rows, open_manifest, read_table
from schemas.errors import ShardError
from schemas.manifest import MANIFEST_FILE, METRICS_FILE, WORK_FOLDER, Manifest, StoredFile
from schemas.tables import BINS_COLUMNS, BINS_FILE, SAMPLES_COLUMNS, SAMPLES_FILE, STATUS_PACKED
from storage.urls import Location

_PAGE_SUFFIX = ".html"
"""A page of `vlprep report` may lie beside the shards."""


_NULLABLE = ("id", "video_backend")


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """What was checked, what the manifest says of the drift of a lossy codec, and what is wrong."""

    folder: Location
    num_shards: int
    num_bins: int
    num_annotations: int
    num_bytes: int
    drift: tuple[str, ...]
    findings: tuple[Finding, ...]

    def text(self) -> str:
        """The outcome for a person: every finding on a line, then what was looked at."""
        found = f"{len(self.findings):,} problems" if len(self.findings) != 1 else "1 problem"
        summary = (
            f"{self.folder}: {self.num_shards:,} shards, {self.num_bins:,} bins, {self.num_annotations:,} annotations "
            f"and {self.num_bytes / 1e6:,.1f} MB checked: {found if self.findings else 'all is well'}"
        )
        return "\n".join([*map(str, self.findings), *self.drift, summary])


def verify(folder: Location, engine: Engine) -> Verification:
    """Check a finished set of shards. What lies behind a URL is fetched, a shard at a time for each worker.

    Raises:
        ShardError: the folder holds no manifest, or one that cannot be read.
        StorageError: the store does not answer.
    """
    manifest = open_manifest(folder)
    findings = [*_manifest_bytes(folder), *check_manifest(manifest), *_files(folder, manifest)]
    bins = _table(folder, manifest, BINS_FILE, BINS_COLUMNS, findings)
    ledger = _table(folder, manifest, SAMPLES_FILE, SAMPLES_COLUMNS, findings)
    if bins is not None:
        findings += check_bins_table(bins, manifest)
    if ledger is not None:
        findings += check_ledger(ledger, manifest, bins)
        findings += check_statistics(ledger, manifest)
    engine.share([folder] if isinstance(folder, Path) else [])
    outcomes: list[ShardOutcome] = []
    tasks = _tasks(folder, manifest, bins, ledger)
    total = sum(shard.num_bytes for shard in manifest.shards)
    with (
        closing(engine.map(check_shard, tasks)) as checked,
        progress("verify", total, "B", unit_scale=True) as bar,
    ):
        for outcome in checked:
            outcomes.append(outcome)
            bar.update(outcome.num_bytes)
    findings += _shards(manifest, outcomes)
    if bins is not None and not any(outcome.findings for outcome in outcomes):
        # What is wrong with the bins would be said twice.
        findings += check_modalities(manifest, sum((outcome.modalities for outcome in outcomes), Counter()))
        findings += check_drift(manifest, [outcome.num_frames for outcome in outcomes])
    return Verification(
        folder=folder,
        num_shards=sum(outcome.sha256 is not None for outcome in outcomes),
        num_bins=sum(outcome.num_bins for outcome in outcomes),
        num_annotations=len(ledger) if ledger is not None else 0,
        num_bytes=sum(outcome.num_bytes for outcome in outcomes),
        drift=tuple(drift_lines(manifest)),
        findings=tuple(findings),
    )


def _manifest_bytes(folder: Location) -> Iterator[Finding]:
    path = folder / MANIFEST_FILE
    data = path.read_bytes() if isinstance(path, Path) else storage.read(path)
    if data != msgspec.json.format(data, indent=2) + b"\n":
        yield damaged(MANIFEST_FILE, "it is not laid out as vlprep writes it; it was edited")


def _files(folder: Location, manifest: Manifest) -> Iterator[Finding]:
    """Files that the manifest does not know. Missing ones are found where they are read."""
    known = {
        MANIFEST_FILE,
        METRICS_FILE,
        WORK_FOLDER,
        *(stored.file for stored in (*manifest.shards, *manifest.tables)),
    }
    found = [path.name for path in folder.iterdir()] if isinstance(folder, Path) else storage.listing(folder)
    for name in sorted(found):
        if name not in known and not name.endswith(_PAGE_SUFFIX):
            yield Finding(
                name,
                f"{name}: the manifest does not list it, and tools that read all files of the folder would take "
                "it for a part of the set. Move it elsewhere.",
            )


def _table(
    folder: Location, manifest: Manifest, name: str, columns: dict[str, str], findings: list[Finding]
) -> pa.Table | None:
    """Check the bytes of a table and read it; None where that is not possible."""
    stored = next((table for table in manifest.tables if table.file == name), None)
    if stored is not None:
        findings += _table_bytes(folder, stored)
    try:
        return read_table(folder / name, columns)
    except ShardError as error:
        findings.append(unreadable(name, error))
        return None


def _table_bytes(folder: Location, stored: StoredFile) -> Iterator[Finding]:
    try:
        num_bytes, sha256 = file_digest(folder / stored.file)
    except (OSError, storage.NotThereError):
        # Reading the table says it with the reason.
        return
    if num_bytes != stored.num_bytes:
        yield damaged(stored.file, f"the file has {num_bytes:,} bytes, the manifest says {stored.num_bytes:,}")
    if sha256 != stored.sha256:
        yield damaged(stored.file, f"SHA-256 is {sha256}, the manifest says {stored.sha256}")


def _tasks(folder: Location, manifest: Manifest, bins: pa.Table | None, ledger: pa.Table | None) -> Iterator[ShardTask]:
    """One task a shard, with the rows that its worker needs; tables with nulls were reported and are left out."""
    if bins is not None and any(bins.column(name).null_count for name in BINS_COLUMNS):
        bins = None
    packed = None if ledger is None else _packed_by_bin(ledger)
    numbers = {place: number for number, place in shard_numbers(manifest).items()}
    for place, stored in enumerate(manifest.shards):
        of_shard = None if bins is None else bins.filter(pc.equal(bins.column("shard"), numbers.get(place, -1)))
        yield ShardTask(
            folder=folder,
            stored=stored,
            settings=manifest.settings,
            bins=None if of_shard is None else bin_rows(of_shard),
            ledger=None if packed is None or of_shard is None else _samples_of(packed, of_shard),
        )


def _samples_of(packed: pa.Table, bins: pa.Table) -> pa.Table:
    """Rows of the samples in a run of bins."""
    held = bins.column("bin").to_numpy()
    first, last = (0, 0)
    if held.size:
        first, last = np.searchsorted(packed.column("bin").to_numpy(), [held.min(), held.max() + 1]).tolist()
    # A slice would carry the whole table to the worker.
    return packed.take(np.arange(first, last))


def _packed_by_bin(ledger: pa.Table) -> pa.Table | None:
    """What the bins are compared with: packed rows by bin and slot; None where a number is missing."""
    packed = ledger.select(["status", *LedgerRow.__struct_fields__])
    packed = packed.filter(pc.equal(packed.column("status"), STATUS_PACKED)).drop_columns("status")
    if any(packed.column(name).null_count for name in LedgerRow.__struct_fields__ if name not in _NULLABLE):
        return None
    return packed.sort_by([("bin", "ascending"), ("slot", "ascending")])


def _shards(manifest: Manifest, outcomes: list[ShardOutcome]) -> Iterator[Finding]:
    """What is wrong in the shards; where one holds another's bytes, that says it all."""
    sealed = {shard.sha256: shard.file for shard in manifest.shards}
    for stored, outcome in zip(manifest.shards, outcomes):
        twin = sealed.get(outcome.sha256 or "")
        if twin is None or twin == stored.file:
            yield from outcome.findings
        else:
            yield damaged(stored.file, f"the file holds the bytes of {twin}: files were renamed or swapped")
