"""``vlprep validate``: checks annotation files without building anything.

Input: files. Output: a :class:`Report` with counts by code and examples, and the rejected records as JSON lines if
asked for. Runs in parallel over chunks; headers of media are probed, with ``deep`` everything is decoded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
from tqdm import tqdm

from prep.chunks import Chunk, Record
from prep.engines import Engine
from prep.records import index_file, read_chunk
from prep.sample import check_media, probe_media
from prep.validation import check_record, media_names, read_id, record_id
from schemas.annotation import Annotation, Problem, ReasonCode
from schemas.errors import ConfigError
from schemas.settings import MediaSettings

_EXAMPLES_PER_CODE = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidateRequest:
    """What to check: files, where their media lie (None: beside each file), how deep, and where to write rejects."""

    files: tuple[Path, ...]
    media_root: Path | None
    deep: bool
    rejects: Path | None
    reserved: str
    media: MediaSettings


class Reject(msgspec.Struct, frozen=True, kw_only=True):
    """One rejected record, as ``--rejects`` writes it: place, all problems, and the record itself (null if not
    JSON).
    """

    file: str
    line: int
    record: int
    id: str | None
    problems: list[Problem]
    annotation: msgspec.Raw


@dataclass(kw_only=True, slots=True)
class Report:
    """Counts over all records, by code and by modality, with the first examples of each code."""

    num_valid: int = 0
    num_rejected: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    modalities: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, part: ChunkReport) -> None:
        """Count one chunk."""
        self.num_valid += part.num_valid
        self.num_rejected += len(part.rejects)
        self.modalities.update(part.modalities)
        for reject in part.rejects:
            self.codes.update({problem.code.value for problem in reject.problems})
            for problem in reject.problems:
                shown = self.examples.setdefault(problem.code.value, [])
                if len(shown) < _EXAMPLES_PER_CODE:
                    name = f" (id {reject.id})" if reject.id is not None else ""
                    shown.append(f"{reject.file}:{reject.line}{name}: {problem.message}")

    def text(self) -> str:
        """The report for a person."""
        total = self.num_valid + self.num_rejected
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in self.modalities.most_common())
        lines = [
            f"{total:,} annotations: {self.num_valid:,} valid, {self.num_rejected:,} rejected",
            f"valid: {kinds or 'none'}",
        ]
        for code, number in self.codes.most_common():
            lines.append(f"{code}: {number:,}")
            lines.extend(f"  {example}" for example in self.examples[code])
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True, slots=True)
class _ChunkTask:
    file: Path
    data: Path
    chunk: Chunk
    root: Path
    request: ValidateRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkReport:
    """What became of one chunk."""

    num_valid: int
    modalities: Counter[str]
    rejects: list[Reject]


def validate(request: ValidateRequest, engine: Engine) -> Report:
    """Check all files.

    Raises:
        ConfigError: a file cannot be read, the media root is not a folder, or ``rejects`` cannot be written.
    """
    if request.media_root is not None and not request.media_root.is_dir():
        raise ConfigError(f"--media-root {request.media_root} is not a folder.")
    report = Report()
    with ExitStack() as stack:
        spool = Path(stack.enter_context(TemporaryDirectory(prefix="vlprep-")))
        tasks = list(_tasks(request, engine, spool))
        try:
            sink = stack.enter_context(request.rejects.open("wb")) if request.rejects is not None else None
        except OSError as error:
            raise ConfigError(f"--rejects {request.rejects} cannot be written: {error.strerror}.") from error
        bar = stack.enter_context(
            tqdm(total=sum(task.chunk.num_records for task in tasks), desc="validate", unit="record")
        )
        for task, part in zip(tasks, engine.map(_check_chunk, tasks)):
            report.add(part)
            bar.update(task.chunk.num_records)
            if sink is not None:
                sink.writelines(msgspec.json.encode(reject) + b"\n" for reject in part.rejects)
    return report


def _tasks(request: ValidateRequest, engine: Engine, spool: Path) -> Iterator[_ChunkTask]:
    for file, index in zip(request.files, engine.map(partial(index_file, spool=spool), request.files)):
        root = request.media_root if request.media_root is not None else file.parent
        for chunk in index.chunks:
            yield _ChunkTask(file=file, data=index.data, chunk=chunk, root=root, request=request)


def _check_chunk(task: _ChunkTask) -> ChunkReport:
    num_valid = 0
    modalities: Counter[str] = Counter()
    rejects: list[Reject] = []
    for record in read_chunk(task.data, task.chunk):
        annotation, problems = _check(record, task.root, task.request)
        if annotation is not None and not problems:
            num_valid += 1
            modalities[_modality(annotation)] += 1
            continue
        rejects.append(
            Reject(
                file=str(task.file),
                line=record.line,
                record=record.number,
                id=record_id(annotation) or (read_id(record.data) if record.data is not None else None),
                problems=problems,
                annotation=_raw(record, problems),
            )
        )
    return ChunkReport(num_valid=num_valid, modalities=modalities, rejects=rejects)


def _check(record: Record, root: Path, request: ValidateRequest) -> tuple[Annotation | None, list[Problem]]:
    annotation, problems = check_record(record, request.reserved)
    if annotation is not None:
        media, media_problems = probe_media(annotation, root, request.media, record.embedded)
        problems = problems + media_problems
        if request.deep and not media_problems:
            problems = problems + check_media(media, root, request.media, record.embedded)
    return annotation, problems


def _raw(record: Record, problems: list[Problem]) -> msgspec.Raw:
    if record.data is None or any(problem.code is ReasonCode.BAD_JSON for problem in problems):
        return msgspec.Raw(b"null")
    return msgspec.Raw(record.data)


def _modality(annotation: Annotation) -> str:
    images, videos = media_names(annotation)
    return " + ".join(kind for kind, names in (("image", images), ("video", videos)) if names) or "text only"
