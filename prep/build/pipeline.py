"""Build: index, scan, plan, write, seal. The whole way from annotation files to a sealed set of shards.

Work is kept under ``<out>/.build/``, keyed by what it depends on: killed at any moment, the same command goes on where
it was; finished, it does nothing; with another ``max_length`` or packer it plans again without scanning.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

import msgspec
import xxhash

import storage
from prep.annotations.records import FileIndex, is_read_in_place
from prep.annotations.registry import Source, draw
from prep.build.columns import SampleColumns, count_rejects, read_columns
from prep.build.ledger import Ledger
from prep.build.metrics import BuildMetrics, Timings, merge_timings
from prep.build.output import Output
from prep.build.parts import ScannedPart, table_path
from prep.build.plan import Plan, make_plan
from prep.build.scan import ScanTask, scan_chunk
from prep.build.seal import seal
from prep.build.work import WorkFolder
from prep.build.write import SHARD_VERSION, WriteTask, write_shard
from prep.build.written import WrittenShards
from prep.engines import Engine
from prep.engines.progress import progress
from prep.engines.software import software_versions
from prep.samples.tokenizer import ModelFiles, find_model_files, read_fingerprints
from schemas.annotation import ReasonCode
from schemas.errors import VlprepError
from schemas.manifest import (
    MANIFEST_FILE,
    METRICS_FILE,
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

_WHY = (
    "`vlprep validate` on the annotation file or dataset says what is wrong with each record; too_long depends on "
    "--max-length, --overlong and the media settings."
)


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildRequest:
    """What to build.

    Attributes:
        sources: datasets, in the order in which the ledger lists them.
        out: folder or URL of the shards.
        settings: everything else that decides the bytes.
        model: checkpoint folder or hub id whose tokenizer is used.
        max_rejected: the build fails when a larger share of the drawn annotations is rejected.
        retry_media: look again at chunks with records that an earlier run rejected for their media.
        work_dir: work folder, or None for the one that belongs to ``out``.
    """

    sources: tuple[Source, ...]
    out: Location
    settings: BuildSettings
    model: str
    max_rejected: Fraction
    retry_media: bool = False
    work_dir: Path | None = None


class _Clock:
    """Collects how long stages and samples take."""

    def __init__(self) -> None:
        self.timings: Timings = {}
        self._stages_s: dict[str, float] = {}
        self._start = time.perf_counter()

    def lap(self, stage: str) -> None:
        """End a stage; the next one starts."""
        now = time.perf_counter()
        self._stages_s[stage] = now - self._start
        self._start = now

    def metrics(self, manifest: Manifest, num_workers: int) -> bytes:
        """Contents of ``build_metrics.json``."""
        found = BuildMetrics(
            num_workers=num_workers,
            stages_s=self._stages_s,
            samples={name: durations.summary() for name, durations in self.timings.items()},
            counts=manifest.counts,
            datasets=manifest.statistics,
        )
        return msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n"


def build(request: BuildRequest, engine: Engine) -> Manifest:
    """Build a set of shards, or go on with one that was interrupted.

    Raises:
        ConfigError: wrong settings, inputs or checkpoint.
        VlprepError: too many rejects, or nothing to pack; nothing is sealed.
    """
    files = find_model_files(request.model)
    fingerprints = read_fingerprints(files)
    work = WorkFolder(request.out, request.work_dir)
    with work.held():
        engine.share(_read_by_tasks(request, files), writes=work.written_by_tasks)
        indexes = _indexes(request, work, engine, needs_data=False)
        inputs = [_input(source, index) for source, index in zip(request.sources, indexes)]
        software = software_versions()
        roots = [location_key(source.media_root) for source in request.sources]
        key = _hash(request.settings, fingerprints, software, inputs, roots)
        finished = work.finished(key)
        if finished is not None and not request.retry_media:
            work.tidy()
            logger.info(
                "%s is complete already; nothing to do. Media are not looked at again; --retry-media does.", request.out
            )
            return finished
        work.output.remove([MANIFEST_FILE])
        clock = _Clock()
        indexes = _indexes(request, work, engine, needs_data=True)
        parts = _scan(request, engine, work, files, fingerprints, indexes, clock.timings)
        clock.lap("scan")
        samples = read_columns(parts)
        _check_rejects(request, parts, samples)
        plan = make_plan(samples.num_tokens, samples.num_patches, samples.pixel_bytes, request.settings)
        clock.lap("plan")
        results = work.write_results(_plan_key(key, parts, plan))
        written = _write(request, engine, work.output, results, parts, samples, plan)
        merge_timings(clock.timings, written.timings)
        work.keep_shards({shard.file for shard in written.shards})
        clock.lap("write")
        names = [source.name for source in request.sources]
        ledger = Ledger(names, plan, len(samples.num_tokens), request.settings.max_length, written)
        with naming(work.output.folder / SAMPLES_FILE):
            statistics = ledger.write(work.output.folder / SAMPLES_FILE, parts)
        _check_share(
            request,
            sum(dataset.num_drawn for dataset in inputs),
            sum(dataset.num_rejected for dataset in statistics),
            sum((Counter(dataset.rejects_by_code) for dataset in statistics), Counter()),
        )
        manifest = seal(
            work.output,
            settings=request.settings,
            fingerprints=fingerprints,
            software=software,
            inputs=inputs,
            written=written,
            statistics=statistics,
        )
        clock.lap("seal")
        write_synced(work.output.folder / METRICS_FILE, clock.metrics(manifest, engine.num_workers))
        work.output.put(METRICS_FILE)
        work.finish(key, manifest)
        return manifest


def _read_by_tasks(request: BuildRequest, files: ModelFiles) -> list[Path]:
    """Files and folders here that tasks read, besides those in the work folder."""
    named = [place for source in request.sources for place in (*source.files, source.media_root)]
    return [files.tokenizer, *(place for place in named if isinstance(place, Path))]


def _hash(*parts: object) -> str:
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode(parts))


def _plan_key(key: str, parts: Sequence[ScannedPart], plan: Plan) -> str:
    """What the shards of a plan depend on: the build, the contents of its parts, the plan, and how they are written."""
    digest = xxhash.xxh3_128(f"{SHARD_VERSION} {key}".encode())
    for part in parts:
        digest.update(table_path(part.path).read_bytes())
    for array in (plan.order, plan.bin_starts, plan.shard_starts):
        digest.update(array.data)
    return digest.hexdigest()


def _indexes(request: BuildRequest, work: WorkFolder, engine: Engine, *, needs_data: bool) -> list[list[FileIndex]]:
    """What is in the annotation files of every dataset; those that have not changed are not walked again."""
    files = [file for source in request.sources for file in source.files]
    asked = list(dict.fromkeys(files))
    answers = storage.in_parallel(partial(work.index, needs_data=needs_data), asked)
    known = {file: found for file, found in zip(asked, answers) if found is not None}
    new = [file for file in dict.fromkeys(files) if file not in known]
    with closing(engine.map(work.make_index, new)) as walked, progress("index", len(new), "file") as bar:
        for file, found in zip(new, walked):
            known[file] = found
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


def _scan(
    request: BuildRequest,
    engine: Engine,
    work: WorkFolder,
    files: ModelFiles,
    fingerprints: Fingerprints,
    indexes: Sequence[Sequence[FileIndex]],
    timings: Timings,
) -> list[ScannedPart]:
    """Scan all chunks; what an earlier run scanned is used again. Adds to ``timings``."""
    tasks: list[ScanTask] = []
    origins: list[tuple[int, str, int]] = []
    parts: list[ScannedPart] = []
    for number, (source, of_files) in enumerate(zip(request.sources, indexes)):
        total = sum(index.num_records for index in of_files)
        copies = draw(total, source.rate, seed=request.settings.seed, dataset=source.name)
        base = 0
        for place, name, index in zip(source.files, source.file_names, of_files):
            modified_ns = index.modified_ns if is_read_in_place(place) else None
            for chunk in index.chunks:
                first = base + chunk.first_record
                task = ScanTask(
                    folder=work.scan,
                    file=index.data,
                    file_hash=index.xxh3,
                    modified_ns=modified_ns,
                    chunk=chunk,
                    copies=copies[first : first + chunk.num_records].tobytes(),
                    media_root=source.media_root,
                    media=source.media,
                    reserved=request.settings.reserved,
                    tokenizer=files.tokenizer,
                    tokenizer_hash=fingerprints.tokenizer,
                    retry_media=request.retry_media,
                    shrink_to=request.settings.max_length if request.settings.overlong == "shrink" else None,
                )
                origins.append((number, name, base))
                tasks.append(task)
            base += index.num_records
    total = sum(task.chunk.num_records for task in tasks)
    with closing(engine.map(scan_chunk, tasks)) as results, progress("scan", total, "record") as bar:
        for result in results:
            number, name, base = origins[len(parts)]
            parts.append(ScannedPart(path=result.part, source=number, file=name, record_base=base))
            bar.update(result.num_records)
            merge_timings(timings, result.timings)
    return parts


def _check_rejects(request: BuildRequest, parts: Sequence[ScannedPart], samples: SampleColumns) -> None:
    """Stop before the write step when the scan alone shows that there is too little to pack."""
    num_packable = int((samples.num_tokens <= request.settings.max_length).sum())
    num_rejected = samples.num_drawn - num_packable
    if not samples.num_drawn:
        raise VlprepError(
            "there is no annotation to pack: the annotation files hold none, or the share taken of them (%N, "
            "sampling_rate) is less than one. Nothing was sealed; take a larger share."
        )
    if num_packable and num_rejected <= request.max_rejected * samples.num_drawn:
        return
    codes = count_rejects(parts) + Counter({ReasonCode.TOO_LONG.value: samples.num_tokens.size - num_packable})
    if not num_packable:
        raise VlprepError(
            f"none of {samples.num_drawn} annotations can be packed{_by_code(codes)}; nothing was sealed. {_WHY}"
        )
    _check_share(request, samples.num_drawn, num_rejected, codes)


def _check_share(request: BuildRequest, drawn: int, rejected: int, codes: Counter[str]) -> None:
    if rejected > request.max_rejected * drawn:
        raise VlprepError(
            f"{rejected} of {drawn} annotations are rejected, more than --max-rejected "
            f"{float(request.max_rejected):.2%}{_by_code(codes)}. Nothing was sealed. {_WHY} With a higher "
            "--max-rejected, samples.parquet lists every reject."
        )


def _by_code(codes: Counter[str]) -> str:
    return f" ({', '.join(f'{code} {number}' for code, number in codes.most_common())})"


def _write(
    request: BuildRequest,
    engine: Engine,
    output: Output,
    results: Path,
    parts: Sequence[ScannedPart],
    samples: SampleColumns,
    plan: Plan,
) -> WrittenShards:
    """Write all shards; those that an earlier run of the same plan finished are kept."""
    written = WrittenShards()
    tasks = _write_tasks(request, output, results, parts, samples, plan)
    total = int(plan.order.size)
    with closing(engine.map(write_shard, tasks)) as shards, progress("write", total, "sample") as bar:
        for result in shards:
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
    for shard in range(plan.num_shards):
        first, last = int(plan.shard_starts[shard]), int(plan.shard_starts[shard + 1])
        starts = plan.bin_starts[first : last + 1]
        numbers = plan.order[starts[0] : starts[-1]]
        used, part = samples.parts_of(numbers)
        yield WriteTask(
            shard=shard,
            output=output,
            result=results / f"{shard:05d}",
            first_bin=first,
            first_place=int(starts[0]),
            bin_starts=starts - starts[0],
            part=part,
            offset=samples.sample_offset[numbers],
            num_bytes=samples.sample_bytes[numbers],
            has_media=samples.num_patches[numbers] > 0,
            parts=tuple(parts[number] for number in used),
            names=tuple(source.name for source in request.sources),
            roots=tuple(source.media_root for source in request.sources),
            media=tuple(source.media for source in request.sources),
            codec=request.settings.pixels,
            jpeg_quality=request.settings.jpeg_quality or None,
        )
