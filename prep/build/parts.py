"""Parts: the files that the scan leaves for the steps after it.

A *part* holds one chunk of records. It is up to four files in the scan folder that share one name:

====================  ======================================================================================
``<key>.parquet``     one row a record (:data:`PART_SCHEMA`): what the plan and the ledger need
``<key>.samples``     measured samples back to back (MessagePack): what the write step reads, by offset
``<key>.media``       encoded media that came inside the records
``<key>.stale``       empty: a medium failed to decode, so ``--retry-media`` scans the chunk again
====================  ======================================================================================

The table is written last: a part whose table exists is complete. A file that stays empty is not kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from prep.samples.sample import Measured
from schemas.annotation import Problem, ReasonCode, SampleBox
from schemas.bins import MEDIA_IMAGE, MEDIA_VIDEO, stored_frames
from storage.files import naming, temporary_path

PART_VERSION = 8
"""Part of every key. Increase it when parts of an older version must not be reused."""

PART_SCHEMA = pa.schema(
    [
        ("record", pa.int64()),
        ("line", pa.int64()),
        ("copies", pa.uint16()),
        ("id", pa.string()),
        ("codes", pa.list_(pa.string())),
        ("message", pa.string()),
        ("unused", pa.list_(pa.string())),
        ("sample_offset", pa.int64()),
        ("sample_bytes", pa.int32()),
        ("num_tokens", pa.int32()),
        ("num_targets", pa.int32()),
        ("num_patches", pa.int32()),
        ("num_images", pa.int32()),
        ("num_videos", pa.int32()),
        ("pixel_bytes", pa.int64()),
        ("video_backend", pa.string()),
        ("num_boxes", pa.int32()),
        ("undeclared", pa.string()),
        ("kept_percents", pa.list_(pa.int32())),
        ("frames", pa.list_(pa.int32())),
        ("text_hash", pa.uint64()),
        ("media_hash", pa.uint64()),
    ]
)
"""Columns of the table. ``record`` counts within the file. Without a sample, ``sample_bytes`` is 0 and the sizes are
null. ``num_boxes`` counts the boxes, points and polygons of a sample. ``undeclared`` is the first one of a record, as
it reads, if nothing says what its coordinates are. ``kept_percents`` has the size of each image after resizing, in
percent of its pixels before; ``frames`` the stored frames of each video; both are null without media, and
``media_hash`` is 0."""

_EMPTY_ROW: dict[str, object] = {
    **dict.fromkeys(PART_SCHEMA.names),
    "codes": [],
    "unused": [],
    "sample_offset": 0,
    "sample_bytes": 0,
}

MEDIA_CODES = {code.value for code in ReasonCode if "media" in code.value} | {ReasonCode.DECODE_TIMEOUT.value}


@dataclass(frozen=True, kw_only=True, slots=True)
class ScannedPart:
    """One part and the records that it holds.

    Attributes:
        path: of the part, without suffix.
        source: index of the dataset.
        file: name of the annotation file in the ledger.
        record_base: index of the file's first annotation within the dataset.
    """

    path: Path
    source: int
    file: str
    record_base: int


class StoredSample(msgspec.Struct, frozen=True, array_like=True):
    """A measured sample as a part stores it, with the index (within the file) and the id of its record.

    ``boxes`` are those that its text does not show.
    """

    record: int
    id: str | None
    measured: Measured
    boxes: list[SampleBox] = []


_sample_decoder = msgspec.msgpack.Decoder(StoredSample)


class PartRows:
    """The table of a part while it is being filled, one row a record."""

    def __init__(self) -> None:
        self._rows: list[dict[str, object]] = []

    def add(self, *, record: int, line: int, copies: int, id: str | None, unused: Sequence[str] = ()) -> int:
        """Add a row without a sample; returns its index. ``unused`` has the names of fields without effect."""
        row = {"record": record, "line": line, "copies": copies, "id": id, "unused": [*unused]}
        self._rows.append({**_EMPTY_ROW, **row})
        return len(self._rows) - 1

    def reject(self, row: int, problems: list[Problem]) -> None:
        """Record why a row has no sample."""
        codes = list(dict.fromkeys(problem.code.value for problem in problems))
        self._rows[row].update(codes=codes, message="; ".join(problem.message for problem in problems))

    def mark_undeclared(self, row: int, excerpt: str) -> None:
        """Record that nothing says what the coordinates of a row's boxes are."""
        self._rows[row].update(undeclared=excerpt)

    def accept(
        self, row: int, sample: Measured, *, num_boxes: int, media_hash: int, offset: int, num_bytes: int
    ) -> None:
        """Record the sizes of a row's sample, and which bytes of the samples file hold it.

        Args:
            row: the row.
            sample: its sample.
            num_boxes: boxes, points and polygons of the sample.
            media_hash: equal for samples with the same media.
            offset: first byte in the samples file.
            num_bytes: size there.
        """
        self._rows[row].update(
            sample_offset=offset,
            sample_bytes=num_bytes,
            num_tokens=sample.num_tokens,
            num_targets=sample.num_targets,
            num_patches=sample.num_patches,
            num_images=sample.num_media(MEDIA_IMAGE),
            num_videos=sample.num_media(MEDIA_VIDEO),
            pixel_bytes=sample.pixel_bytes,
            video_backend=sample.video_backend,
            num_boxes=num_boxes,
            text_hash=xxhash.xxh3_64_intdigest(sample.ids),
            media_hash=media_hash,
        )
        if sample.media:
            images, videos = (
                [medium for medium in sample.media if medium.media_type == kind] for kind in (MEDIA_IMAGE, MEDIA_VIDEO)
            )
            self._rows[row].update(
                kept_percents=[medium.kept_percent for medium in images],
                frames=[stored_frames(medium.grid, MEDIA_VIDEO) for medium in videos],
            )

    def write(self, part: Path) -> None:
        """Write the table. This completes the part, and it is no longer stale."""
        columns = {name: [row[name] for row in self._rows] for name in PART_SCHEMA.names}
        with part_file(part.parent, lambda: table_path(part)) as file:
            pq.write_table(pa.table(columns, schema=PART_SCHEMA), file, compression="zstd")
        _stale_path(part).unlink(missing_ok=True)


def table_path(part: Path) -> Path:
    """The file with the rows of a part."""
    return part.with_name(part.name + ".parquet")


def samples_path(part: Path) -> Path:
    """The file with the measured samples of a part."""
    return part.with_name(part.name + ".samples")


def media_path(part: Path) -> Path:
    """The file with the media that came inside the records of a part."""
    return part.with_name(part.name + ".media")


def _stale_path(part: Path) -> Path:
    return part.with_name(part.name + ".stale")


def mark_stale(part: Path) -> None:
    """Note that a medium of a part failed to decode, so that ``retry_media`` scans the chunk again."""
    if not _stale_path(part).exists():
        _stale_path(part).touch()


def has_media_rejects(part: Path) -> bool:
    """Whether the scan or the write step rejected a record of a part for its media."""
    if _stale_path(part).exists():
        return True
    return not all(
        MEDIA_CODES.isdisjoint(codes.to_pylist()) for codes in list_entries(read_rows(part, ["codes"]).column("codes"))
    )


def read_rows(part: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read the table of a part. It starts no threads, so that workers of the next step can be forked.

    Args:
        part: path without suffix.
        columns: names, or None for all.
    """
    with pq.ParquetFile(table_path(part), pre_buffer=False) as file:
        return file.read(columns=None if columns is None else [*columns], use_threads=False)


def rejected_rows(table: pa.Table) -> pa.Table:
    """The rows of a part's table with reason codes. It must have the column ``codes``."""
    lengths = [np.diff(chunk.offsets.to_numpy()) for chunk in table.column("codes").chunks]
    is_rejected = np.concatenate([np.empty(0, np.int32), *lengths]) > 0
    return table.filter(pa.array(is_rejected)) if is_rejected.any() else table.slice(0, 0)


def list_entries(column: pa.ChunkedArray) -> Iterator[pa.Array]:
    """The entries of all lists of a column, as an array for each of its chunks.

    For this, ``pyarrow`` would import a module that takes as long as the rest of it.
    """
    for chunk in column.chunks:
        first, last = chunk.offsets[0].as_py(), chunk.offsets[-1].as_py()
        yield chunk.values.slice(first, last - first)


def read_sample(part: Path, offset: int, num_bytes: int) -> StoredSample:
    """Read one measured sample of a part.

    Args:
        part: path without suffix.
        offset: first byte in the samples file.
        num_bytes: size.
    """
    file = os.open(samples_path(part), os.O_RDONLY)
    try:
        return _sample_decoder.decode(os.pread(file, num_bytes, offset))
    finally:
        os.close(file)


@contextmanager
def part_file(folder: Path, path: Callable[[], Path]) -> Iterator[BinaryIO]:
    """Open a new file in ``folder`` that moves to ``path()`` once it is complete. An empty one is removed instead.

    ``path`` is called last, because the name of a part depends on what its records turn out to hold.
    """
    temporary = temporary_path(folder / "part")
    with naming(temporary), temporary.open("wb") as file:
        yield file
        is_empty = file.tell() == 0
    if is_empty:
        temporary.unlink()
    else:
        temporary.replace(path())
