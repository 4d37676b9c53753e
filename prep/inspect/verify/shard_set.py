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
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

import storage
from prep.engines import Engine
from prep.engines.progress import progress
from prep.inspect.verify.drift import check_drift
from prep.inspect.verify.findings import Finding, damaged, inconsistent, unreadable
from prep.inspect.verify.shard import (
    MAX_EXCESS_BYTES,
    ShardOutcome,
    ShardTask,
    check_shard,
    file_digest,
    file_size,
    size_problem,
)
from prep.inspect.verify.statistics import check_modalities, check_statistics
from prep.inspect.verify.tables import check_bins_table, check_ledger, check_manifest, shard_numbers
from prep.shards.drift import drift_lines
from schemas.errors import ShardError
from schemas.manifest import (
    MANIFEST_FILE,
    METRICS_FILE,
    WORK_FOLDER,
    Manifest,
    StoredFile,
    decode_manifest,
    encode_manifest,
)
from schemas.tables import (
    BINS_COLUMNS,
    BINS_FILE,
    SAMPLES_COLUMNS,
    SAMPLES_FILE,
    STATUS_PACKED,
    AnnotationRow,
    LedgerRow,
    StoredBin,
)
from schemas.wording import counted, size_text
from storage.shard_set import read_manifest_bytes
from storage.tables import column_problems, read_table
from storage.urls import Location

_PAGE_SUFFIX = ".html"
"""A page of `vlprep report` may lie beside the shards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """The outcome of a check.

    Attributes:
        folder: the set, a folder or URL.
        num_shards: shards that could be read.
        num_bins: bins in them.
        num_annotations: rows of the ledger.
        num_bytes: bytes of the shards.
        drift: lines about the loss of a lossy codec, from the manifest.
        findings: everything that is wrong.
    """

    folder: Location
    num_shards: int
    num_bins: int
    num_annotations: int
    num_bytes: int
    drift: tuple[str, ...]
    findings: tuple[Finding, ...]

    def text(self) -> str:
        """The outcome as text: one finding per line, then a summary of what was checked."""
        problems = counted(len(self.findings), "problem") if self.findings else "no problems"
        summary = (
            f"{self.folder}: {counted(self.num_shards, 'shard')}, {counted(self.num_bins, 'bin')}, "
            f"{counted(self.num_annotations, 'annotation')} and {size_text(self.num_bytes)} checked: {problems}"
        )
        return "\n".join([*map(str, self.findings), *self.drift, summary])

    def content(self) -> dict[str, Any]:
        """The outcome for JSON."""
        return {
            "folder": str(self.folder),
            "num_shards": self.num_shards,
            "num_bins": self.num_bins,
            "num_annotations": self.num_annotations,
            "num_bytes": self.num_bytes,
            "drift": list(self.drift),
            "findings": [{"where": finding.where, "message": finding.text} for finding in self.findings],
        }


def verify(folder: Location, engine: Engine) -> Verification:
    """Check a finished set of shards.

    Raises:
        ShardError: the manifest is missing or cannot be read.
        StorageError: the store does not answer.
    """
    data = read_manifest_bytes(folder)
    manifest = decode_manifest(data, where=str(folder / MANIFEST_FILE))
    findings = [*_manifest_bytes(data, manifest), *check_manifest(manifest), *_unlisted_files(folder, manifest)]
    bins = _table(folder, manifest, BINS_FILE, BINS_COLUMNS, StoredBin, findings)
    ledger = _table(folder, manifest, SAMPLES_FILE, SAMPLES_COLUMNS, AnnotationRow, findings)
    if bins is not None:
        findings += check_bins_table(bins, manifest)
    if ledger is not None:
        findings += check_ledger(ledger, manifest, bins)
        findings += check_statistics(ledger, manifest)
    engine.share([folder] if isinstance(folder, Path) else [])
    outcomes = _check_shards(_tasks(folder, manifest, bins, ledger), manifest, engine)
    findings += _shard_findings(manifest, outcomes)
    if bins is not None and not any(outcome.findings for outcome in outcomes):
        # Otherwise problems of the bins would be reported twice.
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


def _check_shards(tasks: Iterator[ShardTask], manifest: Manifest, engine: Engine) -> list[ShardOutcome]:
    outcomes = []
    total = sum(shard.num_bytes for shard in manifest.shards)
    with (
        closing(engine.map(check_shard, tasks)) as checked,
        progress("verify", total, "B", unit_scale=True) as bar,
    ):
        for outcome in checked:
            outcomes.append(outcome)
            bar.update(outcome.num_bytes)
    return outcomes


def _manifest_bytes(data: bytes, manifest: Manifest) -> Iterator[Finding]:
    """Compare the bytes of a manifest with those of the same values as vlprep writes them."""
    expected = encode_manifest(manifest)
    if data == expected:
        return
    shared = min(len(data), len(expected))
    differs = np.frombuffer(data, np.uint8)[:shared] != np.frombuffer(expected, np.uint8)[:shared]
    at = int(differs.argmax()) if differs.any() else shared
    line_number, start = data.count(b"\n", 0, at) + 1, data.rfind(b"\n", 0, at) + 1
    actual, written = (
        text[start:].partition(b"\n")[0].strip().decode(errors="replace")[:80] or "nothing" for text in (data, expected)
    )
    yield damaged(
        f"{MANIFEST_FILE}, line {line_number}",
        f"it was edited, or another version of vlprep wrote it: {actual} stands where {written} is expected",
    )


def _unlisted_files(folder: Location, manifest: Manifest) -> Iterator[Finding]:
    """Files that the manifest does not list. Missing files are reported where they are read."""
    known = {
        MANIFEST_FILE,
        METRICS_FILE,
        WORK_FOLDER,
        *(stored.file for stored in (*manifest.shards, *manifest.tables)),
    }
    names = [path.name for path in folder.iterdir()] if isinstance(folder, Path) else storage.file_names(folder)
    for name in sorted(names):
        if name not in known and not name.endswith(_PAGE_SUFFIX):
            yield Finding(
                name,
                f"{name}: the manifest does not list it, and tools that read every file of the folder would take "
                "it for part of the set. Move it elsewhere.",
            )


def _table(
    folder: Location,
    manifest: Manifest,
    name: str,
    columns: dict[str, str],
    row: type[msgspec.Struct],
    findings: list[Finding],
) -> pa.Table | None:
    """Check the bytes of a table, read it, and check its values against the bounds of ``row``; None if unusable."""
    stored = next((table for table in manifest.tables if table.file == name), None)
    if stored is not None:
        findings += _table_bytes(folder, stored)
    try:
        table = read_table(folder / name, columns)
    except ShardError as error:
        findings.append(unreadable(name, error))
        return None
    problems = [inconsistent(f"{name}, row {at}", problem) for at, problem in column_problems(table, row)]
    findings += problems
    return None if problems else table


def _table_bytes(folder: Location, stored: StoredFile) -> Iterator[Finding]:
    try:
        num_bytes = file_size(folder / stored.file)
        is_read = num_bytes <= stored.num_bytes + MAX_EXCESS_BYTES
        sha256 = file_digest(folder / stored.file)[1] if is_read else stored.sha256
    except (OSError, storage.NotThereError):
        # Reading the table reports this with the reason.
        return
    if num_bytes != stored.num_bytes:
        yield damaged(stored.file, size_problem(num_bytes, stored))
    if sha256 != stored.sha256:
        yield damaged(stored.file, f"SHA-256 is {sha256}, the manifest says {stored.sha256}")


def _tasks(folder: Location, manifest: Manifest, bins: pa.Table | None, ledger: pa.Table | None) -> Iterator[ShardTask]:
    """One task per shard, with the rows that its worker needs."""
    packed = None if ledger is None else _packed_by_bin(ledger)
    shard_of = {index: shard for shard, index in shard_numbers(manifest).items()}
    by_shard = None if bins is None else bins.take(np.argsort(bins.column("shard").to_numpy(), kind="stable"))
    max_bytes = max((shard.num_bytes for shard in manifest.shards), default=0)
    for index, stored in enumerate(manifest.shards):
        rows = None if by_shard is None else _bins_of(by_shard, shard_of.get(index, -1))
        yield ShardTask(
            folder=folder,
            stored=stored,
            max_bytes=max_bytes,
            settings=manifest.settings,
            bins=rows,
            ledger=None if packed is None or rows is None else _samples_of(packed, rows),
        )


def _bins_of(bins: pa.Table, shard: int) -> pa.Table:
    """Rows of a shard. ``bins`` is sorted by shard."""
    first, last = np.searchsorted(bins.column("shard").to_numpy(), [shard, shard + 1]).tolist()
    # A copy, because a slice would send the complete table to the worker.
    return bins.take(np.arange(first, last))


def _samples_of(packed: pa.Table, bins: pa.Table) -> pa.Table:
    """Ledger rows of the samples in consecutive bins."""
    numbers = bins.column("bin").to_numpy()
    first, last = (0, 0)
    if numbers.size:
        column = packed.column("bin").to_numpy()
        first = int(np.searchsorted(column, numbers.min()))
        last = int(np.searchsorted(column, numbers.max(), side="right"))
    return packed.take(np.arange(first, last))


def _packed_by_bin(ledger: pa.Table) -> pa.Table | None:
    """Packed rows of the ledger, sorted by bin and slot. None if a value is missing or out of its bounds."""
    packed = ledger.select(["status", *LedgerRow.__struct_fields__])
    packed = packed.filter(pc.equal(packed.column("status"), STATUS_PACKED)).drop_columns("status")
    if any(column_problems(packed, LedgerRow)):
        return None
    return packed.sort_by([("bin", "ascending"), ("slot", "ascending")])


def _shard_findings(manifest: Manifest, outcomes: list[ShardOutcome]) -> Iterator[Finding]:
    """Findings of the shards. A shard that holds the bytes of another one gets a single finding."""
    files = {shard.sha256: shard.file for shard in manifest.shards}
    for stored, outcome in zip(manifest.shards, outcomes):
        owner = files.get(outcome.sha256 or "")
        if owner is None or owner == stored.file:
            yield from outcome.findings
        else:
            yield damaged(stored.file, f"the file holds the bytes of {owner}: files were renamed or swapped")
