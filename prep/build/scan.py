"""Scan: validates, probes, tokenizes and measures one chunk of records. No pixel is decoded except a video's first
frame.

Input: a :class:`ScanTask`, a chunk of an annotation file and how often each of its records is drawn. Output: a part
(:mod:`prep.build.parts`), named after everything that it depends on, so that a later run reuses it.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import msgspec
import xxhash

from prep.annotations.annotation import Annotation
from prep.annotations.chunks import Chunk, Record
from prep.annotations.records import read_chunk
from prep.annotations.validation import Checked, check_record, read_id, record_id
from prep.build.metrics import Timings, timed
from prep.build.parts import (
    PART_VERSION,
    PartRows,
    StoredSample,
    has_media_rejects,
    media_path,
    part_file,
    samples_path,
    table_path,
)
from prep.media.access import MediaRequest
from prep.media.caches import ProbeCache
from prep.media.fetch import open_media
from prep.samples.grounding import box_problems, boxes_beside_text, follows_resize, in_resized_pixels
from prep.samples.lengths import NO_TARGETS
from prep.samples.media import Medium, media_requests, probe_media
from prep.samples.sample import measure, shrink
from prep.samples.text import Template, build_templates
from prep.samples.tokenizer import TextTokenizer, load_tokenizer
from schemas.bins import MEDIA_IMAGE, MEDIA_VIDEO
from schemas.errors import ConfigError
from schemas.settings import MediaSettings
from storage.files import temporary_path
from storage.urls import Location, location_key

_OBJECTS_PER_COLLECTION = 50_000

_BOXES = "boxes"
_MEDIA_KINDS = ((MEDIA_IMAGE,), (), (MEDIA_VIDEO,), (MEDIA_IMAGE, MEDIA_VIDEO))
_ALL_CONTENTS: tuple[tuple[int | str, ...], ...] = (*_MEDIA_KINDS, *((*kinds, _BOXES) for kinds in _MEDIA_KINDS))


@dataclass(frozen=True, kw_only=True, slots=True)
class ScanTask:
    """One chunk to scan.

    Attributes:
        folder: the scan folder.
        file: annotation file.
        file_hash: its fingerprint.
        modified_ns: its modification time when it was indexed; None for a copy in the spool folder.
        chunk: the records.
        copies: uint16 bytes, how often each record of the chunk is drawn.
        media_root: folder or URL that media names are relative to.
        media: settings that decide sizes and frames.
        reserved: policy for text that spells control tokens.
        strict_fields: whether a record with unused fields is rejected.
        tokenizer: path of ``tokenizer.json``.
        tokenizer_hash: its fingerprint.
        retry_media: scan again if the scan or the write step rejected a record for its media.
        shrink_to: length to which the media of a longer sample are shrunk; None to leave them.
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
    strict_fields: bool
    tokenizer: Path
    tokenizer_hash: str
    shrink_to: int | None
    retry_media: bool = False


@dataclass(frozen=True, slots=True)
class ScanResult:
    """Path of the part (without suffix), number of records in the chunk, and how long they took."""

    part: Path
    num_records: int
    timings: Timings


def part_path(task: ScanTask, contents: Collection[int | str]) -> Path:
    """Path (without suffix) of the part of a task: a hash of everything that its contents depend on, besides the media
    files. Settings that do not affect what the records hold are left out, so that the part survives a change of them.

    Args:
        task: the task. Of its paths, only the media root counts.
        contents: what the records hold: 0 images, 1 videos, :data:`_BOXES` text that the setting ``boxes`` decides on.
    """
    kinds = sorted(kind for kind in contents if isinstance(kind, int))
    unused = _unused_settings(kinds)
    settings = {name: value for name, value in msgspec.to_builtins(task.media).items() if name not in unused}
    policies = (task.reserved, task.strict_fields)
    fields = (PART_VERSION, task.file_hash, asdict(task.chunk), *policies, task.tokenizer_hash, kinds)
    of_media = (settings, task.shrink_to, os.fsencode(location_key(task.media_root)).hex()) if kinds else ()
    of_boxes = (task.media.boxes or None,) if _BOXES in contents else ()
    return task.folder / xxhash.xxh3_128_hexdigest(msgspec.json.encode((*fields, *of_media, *of_boxes)) + task.copies)


def _unused_settings(kinds: Collection[int]) -> set[str]:
    """Media settings that do not affect the pixels of media of these kinds."""
    unused = {"boxes"}
    if MEDIA_IMAGE not in kinds:
        unused |= {"min_pixels", "max_pixels"}
    if MEDIA_VIDEO not in kinds:
        unused |= {name for name in MediaSettings.__struct_fields__ if name.startswith(("video_", "fps"))}
        unused.add("base_interval")
    return unused


def scan_chunk(task: ScanTask) -> ScanResult:
    """Scan one chunk, unless its part exists already."""
    timings: Timings = {}
    with _rare_garbage_collection():
        part = _existing_part(task) or _make_part(task, timings)
    return ScanResult(part, task.chunk.num_records, timings)


@contextmanager
def _rare_garbage_collection() -> Iterator[None]:
    """Search for reference cycles less often than the interpreter does by itself.

    A chunk keeps some hundred thousand small objects until its part is written. Searching them for cycles every 700
    objects takes a third of the time of short texts.
    """
    thresholds = gc.get_threshold()
    gc.set_threshold(_OBJECTS_PER_COLLECTION, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


def is_scanned(task: ScanTask) -> bool:
    """Whether an earlier run made a part of a chunk."""
    return any(table_path(part_path(task, contents)).exists() for contents in _ALL_CONTENTS)


def _existing_part(task: ScanTask) -> Path | None:
    """The part that an earlier run made of a chunk; None if there is none, or its media are to be probed again."""
    for part in (part_path(task, contents) for contents in _ALL_CONTENTS):
        if table_path(part).exists():
            if not (task.retry_media and has_media_rejects(part)):
                return part
            # The other files are replaced before the table is. Meanwhile the old table would describe the wrong ones.
            table_path(part).unlink(missing_ok=True)
    return None


def _make_part(task: ScanTask, timings: Timings) -> Path:
    rows = PartRows()
    accepted, contents = _check_and_probe(task, rows, timings)
    part = part_path(task, contents)
    if accepted:
        _tokenize_and_measure(task, part, accepted, rows, timings)
    rows.write(part)
    return part


class _Accepted(NamedTuple):
    """A record without problems so far: its row, its index within the file, its probed media, and their hash."""

    row: int
    record: int
    annotation: Annotation
    media: list[Medium]
    media_hash: int


def _check_and_probe(task: ScanTask, rows: PartRows, timings: Timings) -> tuple[list[_Accepted], set[int | str]]:
    """Validate the records of a chunk and probe their media, adding a row for each record.

    Returns:
        The records without problems, and what the records hold (see :func:`part_path`).
    """
    probed = ProbeCache()
    accepted: list[_Accepted] = []
    contents = set[int | str]()
    with (
        part_file(task.folder, lambda: media_path(part_path(task, contents))) as media_file,
        open_media([task.media_root], beginnings=True, scratch=temporary_path(task.folder / "media")) as access,
    ):
        for record, copies, checked in access.prefetch(_checked(task, timings), partial(_requests, task, probed)):
            annotation, problems = checked.annotation, checked.problems
            row = rows.add(
                record=record.index,
                line=record.line,
                copies=copies,
                id=_record_id(record, annotation),
                unused=checked.unused,
            )
            if not copies:
                continue
            contents |= _contents(checked)
            if checked.undeclared is not None:
                rows.mark_undeclared(row, checked.undeclared)
            media: list[Medium] = []
            if annotation is not None:
                with timed(timings, "probe"):
                    media, media_problems = probe_media(
                        annotation, task.media_root, task.media, checked.embedded, access, probed
                    )
                problems = problems + media_problems
            if annotation is not None and not problems:
                problems = box_problems(annotation, media)
            if problems or annotation is None:
                rows.reject(row, problems)
            else:
                media = _store_embedded(media, checked.embedded, media_file)
                media_hash = _media_hash(media, checked.embedded)
                accepted.append(_Accepted(row, record.index, annotation, media, media_hash))
        _require_unchanged(task)
    return accepted, contents


def _tokenize_and_measure(
    task: ScanTask, part: Path, accepted: Sequence[_Accepted], rows: PartRows, timings: Timings
) -> None:
    """Write the samples file of a part, and complete the rows of its samples."""
    with timed(timings, "tokenize", len(accepted)):
        tokenizer = load_tokenizer(task.tokenizer, task.tokenizer_hash)
        resized = [in_resized_pixels(record.annotation, record.media) for record in accepted]
        templates = build_templates(resized, tokenizer)
    with part_file(task.folder, lambda: samples_path(part)) as samples_file:
        for (row, record, annotation, media, media_hash), template in zip(accepted, templates):
            sample = measure(template, media)
            if task.shrink_to is not None and sample.num_tokens > task.shrink_to:
                sample = shrink(partial(_template_of, annotation, template, tokenizer), media, task.shrink_to)
            if not sample.num_targets:
                rows.reject(row, [NO_TARGETS])
                continue
            boxes = boxes_beside_text(annotation, sample.media)
            data = msgspec.msgpack.encode(StoredSample(record, record_id(annotation), sample, boxes))
            num_boxes = 0 if annotation.coordinates is None else annotation.num_shapes
            rows.accept(
                row,
                sample,
                num_boxes=num_boxes,
                media_hash=media_hash,
                offset=samples_file.tell(),
                num_bytes=len(data),
            )
            samples_file.write(data)


def _template_of(
    annotation: Annotation, template: Template, tokenizer: TextTokenizer, media: Sequence[Medium]
) -> Template:
    """The template of an annotation with media of these sizes; ``template`` if it does not depend on them."""
    if not follows_resize(annotation):
        return template
    return build_templates([in_resized_pixels(annotation, media)], tokenizer)[0]


def _media_hash(media: Sequence[Medium], embedded: Mapping[str, bytes]) -> int:
    """Equal for records that name the same files, or hold the same bytes. 0 without media."""
    if not media:
        return 0
    digest = xxhash.xxh3_64()
    for medium in media:
        for name in [frame.name for frame in medium.frames] or [medium.name]:
            content = embedded.get(name) or name.encode(errors="surrogateescape")
            digest.update(len(content).to_bytes(8, "little") + bytes([medium.media_type]))
            digest.update(content)
    return digest.intdigest() or 1


def _contents(checked: Checked) -> set[int | str]:
    """What a record holds, as :func:`part_path` counts it."""
    contents: set[int | str] = {_BOXES} if checked.has_boxes else set()
    if checked.annotation is not None:
        media = ((MEDIA_IMAGE, checked.annotation.images), (MEDIA_VIDEO, checked.annotation.videos))
        contents.update(kind for kind, items in media if items)
    return contents


def _record_id(record: Record, annotation: Annotation | None) -> str | None:
    """The record's own id. Without an annotation, only the id is decoded."""
    if annotation is not None:
        return record_id(annotation)
    return None if record.data is None else read_id(record.data)


def _require_unchanged(task: ScanTask) -> None:
    if task.modified_ns is not None and task.file.stat().st_mtime_ns != task.modified_ns:
        raise ConfigError(f"annotation file {task.file} changed while it was being read; run the command again.")


class _Drawn(NamedTuple):
    """A record after the checks that need no media. A record that is not drawn is not checked."""

    record: Record
    copies: int
    checked: Checked


def _checked(task: ScanTask, timings: Timings) -> Iterator[_Drawn]:
    copies_of = memoryview(task.copies).cast("H")
    for record, copies in zip(read_chunk(task.file, task.chunk), copies_of, strict=True):
        if not copies:
            yield _Drawn(record, copies, Checked(None, []))
            continue
        with timed(timings, "validate"):
            checked = check_record(record, task.reserved, task.media.boxes or None, strict_fields=task.strict_fields)
        yield _Drawn(record, copies, checked)


def _requests(task: ScanTask, probed: ProbeCache, drawn: _Drawn) -> list[MediaRequest]:
    """The media of a record that have not been probed yet."""
    annotation = drawn.checked.annotation
    if annotation is None:
        return []
    return media_requests(annotation, task.media_root, task.media, drawn.checked.embedded, probed)


def _store_embedded(media: list[Medium], embedded: Mapping[str, bytes], file: BinaryIO) -> list[Medium]:
    """Append the media that came inside a record to ``file``; returns all media, with the spans of those."""

    def store(name: str) -> tuple[int, int] | None:
        if name not in embedded:
            return None
        start = file.tell()
        return start, file.write(embedded[name])

    return [medium.stored(store) for medium in media]
