"""What a build came to, for a person."""

from __future__ import annotations

from pathlib import Path

from schemas.manifest import Manifest


def build_summary(manifest: Manifest, out: Path) -> str:
    """A few lines: packed and rejected, fill, tokens, media, bytes."""
    counts = manifest.counts
    num_bytes = sum(shard.num_bytes for shard in manifest.shards)
    lines = [
        f"{out}: {counts.num_annotations:,} annotations = {counts.num_packed:,} packed + "
        f"{counts.num_rejected:,} rejected + {counts.num_not_sampled:,} not sampled",
        *(
            f"  {code}: {number:,}"
            for code, number in sorted(counts.rejects_by_code.items(), key=lambda item: -item[1])
        ),
        f"{counts.num_bins:,} bins of {manifest.settings.max_length:,} tokens, {manifest.fill:.2%} filled; "
        f"{counts.num_tokens:,} tokens, {counts.num_targets:,} of them targets",
        f"{counts.num_images:,} images and {counts.num_videos:,} videos, {counts.num_patches:,} patches; "
        f"{len(manifest.shards):,} shards, {num_bytes / 1e6:,.1f} MB",
    ]
    if counts.num_rejected:
        lines.append("Why each was rejected: samples.parquet, or `vlprep validate` on the annotation file.")
    return "\n".join(lines)
