"""Checks one shard: its bytes against the manifest, and every bin in it.

Input: a :class:`ShardTask`. Output: a :class:`ShardOutcome`. Cost: the file is read once for its SHA-256 and once more,
from the page cache, bin by bin. Memory holds one bin. A shard behind a URL is downloaded to a temporary file first.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import xxhash

import storage
from prep.inspect.verify.bins import BinCheck
from prep.inspect.verify.findings import Finding, damaged, inconsistent, unreadable
from schemas.bins import ARRAY_MEMBERS, SAMPLES_MEMBER, TAR_BLOCK, Bin, bin_key
from schemas.codecs import PIXELS_MEMBER
from schemas.errors import ShardError
from schemas.manifest import StoredFile, StoredShard
from schemas.settings import BuildSettings
from schemas.tables import BINS_FILE, StoredBin
from schemas.wording import counted
from storage.bins import parse_bin, read_bytes
from storage.files import regular_size
from storage.shard_set import bin_rows, locate, oversized_bin
from storage.urls import Location

_HASH_BYTES = 4 << 20
MAX_EXCESS_BYTES = 64 << 20
"""A file that is so much larger than the manifest allows is not read: a sparse file takes hours and no space."""

_FILE_MODE = 0o644
_NPY_PREFIX = 10
"""Bytes of a ``.npy`` file (version 1.0) before the text of its header: magic, version, length of the text."""
_END_OF_ARCHIVE = bytes(2 * TAR_BLOCK)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ShardTask:
    """One shard to check.

    Attributes:
        folder: the set, a folder or URL.
        stored: the shard's entry in the manifest.
        max_bytes: size of the largest shard in the manifest.
        settings: settings of the build.
        bins: its rows of ``bins.parquet``. None if that table cannot be read; then only the file is checked.
        ledger: rows of ``samples.parquet`` of its samples, sorted by bin and slot. None if it cannot be read.
    """

    folder: Location
    stored: StoredShard
    max_bytes: int
    settings: BuildSettings
    bins: pa.Table | None
    ledger: pa.Table | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardOutcome:
    """The outcome of checking one shard.

    Attributes:
        sha256: hash of the file. None if it cannot be read.
        num_bytes: size of the file.
        num_bins: bins checked.
        num_frames: stored frames in the bins that could be read.
        modalities: samples in these bins, by dataset and modality.
        findings: everything that is wrong.
    """

    sha256: str | None
    num_bytes: int
    num_bins: int
    num_frames: int
    modalities: Counter[tuple[str, str]]
    findings: tuple[Finding, ...]


def check_shard(task: ShardTask) -> ShardOutcome:
    """Check one shard.

    Raises:
        StorageError: the store does not answer.
    """
    path = task.folder / task.stored.file
    try:
        num_bytes = file_size(path)
        if num_bytes > task.max_bytes + MAX_EXCESS_BYTES:
            return _unchecked(damaged(task.stored.file, size_problem(num_bytes, task.stored)))
        if isinstance(path, Path):
            return _check_file(task, path)
        with TemporaryDirectory(prefix="vlprep-") as folder, storage.local_copy(path, Path(folder)) as copy:
            return _check_file(task, copy)
    except storage.NotThereError:
        return _unchecked(_unreadable(task, "No such file or directory"))
    except OSError as error:
        if not isinstance(path, Path):  # the disk of the copy is at fault
            raise
        return _unchecked(_unreadable(task, error.strerror))


def _unreadable(task: ShardTask, reason: str | None) -> Finding:
    return damaged(task.stored.file, f"the shard cannot be read: {reason}")


def _unchecked(finding: Finding) -> ShardOutcome:
    return ShardOutcome(sha256=None, num_bytes=0, num_bins=0, num_frames=0, modalities=Counter(), findings=(finding,))


def _check_file(task: ShardTask, path: Path) -> ShardOutcome:
    num_bytes, sha256 = file_digest(path)
    findings = list(_check_bytes(task.stored, num_bytes, sha256))
    modalities = Counter[tuple[str, str]]()
    num_frames = 0
    rows: list[StoredBin] = []
    if task.bins is not None and len(task.bins) > num_bytes // TAR_BLOCK:
        problem = f"the table has {counted(len(task.bins), 'bin')}, the file only {num_bytes:,} bytes"
        findings.append(inconsistent(f"{BINS_FILE}, {task.stored.file}", problem))
    elif task.bins is not None:
        rows = bin_rows(task.bins)
        findings += _check_layout(task.stored, rows, num_bytes, path)
        for row in rows:
            bin_findings, check = _check_bin(path, row, _samples_of(task.ledger, row.bin), task.settings)
            findings += bin_findings
            if check is not None:
                modalities.update(check.modalities())
                num_frames += check.bin.num_frames
    return ShardOutcome(
        sha256=sha256,
        num_bytes=num_bytes,
        num_bins=len(rows),
        num_frames=num_frames,
        modalities=modalities,
        findings=tuple(findings),
    )


def file_size(path: Location) -> int:
    """Size of a file.

    Raises:
        OSError: the file cannot be read, or is not a regular one.
        NotThereError: the URL does not exist.
    """
    return regular_size(path) if isinstance(path, Path) else storage.stat(path).num_bytes


def size_problem(num_bytes: int, stored: StoredFile) -> str:
    """The clause about a file of another size than the manifest says."""
    return f"the file has {num_bytes:,} bytes, the manifest says {stored.num_bytes:,}"


def file_digest(path: Location) -> tuple[int, str]:
    """Size and SHA-256 of a regular file.

    Raises:
        OSError: the file cannot be read.
        NotThereError: the URL does not exist.
    """
    digest, num_bytes = hashlib.sha256(), 0
    with path.open("rb") if isinstance(path, Path) else storage.open_file(path) as file:
        while block := file.read(_HASH_BYTES):
            digest.update(block)
            num_bytes += len(block)
    return num_bytes, digest.hexdigest()


def _samples_of(ledger: pa.Table | None, bin_id: int) -> pa.Table | None:
    """Rows of a bin in a ledger that is sorted by bin."""
    if ledger is None:
        return None
    first, last = np.searchsorted(ledger.column("bin").to_numpy(), [bin_id, bin_id + 1]).tolist()
    return ledger.slice(first, last - first)


def _check_bytes(stored: StoredShard, num_bytes: int, sha256: str) -> Iterator[Finding]:
    if num_bytes != stored.num_bytes:
        yield damaged(stored.file, size_problem(num_bytes, stored))
    if sha256 != stored.sha256:
        yield damaged(stored.file, f"SHA-256 is {sha256}, the manifest says {stored.sha256}")


def _check_layout(stored: StoredShard, rows: list[StoredBin], num_bytes: int, path: Path) -> Iterator[Finding]:
    """The bins must be contiguous from the first byte to the end-of-archive blocks."""
    end = 0
    for row in rows:
        if row.offset != end:
            problem = (
                f"bytes {end:,} to {row.offset:,} belong to no bin"
                if row.offset > end
                else "it begins inside another bin"
            )
            yield inconsistent(row.where, f"the bin before it ends at offset {end:,}: {problem}")
        end = row.offset + row.num_bytes
    with path.open("rb") as file:
        file.seek(min(max(end, 0), num_bytes))
        tail = file.read(len(_END_OF_ARCHIVE) + 1)
    where = f"{stored.file} at offset {end}"
    if len(tail) < len(_END_OF_ARCHIVE) and not any(tail):
        yield damaged(
            where, f"the file is truncated: it ends with {len(tail)} zero bytes instead of {len(_END_OF_ARCHIVE)}"
        )
    elif tail != _END_OF_ARCHIVE:
        excess = num_bytes - end
        yield damaged(where, f"{excess:,} bytes follow the last bin; expected {len(_END_OF_ARCHIVE)} zero bytes")


def _check_bin(
    path: Path, row: StoredBin, ledger: pa.Table | None, settings: BuildSettings
) -> tuple[list[Finding], BinCheck | None]:
    """Findings about one bin, and the check of its contents if it could be read."""
    findings: list[Finding] = []
    if (problem := oversized_bin(row)) is not None:
        return [inconsistent(row.where, problem)], None
    try:
        data = bytes(read_bytes(locate(path, row), verify=False))
        digest = xxhash.xxh3_64_intdigest(data)
        if digest != row.xxh3:
            message = f"XXH3-64 of its {row.num_bytes:,} bytes is {digest:016x}, bins.parquet says {row.xxh3:016x}"
            findings.append(damaged(row.where, message))
        bin_ = parse_bin(data, row.bin, where=row.where)
    except ShardError as error:
        return [*findings, unreadable(row.where, error)], None
    check = BinCheck(bin_, row, ledger, settings)
    return [*findings, *_check_members(data, row, bin_), *check.findings()], check


def _check_members(data: bytes, row: StoredBin, bin_: Bin) -> Iterator[Finding]:
    """Check every byte around the contents: names and order of the members, headers, padding, sizes of the arrays."""
    expected = [f"{bin_key(row.bin)}.{name}" for name in (*ARRAY_MEMBERS, PIXELS_MEMBER[bin_.codec], SAMPLES_MEMBER)]
    arrays = {member: getattr(bin_, name.removesuffix(".npy")) for member, name in zip(expected, ARRAY_MEMBERS)}
    names: list[str] = []
    at = 0
    while at < len(data):
        header = data[at : at + TAR_BLOCK]
        try:
            member = tarfile.TarInfo.frombuf(header, "utf-8", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError) as error:
            yield inconsistent(f"{row.where}, tar header at offset {row.offset + at}", f"it is damaged: {error}")
            return
        names.append(member.name)
        where = f"{row.where}, member {member.name} at offset {row.offset + at}"
        plain = tarfile.TarInfo(member.name)
        plain.size, plain.mode = member.size, _FILE_MODE
        if header != plain.tobuf(format=tarfile.USTAR_FORMAT):
            yield inconsistent(where, "its tar header has a time, owner, mode or link that vlprep does not write")
        start = at + TAR_BLOCK
        at = start + -(-member.size // TAR_BLOCK) * TAR_BLOCK
        if any(data[at - (-member.size % TAR_BLOCK) : at]):
            yield inconsistent(where, "its padding is not zero")
        array = arrays.get(member.name)
        if array is not None:
            header_bytes = _NPY_PREFIX + int.from_bytes(data[start + _NPY_PREFIX - 2 : start + _NPY_PREFIX], "little")
            if (excess := member.size - header_bytes - array.nbytes) > 0:
                yield inconsistent(where, f"{counted(excess, 'byte')} after the end of the array")
    if names != expected:
        yield inconsistent(row.where, f"its members are {', '.join(names)}; expected {', '.join(expected)}")
