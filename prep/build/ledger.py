"""The ledger: one row per annotation with its outcome, and the totals of every dataset.

Input: the parts of the scan, the plan, the results of the shards. Output: ``samples.parquet`` and statistics. It works
part by part. Memory: 32 bytes per sample, and histograms of sizes that do not grow with the samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from msgspec import UNSET
from numpy.typing import NDArray

from prep.build.distribution import ValueCounts
from prep.build.media_tally import MediaTally
from prep.build.parts import ScannedPart, list_entries, read_rows
from prep.build.plan import Plan
from prep.build.written import WrittenShards
from prep.samples.lengths import too_long
from schemas.annotation import Problem
from schemas.manifest import DatasetStatistics
from schemas.tables import SAMPLES_COLUMNS, STATUS_NOT_SAMPLED, STATUS_PACKED, STATUS_REJECTED
from storage.arrow import arrow_schema

_MAX_UNUSED = 100
_MODALITIES = ("text", "image", "video", "image+video")
_STATUSES = (STATUS_PACKED, STATUS_REJECTED, STATUS_NOT_SAMPLED)
_PACKED, _REJECTED, _NOT_SAMPLED = range(3)


class _Tally:
    """Totals of one dataset while the ledger is written."""

    def __init__(self, dataset: str) -> None:
        self._dataset = dataset
        self._statuses = np.zeros(len(_STATUSES), dtype=np.int64)
        self._modalities = np.zeros(len(_MODALITIES), dtype=np.int64)
        self._codes: Counter[str] = Counter()
        self._num_boxes = 0
        self._unused: Counter[str] = Counter()
        self._media = MediaTally()
        self._sizes = {name: ValueCounts() for name in ("num_tokens", "num_targets", "num_patches")}

    def add(self, scanned: pa.Table, codes: pa.ChunkedArray, statuses: NDArray[np.int64]) -> None:
        """Count the rows of a part, with their final codes and statuses (indices of ``_STATUSES``)."""
        self._statuses += np.bincount(statuses, minlength=len(_STATUSES))
        for entries in list_entries(codes):
            self._codes.update(entries.to_pylist())
        for entries in list_entries(scanned.column("unused")):
            self._unused.update(entries.to_pylist())
        is_packed = statuses == _PACKED
        packed = scanned if is_packed.all() else scanned.filter(pa.array(is_packed))
        num_images, num_videos = (packed.column(name).to_numpy() for name in ("num_images", "num_videos"))
        kinds = (num_images > 0) + 2 * (num_videos > 0).astype(np.int64)
        self._modalities += np.bincount(kinds, minlength=len(_MODALITIES))
        self._num_boxes += int(packed.column("num_boxes").to_numpy().sum())
        self._media.add(packed)
        for name, counts in self._sizes.items():
            counts.add(packed.column(name).to_numpy())

    def statistics(self) -> DatasetStatistics:
        """The totals."""
        packed, rejected, not_sampled = self._statuses.tolist()
        modalities = zip(_MODALITIES, self._modalities.tolist())
        return DatasetStatistics(
            dataset=self._dataset,
            num_annotations=packed + rejected + not_sampled,
            num_packed=packed,
            num_rejected=rejected,
            num_not_sampled=not_sampled,
            rejects_by_code=dict(sorted(self._codes.items())),
            modalities=dict(sorted((name, count) for name, count in modalities if count)),
            num_boxes=self._num_boxes,
            **{name.removeprefix("num_"): counts.distribution() for name, counts in self._sizes.items()},
            unused_fields=dict(sorted(self._unused.most_common(_MAX_UNUSED))) or UNSET,
            media=self._media.statistics(),
        )


class Ledger:
    """Accounts for every annotation: where it went, or why it was rejected.

    Args:
        names: of the datasets.
        plan: bins and slots.
        num_samples: measured samples, each as often as it is drawn.
        max_length: of a bin, for the message about samples that are too long.
        written: results of the shards.
    """

    def __init__(
        self, names: Sequence[str], plan: Plan, num_samples: int, max_length: int, written: WrittenShards
    ) -> None:
        self._names = names
        self._plan = plan
        self._max_length = max_length
        self._failed = written.failed
        self._backends = written.backends
        self._failed_positions = np.asarray(sorted(written.failed), dtype=np.int64)
        self._backend_positions = np.asarray(sorted(written.backends), dtype=np.int64)
        self._positions = plan.positions(num_samples)

    def write(self, path: Path, parts: Iterable[ScannedPart]) -> list[DatasetStatistics]:
        """Write ``samples.parquet``, one row group per part, and return the totals of every dataset."""
        tallies = [_Tally(name) for name in self._names]
        first = 0
        with pq.ParquetWriter(path, arrow_schema(SAMPLES_COLUMNS), compression="zstd") as writer:
            for part in parts:
                scanned = _read_rows(part)
                has_sample = scanned.column("sample_bytes").to_numpy() > 0
                num_samples = int(np.count_nonzero(has_sample))
                positions = np.full(len(scanned), -1, dtype=np.int64)
                positions[has_sample] = self._positions[first : first + num_samples]
                first += num_samples
                writer.write_table(self._account(part, scanned, has_sample, positions, tallies[part.source]))
        return [tally.statistics() for tally in tallies]

    def _account(
        self,
        part: ScannedPart,
        scanned: pa.Table,
        has_sample: NDArray[np.bool_],
        positions: NDArray[np.int64],
        tally: _Tally,
    ) -> pa.Table:
        """Rows of the ledger for a part; adds them to the tally.

        Args:
            part: the part.
            scanned: its rows (R), each as often as it is drawn, and once if it is not.
            has_sample: (R,) whether the row was measured.
            positions: (R,) of the row's sample in the plan's order, -1 without one.
            tally: of the dataset.
        """
        late = self._late_problems(scanned, has_sample, positions)
        packed = (positions >= 0) & ~_isin_sorted(positions, self._failed_positions)
        statuses = np.where(packed, _PACKED, _REJECTED)
        statuses[scanned.column("copies").to_numpy() == 0] = _NOT_SAMPLED
        codes = _replaced(scanned, "codes", {row: [problem.code.value] for row, problem in late.items()})
        tally.add(scanned, codes, statuses)
        bins = np.searchsorted(self._plan.bin_starts, positions, side="right") - 1
        other_backend = np.flatnonzero(_isin_sorted(positions, self._backend_positions)).tolist()
        backends = {row: self._backends[int(positions[row])] for row in other_backend}
        columns = {
            "dataset": pa.repeat(pa.scalar(self._names[part.source]), len(scanned)),
            "file": pa.repeat(pa.scalar(part.file), len(scanned)),
            "record": scanned.column("record").to_numpy() + part.record_base,
            "status": np.array(_STATUSES, dtype=object)[statuses],
            "codes": codes,
            "message": _replaced(scanned, "message", {row: problem.message for row, problem in late.items()}),
            "bin": pa.array(bins, mask=~packed),
            "slot": pa.array(self._slots(positions, bins), mask=~packed),
            "video_backend": _replaced(scanned, "video_backend", backends),
        }
        kept = {name: scanned.column(name) for name in SAMPLES_COLUMNS if name not in columns}
        return pa.table({**columns, **kept}, schema=arrow_schema(SAMPLES_COLUMNS))

    def _late_problems(
        self, scanned: pa.Table, has_sample: NDArray[np.bool_], positions: NDArray[np.int64]
    ) -> dict[int, Problem]:
        """Row -> problem of the samples that the scan accepted: they failed to decode, or are too long."""
        failed = np.flatnonzero(_isin_sorted(positions, self._failed_positions)).tolist()
        late = {row: self._failed[int(positions[row])] for row in failed}
        num_tokens = scanned.column("num_tokens")
        for row in np.flatnonzero(has_sample & (positions < 0)).tolist():
            late[row] = too_long(num_tokens[row].as_py(), self._max_length)
        return late

    def _slots(self, positions: NDArray[np.int64], bins: NDArray[np.int64]) -> NDArray[np.int32]:
        """Slots of positions in the plan's order. Samples behind a failed one of their bin move up."""
        starts = self._plan.bin_starts[bins]
        num_failed = np.searchsorted(self._failed_positions, positions) - np.searchsorted(
            self._failed_positions, starts
        )
        return (positions - starts - num_failed).astype(np.int32)


def _read_rows(part: ScannedPart) -> pa.Table:
    """The rows of a part, each as often as it is drawn, and once if it is not."""
    scanned = read_rows(part.path)
    copies = scanned.column("copies").to_numpy()
    if (copies > 1).any():
        scanned = scanned.take(np.repeat(np.arange(copies.size), np.maximum(copies, 1)))
    return scanned


def _isin_sorted(values: NDArray[np.int64], ascending: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which values are in an ascending array."""
    if not ascending.size:
        return np.zeros(values.size, dtype=np.bool_)
    at = np.minimum(np.searchsorted(ascending, values), ascending.size - 1)
    is_in: NDArray[np.bool_] = ascending[at] == values
    return is_in


def _replaced(table: pa.Table, name: str, values: Mapping[int, object]) -> pa.ChunkedArray:
    """A column with the values of a few rows replaced."""
    column = table.column(name)
    if not values:
        return column
    items = column.to_pylist()
    for row, value in values.items():
        items[row] = value
    return pa.chunked_array([pa.array(items, type=column.type)])
