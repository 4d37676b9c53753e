"""Scan: validates, probes, tokenizes and measures one chunk of records. No pixel is decoded but a clip's first frame.

Input: a :class:`ScanTask` (a chunk of an annotation file and how often each of its records is taken). Output: a
*part*, two files in the work folder: ``<key>.parquet`` with one row a record (what the plan and the ledger need), and
``<key>.samples`` with the measured samples back to back (what the write step needs; read by offset). The parts are
keyed by everything that they depend on, so that a part that exists need not be made again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import msgspec
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from prep.annotations.chunks import Chunk, Record
from prep.annotations.records import read_chunk
from prep.annotations.validation import check_record, media_names, read_id, record_id
from prep.build.metrics import Timings, timed
from prep.media.access import Wanted, open_media
from prep.media.caches import ProbeCache
from prep.samples.sample import Measured, Medium, measure, probe_media, shrink, wanted_media
from prep.samples.text import build_templates
from prep.samples.tokenizer import load_tokenizer
from schemas.annotation import Annotation, Problem, ReasonCode
from schemas.bins import MEDIA_IMAGE, MEDIA_VIDEO
from schemas.errors import ConfigError
from schemas.settings import MediaSettings
from storage.files import naming, temporary_path
from storage.urls import Location, location_key

PART_VERSION = 4
"""Changes when parts made by an older version must not be used again."""

_ALL_KINDS = ((MEDIA_IMAGE,), (), (MEDIA_VIDEO,), (MEDIA_IMAGE, MEDIA_VIDEO))

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
        folder: where parts are.
        file: annotation file.
        file_hash: its fingerprint.
        modified_ns: time of its last change when it was indexed, or None for what nobody but the build changes.
        chunk: the records.
        copies: how often each record of the chunk is taken (uint16 bytes, one for each record).
        media_root: folder or URL that the media lie below.
        media: settings that decide sizes and frames.
        reserved: policy for text that spells control tokens.
        tokenizer: path of ``tokenizer.json``.
        tokenizer_hash: its fingerprint.
        retry_media: make a part again that has records rejected for their media, here or in the write step.
        shrink_to: length that the media of a longer sample are shrunk to, or None to leave them.
    """

    folder: Path
    file: Path
    file_hash: str
    modified_ns: int | None
    chunk: Chunk
    copies: bytes
    media_root: Location
    media: MediaSettings
    reserved: str
    tokenizer: Path
    tokenizer_hash: str
    shrink_to: int | None
    retry_media: bool = False


@dataclass(frozen=True, slots=True)
class ScanResult:
    """What a scan task came to: path of the part without suffix, records of the chunk, and how long they took."""

    part: Path
    num_records: int
    timings: Timings


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


class StoredSample(msgspec.Struct, frozen=True, array_like=True):
    """A measured sample as a part holds it, with the number (within the file) and the id of its record."""

    record: int
    id: str | None
    measured: Measured


_sample_decoder = msgspec.msgpack.Decoder(StoredSample)


def part_path(task: ScanTask, kinds: Collection[int]) -> Path:
    """Path (without suffix) of the part of a task: a hash of everything that its contents depend on, besides the media
    files. What a part of texts does not depend on, it is not named after.

    Args:
        task: the task; of its paths only the media root counts.
        kinds: of the media that its records name, 0 image, 1 video.
    """
    unused = _unused_settings(kinds)
    settings = {name: value for name, value in msgspec.structs.asdict(task.media).items() if name not in unused}
    fields = (PART_VERSION, task.file_hash, asdict(task.chunk), task.reserved, task.tokenizer_hash, sorted(kinds))
    of_media = (settings, task.shrink_to, os.fsencode(location_key(task.media_root)).hex()) if kinds else ()
    return task.folder / xxhash.xxh3_128_hexdigest(msgspec.json.encode((*fields, *of_media)) + task.copies)


def _unused_settings(kinds: Collection[int]) -> set[str]:
    """Media settings that have no bearing on media of some kinds."""
    unused = set[str]()
    if MEDIA_IMAGE not in kinds:
        unused |= {"min_pixels", "max_pixels"}
    if MEDIA_VIDEO not in kinds:
        unused |= {name for name in MediaSettings.__struct_fields__ if name.startswith("video_")} | {"base_interval"}
    return unused


def table_path(part: Path) -> Path:
    """Where the rows of a part are."""
    return part.with_name(part.name + ".parquet")


def samples_path(part: Path) -> Path:
    """Where the measured samples of a part are."""
    return part.with_name(part.name + ".samples")


def media_path(part: Path) -> Path:
    """Where media that came inside the records of a part are."""
    return part.with_name(part.name + ".media")


def mark_stale(part: Path) -> None:
    """Note that media of a part failed when they were decoded: with ``retry_media`` it will be made again."""
    if not _stale_path(part).exists():
        _stale_path(part).touch()


def _stale_path(part: Path) -> Path:
    return part.with_name(part.name + ".stale")


def scan_chunk(task: ScanTask) -> ScanResult:
    """Make the part of one chunk, unless it exists."""
    timings: Timings = {}
    for part in (part_path(task, kinds) for kinds in _ALL_KINDS):
        if table_path(part).exists():
            if not (task.retry_media and _has_media_rejects(part)):
                return ScanResult(part, task.chunk.num_records, timings)
            # Its other files will be replaced before the table is; by itself, the table would tell of the wrong ones.
            table_path(part).unlink(missing_ok=True)
    rows, probed = _Rows(), ProbeCache()
    accepted: list[tuple[int, int, Annotation, list[Medium]]] = []
    kinds = set[int]()
    with (
        _atomic(task.folder, lambda: media_path(part_path(task, kinds))) as media_file,
        open_media([task.media_root], beginnings=True, scratch=temporary_path(task.folder / "media")) as access,
    ):
        for record, taken, annotation, problems in access.along(
            _checked(task, timings), partial(_wanted, task, probed)
        ):
            place = rows.add(record, taken)
            rows.identify(place, record, annotation)
            if not taken:
                continue
            media: list[Medium] = []
            if annotation is not None:
                kinds |= _kinds(annotation)
                with timed(timings, "probe"):
                    media, media_problems = probe_media(
                        annotation, task.media_root, task.media, record.embedded, access, probed
                    )
                problems = problems + media_problems
            if problems or annotation is None:
                rows.reject(place, problems)
            else:
                stored = _stored(media, record.embedded, media_file)
                accepted.append((place, record.number, annotation, stored))
        _require_unchanged(task)
    part = part_path(task, kinds)
    with timed(timings, "tokenize", len(accepted)):
        tokenizer = load_tokenizer(task.tokenizer, task.tokenizer_hash)
        templates = build_templates([annotation for _, _, annotation, _ in accepted], tokenizer)
    with _atomic(task.folder, lambda: samples_path(part)) as samples_file:
        for (place, number, annotation, media), template in zip(accepted, templates):
            sample = measure(template, media)
            if task.shrink_to is not None and sample.num_tokens > task.shrink_to:
                sample = measure(template, shrink(template, media, task.shrink_to))
            if not sample.num_targets:
                problem = Problem(ReasonCode.NO_TARGETS, "no token of the answers is a target; write an answer")
                rows.reject(place, [problem])
                continue
            data = msgspec.msgpack.encode(StoredSample(number, record_id(annotation), sample))
            rows.accept(place, sample, samples_file.tell(), len(data))
            samples_file.write(data)
    with _atomic(task.folder, lambda: table_path(part)) as table_file:
        pq.write_table(rows.table(), table_file, compression="zstd")
    _stale_path(part).unlink(missing_ok=True)
    return ScanResult(part, task.chunk.num_records, timings)


def _kinds(annotation: Annotation) -> set[int]:
    """Kinds of the media that an annotation names."""
    images, videos = media_names(annotation)
    return {kind for kind, names in ((MEDIA_IMAGE, images), (MEDIA_VIDEO, videos)) if names}


def _require_unchanged(task: ScanTask) -> None:
    if task.modified_ns is not None and task.file.stat().st_mtime_ns != task.modified_ns:
        raise ConfigError(f"annotation file {task.file} changed while it was being read; run the command again.")


class _Checked(NamedTuple):
    """A record after the checks that need no media; one that is not taken is not checked."""

    record: Record
    copies: int
    annotation: Annotation | None
    problems: list[Problem]


def _checked(task: ScanTask, timings: Timings) -> Iterator[_Checked]:
    copies = memoryview(task.copies).cast("H")
    for record, taken in zip(read_chunk(task.file, task.chunk), copies, strict=True):
        if not taken:
            yield _Checked(record, taken, None, [])
            continue
        with timed(timings, "validate"):
            annotation, problems = check_record(record, task.reserved)
        yield _Checked(record, taken, annotation, problems)


def _wanted(task: ScanTask, probed: ProbeCache, checked: _Checked) -> list[Wanted]:
    """The media of a record that are still to be probed."""
    if checked.annotation is None:
        return []
    media = wanted_media(checked.annotation, task.media_root, task.media, checked.record.embedded)
    return [wanted for wanted in media if not probed.has(wanted)]


def _has_media_rejects(part: Path) -> bool:
    if _stale_path(part).exists():
        return True
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


def read_sample(part: Path, offset: int, num_bytes: int) -> StoredSample:
    """Read one measured sample of a part by its place."""
    file = os.open(samples_path(part), os.O_RDONLY)
    try:
        return _sample_decoder.decode(os.pread(file, num_bytes, offset))
    finally:
        os.close(file)


_EMPTY_ROW: dict[str, object] = {**dict.fromkeys(PART_SCHEMA.names), "codes": [], "sample_offset": 0, "sample_bytes": 0}


class _Rows:
    """The table of a part while it is filled."""

    def __init__(self) -> None:
        self._rows: list[dict[str, object]] = []

    def add(self, record: Record, copies: int) -> int:
        self._rows.append({**_EMPTY_ROW, "record": record.number, "line": record.line, "copies": copies})
        return len(self._rows) - 1

    def identify(self, place: int, record: Record, annotation: Annotation | None = None) -> None:
        """Note the record's own id; one that is not otherwise decoded is looked at for its id alone."""
        identity = record_id(annotation)
        if identity is None and annotation is None and record.data is not None:
            identity = read_id(record.data)
        self._rows[place]["id"] = identity

    def reject(self, place: int, problems: list[Problem]) -> None:
        codes = list(dict.fromkeys(problem.code.value for problem in problems))
        self._rows[place].update(codes=codes, message="; ".join(problem.message for problem in problems))

    def accept(self, place: int, sample: Measured, offset: int, num_bytes: int) -> None:
        self._rows[place].update(
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
        columns = {name: [row[name] for row in self._rows] for name in PART_SCHEMA.names}
        return pa.table(columns, schema=PART_SCHEMA)


@contextmanager
def _atomic(folder: Path, path: Callable[[], Path]) -> Iterator[BinaryIO]:
    """A file in ``folder`` that gets its path only when it is complete; one that stays empty is not kept."""
    temporary = temporary_path(folder / "part")
    with naming(temporary), temporary.open("wb") as file:
        yield file
        is_empty = file.tell() == 0
    if is_empty:
        temporary.unlink()
    else:
        temporary.replace(path())
