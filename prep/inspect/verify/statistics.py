"""Recomputes the manifest's statistics of every dataset from the ledger and from the bins.

Input: the manifest, the ledger, and the modalities that the workers counted in the bins. Output: findings. Cost: a
sort of the sizes of all packed samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from prep.inspect.verify.findings import Finding, inconsistent
from schemas.manifest import MANIFEST_FILE, Distribution, Manifest
from schemas.tables import STATUS_NOT_SAMPLED, STATUS_PACKED, STATUS_REJECTED

MODALITIES = ("text", "image", "video", "image+video")
"""Modality of a sample by index: 1 if it has images, plus 2 if it has videos."""

_MEAN_TOLERANCE = 1e-9
_STATUSES = {"num_packed": STATUS_PACKED, "num_rejected": STATUS_REJECTED, "num_not_sampled": STATUS_NOT_SAMPLED}


def check_statistics(ledger: pa.Table, manifest: Manifest) -> Iterator[Finding]:
    """Compare the statistics with the ledger."""
    named = [dataset.dataset for dataset in manifest.statistics]
    expected = [dataset.dataset for dataset in manifest.inputs]
    if named != expected:
        yield inconsistent(MANIFEST_FILE, f"statistics are of the datasets {named}; the inputs are {expected}")
        return
    media = [stated.media for stated in manifest.statistics if stated.media is not msgspec.UNSET]
    if media and (total := sum(stated.num_images for stated in media)) != manifest.counts.num_images:
        yield inconsistent(
            MANIFEST_FILE, f"counts.num_images is {manifest.counts.num_images}, the statistics of media have {total}"
        )
    for stated in manifest.statistics:
        where = f"{MANIFEST_FILE}, statistics of {stated.dataset}"
        rows = ledger.filter(pc.equal(ledger.column("dataset"), stated.dataset))
        for name, actual in _counts(rows).items():
            if (value := getattr(stated, name)) != actual:
                yield inconsistent(where, f"{name} is {value}, samples.parquet has {actual}")
        packed = rows.filter(pc.equal(rows.column("status"), STATUS_PACKED))
        for name in ("tokens", "targets", "patches"):
            column = packed.column(f"num_{name}")
            if not column.null_count:
                yield from _check_distribution(where, name, getattr(stated, name), column.to_numpy())


def check_modalities(manifest: Manifest, counted: Mapping[tuple[str, str], int]) -> Iterator[Finding]:
    """Compare the modalities with the bins.

    Args:
        manifest: manifest of the set.
        counted: samples in the bins by dataset and modality.
    """
    for stated in manifest.statistics:
        actual = {kind: count for kind in sorted(MODALITIES) if (count := counted.get((stated.dataset, kind), 0))}
        if actual != stated.modalities:
            yield inconsistent(
                f"{MANIFEST_FILE}, statistics of {stated.dataset}",
                f"modalities are {stated.modalities}, the bins hold {actual}",
            )


def _counts(rows: pa.Table) -> dict[str, object]:
    status = rows.column("status")
    counts = {name: int(pc.equal(status, value).to_numpy().sum()) for name, value in _STATUSES.items()}
    codes = Counter(pc.list_flatten(rows.column("codes")).to_pylist())
    return {"num_annotations": len(rows), **counts, "rejects_by_code": dict(codes)}


def _check_distribution(
    where: str, name: str, stated: Distribution | None, values: NDArray[np.int32]
) -> Iterator[Finding]:
    actual = distribution(values)
    if stated is None or actual is None:
        if stated is not actual:
            yield inconsistent(where, f"{name} is {stated}, samples.parquet has {actual}")
        return
    for field, expected in msgspec.structs.asdict(actual).items():
        value = getattr(stated, field)
        if abs(value - expected) > _MEAN_TOLERANCE * abs(expected):
            yield inconsistent(where, f"{name}.{field} is {value}, samples.parquet has {expected}")


def distribution(values: NDArray[np.int32]) -> Distribution | None:
    """Distribution of (n,) int32. Percentile p is the value of rank ``ceil(p / 100 * n)`` of the sorted values."""
    if not values.size:
        return None
    ordered = np.sort(values).tolist()
    total = sum(ordered)

    def percentile(percent: int) -> int:
        return int(ordered[-(-percent * len(ordered) // 100) - 1])

    return Distribution(
        total=total,
        mean=total / len(ordered),
        min=ordered[0],
        p50=percentile(50),
        p90=percentile(90),
        p99=percentile(99),
        max=ordered[-1],
    )


def modality(num_images: int, num_videos: int) -> str:
    """Modality of a sample."""
    return MODALITIES[(num_images > 0) + 2 * (num_videos > 0)]
