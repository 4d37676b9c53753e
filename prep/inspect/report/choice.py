"""Which samples a report shows: of every dataset and modality a few that differ, or those that the reader names.

Input: the ledger. Output: a list of :class:`Choice` in the order of the page. The choice is a function of the ledger
alone, so equal sets have equal pages. Cost: one pass over the ledger, and a sort of each group.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from prep.inspect.report.statistics import MODALITIES, modality_of, numbers
from schemas.errors import ConfigError
from schemas.seeds import seed_for
from storage.shard_set import ShardSet, read_packed

PER_GROUP = 4
_COLUMNS = ["dataset", "record", "bin", "slot", "num_tokens", "num_targets", "num_patches", "video_backend"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """A sample to show.

    Attributes:
        dataset: its dataset.
        modality: one of :data:`MODALITIES`.
        record: index of its annotation in the dataset.
        bin: its bin.
        slot: its index in the bin.
        reason: why it is shown.
    """

    dataset: str
    modality: str
    record: int
    bin: int
    slot: int
    reason: str


def choose_samples(shards: ShardSet, *, bins: Sequence[int] = (), samples: Sequence[str] = ()) -> list[Choice]:
    """Choose the samples of a report.

    Args:
        shards: the set.
        bins: bins to show completely.
        samples: samples to show, as ``dataset:record``. Without these and ``bins``, every dataset and modality shows
            its median, its longest and its most visual sample, and one or more at random.

    Raises:
        ConfigError: the set has no such bin or sample.
        ShardError: the ledger is missing or damaged.
    """
    filters = [("bin", "in", list(bins))] if bins and not samples else []
    table = read_packed(shards.folder, names=_COLUMNS, filters=filters)
    modality = modality_of(table)
    if not bins and not samples:
        datasets = [source.dataset for source in shards.manifest.inputs]
        rows = [pair for dataset in datasets for pair in _of_dataset(table, modality, dataset)]
    else:
        rows = [(_row_of(shards, table, name), "chosen") for name in samples]
        for bin_id in bins:
            shards.row(bin_id)
            inside = _rows_where(table, "bin", bin_id)
            inside.sort(key=numbers(table, "slot").__getitem__)
            rows += [(row, f"bin {bin_id}") for row in inside]
        rows = list({row: (row, reason) for row, reason in reversed(rows)}.values())[::-1]
    return [_choice(table, modality, row, reason) for row, reason in rows]


def fitting(choices: Sequence[Choice], max_samples: int) -> list[Choice]:
    """As many of the choices as fit, in their order. Every dataset and modality gives up its last ones first."""
    num_before: Counter[tuple[str, str]] = Counter()
    ranks = []
    for choice in choices:
        group = choice.dataset, choice.modality
        ranks.append(num_before[group])
        num_before[group] += 1
    kept = sorted(range(len(choices)), key=ranks.__getitem__)[:max_samples]
    return [choices[index] for index in sorted(kept)]


def _of_dataset(table: pa.Table, modality: NDArray[np.int64], dataset: str) -> list[tuple[int, str]]:
    """Rows of a dataset to show, with the reason, by modality."""
    rows = np.flatnonzero(pc.equal(table.column("dataset"), dataset).to_numpy())
    # Of an annotation that was drawn several times, only the first row.
    rows = rows[np.unique(numbers(table, "record")[rows], return_index=True)[1]]
    chosen: list[tuple[int, str]] = []
    # Images and videos first: a page begins with them.
    for kind in (1, 2, 0):
        own = rows[modality[rows] == kind]
        if own.size:
            chosen += _of_group(table, own, seed=seed_for(0, "report", dataset, MODALITIES[kind]))
    return chosen


def _of_group(table: pa.Table, rows: NDArray[np.int64], *, seed: int) -> list[tuple[int, str]]:
    tokens, patches, targets = (numbers(table, name)[rows] for name in ("num_tokens", "num_patches", "num_targets"))
    by_length = rows[np.argsort(tokens, kind="stable")]
    visual = (patches, "most visual") if patches.any() else (targets, "most trained tokens")
    picks = [
        (int(by_length[(rows.size - 1) // 2]), "median length"),
        (int(by_length[-1]), "longest"),
        (int(rows[np.argmax(visual[0])]), visual[1]),
    ]
    rng = np.random.default_rng(seed)
    # Three of these at most are chosen already.
    drawn = rng.choice(rows, size=min(rows.size, 2 * PER_GROUP), replace=False).tolist()
    reasons: dict[int, str] = {}
    for row, reason in picks:
        reasons[row] = f"{reasons[row]}, {reason}" if row in reasons else reason
    for row in drawn:
        if len(reasons) < PER_GROUP:
            reasons.setdefault(row, "random")
    return list(reasons.items())


def _row_of(shards: ShardSet, table: pa.Table, name: str) -> int:
    """The row of a sample that is written ``dataset:record``."""
    dataset, _, record = name.rpartition(":")
    if not dataset or not record.isdecimal() or not record.isascii():
        raise ConfigError(
            f"--sample {name} is not dataset:record, such as {shards.manifest.inputs[0].dataset}:0. The record counts "
            "from 0; `vlprep show` prints it."
        )
    rows = [row for row in _rows_where(table, "record", int(record)) if table.column("dataset")[row].as_py() == dataset]
    if not rows:
        names = ", ".join(source.dataset for source in shards.manifest.inputs)
        raise ConfigError(
            f"--sample {name}: {shards.folder} has no packed sample of record {record} of dataset {dataset!r}. "
            f"Its datasets: {names}."
        )
    return rows[0]


def _rows_where(table: pa.Table, column: str, value: int) -> list[int]:
    rows: list[int] = np.flatnonzero(numbers(table, column) == value).tolist()
    return rows


def _choice(table: pa.Table, modality: NDArray[np.int64], row: int, reason: str) -> Choice:
    return Choice(
        dataset=table.column("dataset")[row].as_py(),
        modality=MODALITIES[modality[row]],
        reason=reason,
        **{name: int(table.column(name)[row].as_py()) for name in ("record", "bin", "slot")},
    )
