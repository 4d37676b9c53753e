"""Seal: joins scan, plan and write results into the ledger and the tables, checks the balance, writes the manifest
last.

Input: the parts, the plan, the shard results. Output: ``samples.parquet``, ``bins.parquet``, ``manifest.json``. Works
part by part; memory holds three columns over all samples.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prep.plan import Plan
from prep.scan import table_path
from prep.write import ShardResult
from schemas.annotation import Problem, ReasonCode
from schemas.bins import shard_name
from schemas.errors import VlprepError
from schemas.manifest import (
    FORMAT_VERSION,
    MANIFEST_FILE,
    Counts,
    Fingerprints,
    InputDataset,
    Manifest,
    StoredFile,
    StoredShard,
    encode_manifest,
)
from schemas.settings import BuildSettings
from schemas.tables import (
    BINS_COLUMNS,
    BINS_FILE,
    SAMPLES_COLUMNS,
    SAMPLES_FILE,
    STATUS_NOT_SAMPLED,
    STATUS_PACKED,
    STATUS_REJECTED,
)


def arrow_schema(columns: dict[str, str]) -> pa.Schema:
    """Arrow schema of a table of :mod:`schemas.tables`."""
    types = {
        "int32": pa.int32(),
        "int64": pa.int64(),
        "uint64": pa.uint64(),
        "string": pa.string(),
        "list<string>": pa.list_(pa.string()),
    }
    return pa.schema([(name, types[kind]) for name, kind in columns.items()])


@dataclass(frozen=True, kw_only=True, slots=True)
class ScannedPart:
    """One part of the scan and where its records come from.

    Attributes:
        path: of the part, without suffix.
        source: index of the dataset.
        file: name of the annotation file in the ledger.
        record_base: number of the file's first annotation within the dataset.
    """

    path: Path
    source: int
    file: str
    record_base: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """Totals over the ledger."""

    statuses: Counter[str]
    codes: Counter[str]


class Ledger:
    """Accounts for every annotation: where it went, or why not.

    Args:
        names: name of every dataset, by index.
        plan: bins and slots.
        num_samples: measured samples, in the order of the parts, each as often as it is taken.
        max_length: for the message of what is too long.
        results: of all shards.
    """

    def __init__(
        self, names: Sequence[str], plan: Plan, num_samples: int, max_length: int, results: Sequence[ShardResult]
    ) -> None:
        self._names = names
        self._max_length = max_length
        self._failed = {number: problem for result in results for number, problem in result.failed.items()}
        self._backends = {number: name for result in results for number, name in result.backends.items()}
        self._bins, self._slots = plan.places(num_samples)
        for number in self._failed:
            place, slot = self._bins[number], self._slots[number]
            members = plan.order[plan.bin_starts[place] : plan.bin_starts[place + 1]]
            # What stood behind the failed sample moves up; slots of other failed samples no longer matter.
            self._slots[members] -= self._slots[members] > slot
        failed = np.asarray(sorted(self._failed), dtype=np.int64)
        self._bins[failed] = -1

    def write(self, path: Path, parts: Iterable[ScannedPart]) -> Outcome:
        """Write ``samples.parquet``, one row group a part."""
        outcome = Outcome(Counter(), Counter())
        number = 0
        with pq.ParquetWriter(path, arrow_schema(SAMPLES_COLUMNS), compression="zstd") as writer:
            for part in parts:
                rows = pq.read_table(table_path(part.path))
                table, number = self._rows(part, rows, number)
                writer.write_table(table)
                outcome.statuses.update(table.column("status").to_pylist())
                outcome.codes.update(code for codes in table.column("codes").to_pylist() for code in codes)
        return outcome

    def _rows(self, part: ScannedPart, scanned: pa.Table, first: int) -> tuple[pa.Table, int]:
        """Rows of one part; ``first`` is the number of its first sample. Returns them and the next part's first."""
        copies = scanned.column("copies").to_numpy()
        rows = scanned.take(np.repeat(np.arange(len(copies)), np.maximum(copies, 1)))
        has_sample = rows.column("sample_bytes").to_numpy() > 0
        numbers = np.full(len(rows), -1, dtype=np.int64)
        numbers[has_sample] = first + np.arange(int(has_sample.sum()))
        columns = {name: rows.column(name).to_pylist() for name in ("codes", "message", "num_tokens", "video_backend")}
        bins = np.where(has_sample, self._bins[numbers] if self._bins.size else -1, -1)
        slots = np.where(bins >= 0, self._slots[numbers] if self._slots.size else -1, -1)
        statuses = np.where(bins >= 0, STATUS_PACKED, STATUS_REJECTED).astype(object)
        statuses[rows.column("copies").to_numpy() == 0] = STATUS_NOT_SAMPLED
        for row in np.flatnonzero(has_sample & (bins < 0)).tolist():
            problem = self._failed.get(int(numbers[row])) or self._too_long(columns["num_tokens"][row])
            columns["codes"][row], columns["message"][row] = [problem.code.value], problem.message
        for row, number in enumerate(numbers.tolist()):
            if number in self._backends:
                columns["video_backend"][row] = self._backends[number]
        table = pa.table(
            {
                "dataset": [self._names[part.source]] * len(rows),
                "file": [part.file] * len(rows),
                "line": rows.column("line"),
                "record": rows.column("record").to_numpy() + part.record_base,
                "id": rows.column("id"),
                "status": statuses,
                "codes": columns["codes"],
                "message": columns["message"],
                "bin": pa.array(bins, mask=bins < 0),
                "slot": pa.array(slots.astype(np.int32), mask=bins < 0),
                "num_tokens": rows.column("num_tokens"),
                "num_targets": rows.column("num_targets"),
                "num_patches": rows.column("num_patches"),
                "video_backend": columns["video_backend"],
            },
            schema=arrow_schema(SAMPLES_COLUMNS),
        )
        return table, first + int(has_sample.sum())

    def _too_long(self, num_tokens: int) -> Problem:
        return Problem(
            ReasonCode.TOO_LONG,
            f"the sample has {num_tokens} tokens; a bin holds {self._max_length} (--max-length). Shorten it, raise "
            "--max-length or lower the pixel bounds",
        )


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
    outcome: Outcome,
) -> Manifest:
    """Check that the ledger balances, write ``bins.parquet`` and then the manifest. ``samples.parquet`` is there
    already.

    Raises:
        VlprepError: the ledger does not balance, or disagrees with the bins; nothing is sealed.
    """
    table = bins_table(results)
    pq.write_table(table, out / BINS_FILE, compression="zstd")
    total = {name: int(np.sum(table.column(name).to_numpy())) for name in BINS_COLUMNS if name.startswith("num_")}
    counts = Counts(
        num_annotations=outcome.statuses.total(),
        num_packed=outcome.statuses[STATUS_PACKED],
        num_rejected=outcome.statuses[STATUS_REJECTED],
        num_not_sampled=outcome.statuses[STATUS_NOT_SAMPLED],
        rejects_by_code=dict(sorted(outcome.codes.items())),
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


def write_synced(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all: temporary name, sync, rename, sync of the folder."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
