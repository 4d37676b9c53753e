"""Checks the manifest, ``bins.parquet`` and the ledger against each other, without opening a shard.

Input: the manifest and tables that could be read. Output: findings. Vectorised; the ledger takes about 100 bytes of
memory a row besides its texts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from prep.inspect.verify.findings import Finding, inconsistent
from schemas.annotation import ReasonCode
from schemas.bins import shard_name
from schemas.manifest import MANIFEST_FILE, InputDataset, Manifest
from schemas.tables import (
    BINS_COLUMNS,
    BINS_FILE,
    SAMPLES_FILE,
    STATUS_NOT_SAMPLED,
    STATUS_PACKED,
    STATUS_REJECTED,
)

_CODES = {code.value for code in ReasonCode}
_SIZES = ("num_tokens", "num_targets", "num_patches")
_ALWAYS = ("dataset", "file", "line", "record", "status", "codes")
_EXAMPLES = 3
_RATE_TOLERANCE = 1e-6
"""The exact share is a fraction, which the manifest rounds to a float."""


def check_manifest(manifest: Manifest) -> Iterator[Finding]:
    """Rules that the manifest alone must keep."""
    counts = manifest.counts
    if not counts.balances():
        yield inconsistent(
            MANIFEST_FILE,
            f"the balance is broken: {counts.num_annotations} annotations, {counts.num_packed} packed + "
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
            f"{counts.num_packed} packed + {counts.num_rejected} rejected are not the {drawn} annotations drawn",
        )
    for dataset in manifest.inputs:
        cut = dataset.rate * _num_annotations(dataset) - dataset.num_drawn
        if not -_RATE_TOLERANCE <= cut < 1 + _RATE_TOLERANCE:
            yield inconsistent(
                MANIFEST_FILE,
                f"dataset {dataset.dataset} draws {dataset.num_drawn} of {_num_annotations(dataset)} annotations, its "
                f"rate is {dataset.rate}",
            )
    for code in sorted(counts.rejects_by_code.keys() - _CODES):
        yield inconsistent(MANIFEST_FILE, f"rejects_by_code has the unknown code {code!r}")
    tables = [table.file for table in manifest.tables]
    if tables != [BINS_FILE, SAMPLES_FILE]:
        yield inconsistent(MANIFEST_FILE, f"tables are {tables}; expected {[BINS_FILE, SAMPLES_FILE]}")
    names = [shard.file for shard in manifest.shards]
    numbers = shard_numbers(manifest)
    if len(numbers) != len(names) or list(numbers) != sorted(numbers):
        yield inconsistent(MANIFEST_FILE, f"shards are {names[:8]}; expected ascending names such as {shard_name(0)}")
    if (held := sum(shard.num_bins for shard in manifest.shards)) != counts.num_bins:
        yield inconsistent(MANIFEST_FILE, f"counts.num_bins is {counts.num_bins}, the shards hold {held}")


def shard_numbers(manifest: Manifest) -> dict[int, int]:
    """Place in the manifest of every shard, by the number in its name; misnamed shards are left out."""
    numbers = {}
    for place, shard in enumerate(manifest.shards):
        digits = shard.file.removeprefix("bins-").removesuffix(".tar")
        if digits.isascii() and digits.isdigit() and shard.file == shard_name(int(digits)):
            numbers[int(digits)] = place
    return numbers


def check_bins_table(bins: pa.Table, manifest: Manifest) -> Iterator[Finding]:
    """``bins.parquet`` against the manifest."""
    nulls = [name for name in BINS_COLUMNS if bins.column(name).null_count]
    if nulls:
        yield inconsistent(BINS_FILE, f"columns {', '.join(nulls)} have nulls")
        return
    columns = {name: bins.column(name).to_numpy() for name in BINS_COLUMNS}
    numbers, shards = columns["bin"], columns["shard"]
    yield from _rows(BINS_FILE, np.flatnonzero(np.diff(numbers, prepend=-1) <= 0), "bin does not ascend")
    yield from _rows(BINS_FILE, np.flatnonzero(np.diff(shards, prepend=0) < 0), "shard does not ascend")
    known = shard_numbers(manifest)
    yield from _rows(BINS_FILE, np.flatnonzero(~np.isin(shards, list(known))), "the manifest has no such shard")
    for number, place in known.items():
        stored = manifest.shards[place]
        held = numbers[shards == number]
        if held.size != stored.num_bins or (held.size and held[0] != stored.first_bin):
            found = f"{held.size} bins" + (f" from bin {held[0]} on" if held.size else "")
            yield inconsistent(
                f"{BINS_FILE}, {stored.file}",
                f"the table has {found}, the manifest {stored.num_bins} bins from bin {stored.first_bin} on",
            )
    for name in ("num_tokens", "num_targets", "num_samples", "num_bytes"):
        yield from _rows(BINS_FILE, np.flatnonzero(columns[name] <= 0), f"{name} is not above 0")
    said = {
        "num_bins": manifest.counts.num_bins,
        "num_samples": manifest.counts.num_packed,
        "num_tokens": manifest.counts.num_tokens,
        "num_targets": manifest.counts.num_targets,
        "num_patches": manifest.counts.num_patches,
        "num_images": manifest.counts.num_images,
        "num_videos": manifest.counts.num_videos,
    }
    counted = {name: int(columns[name].sum(dtype=np.int64)) for name in said if name in columns}
    counted["num_bins"] = len(bins)
    for name, number in said.items():
        if counted[name] != number:
            named = "num_packed" if name == "num_samples" else name
            yield inconsistent(BINS_FILE, f"it adds up to {name} {counted[name]}, the manifest says {named} {number}")


def check_ledger(ledger: pa.Table, manifest: Manifest, bins: pa.Table | None) -> Iterator[Finding]:
    """``samples.parquet`` against the manifest, and against ``bins.parquet`` where that can be read."""
    nulls = [name for name in _ALWAYS if ledger.column(name).null_count]
    if nulls:
        yield inconsistent(SAMPLES_FILE, f"columns {', '.join(nulls)} have nulls")
        return
    status = ledger.column("status")
    packed, rejected, not_sampled = (
        pc.equal(status, name).to_numpy() for name in (STATUS_PACKED, STATUS_REJECTED, STATUS_NOT_SAMPLED)
    )
    unknown = np.flatnonzero(~(packed | rejected | not_sampled))
    yield from _rows(SAMPLES_FILE, unknown, "the status is none of packed, rejected, not_sampled")
    yield from _statuses(ledger, packed, rejected)
    yield from _totals(ledger, manifest, packed, rejected, not_sampled)
    names = [dataset.dataset for dataset in manifest.inputs]
    place = pc.fill_null(pc.index_in(ledger.column("dataset"), value_set=pa.array(names, pa.string())), -1).to_numpy()
    yield from _rows(SAMPLES_FILE, np.flatnonzero(place < 0), "the manifest has no such dataset")
    yield from _rows(SAMPLES_FILE, np.flatnonzero(np.diff(place, prepend=0) < 0), "it stands after a later dataset")
    for number, dataset in enumerate(manifest.inputs):
        rows = np.flatnonzero(place == number)
        yield from _dataset(ledger.take(rows), rows, dataset, not_sampled[rows])
    if bins is not None:
        yield from _packed(ledger.filter(packed), bins)


def _statuses(ledger: pa.Table, packed: NDArray[np.bool_], rejected: NDArray[np.bool_]) -> Iterator[Finding]:
    """What must be there, and what not, for each status."""
    num_codes = pc.list_value_length(ledger.column("codes")).to_numpy()
    yield from _rows(SAMPLES_FILE, np.flatnonzero(rejected != (num_codes > 0)), "codes go with status rejected alone")
    has_message = pc.is_valid(ledger.column("message")).to_numpy()
    yield from _rows(SAMPLES_FILE, np.flatnonzero(rejected != has_message), "a message goes with status rejected alone")
    for name in ("bin", "slot"):
        given = pc.is_valid(ledger.column(name)).to_numpy()
        yield from _rows(SAMPLES_FILE, np.flatnonzero(packed != given), f"{name} goes with status packed alone")
    for name in _SIZES:
        given = pc.is_valid(ledger.column(name)).to_numpy()
        yield from _rows(SAMPLES_FILE, np.flatnonzero(packed & ~given), f"{name} of a packed sample is null")
        below = pc.fill_null(pc.less(ledger.column(name), 0), False).to_numpy()
        yield from _rows(SAMPLES_FILE, np.flatnonzero(below), f"{name} is below 0")


def _totals(
    ledger: pa.Table,
    manifest: Manifest,
    packed: NDArray[np.bool_],
    rejected: NDArray[np.bool_],
    not_sampled: NDArray[np.bool_],
) -> Iterator[Finding]:
    counted = {
        "num_annotations": len(ledger),
        "num_packed": int(packed.sum()),
        "num_rejected": int(rejected.sum()),
        "num_not_sampled": int(not_sampled.sum()),
    }
    for name, number in counted.items():
        if (said := getattr(manifest.counts, name)) != number:
            yield inconsistent(SAMPLES_FILE, f"it has {name} {number}, the manifest says {said}")
    codes = Counter(pc.list_flatten(ledger.column("codes")).to_pylist())
    for code in sorted(codes.keys() | manifest.counts.rejects_by_code.keys()):
        if code not in _CODES:
            yield inconsistent(SAMPLES_FILE, f"the code {code!r} is unknown")
        if codes[code] != (said := manifest.counts.rejects_by_code.get(code, 0)):
            yield inconsistent(SAMPLES_FILE, f"{codes[code]} annotations are {code}, the manifest says {said}")


def _dataset(
    rows: pa.Table, numbers: NDArray[np.int64], dataset: InputDataset, not_sampled: NDArray[np.bool_]
) -> Iterator[Finding]:
    """Every annotation of a dataset is there, as often as it was drawn, with its file and line.

    Args:
        rows: of the ledger.
        numbers: where they stand in it.
        dataset: what the manifest says.
        not_sampled: of these rows.
    """
    where = f"{SAMPLES_FILE}, dataset {dataset.dataset}"
    total = _num_annotations(dataset)
    records, lines = rows.column("record").to_numpy(), rows.column("line").to_numpy()
    if total > len(rows):
        yield inconsistent(where, f"it has {len(rows)} rows for {total} annotations; each has at least one")
        return
    outside = np.flatnonzero((records < 0) | (records >= total))
    if outside.size:
        yield from _rows(where, numbers[outside], f"record is outside 0 to {total - 1}")
        return
    yield from _rows(where, numbers[np.flatnonzero(np.diff(records, prepend=0) < 0)], "record does not ascend")
    copies = np.bincount(records, minlength=total)
    taken = copies - np.bincount(records[not_sampled], minlength=total)
    absent = np.flatnonzero(copies == 0)
    if absent.size:
        yield inconsistent(where, f"{absent.size} annotations are missing, the first is record {absent[0]}")
    most, least = -(-dataset.num_drawn // total) if total else 0, dataset.num_drawn // total if total else 0
    uneven = np.flatnonzero((taken < least) | (taken > most) | (copies != np.maximum(taken, 1)))
    if int(taken.sum()) != dataset.num_drawn or uneven.size:
        first = f"; record {uneven[0]} stands {copies[uneven[0]]} times" if uneven.size else ""
        yield inconsistent(
            where, f"{taken.sum()} of {total} annotations are taken, the manifest says {dataset.num_drawn}{first}"
        )
    of_record = np.repeat(np.arange(len(dataset.files)), [file.num_annotations for file in dataset.files])
    expected = pa.array([file.file for file in dataset.files], pa.string()).take(pa.array(of_record[records]))
    other = np.flatnonzero(pc.not_equal(rows.column("file"), expected).to_numpy())
    yield from _rows(where, numbers[other], "the file is not the one that the manifest has this record in")
    same_file = np.diff(of_record[records], prepend=-1) == 0
    yield from _rows(where, numbers[np.flatnonzero(lines < 1)], "line is below 1")
    yield from _rows(
        where, numbers[np.flatnonzero(same_file & (np.diff(lines, prepend=1) < 0))], "line goes back within a file"
    )


def _packed(packed: pa.Table, bins: pa.Table) -> Iterator[Finding]:
    """The packed samples of the ledger fill the bins, slot by slot."""
    if any(packed.column(name).null_count for name in ("bin", "slot", *_SIZES)):
        return
    place, slot = packed.column("bin").to_numpy(), packed.column("slot").to_numpy()
    order = np.lexsort((slot, place))
    place, slot = place[order], slot[order]
    numbers = bins.column("bin").to_numpy()
    held, first, size = np.unique(place, return_index=True, return_counts=True)
    for number in np.setxor1d(held, numbers)[:_EXAMPLES].tolist():
        table, other = (SAMPLES_FILE, BINS_FILE) if number in held else (BINS_FILE, SAMPLES_FILE)
        yield inconsistent(f"{table}, bin {number}", f"{other} does not have this bin")
    ramp = np.arange(place.size) - np.repeat(first, size)
    for number in np.unique(place[slot != ramp])[:_EXAMPLES].tolist():
        yield inconsistent(f"{SAMPLES_FILE}, bin {number}", "its slots do not run from 0 without gap or repetition")
    both, at, row = np.intersect1d(held, numbers, assume_unique=False, return_indices=True)
    sums = {"num_samples": size}
    for name in _SIZES:
        values = packed.column(name).to_numpy()[order].astype(np.int64)
        sums[name] = np.add.reduceat(values, first) if values.size else values
    for name, counted in sums.items():
        said = bins.column(name).to_numpy()
        wrong = np.flatnonzero(counted[at] != said[row])
        for place_of in wrong[:_EXAMPLES].tolist():
            yield inconsistent(
                f"{SAMPLES_FILE}, bin {both[place_of]}",
                f"its samples add up to {name} {counted[at][place_of]}, bins.parquet says {said[row][place_of]}",
            )


def _num_annotations(dataset: InputDataset) -> int:
    return sum(file.num_annotations for file in dataset.files)


def _rows(table: str, rows: NDArray[np.int64], message: str) -> Iterator[Finding]:
    """One finding for all rows that break a rule."""
    if rows.size:
        more = f" ({rows.size} rows in all)" if rows.size > 1 else ""
        yield inconsistent(f"{table}, row {rows[0]}", f"{message}{more}")
