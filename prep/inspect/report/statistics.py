"""The numbers of a report.

Input: a set of shards. Output: :class:`Statistics`. Cost: one pass over the ledger and the table of bins, and a few
numbers of memory per row of the ledger.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from schemas.tables import SAMPLES_COLUMNS, SAMPLES_FILE, STATUS_NOT_SAMPLED, STATUS_PACKED, STATUS_REJECTED
from storage.shard_set import ShardSet
from storage.tables import read_table

MODALITIES = ("text only", "images", "video")
"""Kinds of samples. A ``video`` sample may have images too."""

_EXAMPLES_PER_CODE = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetNumbers:
    """Counts of one dataset."""

    name: str
    num_annotations: int
    num_packed: int
    num_rejected: int
    num_not_sampled: int
    num_tokens: int
    num_targets: int
    num_patches: int


@dataclass(frozen=True, slots=True)
class Example:
    """One rejected annotation."""

    file: str
    line: int
    id: str | None
    message: str


@dataclass(frozen=True, slots=True)
class RejectNumbers:
    """Annotations with one reason code: their count, and the first examples."""

    code: str
    num_rejected: int
    examples: tuple[Example, ...]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Statistics:
    """Everything that a report counts.

    Attributes:
        datasets: datasets in the order of the build.
        rejects: rejects by code, most frequent first.
        num_tokens: (n,) int64 tokens of every packed sample, by modality.
        num_targets: (n,) int64 targets of every packed sample, by modality.
        fill: (B,) float64 share of the token budget that each bin uses.
        samples_of_bin: (B,) int64 samples in each bin.
        targets_of_bin: (B,) int64 targets in each bin.
        patches_of_bin: (B,) int64 vision patches in each bin.
    """

    datasets: tuple[DatasetNumbers, ...]
    rejects: tuple[RejectNumbers, ...]
    num_tokens: dict[str, NDArray[np.int64]]
    num_targets: dict[str, NDArray[np.int64]]
    fill: NDArray[np.float64]
    samples_of_bin: NDArray[np.int64]
    targets_of_bin: NDArray[np.int64]
    patches_of_bin: NDArray[np.int64]


def gather(shards: ShardSet) -> Statistics:
    """Compute the numbers of a report.

    Raises:
        ShardError: the ledger is missing or damaged.
    """
    path = shards.folder / SAMPLES_FILE
    names = ["dataset", "status", "num_tokens", "num_targets", "num_patches", "video_backend"]
    ledger = read_table(path, SAMPLES_COLUMNS, names=names)
    rejected = read_table(
        path,
        SAMPLES_COLUMNS,
        names=["file", "line", "id", "codes", "message"],
        filters=[("status", "=", STATUS_REJECTED)],
    )
    packed = ledger.filter(pc.equal(ledger.column("status"), STATUS_PACKED))
    modality = _modality(packed)
    tokens, targets = _numbers(packed, "num_tokens"), _numbers(packed, "num_targets")
    datasets = [dataset.dataset for dataset in shards.manifest.inputs]
    return Statistics(
        datasets=tuple(_dataset(name, ledger, packed) for name in datasets),
        rejects=_rejects(rejected),
        num_tokens={name: tokens[modality == kind] for kind, name in enumerate(MODALITIES)},
        num_targets={name: targets[modality == kind] for kind, name in enumerate(MODALITIES)},
        fill=_numbers(shards.bins, "num_tokens") / shards.manifest.settings.max_length,
        samples_of_bin=_numbers(shards.bins, "num_samples"),
        targets_of_bin=_numbers(shards.bins, "num_targets"),
        patches_of_bin=_numbers(shards.bins, "num_patches"),
    )


def notable_bins(shards: ShardSet, max_bins: int) -> list[tuple[int, str]]:
    """Choose example bins with a reason: most videos, most images, most samples, then the first bins in order."""
    numbers = _numbers(shards.bins, "bin")
    chosen: dict[int, str] = {}
    for column, reason in (
        ("num_videos", "the most videos"),
        ("num_images", "the most images"),
        ("num_samples", "the most samples"),
    ):
        values = _numbers(shards.bins, column)
        if values.size and values.max() > 0:
            chosen.setdefault(int(numbers[np.argmax(values)]), reason)
    for bin_id in numbers[:max_bins].tolist():
        chosen.setdefault(bin_id, "in order")
    return list(chosen.items())[:max_bins]


def _numbers(table: pa.Table, column: str) -> NDArray[np.int64]:
    values: NDArray[np.int64] = table.column(column).to_numpy().astype(np.int64)
    return values


def _modality(packed: pa.Table) -> NDArray[np.int64]:
    """Index into :data:`MODALITIES` of every packed sample."""
    has_video = pc.is_valid(packed.column("video_backend")).to_numpy()
    return np.where(has_video, 2, np.where(_numbers(packed, "num_patches") > 0, 1, 0))


def _dataset(name: str, ledger: pa.Table, packed: pa.Table) -> DatasetNumbers:
    own = ledger.filter(pc.equal(ledger.column("dataset"), name))
    own_packed = packed.filter(pc.equal(packed.column("dataset"), name))
    status = own.column("status")

    def total(column: str) -> int:
        return int(_numbers(own_packed, column).sum())

    return DatasetNumbers(
        name=name,
        num_annotations=len(own),
        num_packed=len(own_packed),
        num_rejected=int(pc.equal(status, STATUS_REJECTED).to_numpy().sum()),
        num_not_sampled=int(pc.equal(status, STATUS_NOT_SAMPLED).to_numpy().sum()),
        num_tokens=total("num_tokens"),
        num_targets=total("num_targets"),
        num_patches=total("num_patches"),
    )


def _rejects(rejected: pa.Table) -> tuple[RejectNumbers, ...]:
    codes = rejected.column("codes").combine_chunks()
    # One entry per code of a row: the row, and the code.
    row_of, flat = pc.list_parent_indices(codes).to_numpy(), pc.list_flatten(codes)
    rejects = []
    for code in pc.unique(flat).to_pylist():
        rows = row_of[pc.equal(flat, code).to_numpy(zero_copy_only=False)]
        rejects.append(RejectNumbers(code, len(rows), _examples(rejected, rows.tolist())))
    return tuple(sorted(rejects, key=lambda reject: (-reject.num_rejected, reject.code)))


def _examples(rejected: pa.Table, rows: Sequence[int]) -> tuple[Example, ...]:
    """The first annotations among ``rows``. An annotation that is drawn more than once counts once."""
    columns = ("file", "line", "id", "message")
    examples: dict[Example, None] = {}
    for row in rows:
        examples.setdefault(Example(*(rejected.column(name)[row].as_py() for name in columns)))
        if len(examples) == _EXAMPLES_PER_CODE:
            break
    return tuple(examples)
