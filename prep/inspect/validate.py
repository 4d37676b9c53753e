"""``vlprep validate``: checks annotation files without building anything.

Input: annotation files or registered datasets. Output: a :class:`Report` with counts and examples by reason code, and
optionally the rejected and the valid records as JSON lines. Cost: parallel over chunks of records. It probes the
headers of media, and with ``deep`` it decodes all of them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO, NamedTuple

import msgspec

from prep.annotations.annotation import Annotation
from prep.annotations.chunks import Chunk, Record
from prep.annotations.problems import MAX_OF_A_CODE
from prep.annotations.records import index_file, is_read_in_place, read_chunk
from prep.annotations.registry import check_root, find_files, find_sources
from prep.annotations.shares import split_share
from prep.annotations.validation import Checked, check_record, read_id, record_id
from prep.engines import Engine
from prep.engines.progress import progress
from prep.inspect.validation_report import FileCounts, Reject, Report
from prep.media.access import MediaAccess, MediaRequest
from prep.media.fetch import open_media
from prep.media.nearby import all_missing_message
from prep.media.paths import missing_name
from prep.samples.grounding import box_problems
from prep.samples.lengths import LengthCheck, length_problems
from prep.samples.media import Medium, check_media, media_requests, probe_media
from schemas.annotation import ANNOTATION_SUFFIXES, Problem, ReasonCode
from schemas.errors import ConfigError
from schemas.settings import MediaSettings
from storage.urls import Location, Url, parse_location


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidateRequest:
    """What to check, and which files to write.

    Attributes:
        files: annotation files (paths or URLs), or names of registered datasets.
        media_root: folder or URL of all media. None for the folder of each file, or the root in the registry.
        registry: registry file. None for ``datasets.toml`` in the working folder. Read only if a dataset is named.
        deep: decode media instead of only probing their headers.
        rejects: output file for the rejected records with all their problems, as JSON lines.
        fixed: output file for the valid records, unchanged, as JSON lines.
        reserved: policy for text that spells control tokens.
        strict_fields: whether a record with unused fields is rejected.
        media: media settings.
        lengths: how to find samples that are too long. None not to tokenize.
    """

    files: tuple[Location, ...]
    media_root: Location | None
    registry: Path | None = None
    deep: bool
    rejects: Path | None
    fixed: Path | None
    reserved: str
    strict_fields: bool = False
    media: MediaSettings
    lengths: LengthCheck | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class _ChunkTask:
    file: Location
    data: Path
    chunk: Chunk
    root: Location
    media: MediaSettings
    scratch: Path
    request: ValidateRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkReport:
    """The outcome of checking one chunk. ``undeclared`` has ``file:line`` and a box of each record with boxes whose
    coordinates nobody declared.
    """

    counts: FileCounts
    modalities: Counter[str]
    unused: Counter[str]
    rejects: list[Reject]
    valid: list[bytes]
    undeclared: list[tuple[str, str]]


def validate(request: ValidateRequest, engine: Engine) -> Report:
    """Check annotation files.

    Raises:
        ConfigError: a file cannot be read, the media root is not a folder, or an output file cannot be written.
        StorageError: a store does not answer.
    """
    if isinstance(request.media_root, Path) and not request.media_root.is_dir():
        raise ConfigError(f"--media-root {request.media_root} is not a folder. Check the path.")
    report = Report(rejects=request.rejects)
    with ExitStack() as stack:
        spool = Path(stack.enter_context(TemporaryDirectory(prefix="vlprep-")))
        inputs = [file for argument in request.files for file in _inputs(request, argument)]
        tasks = list(_tasks(request, inputs, engine, spool))
        report.files = {str(file.file): FileCounts() for file in inputs}
        if request.fixed is not None and request.rejects is not None and _is_same(request.fixed, request.rejects):
            raise ConfigError(f"--fixed and --rejects are the same file, {request.fixed}; give two different names.")
        rejects = stack.enter_context(_output("--rejects", request.rejects, inputs))
        fixed = stack.enter_context(_output("--fixed", request.fixed, inputs))
        total = sum(task.chunk.num_records for task in tasks)
        bar = stack.enter_context(progress("validate", total, "record"))
        for task, chunk in zip(tasks, stack.enter_context(closing(engine.map(_check_chunk, tasks)))):
            report.undeclared.add(str(task.file), chunk.undeclared)
            report.add(str(task.file), chunk.counts, chunk.modalities, chunk.rejects)
            report.unused.update(chunk.unused)
            bar.update(task.chunk.num_records)
            rejects.writelines(msgspec.json.encode(reject) + b"\n" for reject in chunk.rejects)
            fixed.writelines(record + b"\n" for record in chunk.valid)
    for file in inputs:
        counts = report.files[str(file.file)]
        if counts.missing is not None and not counts.num_media_found:
            subject = "the only medium is" if counts.num_media == 1 else f"all {counts.num_media:,} media are"
            report.hints.append(
                all_missing_message(subject=subject, name=counts.missing, root=file.root, annotation_file=file.file)
            )
    return report


def _is_same(path: Path, other: Path) -> bool:
    return path.resolve() == other.resolve()


def _output(option: str, path: Path | None, inputs: Sequence[_Input]) -> BinaryIO:
    """Open the output file of an option, or the null device if the option is not set."""
    local = [file.file for file in inputs if isinstance(file.file, Path)]
    if path is not None and path.exists() and any(path.samefile(file) for file in local):
        raise ConfigError(f"{option} {path} would overwrite an annotation file to be checked; give another name.")
    try:
        return open(os.devnull if path is None else path, "wb")
    except OSError as error:
        raise ConfigError(f"{option} {path} cannot be written: {error.strerror}. Give another name.") from error


class _Input(NamedTuple):
    file: Location
    root: Location
    media: MediaSettings


def _inputs(request: ValidateRequest, argument: Location) -> list[_Input]:
    """Find the annotation files that a command-line argument names. Shares are ignored: every record is checked."""
    text = argument.url if isinstance(argument, Url) else str(argument)
    file = parse_location(split_share(text)[0])
    if _is_file_argument(file):
        files = find_files(file) if isinstance(file, Url) else (file,)
        return [_Input(file, request.media_root or file.parent, request.media) for file in files]
    sources = find_sources(text, registry=request.registry, media_root=request.media_root, media=request.media)
    return [_Input(file, source.media_root, source.media) for source in sources for file in source.files]


def _is_file_argument(argument: Location) -> bool:
    """Whether an argument is a file or URL, not the name of a dataset. A folder may have the name of its dataset."""
    return (
        isinstance(argument, Url)
        or argument.is_file()
        or ("," not in str(argument) and (argument.name.endswith(ANNOTATION_SUFFIXES) or len(argument.parts) > 1))
    )


def _tasks(request: ValidateRequest, inputs: Sequence[_Input], engine: Engine, spool: Path) -> Iterator[_ChunkTask]:
    files, roots = [file.file for file in inputs], [file.root for file in inputs]
    for remote in dict.fromkeys(root for root in roots if isinstance(root, Url)):
        check_root(remote)
    tokenizers = [] if request.lengths is None else [request.lengths.tokenizer]
    engine.share(
        [location for location in (*files, *roots, *tokenizers) if isinstance(location, Path)],
        writes=[] if all(map(is_read_in_place, files)) else [spool],
    )
    indexes = engine.map(partial(index_file, spool=spool), files)
    for position, ((file, root, media), index) in enumerate(zip(inputs, indexes)):
        for chunk_index, chunk in enumerate(index.chunks):
            # By position, because a file may be given twice or belong to several datasets.
            scratch = spool / f"media-{position}-{chunk_index}"
            yield _ChunkTask(
                file=file, data=index.data, chunk=chunk, root=root, media=media, scratch=scratch, request=request
            )


def _check_chunk(task: _ChunkTask) -> ChunkReport:
    counts = FileCounts()
    modalities: Counter[str] = Counter()
    unused: Counter[str] = Counter()
    rejects: list[Reject] = []
    valid: list[bytes] = []
    undeclared: list[tuple[str, str]] = []
    checked_records = _checked(task)
    if task.request.lengths is not None:
        checked_records = iter(_with_lengths(list(checked_records), task.request.lengths))
    for record, checked, _ in checked_records:
        annotation, problems = checked.annotation, checked.problems
        if checked.undeclared is not None:
            undeclared.append((f"{task.file}:{record.line}", checked.undeclared))
        if annotation is not None:
            _count_media(counts, annotation, problems)
        unused.update(checked.unused)
        if annotation is not None and not problems:
            counts.num_valid += 1
            modalities[_modality(annotation)] += 1
            if task.request.fixed is not None:
                valid.append(_one_line(task, record))
            continue
        counts.num_rejected += 1
        rejects.append(
            Reject(
                file=str(task.file),
                line=record.line,
                record=record.index,
                id=record_id(annotation) or (read_id(record.data) if record.data is not None else None),
                problems=problems,
                annotation=_raw(record, problems),
            )
        )
    return ChunkReport(
        counts=counts,
        modalities=modalities,
        unused=unused,
        rejects=rejects,
        valid=valid,
        undeclared=undeclared,
    )


def _count_media(counts: FileCounts, annotation: Annotation, problems: list[Problem]) -> None:
    """Count the media of a record. If at least one is not missing, all of them count as found."""
    num_media = len(annotation.images) + len(annotation.videos)
    missing = [problem for problem in problems if problem.code is ReasonCode.MEDIA_MISSING] if problems else []
    counts.num_media += num_media
    if len(missing) < num_media <= MAX_OF_A_CODE:
        counts.num_media_found += num_media
    elif missing and counts.missing is None:
        counts.missing = missing_name(missing[0].message)


def _with_lengths(records: Sequence[_CheckedRecord], check: LengthCheck) -> list[_CheckedRecord]:
    """The records of a chunk, with the problems of those that are only too long or have no targets."""
    measured = list(records)
    good = [
        (index, checked.annotation, media)
        for index, (_, checked, media) in enumerate(records)
        if checked.annotation is not None and not checked.problems
    ]
    of_records = length_problems([(annotation, media) for _, annotation, media in good], check)
    for (index, _, _), problems in zip(good, of_records):
        record = records[index]
        measured[index] = record._replace(checked=record.checked._replace(problems=problems))
    return measured


class _CheckedRecord(NamedTuple):
    """A record with the outcome of its check, and its media that could be probed."""

    record: Record
    checked: Checked
    media: list[Medium]


def _checked(task: _ChunkTask) -> Iterator[_CheckedRecord]:
    """The records of a chunk with all their problems."""
    records = (
        _CheckedRecord(
            record,
            check_record(
                record, task.request.reserved, task.media.boxes or None, strict_fields=task.request.strict_fields
            ),
            [],
        )
        for record in read_chunk(task.data, task.chunk)
    )
    with open_media([task.root], beginnings=not task.request.deep, scratch=task.scratch) as access:
        for record, checked, _ in access.prefetch(records, partial(_requests, task)):
            media, problems = _probe(task, checked, access)
            yield _CheckedRecord(record, checked._replace(problems=checked.problems + problems), media)


def _requests(task: _ChunkTask, record: _CheckedRecord) -> list[MediaRequest]:
    annotation, embedded = record.checked.annotation, record.checked.embedded
    return [] if annotation is None else media_requests(annotation, task.root, task.media, embedded)


def _probe(task: _ChunkTask, checked: Checked, access: MediaAccess) -> tuple[list[Medium], list[Problem]]:
    """The media of a record and their problems."""
    annotation, embedded = checked.annotation, checked.embedded
    if annotation is None:
        return [], []
    media, problems = probe_media(annotation, task.root, task.media, embedded, access)
    if not problems and not checked.problems:
        problems = box_problems(annotation, media)
    if task.request.deep:
        problems = problems + check_media(media, task.root, task.media, embedded, access)
    return media, problems


def _one_line(task: _ChunkTask, record: Record) -> bytes:
    """Format a valid record as one line of JSON.

    Raises:
        ConfigError: the record embeds media, which JSON cannot hold.
    """
    if record.embedded:
        raise ConfigError(
            f"--fixed cannot write the media embedded in {task.file}:{record.line}; run `vlprep build` on the Parquet "
            "file itself."
        )
    return _compact(record.data or b"")


def _raw(record: Record, problems: list[Problem]) -> msgspec.Raw:
    if record.data is None or any(problem.code is ReasonCode.BAD_JSON for problem in problems):
        return msgspec.Raw(b"null")
    return msgspec.Raw(_compact(record.data))


def _compact(data: bytes) -> bytes:
    """Remove whitespace between JSON tokens."""
    return msgspec.json.format(data, indent=-1)


def _modality(annotation: Annotation) -> str:
    kinds = (("image", annotation.images), ("video", annotation.videos))
    return " + ".join(kind for kind, items in kinds if items) or "text only"
