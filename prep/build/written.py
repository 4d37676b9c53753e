"""Collects the results of shards: the rows of ``bins.parquet`` as columns, and the samples that did not go as planned.

Input: shard results, in the order of the shards. Memory: 76 bytes per bin, and a few hundred bytes per shard and
per failed sample. The results themselves are not kept.
"""

from __future__ import annotations

import msgspec
import pyarrow as pa

from prep.build.metrics import Timings, merge_timings
from prep.build.write import ShardResult
from prep.shards.drift import DriftSums
from schemas.annotation import Problem
from schemas.bins import shard_name
from schemas.manifest import StoredShard
from schemas.tables import BINS_COLUMNS
from storage.arrow import arrow_schema

_ROWS = 1 << 14
"""Rows that are kept as objects before they become a piece of the table."""


class WrittenShards:
    """The results of all shards.

    Attributes:
        shards: those that have a file.
        failed: position in the plan's order -> problem, for every sample that failed.
        backends: position -> video decoders, for samples that used others than the scan.
        timings: how long samples took.
        drift: of a lossy codec; None with a lossless one.
    """

    def __init__(self) -> None:
        self.shards: list[StoredShard] = []
        self.failed: dict[int, Problem] = {}
        self.backends: dict[int, str] = {}
        self.timings: Timings = {}
        self.drift: DriftSums | None = None
        self._rows: list[dict[str, object]] = []
        self._tables: list[pa.Table] = []

    def add(self, result: ShardResult) -> None:
        """Add the result of the next shard."""
        self.failed.update(result.failed)
        self.backends.update(result.backends)
        merge_timings(self.timings, result.timings)
        if result.drift is not None:
            self.drift = self.drift or DriftSums()
            self.drift.add(result.drift)
        if not result.rows:
            return
        self._rows.extend({"shard": result.shard, **msgspec.structs.asdict(row)} for row in result.rows)
        if len(self._rows) >= _ROWS:
            self._close_table()
        self.shards.append(
            StoredShard(
                file=shard_name(result.shard),
                num_bytes=result.num_bytes,
                sha256=result.sha256,
                first_bin=result.rows[0].bin,
                num_bins=len(result.rows),
            )
        )

    def bins_table(self) -> pa.Table:
        """Contents of ``bins.parquet``."""
        self._close_table()
        return pa.concat_tables(self._tables).combine_chunks()

    def _close_table(self) -> None:
        self._tables.append(pa.Table.from_pylist(self._rows, schema=arrow_schema(BINS_COLUMNS)))
        self._rows.clear()
