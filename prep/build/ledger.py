"""The ledger: one row an annotation, with what became of it, and the totals of every dataset.

Input: the parts of the scan, the plan, what the shards came to. Output: ``samples.parquet`` and statistics. Works part
by part; memory holds 8 bytes a sample, and counts of sizes that do not grow with samples.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from prep.build.parts import ScannedPart, table_path
from prep.build.plan import Plan
from prep.build.written import WrittenShards
from schemas.annotation import Problem, ReasonCode
from schemas.manifest import DatasetStatistics, Distribution
from schemas.tables import SAMPLES_COLUMNS, STATUS_NOT_SAMPLED, STATUS_PACKED, STATUS_REJECTED
from storage.tables import arrow_schema

_MODALITIES = ("text", "image", "video", "image+video")
_STATUSES = (STATUS_PACKED, STATUS_REJECTED, STATUS_NOT_SAMPLED)
_PACKED, _REJECTED, _NOT_SAMPLED = range(3)


class _Counts:
    """How often each small number was seen: 8 bytes for each number up to the highest."""

    def __init__(self) -> None:
        self._counts: NDArray[np.int64] = np.zeros(0, dtype=np.int64)

    def add(self, values: NDArray[np.integer]) -> None:
        """Count some values, each 0 or more."""
        found = np.bincount(values, minlength=self._counts.size)
        found[: self._counts.size] += self._counts
        self._counts = found

    def distribution(self) -> Distribution | None:
        """Exact totals and quantiles, None where nothing was counted."""
        ends = np.cumsum(self._counts)
        number = int(ends[-1]) if ends.size else 0
        if not number:
            return None
        # The least value that a share of all values does not exceed.
        ranks = [max(1, math.ceil(number * share)) for share in (0, 0.5, 0.9, 0.99, 1)]
        low, p50, p90, p99, high = np.searchsorted(ends, ranks).tolist()
        total = int(np.dot(self._counts, np.arange(self._counts.size)))
        return Distribution(total=total, mean=total / number, min=low, p50=p50, p90=p90, p99=p99, max=high)


class _Tally:
    """What became of one dataset, while the ledger is written."""

    def __init__(self, dataset: str) -> None:
        self._dataset = dataset
        self._statuses = np.zeros(len(_STATUSES), dtype=np.int64)
        self._modalities = np.zeros(len(_MODALITIES), dtype=np.int64)
        self._codes: Counter[str] = Counter()
        self._sizes = {name: _Counts() for name in ("num_tokens", "num_targets", "num_patches")}

    def add(self, scanned: pa.Table, codes: pa.ChunkedArray, statuses: NDArray[np.int64]) -> None:
        """Count rows of a part, given the codes and the statuses (indices of ``_STATUSES``) that they end with."""
        self._statuses += np.bincount(statuses, minlength=len(_STATUSES))
        self._codes.update(pc.list_flatten(codes).to_pylist())
        packed = scanned.filter(pa.array(statuses == _PACKED))
        num_images, num_videos = (packed.column(name).to_numpy() for name in ("num_images", "num_videos"))
        kinds = (num_images > 0) + 2 * (num_videos > 0).astype(np.int64)
        self._modalities += np.bincount(kinds, minlength=len(_MODALITIES))
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
            **{name.removeprefix("num_"): counts.distribution() for name, counts in self._sizes.items()},
        )


class Ledger:
    """Accounts for every annotation: where it went, or why not.

    Args:
        names: name of every dataset, by index.
        plan: bins and slots.
        num_samples: measured samples, in the order of the parts, each as often as it is taken.
        max_length: for the message of what is too long.
        written: what the shards came to.
    """

    def __init__(
        self, names: Sequence[str], plan: Plan, num_samples: int, max_length: int, written: WrittenShards
    ) -> None:
        self._names = names
        self._plan = plan
        self._max_length = max_length
        self._failed = written.failed
        self._backends = written.backends
        self._failed_places = np.asarray(sorted(written.failed), dtype=np.int64)
        self._backend_places = np.asarray(sorted(written.backends), dtype=np.int64)
        self._places = plan.places(num_samples)

    def write(self, path: Path, parts: Iterable[ScannedPart]) -> list[DatasetStatistics]:
        """Write ``samples.parquet``, one row group a part; return the totals of every dataset."""
        tallies = [_Tally(name) for name in self._names]
        number = 0
        with pq.ParquetWriter(path, arrow_schema(SAMPLES_COLUMNS), compression="zstd") as writer:
            for part in parts:
                scanned = pq.read_table(table_path(part.path))
                copies = scanned.column("copies").to_numpy()
                if (copies > 1).any():
                    scanned = scanned.take(np.repeat(np.arange(copies.size), np.maximum(copies, 1)))
                has_sample = scanned.column("sample_bytes").to_numpy() > 0
                places = np.full(len(scanned), -1, dtype=np.int64)
                num_samples = int(np.count_nonzero(has_sample))
                places[has_sample] = self._places[number : number + num_samples]
                number += num_samples
                writer.write_table(self._account(part, scanned, has_sample, places, tallies[part.source]))
        return [tally.statistics() for tally in tallies]

    def _account(
        self,
        part: ScannedPart,
        scanned: pa.Table,
        has_sample: NDArray[np.bool_],
        places: NDArray[np.int64],
        tally: _Tally,
    ) -> pa.Table:
        """Rows of the ledger for a part, and the tally of them.

        Args:
            part: where the rows come from.
            scanned: its rows, each as often as it is taken, and once if it is not.
            has_sample: whether a row was measured.
            places: of its sample in the plan's order, -1 without one.
            tally: of the dataset.
        """
        failed = _is_among(places, self._failed_places)
        packed = (places >= 0) & ~failed
        statuses = np.where(packed, _PACKED, _REJECTED)
        statuses[scanned.column("copies").to_numpy() == 0] = _NOT_SAMPLED
        num_tokens = scanned.column("num_tokens")
        late = {row: self._failed[int(places[row])] for row in np.flatnonzero(failed).tolist()}
        for row in np.flatnonzero(has_sample & (places < 0)).tolist():
            late[row] = self._too_long(num_tokens[row].as_py())
        codes = _replaced(scanned, "codes", {row: [problem.code.value] for row, problem in late.items()})
        tally.add(scanned, codes, statuses)
        bins = np.searchsorted(self._plan.bin_starts, places, side="right") - 1
        other_backend = np.flatnonzero(_is_among(places, self._backend_places)).tolist()
        backends = {row: self._backends[int(places[row])] for row in other_backend}
        return pa.table(
            {
                "dataset": pa.repeat(pa.scalar(self._names[part.source]), len(scanned)),
                "file": pa.repeat(pa.scalar(part.file), len(scanned)),
                "line": scanned.column("line"),
                "record": scanned.column("record").to_numpy() + part.record_base,
                "id": scanned.column("id"),
                "status": pa.array(_STATUSES).take(pa.array(statuses)),
                "codes": codes,
                "message": _replaced(scanned, "message", {row: problem.message for row, problem in late.items()}),
                "bin": pa.array(bins, mask=~packed),
                "slot": pa.array(self._slots(places, bins), mask=~packed),
                "num_tokens": num_tokens,
                "num_targets": scanned.column("num_targets"),
                "num_patches": scanned.column("num_patches"),
                "video_backend": _replaced(scanned, "video_backend", backends),
            },
            schema=arrow_schema(SAMPLES_COLUMNS),
        )

    def _slots(self, places: NDArray[np.int64], bins: NDArray[np.int64]) -> NDArray[np.int32]:
        """Slots of places in the plan's order. What stands behind a failed sample of its bin moves up."""
        starts = self._plan.bin_starts[bins]
        num_failed = np.searchsorted(self._failed_places, places) - np.searchsorted(self._failed_places, starts)
        return (places - starts - num_failed).astype(np.int32)

    def _too_long(self, num_tokens: int) -> Problem:
        return Problem(
            ReasonCode.TOO_LONG,
            f"the sample has {num_tokens} tokens; a bin holds {self._max_length} (--max-length). Shorten it, raise "
            "--max-length or lower the pixel bounds",
        )


def _is_among(values: NDArray[np.int64], ordered: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which of some values are among others, which ascend."""
    if not ordered.size:
        return np.zeros(values.size, dtype=np.bool_)
    at = np.minimum(np.searchsorted(ordered, values), ordered.size - 1)
    found: NDArray[np.bool_] = ordered[at] == values
    return found


def _replaced(table: pa.Table, name: str, values: Mapping[int, object]) -> pa.ChunkedArray:
    """A column with other values in a few rows."""
    column = table.column(name)
    if not values:
        return column
    listed = column.to_pylist()
    for row, value in values.items():
        listed[row] = value
    return pa.chunked_array([pa.array(listed, type=column.type)])
