"""Build: index, scan, plan, write, seal. The whole way from annotation files to a sealed set of shards.

Work is kept under ``<out>/.build/``, keyed by what it depends on: killed at any moment, the same command goes on where
it was; finished, it does nothing; with another ``max_length`` or packer it plans again without scanning.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path

import msgspec
import numpy as np
import pyarrow.parquet as pq
import xxhash
from numpy.typing import NDArray
from tqdm import tqdm

from prep.engines import Engine
from prep.files import write_synced
from prep.ledger import Ledger, ScannedPart
from prep.metrics import BuildMetrics, Timings, merge_timings
from prep.plan import Plan, make_plan
from prep.records import FileIndex
from prep.registry import Source, draw
from prep.scan import ScanTask, part_key, scan_chunk, table_path
from prep.seal import seal
from prep.tokenizer import ModelFiles, find_model_files, read_fingerprints
from prep.work import WorkFolder
from prep.write import PlannedSample, ShardResult, WriteTask, write_shard
from schemas.annotation import SampleRef
from schemas.bins import shard_name
from schemas.errors import VlprepError
from schemas.manifest import (
    MANIFEST_FILE,
    Fingerprints,
    InputDataset,
    InputFile,
    Manifest,
)
from schemas.settings import BuildSettings
from schemas.tables import SAMPLES_FILE

logger = logging.getLogger(__name__)

METRICS_FILE = "build_metrics.json"
"""Counts and times of the run that finished the build; not part of the set, since times differ from run to run."""

_SOFTWARE = ("pillow", "decord2", "numpy", "pyarrow", "tokenizers", "zstandard")
"""Packages whose version can change the bytes of a build."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildRequest:
    """What to build.

    Attributes:
        sources: datasets, in the order in which the ledger lists them.
        out: folder of the shards.
        settings: everything else that decides the bytes.
        model: checkpoint folder or hub id whose tokenizer is used.
        max_rejected: the build fails when a larger share of the drawn annotations is rejected.
        retry_media: look again at chunks with records that an earlier run rejected for their media.
    """

    sources: tuple[Source, ...]
    out: Path
    settings: BuildSettings
    model: str
    max_rejected: Fraction
    retry_media: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class _Samples:
    """Columns over all measured samples, each as often as it is taken, in the order of the parts.

    Attributes:
        part: (N,) int32, index of the part.
        row: (N,) int32, row in the part.
    """

    part: NDArray[np.int32]
    row: NDArray[np.int32]
    num_tokens: NDArray[np.int32]
    num_patches: NDArray[np.int32]
    pixel_bytes: NDArray[np.int64]


def read_metrics(out: Path) -> BuildMetrics | None:
    """Read the ``build_metrics.json`` of a finished build; None where it is not there or damaged."""
    try:
        return msgspec.json.decode((out / METRICS_FILE).read_bytes(), type=BuildMetrics)
    except (OSError, msgspec.MsgspecError):
        return None


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
    work = WorkFolder(request.out)
    with work.held():
        indexes = _indexes(request, work, engine, needs_data=False)
        inputs = [_input(source, index) for source, index in zip(request.sources, indexes)]
        software = {name: version(name) for name in _SOFTWARE}
        roots = [str(source.media_root.resolve()) for source in request.sources]
        key = _hash(request.settings, fingerprints, software, inputs, roots)
        finished = work.finished(key)
        if finished is not None and not request.retry_media:
            logger.info(
                "%s is complete already; nothing to do. Media are not looked at again; --retry-media does.", request.out
            )
            return finished
        (request.out / MANIFEST_FILE).unlink(missing_ok=True)
        clock = _Clock()
        indexes = _indexes(request, work, engine, needs_data=True)
        parts = _scan(request, engine, work, files, fingerprints, indexes, clock.timings)
        clock.lap("scan")
        samples = _measured(parts)
        num_too_long = int((samples.num_tokens > request.settings.max_length).sum())
        _check_rejects(request, parts, len(samples.num_tokens), num_too_long)
        plan = make_plan(samples.num_tokens, samples.num_patches, samples.pixel_bytes, request.settings)
        clock.lap("plan")
        results = _write(request, engine, work.write_results(_plan_key(key, parts, plan)), parts, samples, plan)
        for result in results:
            merge_timings(clock.timings, result.timings)
        work.keep_shards({shard_name(result.shard) for result in results if result.rows})
        clock.lap("write")
        names = [source.name for source in request.sources]
        ledger = Ledger(names, plan, len(samples.num_tokens), request.settings.max_length, results)
        statistics = ledger.write(request.out / SAMPLES_FILE, parts)
        num_rejected = sum(dataset.num_rejected for dataset in statistics)
        _check_share(request, sum(dataset.num_drawn for dataset in inputs), num_rejected)
        manifest = seal(
            request.out,
            settings=request.settings,
            fingerprints=fingerprints,
            software=software,
            inputs=inputs,
            results=results,
            statistics=statistics,
        )
        clock.lap("seal")
        write_synced(request.out / METRICS_FILE, clock.metrics(manifest, engine.num_workers))
        work.finish(key, manifest)
        return manifest


def _hash(*parts: object) -> str:
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode(parts))


def _plan_key(key: str, parts: Sequence[ScannedPart], plan: Plan) -> str:
    """What the shards of a plan depend on: the build, the contents of its parts, and the plan."""
    digest = xxhash.xxh3_128(key.encode())
    for part in parts:
        digest.update(table_path(part.path).read_bytes())
    for array in (plan.order, plan.bin_starts, plan.shard_starts):
        digest.update(array.tobytes())
    return digest.hexdigest()


def _indexes(request: BuildRequest, work: WorkFolder, engine: Engine, *, needs_data: bool) -> list[list[FileIndex]]:
    """What is in the annotation files of every dataset; those that have not changed are not walked again."""
    files = [file for source in request.sources for file in source.files]
    known = {file: found for file in files if (found := work.index(file, needs_data=needs_data)) is not None}
    new = [file for file in dict.fromkeys(files) if file not in known]
    walked = tqdm(engine.map(work.make_index, new), total=len(new), desc="index", unit="file", disable=not new)
    known.update(zip(new, walked))
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
    parts: list[ScannedPart] = []
    for number, (source, of_files) in enumerate(zip(request.sources, indexes)):
        total = sum(index.num_records for index in of_files)
        copies = draw(total, source.rate, seed=request.settings.seed, dataset=source.name)
        base = 0
        for name, index in zip(source.file_names, of_files):
            for chunk in index.chunks:
                first = base + chunk.first_record
                task = ScanTask(
                    part=work.scan,
                    file=index.data,
                    chunk=chunk,
                    copies=copies[first : first + chunk.num_records].tobytes(),
                    media_root=source.media_root,
                    media=source.media,
                    reserved=request.settings.reserved,
                    tokenizer=files.tokenizer,
                    retry_media=request.retry_media,
                    shrink_to=request.settings.max_length if request.settings.overlong == "shrink" else None,
                )
                task = replace(task, part=task.part / part_key(index.xxh3, task, fingerprints.tokenizer))
                parts.append(ScannedPart(path=task.part, source=number, file=name, record_base=base))
                tasks.append(task)
            base += index.num_records
    with tqdm(total=sum(task.chunk.num_records for task in tasks), desc="scan", unit="record") as bar:
        for result in engine.map(scan_chunk, tasks):
            bar.update(result.num_records)
            merge_timings(timings, result.timings)
    return parts


def _measured(parts: Sequence[ScannedPart]) -> _Samples:
    """Read the sizes of all samples."""
    names = ["copies", "sample_bytes", "num_tokens", "num_patches", "pixel_bytes"]
    columns: dict[str, list[NDArray[np.int64]]] = {name: [] for name in ("part", "row", *names[2:])}
    for number, part in enumerate(parts):
        table = pq.read_table(table_path(part.path), columns=names)
        has_sample = table.column("sample_bytes").to_numpy() > 0
        row = np.repeat(np.flatnonzero(has_sample), table.column("copies").to_numpy()[has_sample])
        columns["part"].append(np.full(row.size, number))
        columns["row"].append(row)
        for name in names[2:]:
            columns[name].append(table.column(name).to_numpy()[row])
    empty = np.empty(0, dtype=np.int64)
    joined = {name: np.concatenate([empty, *arrays]) for name, arrays in columns.items()}
    narrow = {name: joined[name].astype(np.int32) for name in ("part", "row", "num_tokens", "num_patches")}
    return _Samples(pixel_bytes=joined["pixel_bytes"].astype(np.int64), **narrow)


def _check_rejects(request: BuildRequest, parts: Sequence[ScannedPart], num_samples: int, num_too_long: int) -> None:
    """Stop before the write step when the scan alone shows that there is too little to pack."""
    drawn = 0
    for part in parts:
        copies = pq.read_table(table_path(part.path), columns=["copies"]).column("copies")
        drawn += int(copies.to_numpy().sum(dtype=np.int64))
    if num_samples == num_too_long:
        raise VlprepError(
            f"none of {drawn} annotations can be packed; nothing was sealed. `vlprep validate` on the same file "
            "says what is wrong with each."
        )
    _check_share(request, drawn, drawn - num_samples + num_too_long)


def _check_share(request: BuildRequest, drawn: int, rejected: int) -> None:
    if rejected > request.max_rejected * drawn:
        raise VlprepError(
            f"{rejected} of {drawn} annotations are rejected, more than --max-rejected "
            f"{float(request.max_rejected):.2%}. Nothing was sealed; `vlprep validate` says what is wrong with each."
        )


def _write(
    request: BuildRequest,
    engine: Engine,
    results: Path,
    parts: Sequence[ScannedPart],
    samples: _Samples,
    plan: Plan,
) -> list[ShardResult]:
    """Write all shards; those that an earlier run of the same plan finished are kept."""
    found: list[ShardResult] = []
    with tqdm(total=int(plan.order.size), desc="write", unit="sample") as bar:
        for result in engine.map(write_shard, _write_tasks(request, results, parts, samples, plan)):
            found.append(result)
            bar.update(sum(row.num_samples for row in result.rows) + len(result.failed))
    return found


def _write_tasks(
    request: BuildRequest, results: Path, parts: Sequence[ScannedPart], samples: _Samples, plan: Plan
) -> Iterator[WriteTask]:
    places = _Places(request, parts, samples)
    for shard in range(plan.num_shards):
        first, last = int(plan.shard_starts[shard]), int(plan.shard_starts[shard + 1])
        yield WriteTask(
            shard=shard,
            out=request.out,
            result=results / f"{shard:05d}",
            first_bin=first,
            bins=tuple(
                tuple(places.planned(int(number)) for number in plan.order[plan.bin_starts[b] : plan.bin_starts[b + 1]])
                for b in range(first, last)
            ),
            roots=tuple(source.media_root for source in request.sources),
            media=tuple(source.media for source in request.sources),
            codec=request.settings.pixels,
        )


class _Places:
    """Looks up where the measured form of a sample lies, and what it is called."""

    def __init__(self, request: BuildRequest, parts: Sequence[ScannedPart], samples: _Samples) -> None:
        self._names = [source.name for source in request.sources]
        self._parts = parts
        self._samples = samples
        names = ["record", "id", "sample_offset", "sample_bytes"]
        tables = [pq.read_table(table_path(part.path), columns=names) for part in parts]
        self._ids = [table.column("id") for table in tables]
        self._numbers = [[table.column(name).to_numpy() for name in names if name != "id"] for table in tables]

    def planned(self, number: int) -> PlannedSample:
        """The write task's view of sample ``number``."""
        at, row = int(self._samples.part[number]), int(self._samples.row[number])
        part = self._parts[at]
        record, offset, num_bytes = (int(column[row]) for column in self._numbers[at])
        reference = SampleRef(self._names[part.source], part.record_base + record, self._ids[at][row].as_py())
        return PlannedSample(number, part.source, reference, part.path, offset, num_bytes)
