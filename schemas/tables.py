"""Columns of the two Parquet tables beside the shards. Types are named as Arrow names them."""

from __future__ import annotations

from typing import Literal

import msgspec

from schemas.bins import shard_name
from schemas.bounds import Checksum, Count, Count32, Length, PositiveCount, PositiveSize, Size

BINS_FILE = "bins.parquet"
SAMPLES_FILE = "samples.parquet"

BINS_COLUMNS: dict[str, str] = {
    "bin": "int64",
    "shard": "int32",
    "offset": "int64",
    "num_bytes": "int64",
    "xxh3": "uint64",
    "num_tokens": "int32",
    "num_targets": "int32",
    "num_samples": "int32",
    "num_patches": "int32",
    "num_images": "int32",
    "num_videos": "int32",
    "sum_squared_lengths": "int64",
}
"""One row per bin, ordered by ``bin``. A number is absent if every sample of a planned bin failed.

``xxh3`` is the XXH3-64 of the ``num_bytes`` bytes at ``offset``;
``num_targets`` counts labels that are not -100; ``sum_squared_lengths`` sums the squares of the samples' lengths."""

SAMPLES_COLUMNS: dict[str, str] = {
    "dataset": "string",
    "file": "string",
    "line": "int64",
    "record": "int64",
    "id": "string",
    "status": "string",
    "codes": "list<string>",
    "message": "string",
    "bin": "int64",
    "slot": "int32",
    "num_tokens": "int32",
    "num_targets": "int32",
    "num_patches": "int32",
    "video_backend": "string",
}
"""The ledger: one row per annotation (one per copy, if a dataset is sampled more than once), ordered by dataset as
named, then ``record``. ``line`` counts from 1, ``record`` from 0 over the files of the dataset. Null where it has no
meaning: ``bin`` and ``slot`` of what is not packed, sizes of what was not measured, ``message`` of what is fine."""

STATUS_PACKED = "packed"
STATUS_REJECTED = "rejected"
STATUS_NOT_SAMPLED = "not_sampled"


class BinRow(msgspec.Struct, frozen=True, kw_only=True):
    """One row of ``bins.parquet``, without the number of the shard."""

    bin: Count
    offset: Size
    num_bytes: PositiveSize
    xxh3: Checksum
    num_tokens: Length
    num_targets: Length
    num_samples: Length
    num_patches: Count32
    num_images: Count32
    num_videos: Count32
    sum_squared_lengths: PositiveCount


class StoredBin(BinRow, frozen=True, kw_only=True):
    """One row of ``bins.parquet``: where a bin lies and what it holds."""

    shard: Count32

    @property
    def where(self) -> str:
        """How messages name it."""
        return f"{shard_name(self.shard)}, bin {self.bin} at offset {self.offset}"


class LedgerRow(msgspec.Struct, frozen=True, kw_only=True):
    """The columns of ``samples.parquet`` that describe a packed sample."""

    dataset: str
    file: str
    line: PositiveCount
    record: Count
    id: str | None
    bin: Count
    slot: Count32
    num_tokens: Length
    num_targets: Length
    num_patches: Count32
    video_backend: str | None


class RejectedRow(msgspec.Struct, frozen=True, kw_only=True):
    """The columns of ``samples.parquet`` that describe a rejected annotation."""

    dataset: str
    file: str
    line: PositiveCount
    record: Count
    id: str | None
    codes: list[str]
    message: str


class AnnotationRow(msgspec.Struct, frozen=True, kw_only=True):
    """One row of ``samples.parquet``."""

    dataset: str
    file: str
    line: PositiveCount
    record: Count
    id: str | None
    status: Literal["packed", "rejected", "not_sampled"]
    codes: list[str]
    message: str | None
    bin: Count | None
    slot: Count32 | None
    num_tokens: Count32 | None
    num_targets: Count32 | None
    num_patches: Count32 | None
    video_backend: str | None
