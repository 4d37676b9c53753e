"""The numbers of a report.

Input: a set of shards. Output: :class:`Statistics`. Cost: one pass over the ledger and the table of bins, and a few
numbers of memory per row of the ledger.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from schemas.tables import SAMPLES_FILE, STATUS_NOT_SAMPLED, STATUS_PACKED, STATUS_REJECTED, LedgerRow
from storage.shard_set import ShardSet, read_ledger, read_rejected
from storage.tables import check_columns

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

    dataset: str
    file: str
    line: int
    record: int
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
        attention_of_bin: (B,) int64 sum of the squared lengths of the samples in each bin.
    """

    datasets: tuple[DatasetNumbers, ...]
    rejects: tuple[RejectNumbers, ...]
    num_tokens: dict[str, NDArray[np.int64]]
    num_targets: dict[str, NDArray[np.int64]]
    fill: NDArray[np.float64]
    samples_of_bin: NDArray[np.int64]
    targets_of_bin: NDArray[np.int64]
    patches_of_bin: NDArray[np.int64]
    attention_of_bin: NDArray[np.int64]


def gather(shards: ShardSet) -> Statistics:
    """Compute the numbers of a report.

    Raises:
        ShardError: the ledger is missing or damaged.
    """
    names = ["dataset", "status", "num_tokens", "num_targets", "num_patches", "video_backend"]
    ledger = read_ledger(shards.folder, names=names)
    rejected = read_rejected(shards.folder, names=[*(field.name for field in fields(Example)), "codes"])
    packed = ledger.filter(pc.equal(ledger.column("status"), STATUS_PACKED))
    check_columns(packed, LedgerRow, shards.folder / SAMPLES_FILE)
    modality = modality_of(packed)
    tokens, targets = numbers(packed, "num_tokens"), numbers(packed, "num_targets")
    datasets = [dataset.dataset for dataset in shards.manifest.inputs]
    return Statistics(
        datasets=tuple(_dataset(name, ledger, packed) for name in datasets),
        rejects=_rejects(rejected),
        num_tokens={name: tokens[modality == kind] for kind, name in enumerate(MODALITIES)},
        num_targets={name: targets[modality == kind] for kind, name in enumerate(MODALITIES)},
        fill=numbers(shards.bins, "num_tokens") / shards.manifest.settings.max_length,
        samples_of_bin=numbers(shards.bins, "num_samples"),
        targets_of_bin=numbers(shards.bins, "num_targets"),
        patches_of_bin=numbers(shards.bins, "num_patches"),
        attention_of_bin=numbers(shards.bins, "sum_squared_lengths"),
    )


def busy_share(values: NDArray[np.int64], ranks: int) -> float:
    """Mean of ``values`` relative to the expected largest of ``ranks`` of them, drawn at random: the share of the time
    for which a rank computes if every rank takes a random bin and all wait for the slowest.
    """
    if not values.size or not values.max():
        return 1.0
    ordered = np.sort(values).astype(np.float64)
    # Probability that the largest of the draws is at most the i-th value: (i / n) ** ranks.
    at_most = (np.arange(ordered.size + 1) / ordered.size) ** ranks
    return float(ordered.mean() / (ordered * np.diff(at_most)).sum())


def numbers(table: pa.Table, column: str) -> NDArray[np.int64]:
    """A column of integers."""
    values: NDArray[np.int64] = table.column(column).to_numpy().astype(np.int64)
    return values


def modality_of(packed: pa.Table) -> NDArray[np.int64]:
    """Index into :data:`MODALITIES` of every packed sample."""
    has_video = pc.is_valid(packed.column("video_backend")).to_numpy()
    return np.where(has_video, 2, np.where(numbers(packed, "num_patches") > 0, 1, 0))


def _dataset(name: str, ledger: pa.Table, packed: pa.Table) -> DatasetNumbers:
    own = ledger.filter(pc.equal(ledger.column("dataset"), name))
    own_packed = packed.filter(pc.equal(packed.column("dataset"), name))
    status = own.column("status")

    def total(column: str) -> int:
        return int(numbers(own_packed, column).sum())

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
    columns = [rejected.column(field.name) for field in fields(Example)]
    examples: dict[Example, None] = {}
    for row in rows:
        examples.setdefault(Example(*(column[row].as_py() for column in columns)))
        if len(examples) == _EXAMPLES_PER_CODE:
            break
    return tuple(examples)
