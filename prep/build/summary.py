"""The summary of a build, as text and for JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from prep.annotations.unused import describe_unused
from prep.build.metrics import BuildMetrics
from prep.shards.drift import drift_lines
from schemas.manifest import DatasetStatistics, Manifest
from schemas.wording import counted
from storage.urls import Location


def build_summary(manifest: Manifest, out: Location) -> str:
    """A few lines: packed and rejected annotations, fill, tokens, media, bytes."""
    counts = manifest.counts
    num_bytes = sum(shard.num_bytes for shard in manifest.shards)
    lines = [
        f"{out}: {counted(counts.num_annotations, 'annotation')} = {counts.num_packed:,} packed + "
        f"{counts.num_rejected:,} rejected + {counts.num_not_sampled:,} not sampled",
        *(f"  {code}: {count:,}" for code, count in sorted(counts.rejects_by_code.items(), key=lambda item: -item[1])),
        f"{counted(counts.num_bins, 'bin')} of {manifest.settings.max_length:,} tokens, {manifest.fill:.2%} filled; "
        f"{counted(counts.num_tokens, 'token')}, {counts.num_targets:,} of them targets",
        *(line for dataset in manifest.statistics for line in _dataset_lines(dataset)),
        f"{counted(counts.num_images, 'image')} and {counted(counts.num_videos, 'video')}, "
        f"{counts.num_patches:,} patches; {counted(len(manifest.shards), 'shard')}, {num_bytes / 1e6:,.1f} MB",
        *drift_lines(manifest),
    ]
    if counts.num_rejected:
        lines.append("Why each was rejected: samples.parquet, or `vlprep validate` on the annotation file or dataset.")
    return "\n".join(lines)


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


def _dataset_lines(dataset: DatasetStatistics) -> Iterator[str]:
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in dataset.modalities.items()) or "nothing packed"
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
