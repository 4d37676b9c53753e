"""Checks the statistics of every dataset in the manifest, counted again from the ledger and from the bins.

Input: the manifest, the ledger, and what the workers saw in the bins. Output: findings. Cost: a sort of the sizes of
all packed samples.
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
"""What a sample holds besides text: 1 for images, plus 2 for videos."""

_MEAN_TOLERANCE = 1e-9
_STATUSES = {"num_packed": STATUS_PACKED, "num_rejected": STATUS_REJECTED, "num_not_sampled": STATUS_NOT_SAMPLED}


def check_statistics(ledger: pa.Table, manifest: Manifest) -> Iterator[Finding]:
    """The statistics against the ledger."""
    if any(ledger.column(name).null_count for name in ("dataset", "status", "codes")):
        return
    named = [dataset.dataset for dataset in manifest.statistics]
    expected = [dataset.dataset for dataset in manifest.inputs]
    if named != expected:
        yield inconsistent(MANIFEST_FILE, f"statistics are of the datasets {named}; the inputs are {expected}")
        return
    for said in manifest.statistics:
        where = f"{MANIFEST_FILE}, statistics of {said.dataset}"
        rows = ledger.filter(pc.equal(ledger.column("dataset"), said.dataset))
        for name, found in _counted(rows).items():
            if (number := getattr(said, name)) != found:
                yield inconsistent(where, f"{name} is {number}, samples.parquet has {found}")
        packed = rows.filter(pc.equal(rows.column("status"), STATUS_PACKED))
        for name in ("tokens", "targets", "patches"):
            column = packed.column(f"num_{name}")
            if not column.null_count:
                yield from _distribution(where, name, getattr(said, name), column.to_numpy())


def check_modalities(manifest: Manifest, counted: Mapping[tuple[str, str], int]) -> Iterator[Finding]:
    """The modalities against what the bins hold.

    Args:
        manifest: of the set.
        counted: samples in the bins by dataset and modality.
    """
    for said in manifest.statistics:
        found = {kind: number for kind in sorted(MODALITIES) if (number := counted.get((said.dataset, kind), 0))}
        if found != said.modalities:
            yield inconsistent(
                f"{MANIFEST_FILE}, statistics of {said.dataset}",
                f"modalities are {said.modalities}, the bins hold {found}",
            )


def _counted(rows: pa.Table) -> dict[str, object]:
    status = rows.column("status")
    numbers = {name: int(pc.equal(status, value).to_numpy().sum()) for name, value in _STATUSES.items()}
    codes = Counter(pc.list_flatten(rows.column("codes")).to_pylist())
    return {"num_annotations": len(rows), **numbers, "rejects_by_code": dict(codes)}


def _distribution(where: str, name: str, said: Distribution | None, values: NDArray[np.int32]) -> Iterator[Finding]:
    found = distribution(values)
    if said is None or found is None:
        if said is not found:
            yield inconsistent(where, f"{name} is {said}, samples.parquet has {found}")
        return
    for field, expected in msgspec.structs.asdict(found).items():
        number = getattr(said, field)
        if abs(number - expected) > _MEAN_TOLERANCE * abs(expected):
            yield inconsistent(where, f"{name}.{field} is {number}, samples.parquet has {expected}")


def distribution(values: NDArray[np.int32]) -> Distribution | None:
    """Spread of (n,) int32; percentile p is the value of rank ``ceil(p * n)`` of the sorted values."""
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
    """Modality of one sample."""
    return MODALITIES[(num_images > 0) + 2 * (num_videos > 0)]
