"""Checks the manifest, ``bins.parquet`` and the ledger against each other, without opening a shard.

Input: the manifest and the tables that could be read. Output: findings. Cost: vectorised passes. The ledger takes about
100 bytes of memory per row, plus its texts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from prep.inspect.verify.findings import Finding, inconsistent
from schemas.annotation import ReasonCode
from schemas.bins import shard_name
from schemas.manifest import MANIFEST_FILE, InputDataset, Manifest, normalisation_problem
from schemas.tables import (
    BINS_COLUMNS,
    BINS_FILE,
    SAMPLES_FILE,
    STATUS_NOT_SAMPLED,
    STATUS_PACKED,
    STATUS_REJECTED,
    LedgerRow,
)
from schemas.wording import counted
from storage.tables import column_problems

_CODES = {code.value for code in ReasonCode}
_SIZES = ("num_tokens", "num_targets", "num_patches")
_EXAMPLES = 3
_RATE_TOLERANCE = 1e-6
"""The exact rate is a fraction, which the manifest rounds to a float."""


def check_manifest(manifest: Manifest) -> Iterator[Finding]:
    """Check the rules that concern the manifest alone."""
    counts = manifest.counts
    if not counts.balances():
        yield inconsistent(
            MANIFEST_FILE,
            f"the counts do not add up: {counts.num_annotations} annotations, but {counts.num_packed} packed + "
            f"{counts.num_rejected} rejected + {counts.num_not_sampled} not sampled",
        )
    expected = sum(max(_num_annotations(dataset), dataset.num_drawn) for dataset in manifest.inputs)
    if counts.num_annotations != expected:
        yield inconsistent(
            MANIFEST_FILE, f"counts.num_annotations is {counts.num_annotations}, the inputs have {expected}"
        )
    drawn = sum(dataset.num_drawn for dataset in manifest.inputs)
    if counts.num_packed + counts.num_rejected != drawn:
        yield inconsistent(
            MANIFEST_FILE,
            f"{counts.num_packed} packed + {counts.num_rejected} rejected do not make the {drawn} annotations drawn",
        )
    for dataset in manifest.inputs:
        rounded_off = dataset.rate * _num_annotations(dataset) - dataset.num_drawn
        if not -_RATE_TOLERANCE <= rounded_off < 1 + _RATE_TOLERANCE:
            yield inconsistent(
                MANIFEST_FILE,
                f"dataset {dataset.dataset} draws {dataset.num_drawn} of {_num_annotations(dataset)} annotations, but "
                f"its rate is {dataset.rate}",
            )
    if (problem := normalisation_problem(manifest.fingerprints)) is not None:
        yield inconsistent(MANIFEST_FILE, f"the set was {problem}")
    for code in sorted(counts.rejects_by_code.keys() - _CODES):
        yield inconsistent(MANIFEST_FILE, f"rejects_by_code has the unknown code {code!r}")
    tables = [table.file for table in manifest.tables]
    if tables != [BINS_FILE, SAMPLES_FILE]:
        yield inconsistent(MANIFEST_FILE, f"tables are {tables}; expected {[BINS_FILE, SAMPLES_FILE]}")
    names = [shard.file for shard in manifest.shards]
    numbers = shard_numbers(manifest)
    if len(numbers) != len(names) or list(numbers) != sorted(numbers):
        yield inconsistent(MANIFEST_FILE, f"shards are {names[:8]}; expected ascending names such as {shard_name(0)}")
    if (num_bins := sum(shard.num_bins for shard in manifest.shards)) != counts.num_bins:
        yield inconsistent(MANIFEST_FILE, f"counts.num_bins is {counts.num_bins}, the shards hold {num_bins}")


def shard_numbers(manifest: Manifest) -> dict[int, int]:
    """Map the number in a shard's name to its index in the manifest. Misnamed shards are left out."""
    numbers = {}
    for index, shard in enumerate(manifest.shards):
        digits = shard.file.removeprefix("bins-").removesuffix(".tar")
        if digits.isascii() and digits.isdigit() and shard.file == shard_name(int(digits)):
            numbers[int(digits)] = index
    return numbers


def check_bins_table(bins: pa.Table, manifest: Manifest) -> Iterator[Finding]:
    """Compare ``bins.parquet``, whose values are within their bounds, with the manifest."""
    columns = {name: bins.column(name).to_numpy() for name in BINS_COLUMNS}
    numbers, shards = columns["bin"], columns["shard"]
    yield from _rows(BINS_FILE, np.flatnonzero(np.diff(numbers, prepend=-1) <= 0), "bin does not ascend")
    yield from _rows(BINS_FILE, np.flatnonzero(np.diff(shards, prepend=0) < 0), "shard does not ascend")
    known = shard_numbers(manifest)
    yield from _rows(BINS_FILE, np.flatnonzero(~np.isin(shards, list(known))), "the manifest has no such shard")
    by_shard = np.argsort(shards, kind="stable")
    firsts, lasts = (np.searchsorted(shards[by_shard], list(known), side=side).tolist() for side in ("left", "right"))
    for index, first, last in zip(known.values(), firsts, lasts):
        stored, shard_bins = manifest.shards[index], numbers[by_shard[first:last]]
        if shard_bins.size != stored.num_bins or (shard_bins.size and shard_bins[0] != stored.first_bin):
            actual = counted(shard_bins.size, "bin") + (f" from bin {shard_bins[0]} on" if shard_bins.size else "")
            expected = f"{counted(stored.num_bins, 'bin')} from bin {stored.first_bin} on"
            yield inconsistent(f"{BINS_FILE}, {stored.file}", f"the table has {actual}, the manifest says {expected}")
    yield from _check_bin_totals(columns, len(bins), manifest)


def _check_bin_totals(columns: dict[str, NDArray[Any]], num_bins: int, manifest: Manifest) -> Iterator[Finding]:
    stated = {
        "num_bins": manifest.counts.num_bins,
        "num_samples": manifest.counts.num_packed,
        "num_tokens": manifest.counts.num_tokens,
        "num_targets": manifest.counts.num_targets,
        "num_patches": manifest.counts.num_patches,
        "num_images": manifest.counts.num_images,
        "num_videos": manifest.counts.num_videos,
    }
    actual = {name: int(columns[name].sum(dtype=np.int64)) for name in stated if name in columns}
    actual["num_bins"] = num_bins
    for name, count in stated.items():
        if actual[name] != count:
            field = "num_packed" if name == "num_samples" else name
            yield inconsistent(BINS_FILE, f"it adds up to {name} {actual[name]}, the manifest says {field} {count}")


def check_ledger(ledger: pa.Table, manifest: Manifest, bins: pa.Table | None) -> Iterator[Finding]:
    """Compare ``samples.parquet``, whose values are within their bounds, with the manifest and ``bins.parquet``."""
    status = ledger.column("status")
    packed, rejected, not_sampled = (
        pc.equal(status, name).to_numpy() for name in (STATUS_PACKED, STATUS_REJECTED, STATUS_NOT_SAMPLED)
    )
    yield from _check_statuses(ledger, packed, rejected)
    yield from _check_totals(ledger, manifest, packed, rejected, not_sampled)
    names = [dataset.dataset for dataset in manifest.inputs]
    # (rows,): index of the row's dataset in the manifest, or -1.
    index = pc.fill_null(pc.index_in(ledger.column("dataset"), value_set=pa.array(names, pa.string())), -1).to_numpy()
    yield from _rows(SAMPLES_FILE, np.flatnonzero(index < 0), "the manifest has no such dataset")
    yield from _rows(SAMPLES_FILE, np.flatnonzero(np.diff(index, prepend=0) < 0), "it comes after a later dataset")
    for position, dataset in enumerate(manifest.inputs):
        rows = np.flatnonzero(index == position)
        yield from _check_dataset(ledger.filter(index == position), rows, dataset, not_sampled[rows])
    if bins is not None:
        yield from _check_packed(ledger.filter(packed), bins)


def _check_statuses(ledger: pa.Table, packed: NDArray[np.bool_], rejected: NDArray[np.bool_]) -> Iterator[Finding]:
    """Check which columns are set and which are null for each status."""
    has_codes = pc.list_value_length(ledger.column("codes")).to_numpy() > 0
    is_set = {name: pc.is_valid(ledger.column(name)).to_numpy() for name in ("message", "bin", "slot")}
    for name, status, of_status, actual in (
        ("codes", STATUS_REJECTED, rejected, has_codes),
        ("message", STATUS_REJECTED, rejected, is_set["message"]),
        ("bin", STATUS_PACKED, packed, is_set["bin"]),
        ("slot", STATUS_PACKED, packed, is_set["slot"]),
    ):
        wrong = np.flatnonzero(of_status != actual)
        yield from _rows(SAMPLES_FILE, wrong, f"{name} must be set for status {status}, and only then")
    numbers = np.flatnonzero(packed)
    for at, problem in column_problems(ledger.filter(packed).select(_SIZES), LedgerRow):
        yield from _rows(SAMPLES_FILE, numbers[at : at + 1], f"{problem}, for a packed sample")


def _check_totals(
    ledger: pa.Table,
    manifest: Manifest,
    packed: NDArray[np.bool_],
    rejected: NDArray[np.bool_],
    not_sampled: NDArray[np.bool_],
) -> Iterator[Finding]:
    actual = {
        "num_annotations": len(ledger),
        "num_packed": int(packed.sum()),
        "num_rejected": int(rejected.sum()),
        "num_not_sampled": int(not_sampled.sum()),
    }
    for name, count in actual.items():
        if (stated := getattr(manifest.counts, name)) != count:
            yield inconsistent(SAMPLES_FILE, f"it has {name} {count}, the manifest says {stated}")
    codes = Counter(pc.list_flatten(ledger.column("codes")).to_pylist())
    for code in sorted(codes.keys() | manifest.counts.rejects_by_code.keys()):
        if code not in _CODES:
            yield inconsistent(SAMPLES_FILE, f"the code {code!r} is unknown")
        if codes[code] != (stated := manifest.counts.rejects_by_code.get(code, 0)):
            yield inconsistent(
                SAMPLES_FILE, f"it has code {code} in {counted(codes[code], 'row')}, the manifest says {stated}"
            )


def _check_dataset(
    rows: pa.Table, numbers: NDArray[np.int64], dataset: InputDataset, not_sampled: NDArray[np.bool_]
) -> Iterator[Finding]:
    """Check that every annotation of a dataset has its rows, with the right file and line.

    Args:
        rows: rows of the dataset in the ledger.
        numbers: their row numbers in the ledger.
        dataset: entry of the dataset in the manifest.
        not_sampled: whether a row has status ``not_sampled``.
    """
    where = f"{SAMPLES_FILE}, dataset {dataset.dataset}"
    total = _num_annotations(dataset)
    records = rows.column("record").to_numpy()
    if total > len(rows):
        yield inconsistent(
            where, f"{counted(len(rows), 'row')} for {counted(total, 'annotation')}; each needs at least one"
        )
        return
    outside = np.flatnonzero((records < 0) | (records >= total))
    if outside.size:
        yield from _rows(where, numbers[outside], f"record is outside 0 to {total - 1}")
        return
    yield from _rows(where, numbers[np.flatnonzero(np.diff(records, prepend=0) < 0)], "record does not ascend")
    yield from _check_draws(where, records, dataset, not_sampled)
    yield from _check_origins(where, rows, numbers, dataset)


def _check_draws(
    where: str, records: NDArray[np.int64], dataset: InputDataset, not_sampled: NDArray[np.bool_]
) -> Iterator[Finding]:
    """Check that the records are drawn as often as the manifest says, and as evenly as possible."""
    total = _num_annotations(dataset)
    # (total,): rows and draws per record. A record that is not drawn has one row.
    num_rows = np.bincount(records, minlength=total)
    num_draws = num_rows - np.bincount(records[not_sampled], minlength=total)
    missing = np.flatnonzero(num_rows == 0)
    if missing.size:
        yield inconsistent(where, f"missing {counted(missing.size, 'annotation')}, the first is record {missing[0]}")
    lowest, highest = (dataset.num_drawn // total, -(-dataset.num_drawn // total)) if total else (0, 0)
    uneven = np.flatnonzero((num_draws < lowest) | (num_draws > highest) | (num_rows != np.maximum(num_draws, 1)))
    if int(num_draws.sum()) != dataset.num_drawn or uneven.size:
        first = f"; record {uneven[0]} has {counted(num_rows[uneven[0]], 'row')}" if uneven.size else ""
        yield inconsistent(
            where, f"{num_draws.sum()} of {total} annotations are drawn, the manifest says {dataset.num_drawn}{first}"
        )


def _check_origins(where: str, rows: pa.Table, numbers: NDArray[np.int64], dataset: InputDataset) -> Iterator[Finding]:
    """Check the file and line of every row."""
    records, lines = rows.column("record").to_numpy(), rows.column("line").to_numpy()
    # (total,): index of the file of every record; files follow one another in the order of the manifest.
    file_of = np.repeat(np.arange(len(dataset.files)), [file.num_annotations for file in dataset.files])
    expected = pa.array([file.file for file in dataset.files], pa.string()).take(pa.array(file_of[records]))
    other = np.flatnonzero(pc.not_equal(rows.column("file"), expected).to_numpy())
    yield from _rows(where, numbers[other], "the manifest says that this record is in another file")
    same_file = np.diff(file_of[records], prepend=-1) == 0
    yield from _rows(
        where, numbers[np.flatnonzero(same_file & (np.diff(lines, prepend=1) < 0))], "line decreases within a file"
    )


def _check_packed(packed: pa.Table, bins: pa.Table) -> Iterator[Finding]:
    """Check that the packed samples of the ledger fill the bins, slot by slot."""
    if any(packed.column(name).null_count for name in ("bin", "slot", *_SIZES)):
        return
    sample_bins, slots = packed.column("bin").to_numpy(), packed.column("slot").to_numpy()
    order = np.lexsort((slots, sample_bins))
    sample_bins, slots = sample_bins[order], slots[order]
    numbers = bins.column("bin").to_numpy()
    # Bins of the ledger: number, first sample in the sorted order, and count of samples.
    ledger_bins, first, num_samples = np.unique(sample_bins, return_index=True, return_counts=True)
    for bin_id in np.setxor1d(ledger_bins, numbers)[:_EXAMPLES].tolist():
        table, other = (SAMPLES_FILE, BINS_FILE) if bin_id in ledger_bins else (BINS_FILE, SAMPLES_FILE)
        yield inconsistent(f"{table}, bin {bin_id}", f"{other} does not have this bin")
    expected_slots = np.arange(sample_bins.size) - np.repeat(first, num_samples)
    for bin_id in np.unique(sample_bins[slots != expected_slots])[:_EXAMPLES].tolist():
        yield inconsistent(f"{SAMPLES_FILE}, bin {bin_id}", "its slots do not run from 0 without gap or repetition")
    common, at, row = np.intersect1d(ledger_bins, numbers, assume_unique=False, return_indices=True)
    sums = {"num_samples": num_samples}
    for name in _SIZES:
        values = packed.column(name).to_numpy()[order].astype(np.int64)
        sums[name] = np.add.reduceat(values, first) if values.size else values
    for name, actual in sums.items():
        stated = bins.column(name).to_numpy()
        wrong = np.flatnonzero(actual[at] != stated[row])
        for index in wrong[:_EXAMPLES].tolist():
            yield inconsistent(
                f"{SAMPLES_FILE}, bin {common[index]}",
                f"its samples add up to {name} {actual[at][index]}, bins.parquet says {stated[row][index]}",
            )


def _num_annotations(dataset: InputDataset) -> int:
    return sum(file.num_annotations for file in dataset.files)


def _rows(table: str, rows: NDArray[np.int64], message: str) -> Iterator[Finding]:
    """One finding for all rows that break a rule."""
    if rows.size:
        more = f" ({rows.size} rows in all)" if rows.size > 1 else ""
        yield inconsistent(f"{table}, row {rows[0]}", f"{message}{more}")
