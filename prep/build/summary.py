"""The summary of a build, as text and for JSON."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from prep.annotations.unused import describe_unused
from prep.build.metrics import BuildMetrics
from prep.shards.drift import drift_lines
from schemas.annotation import ReasonCode
from schemas.manifest import Counts, DatasetStatistics, Manifest
from schemas.qwen import DEFAULT_MODEL
from schemas.wording import counted, kinds_text, size_text
from storage.urls import Location

_MAX_LINES = 10


def build_summary(
    manifest: Manifest, out: Location, *, model: str, verbose: bool = False, with_report: bool = False
) -> str:
    """At most ten lines: packed and rejected annotations, fill, media, bytes, datasets, and the next commands.

    Args:
        manifest: of the finished set.
        out: the set.
        model: checkpoint folder or hub id of the build, for the next commands.
        verbose: list all datasets, in as many lines as that takes.
        with_report: leave room for a line about the report, which takes the place of the command that shows a bin.
    """
    counts = manifest.counts
    num_bytes = sum(shard.num_bytes for shard in manifest.shards)
    lines = [
        f"{out}: {counted(counts.num_annotations, 'annotation')} = {counts.num_packed:,} packed + "
        f"{counts.num_rejected:,} rejected + {counts.num_not_sampled:,} not sampled",
        *_reject_lines(counts, f" --max-length {manifest.settings.max_length}{_model_option(model)}"),
        f"{counted(counts.num_bins, 'bin')} of {manifest.settings.max_length:,} tokens, {manifest.fill:.2%} filled; "
        f"{counted(counts.num_tokens, 'token')}, {counts.num_targets:,} of them targets",
        f"{counted(counts.num_images, 'image')} and {counted(counts.num_videos, 'video')}, "
        f"{counts.num_patches:,} patches; {counted(len(manifest.shards), 'shard')}, {size_text(num_bytes)}",
        *drift_lines(manifest),
    ]
    commands = [f"next: {command}" for command in next_commands(out, model)[with_report:] if counts.num_bins]
    datasets = [line for dataset in manifest.statistics for line in _dataset_lines(dataset)]
    num_free = _MAX_LINES - len(lines) - len(commands) - with_report
    if not verbose and len(datasets) > num_free:
        datasets = _shorten(manifest.statistics, num_free)
    return "\n".join([*lines, *datasets, *commands])


def next_commands(out: Location, model: str) -> tuple[str, str]:
    """The commands that show a bin of a set and train on it."""
    folder, checkpoint = shlex.quote(str(out)), shlex.quote(model)
    run = shlex.quote(f"runs/{out.name or 'run'}")
    return (
        f"vlprep show {folder} --bin 0{_model_option(model)}",
        f"deepspeed train/main.py --shards {folder} --model_name_or_path {checkpoint} --output_dir {run}",
    )


def build_json(
    manifest: Manifest, out: Location, *, metrics: BuildMetrics | None, report: Location | None
) -> dict[str, Any]:
    """The summary for JSON: counts, drift and datasets as in the manifest.

    Args:
        manifest: of the finished set.
        out: the set.
        metrics: times of the build, if they are wanted.
        report: the page about the shards, if it was written.
    """
    content: dict[str, Any] = {
        "out": str(out),
        "counts": manifest.counts,
        "fill": manifest.fill,
        "num_shards": len(manifest.shards),
        "num_bytes": sum(shard.num_bytes for shard in manifest.shards),
        "drift": None if manifest.drift is msgspec.UNSET else manifest.drift,
        "statistics": manifest.statistics,
        "report": None if report is None else str(report),
    }
    if metrics is not None:
        content |= {"num_workers": metrics.num_workers, "stages_s": metrics.stages_s, "samples_s": metrics.samples}
    builtins: dict[str, Any] = msgspec.to_builtins(content)
    return builtins


def _model_option(model: str) -> str:
    return "" if model == DEFAULT_MODEL else f" --model {shlex.quote(model)}"


def _reject_lines(counts: Counts, with_length: str) -> Iterator[str]:
    if counts.num_rejected:
        codes = sorted(counts.rejects_by_code.items(), key=lambda item: -item[1])
        # Only with a length does `validate` count tokens.
        option = with_length if counts.rejects_by_code.get(ReasonCode.TOO_LONG.value) else ""
        yield (
            f"  {', '.join(f'{code}: {count:,}' for code, count in codes)} "
            f"(why: samples.parquet, or `vlprep validate{option}` on the annotation file or dataset)"
        )


def _shorten(statistics: Sequence[DatasetStatistics], num_lines: int) -> list[str]:
    """The first datasets, how many others there are, and one line about the unused fields of all."""
    unused: Counter[str] = Counter()
    for dataset in statistics:
        unused.update(dataset.unused_fields or {})
    unused_lines = [f"  fields not used: {describe_unused(unused)}"] if unused else []
    num_shown = max(0, num_lines - len(unused_lines) - 1)
    shown = [next(_dataset_lines(dataset)) for dataset in statistics[:num_shown]]
    num_others = len(statistics) - len(shown)
    others = [f"  … and {counted(num_others, 'more dataset')}: -v lists all"] if num_others else []
    return [*shown, *others, *unused_lines]


def _dataset_lines(dataset: DatasetStatistics) -> Iterator[str]:
    kinds = kinds_text(dataset.modalities) or "nothing packed"
    others = "".join(
        f", {count:,} {outcome}"
        for count, outcome in ((dataset.num_rejected, "rejected"), (dataset.num_not_sampled, "not sampled"))
        if count
    )
    if dataset.num_boxes:
        others += f"; {dataset.num_boxes:,} {'box or point' if dataset.num_boxes == 1 else 'boxes and points'}"
    lengths = ""
    if dataset.tokens is not None:
        tokens = dataset.tokens
        lengths = (
            f"; tokens per sample: mean {tokens.mean:,.0f}, median {tokens.p50:,}, 99 % {tokens.p99:,}, "
            f"most {tokens.max:,}"
        )
    yield f"  {dataset.dataset}: {kinds}{others}{lengths}"
    if dataset.unused_fields:
        yield f"    fields not used: {describe_unused(dataset.unused_fields)}"


def metrics_summary(metrics: BuildMetrics) -> str:
    """Two lines on how long the build took, by stage and by sample."""
    stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in metrics.stages_s.items())
    samples = ", ".join(
        f"{name} {times.mean_s * 1e3:.2f} ({times.p50_s * 1e3:.2f}, {times.p99_s * 1e3:.2f})"
        for name, times in metrics.samples.items()
    )
    return (
        f"{counted(metrics.num_workers, 'worker')}: {stages}\n"
        f"ms per sample, mean (median, 99 %): {samples or 'nothing was left to do'}"
    )
