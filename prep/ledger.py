"""The ledger: one row an annotation, with what became of it, and the totals of every dataset.

Input: the parts of the scan, the plan, the shard results. Output: ``samples.parquet`` and statistics. Works part by
part; memory holds five numbers a sample.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from prep.plan import Plan
from prep.scan import table_path
from prep.tables import arrow_schema
from prep.write import ShardResult
from schemas.annotation import Problem, ReasonCode
from schemas.manifest import DatasetStatistics, Distribution
from schemas.tables import SAMPLES_COLUMNS, STATUS_NOT_SAMPLED, STATUS_PACKED, STATUS_REJECTED

_MODALITIES = ("text", "image", "video", "image+video")
_SIZES = ("num_tokens", "num_targets", "num_patches")


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


class _Tally:
    """What became of one dataset, while the ledger is written."""

    def __init__(self, dataset: str) -> None:
        self._dataset = dataset
        self._statuses: Counter[str] = Counter()
        self._codes: Counter[str] = Counter()
        self._modalities: Counter[str] = Counter()
        self._sizes: dict[str, list[NDArray[np.int32]]] = {name: [] for name in _SIZES}

    def add(self, rows: pa.Table, num_images: NDArray[np.int32], num_videos: NDArray[np.int32]) -> None:
        """Count rows of the ledger; the two arrays say what media each row has."""
        statuses = rows.column("status").to_numpy()
        self._statuses.update(statuses.tolist())
        self._codes.update(code for codes in rows.column("codes").to_pylist() for code in codes)
        is_packed = statuses == STATUS_PACKED
        kinds = (num_images[is_packed] > 0) + 2 * (num_videos[is_packed] > 0)
        for kind, count in enumerate(np.bincount(kinds.astype(np.int64), minlength=len(_MODALITIES)).tolist()):
            if count:
                self._modalities[_MODALITIES[kind]] += count
        for name, found in self._sizes.items():
            found.append(rows.column(name).to_numpy()[is_packed].astype(np.int32))

    def statistics(self) -> DatasetStatistics:
        """The totals."""
        return DatasetStatistics(
            dataset=self._dataset,
            num_annotations=self._statuses.total(),
            num_packed=self._statuses[STATUS_PACKED],
            num_rejected=self._statuses[STATUS_REJECTED],
            num_not_sampled=self._statuses[STATUS_NOT_SAMPLED],
            rejects_by_code=dict(sorted(self._codes.items())),
            modalities=dict(sorted(self._modalities.items())),
            **{name.removeprefix("num_"): _distribution(found) for name, found in self._sizes.items()},
        )


def _distribution(parts: Sequence[NDArray[np.int32]]) -> Distribution | None:
    values = np.concatenate([np.empty(0, dtype=np.int32), *parts])
    if not values.size:
        return None
    total = int(values.sum(dtype=np.int64))
    low, p50, p90, p99, high = np.quantile(values, [0, 0.5, 0.9, 0.99, 1], method="inverted_cdf").tolist()
    return Distribution(
        total=total, mean=total / values.size, min=int(low), p50=int(p50), p90=int(p90), p99=int(p99), max=int(high)
    )


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

    def write(self, path: Path, parts: Iterable[ScannedPart]) -> list[DatasetStatistics]:
        """Write ``samples.parquet``, one row group a part; return the totals of every dataset."""
        tallies = [_Tally(name) for name in self._names]
        number = 0
        with pq.ParquetWriter(path, arrow_schema(SAMPLES_COLUMNS), compression="zstd") as writer:
            for part in parts:
                scanned = pq.read_table(table_path(part.path))
                copies = scanned.column("copies").to_numpy()
                rows = scanned.take(np.repeat(np.arange(len(copies)), np.maximum(copies, 1)))
                table, number = self._rows(part, rows, number)
                writer.write_table(table)
                media = (rows.column(name).fill_null(0).to_numpy() for name in ("num_images", "num_videos"))
                tallies[part.source].add(table, *media)
        return [tally.statistics() for tally in tallies]

    def _rows(self, part: ScannedPart, rows: pa.Table, first: int) -> tuple[pa.Table, int]:
        """Ledger of one part; ``first`` is the number of its first sample. Returns it and the next part's first."""
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
