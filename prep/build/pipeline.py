"""Build: index, scan, plan, write, seal. The whole way from annotation files to a sealed set of shards.

The work folder keeps the results of every step, keyed by what they depend on. After a kill at any moment, the same
command resumes. After it has finished, it does nothing. With another ``max_length`` or packer it plans again without
scanning.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import msgspec
import xxhash

import storage
from prep.annotations.records import FileIndex, is_read_in_place
from prep.annotations.registry import Source
from prep.annotations.shares import draw
from prep.build.columns import SampleColumns, read_columns
from prep.build.declared import require_declared_boxes
from prep.build.ledger import Ledger
from prep.build.metrics import BuildMetrics, Timings, merge_timings
from prep.build.missing import all_missing
from prep.build.output import Output
from prep.build.ownership import require_own_set
from prep.build.parts import ScannedPart, table_path
from prep.build.plan import Plan, make_plan
from prep.build.rejects import check_scan, check_share
from prep.build.scan import ScanTask, is_scanned, scan_chunk
from prep.build.seal import seal
from prep.build.work import WorkFolder
from prep.build.write import SHARD_VERSION, WriteTask, write_shard
from prep.build.written import WrittenShards
from prep.engines import Engine
from prep.engines.progress import progress
from prep.engines.software import software_versions
from prep.media.bicubic import fallback_reason
from prep.samples.tokenizer import ModelFiles, find_model_files, load_tokenizer, read_fingerprints
from schemas.manifest import (
    MANIFEST_FILE,
    METRICS_FILE,
    DatasetStatistics,
    Fingerprints,
    InputDataset,
    InputFile,
    Manifest,
)
from schemas.settings import BuildSettings
from schemas.tables import SAMPLES_FILE
from storage.files import naming, write_synced
from storage.urls import Location, location_key

logger = logging.getLogger(__name__)

_FEW_RECORDS = 192
"""Workers encode the texts of three small chunks with a part of the tokenizer, which is faster than to load it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildRequest:
    """What to build.

    Attributes:
        sources: datasets, in the order of the ledger.
        out: folder or URL of the shards.
        settings: everything else that decides the bytes.
        model: checkpoint folder or hub id of the tokenizer.
        max_rejected: the build fails if a larger share of the drawn annotations is rejected.
        retry_media: scan chunks again in which an earlier run rejected records for their media.
        work_dir: work folder; None for the default one of ``out``.
        overwrite: replace a finished set of other annotation files in ``out``.
    """

    sources: tuple[Source, ...]
    out: Location
    settings: BuildSettings
    model: str
    max_rejected: Fraction
    retry_media: bool = False
    work_dir: Path | None = None
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class _Identity:
    """What a set of shards depends on, besides the media files and the settings."""

    fingerprints: Fingerprints
    software: dict[str, str]
    inputs: list[InputDataset]
    media_roots: list[str]

    def key(self, settings: BuildSettings) -> str:
        """Equal keys mean equal shards, as long as the media are the same."""
        parts = (settings, self.fingerprints, self.software, self.inputs, self.media_roots)
        return xxhash.xxh3_128_hexdigest(msgspec.json.encode(parts))


class _Clock:
    """Collects the times of stages and samples."""

    def __init__(self) -> None:
        self.timings: Timings = {}
        self._stages_s: dict[str, float] = {}
        self._start = time.perf_counter()

    def lap(self, stage: str) -> None:
        """End a stage. The next one starts."""
        now = time.perf_counter()
        self._stages_s[stage] = now - self._start
        self._start = now

    def metrics(self, manifest: Manifest, num_workers: int) -> bytes:
        """Contents of ``build_metrics.json``."""
        metrics = BuildMetrics(
            num_workers=num_workers,
            stages_s=self._stages_s,
            samples={name: durations.summary() for name, durations in self.timings.items()},
            counts=manifest.counts,
            datasets=manifest.statistics,
        )
        return msgspec.json.format(msgspec.json.encode(metrics), indent=2) + b"\n"


def build(request: BuildRequest, engine: Engine) -> Manifest:
    """Build a set of shards, or resume an interrupted build.

    Raises:
        ConfigError: invalid settings, inputs or checkpoint.
        VlprepError: too many rejects, or nothing to pack. Nothing is sealed.
    """
    files = find_model_files(request.model)
    fingerprints = read_fingerprints(files)
    work = WorkFolder(request.out, request.work_dir)
    with work.locked():
        engine.share(_read_by_tasks(request, files), writes=work.written_by_tasks)
        indexes = _indexes(request, work, engine, needs_data=False)
        identity = _Identity(
            fingerprints=fingerprints,
            software=software_versions(),
            inputs=[_input(source, index) for source, index in zip(request.sources, indexes)],
            media_roots=[location_key(source.media_root) for source in request.sources],
        )
        finished = work.finished(identity.key(request.settings))
        if finished is not None and not request.retry_media:
            work.tidy()
            logger.info(
                "%s is already complete; nothing to do. Media are not checked again; use --retry-media for that.",
                request.out,
            )
            return finished
        if not request.overwrite:
            require_own_set(work, _files_of(request.sources), identity.inputs)
        return _build_shards(request, engine, work, files, identity)


def _build_shards(
    request: BuildRequest, engine: Engine, work: WorkFolder, files: ModelFiles, identity: _Identity
) -> Manifest:
    """Scan, plan, write, seal."""
    key = identity.key(request.settings)
    work.output.remove([MANIFEST_FILE])
    clock = _Clock()
    indexes = _indexes(request, work, engine, needs_data=True)
    parts = _scan(engine, _scan_tasks(request, work, files, identity.fingerprints, indexes), clock.timings)
    clock.lap("scan")
    require_declared_boxes(parts, [source.name for source in request.sources])
    for message in all_missing(request.sources, parts):
        logger.warning(message)
    samples = read_columns(parts)
    check_scan(parts, samples, max_length=request.settings.max_length, max_rejected=request.max_rejected)
    plan = make_plan(samples.num_tokens, samples.num_patches, samples.pixel_bytes, request.settings)
    clock.lap("plan")
    if samples.pixel_bytes.any() and (reason := fallback_reason()) is not None:
        logger.info(reason)
    results = work.write_results(_plan_key(key, parts, plan))
    written = _write(engine, _write_tasks(request, work.output, results, parts, samples, plan), plan)
    merge_timings(clock.timings, written.timings)
    work.keep_shards({shard.file for shard in written.shards})
    clock.lap("write")
    statistics = _write_ledger(request, work.output, parts, plan, len(samples.num_tokens), written)
    check_share(
        sum(dataset.num_rejected for dataset in statistics),
        sum(dataset.num_drawn for dataset in identity.inputs),
        sum((Counter(dataset.rejects_by_code) for dataset in statistics), Counter()),
        max_rejected=request.max_rejected,
    )
    manifest = seal(
        work.output,
        settings=request.settings,
        fingerprints=identity.fingerprints,
        software=identity.software,
        inputs=identity.inputs,
        written=written,
        statistics=statistics,
    )
    clock.lap("seal")
    write_synced(work.output.folder / METRICS_FILE, clock.metrics(manifest, engine.num_workers))
    work.output.put(METRICS_FILE)
    work.finish(key, manifest, _files_of(request.sources))
    return manifest


def _write_ledger(
    request: BuildRequest,
    output: Output,
    parts: Sequence[ScannedPart],
    plan: Plan,
    num_samples: int,
    written: WrittenShards,
) -> list[DatasetStatistics]:
    """Write ``samples.parquet`` into the output's folder; returns the totals of every dataset."""
    names = [source.name for source in request.sources]
    ledger = Ledger(names, plan, num_samples, request.settings.max_length, written)
    with naming(output.folder / SAMPLES_FILE):
        return ledger.write(output.folder / SAMPLES_FILE, parts)


def _files_of(sources: Sequence[Source]) -> list[Location]:
    """The annotation files of all datasets."""
    return [file for source in sources for file in source.files]


def _read_by_tasks(request: BuildRequest, files: ModelFiles) -> list[Path]:
    """Local files and folders that tasks read, besides those in the work folder."""
    named = [location for source in request.sources for location in (*source.files, source.media_root)]
    return [files.tokenizer, *(location for location in named if isinstance(location, Path))]


def _plan_key(key: str, parts: Sequence[ScannedPart], plan: Plan) -> str:
    """Hash of what shards depend on: the build, its parts, the plan, and the version of their layout."""
    digest = xxhash.xxh3_128(f"{SHARD_VERSION} {key}".encode())
    for part in parts:
        digest.update(table_path(part.path).read_bytes())
    for array in (plan.order, plan.bin_starts, plan.shard_starts):
        digest.update(array.data)
    return digest.hexdigest()


def _indexes(request: BuildRequest, work: WorkFolder, engine: Engine, *, needs_data: bool) -> list[list[FileIndex]]:
    """Indexes of the annotation files of every dataset. Files that have not changed are not read again."""
    files = list(dict.fromkeys(file for source in request.sources for file in source.files))
    kept = storage.in_parallel(partial(work.index, needs_data=needs_data), files)
    known = {file: index for file, index in zip(files, kept) if index is not None}
    new = [file for file in files if file not in known]
    with closing(engine.map(work.make_index, new)) as indexes, progress("index", len(new), "file") as bar:
        for file, index in zip(new, indexes):
            known[file] = index
            bar.update()
    return [[known[file] for file in source.files] for source in request.sources]


def _input(source: Source, indexes: Sequence[FileIndex]) -> InputDataset:
    num_annotations = sum(index.num_records for index in indexes)
    return InputDataset(
        dataset=source.name,
        rate=float(source.rate),
        num_drawn=int(num_annotations * source.rate),
        media=source.media,
        files=[
            InputFile(file=name, num_bytes=index.num_bytes, xxh3=index.xxh3, num_annotations=index.num_records)
            for name, index in zip(source.file_names, indexes)
        ],
    )


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where the records of a chunk come from, see :class:`ScannedPart`."""

    source: int
    file: str
    record_base: int


def _scan_tasks(
    request: BuildRequest,
    work: WorkFolder,
    files: ModelFiles,
    fingerprints: Fingerprints,
    indexes: Sequence[Sequence[FileIndex]],
) -> list[tuple[ScanTask, _Origin]]:
    """One task for every chunk of every annotation file."""
    settings = request.settings
    tasks: list[tuple[ScanTask, _Origin]] = []
    for source_index, (source, of_files) in enumerate(zip(request.sources, indexes)):
        num_annotations = sum(index.num_records for index in of_files)
        copies = draw(num_annotations, source.rate, seed=settings.seed, dataset=source.name)
        base = 0
        for location, name, index in zip(source.files, source.file_names, of_files):
            for chunk in index.chunks:
                first = base + chunk.first_record
                task = ScanTask(
                    folder=work.scan,
                    file=index.data,
                    file_hash=index.xxh3,
                    modified_ns=index.modified_ns if is_read_in_place(location) else None,
                    chunk=chunk,
                    copies=copies[first : first + chunk.num_records].tobytes(),
                    media_root=source.media_root,
                    media=source.media,
                    reserved=settings.reserved,
                    strict_fields=settings.strict_fields is True,
                    tokenizer=files.tokenizer,
                    tokenizer_hash=fingerprints.tokenizer,
                    retry_media=request.retry_media,
                    shrink_to=settings.max_length if settings.overlong == "shrink" else None,
                )
                tasks.append((task, _Origin(source_index, name, base)))
            base += index.num_records
    return tasks


def _scan(engine: Engine, tasks: Sequence[tuple[ScanTask, _Origin]], timings: Timings) -> list[ScannedPart]:
    """Scan all chunks, reusing the parts of an earlier run. Adds to ``timings``."""
    parts: list[ScannedPart] = []
    num_records = sum(task.chunk.num_records for task, _ in tasks)
    unscanned = next((task for task, _ in tasks if not is_scanned(task)), None)
    if num_records > _FEW_RECORDS and unscanned is not None and engine.renew_workers():
        load_tokenizer(unscanned.tokenizer, unscanned.tokenizer_hash).complete()
    with (
        closing(engine.map(scan_chunk, [task for task, _ in tasks])) as results,
        progress("scan", num_records, "record") as bar,
    ):
        for result, (_, origin) in zip(results, tasks):
            parts.append(
                ScannedPart(path=result.part, source=origin.source, file=origin.file, record_base=origin.record_base)
            )
            bar.update(result.num_records)
            merge_timings(timings, result.timings)
    return parts


def _write(engine: Engine, tasks: Iterable[WriteTask], plan: Plan) -> WrittenShards:
    """Write all shards, keeping those that an earlier run of the same plan finished."""
    written = WrittenShards()
    with (
        closing(engine.map(write_shard, tasks)) as results,
        progress("write", int(plan.order.size), "sample") as bar,
    ):
        for result in results:
            written.add(result)
            bar.update(sum(row.num_samples for row in result.rows) + len(result.failed))
    return written


def _write_tasks(
    request: BuildRequest,
    output: Output,
    results: Path,
    parts: Sequence[ScannedPart],
    samples: SampleColumns,
    plan: Plan,
) -> Iterator[WriteTask]:
    """One task for every shard of the plan."""
    for shard in range(plan.num_shards):
        first, last = int(plan.shard_starts[shard]), int(plan.shard_starts[shard + 1])
        starts = plan.bin_starts[first : last + 1]
        indices = plan.order[starts[0] : starts[-1]]
        used, part = samples.parts_of(indices)
        yield WriteTask(
            shard=shard,
            output=output,
            result=results / f"{shard:05d}",
            first_bin=first,
            first_position=int(starts[0]),
            bin_starts=starts - starts[0],
            part=part,
            offset=samples.sample_offset[indices],
            num_bytes=samples.sample_bytes[indices],
            has_media=samples.num_patches[indices] > 0,
            parts=tuple(parts[index] for index in used),
            names=tuple(source.name for source in request.sources),
            roots=tuple(source.media_root for source in request.sources),
            media=tuple(source.media for source in request.sources),
            codec=request.settings.pixels,
            jpeg_quality=request.settings.jpeg_quality or None,
        )
