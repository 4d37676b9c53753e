"""Scan: validates, probes, tokenizes and measures one chunk of records. No pixel is decoded but a clip's first frame.

Input: a :class:`ScanTask` (a chunk of an annotation file and how often each of its records is taken). Output: a
*part*, two files in the work folder: ``<key>.parquet`` with one row a record (what the plan and the ledger need), and
``<key>.samples`` with the measured samples back to back (what the write step needs; read by offset). The parts are
keyed by everything that they depend on, so that a part that exists need not be made again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from prep.chunks import Chunk, Record
from prep.metrics import Timings, timed
from prep.records import read_chunk
from prep.sample import Measured, Medium, measure, probe_media, shrink
from prep.text import build_templates
from prep.tokenizer import load_tokenizer
from prep.validation import check_record, read_id, record_id
from schemas.annotation import Annotation, Problem, ReasonCode
from schemas.bins import MEDIA_IMAGE, MEDIA_VIDEO
from schemas.settings import MediaSettings

PART_VERSION = 2
"""Changes when parts made by an older version must not be used again."""

_MEDIA_CODES = {code.value for code in ReasonCode if "media" in code.value} | {ReasonCode.DECODE_TIMEOUT.value}

PART_SCHEMA = pa.schema(
    [
        ("record", pa.int64()),
        ("line", pa.int64()),
        ("copies", pa.uint16()),
        ("id", pa.string()),
        ("codes", pa.list_(pa.string())),
        ("message", pa.string()),
        ("sample_offset", pa.int64()),
        ("sample_bytes", pa.int32()),
        ("num_tokens", pa.int32()),
        ("num_targets", pa.int32()),
        ("num_patches", pa.int32()),
        ("num_images", pa.int32()),
        ("num_videos", pa.int32()),
        ("pixel_bytes", pa.int64()),
        ("video_backend", pa.string()),
    ]
)
"""Columns of a part. ``record`` counts within the file; ``sample_bytes`` is 0 and the sizes are null for what has no
sample."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ScanTask:
    """One chunk to scan.

    Attributes:
        part: path of the part without suffix.
        file: annotation file.
        chunk: the records.
        copies: how often each record of the chunk is taken (uint16 bytes, one for each record).
        media_root: folder that the media lie in.
        media: settings that decide sizes and frames.
        reserved: policy for text that spells control tokens.
        tokenizer: path of ``tokenizer.json``.
        retry_media: make a part again that has records rejected for their media.
        shrink_to: length that the media of a longer sample are shrunk to, or None to leave them.
    """

    part: Path
    file: Path
    chunk: Chunk
    copies: bytes
    media_root: Path
    media: MediaSettings
    reserved: str
    tokenizer: Path
    shrink_to: int | None
    retry_media: bool = False


@dataclass(frozen=True, slots=True)
class ScanResult:
    """What a scan task came to: records of the chunk, and how long they took."""

    num_records: int
    timings: Timings


def part_key(file_hash: str, task: ScanTask, tokenizer: str) -> str:
    """Name of the part of a task: a hash of everything that its contents depend on, besides the media files.

    Args:
        file_hash: of the annotation file.
        task: the task; of its paths only the media root counts.
        tokenizer: fingerprint of the tokenizer.
    """
    fields = (PART_VERSION, file_hash, asdict(task.chunk), task.media, task.reserved, task.shrink_to, tokenizer)
    root = os.fsencode(os.path.realpath(task.media_root))
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode(fields) + task.copies + root)


def table_path(part: Path) -> Path:
    """Where the rows of a part are."""
    return part.with_name(part.name + ".parquet")


def samples_path(part: Path) -> Path:
    """Where the measured samples of a part are."""
    return part.with_name(part.name + ".samples")


def media_path(part: Path) -> Path:
    """Where media that came inside the records of a part are."""
    return part.with_name(part.name + ".media")


def scan_chunk(task: ScanTask) -> ScanResult:
    """Make the part of one chunk, unless it exists."""
    timings: Timings = {}
    if table_path(task.part).exists() and not (task.retry_media and _has_media_rejects(task.part)):
        return ScanResult(task.chunk.num_records, timings)
    rows = _Rows()
    accepted: list[tuple[int, Annotation, list[Medium]]] = []
    with _atomic(media_path(task.part)) as media_file:
        copies = memoryview(task.copies).cast("H")
        for record, taken in zip(read_chunk(task.file, task.chunk), copies, strict=True):
            place = rows.add(record, taken)
            if not taken:
                rows.identify(place, record)
                continue
            with timed(timings, "validate"):
                annotation, problems = check_record(record, task.reserved)
            rows.identify(place, record, annotation)
            media: list[Medium] = []
            if annotation is not None:
                with timed(timings, "probe"):
                    media, media_problems = probe_media(annotation, task.media_root, task.media, record.embedded)
                problems = problems + media_problems
            if problems or annotation is None:
                rows.reject(place, problems)
            else:
                accepted.append((place, annotation, _stored(media, record.embedded, media_file)))
    with timed(timings, "tokenize", len(accepted)):
        templates = build_templates([annotation for _, annotation, _ in accepted], load_tokenizer(task.tokenizer))
    with _atomic(samples_path(task.part)) as samples_file:
        for (place, _, media), template in zip(accepted, templates):
            sample = measure(template, media)
            if task.shrink_to is not None and sample.num_tokens > task.shrink_to:
                sample = measure(template, shrink(template, media, task.shrink_to))
            if not sample.num_targets:
                problem = Problem(ReasonCode.NO_TARGETS, "no token of the answers is a target; write an answer")
                rows.reject(place, [problem])
                continue
            data = msgspec.msgpack.encode(sample)
            rows.accept(place, sample, samples_file.tell(), len(data))
            samples_file.write(data)
    with _atomic(table_path(task.part)) as table_file:
        pq.write_table(rows.table(), table_file, compression="zstd")
    return ScanResult(task.chunk.num_records, timings)


def _has_media_rejects(part: Path) -> bool:
    rejected = pq.read_table(table_path(part), columns=["codes"]).column("codes").combine_chunks().flatten()
    return not _MEDIA_CODES.isdisjoint(rejected.to_pylist())


def _stored(media: list[Medium], embedded: Mapping[str, bytes], file: BinaryIO) -> list[Medium]:
    """The media, with what came inside the record appended to ``file``."""
    stored: list[Medium] = []
    for medium in media:
        if medium.name in embedded:
            data = embedded[medium.name]
            medium = msgspec.structs.replace(medium, span=(file.tell(), len(data)))
            file.write(data)
        stored.append(medium)
    return stored


def read_sample(part: Path, offset: int, num_bytes: int) -> Measured:
    """Read one measured sample of a part by its place."""
    with samples_path(part).open("rb") as file:
        return msgspec.msgpack.decode(os.pread(file.fileno(), num_bytes, offset), type=Measured)


class _Rows:
    """The table of a part while it is filled."""

    def __init__(self) -> None:
        self._columns: dict[str, list[object]] = {name: [] for name in PART_SCHEMA.names}

    def add(self, record: Record, copies: int) -> int:
        place = len(self._columns["record"])
        for name, column in self._columns.items():
            column.append([] if name == "codes" else 0 if name in ("sample_offset", "sample_bytes") else None)
        self._set(place, record=record.number, line=record.line, copies=copies)
        return place

    def identify(self, place: int, record: Record, annotation: Annotation | None = None) -> None:
        """Note the record's own id; one that is not otherwise decoded is looked at for its id alone."""
        identity = record_id(annotation)
        if identity is None and annotation is None and record.data is not None:
            identity = read_id(record.data)
        self._set(place, id=identity)

    def reject(self, place: int, problems: list[Problem]) -> None:
        codes = list(dict.fromkeys(problem.code.value for problem in problems))
        self._set(place, codes=codes, message="; ".join(problem.message for problem in problems))

    def accept(self, place: int, sample: Measured, offset: int, num_bytes: int) -> None:
        self._set(
            place,
            sample_offset=offset,
            sample_bytes=num_bytes,
            num_tokens=sample.num_tokens,
            num_targets=sample.num_targets,
            num_patches=sample.num_patches,
            num_images=sample.num_media(MEDIA_IMAGE),
            num_videos=sample.num_media(MEDIA_VIDEO),
            pixel_bytes=sample.pixel_bytes,
            video_backend=sample.video_backend,
        )

    def table(self) -> pa.Table:
        return pa.table(self._columns, schema=PART_SCHEMA)

    def _set(self, place: int, **values: object) -> None:
        for name, value in values.items():
            self._columns[name][place] = value


@contextmanager
def _atomic(path: Path) -> Iterator[BinaryIO]:
    """A file that gets its name only when it is complete; one that stays empty is not kept."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        yield file
        is_empty = file.tell() == 0
    if is_empty:
        temporary.unlink()
    else:
        temporary.replace(path)
