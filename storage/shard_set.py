"""Opens sets of shards: the one place for both programs.

In: a folder or a URL. Out: a :class:`ShardSet` with its manifest and its table of bins. Opening reads the manifest and
``bins.parquet``. A bin costs one positional read, or two requests behind a URL (size, range), and its checksum.
"""

from __future__ import annotations

import errno
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa

from schemas.bins import TAR_BLOCK, Bin, shard_name
from schemas.bounds import FREE_BIN_BYTES, MAX_BYTES_PER_TOKEN
from schemas.errors import BUILD_AGAIN, COPY_AGAIN, GIVE_SHARDS, MEND_SHARDS, ConfigError, ShardError, VlprepError
from schemas.manifest import MANIFEST_FILE, MAX_MANIFEST_BYTES, WORK_FOLDER, Manifest, decode_manifest
from schemas.tables import (
    BINS_COLUMNS,
    BINS_FILE,
    SAMPLES_COLUMNS,
    SAMPLES_FILE,
    STATUS_PACKED,
    STATUS_REJECTED,
    AnnotationRow,
    LedgerRow,
    RejectedRow,
    StoredBin,
)
from schemas.wording import counted, listed
from storage.bins import BinLocation, check_samples, parse_bin, read_bytes
from storage.errors import NotThereError
from storage.files import regular_size
from storage.folder_contents import describe_folder
from storage.folders import file_sizes, sub_folders
from storage.reading import read_range, stat
from storage.tables import check_columns, read_table
from storage.urls import Location, Url


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ShardSet:
    """A complete set of shards.

    Attributes:
        folder: a folder or URL.
        manifest: of the set.
        bins: contents of ``bins.parquet``.
    """

    folder: Location
    manifest: Manifest
    bins: pa.Table

    def row(self, bin_id: int) -> StoredBin:
        """The row of a bin.

        Raises:
            ConfigError: there is no such bin.
        """
        bin_ids = self.bins.column("bin").to_numpy()
        at = int(np.searchsorted(bin_ids, bin_id))
        if at == len(bin_ids) or bin_ids[at] != bin_id:
            contents = f"bins {bin_ids[0]} to {bin_ids[-1]}" if len(bin_ids) > 1 else listed("bin", bin_ids.tolist())
            raise ConfigError(f"{self.folder} has no bin {bin_id}; it holds {contents}.")
        return bin_rows(self.bins.slice(at, 1))[0]

    def read(self, bin_id: int) -> Bin:
        """Read a bin and compare its checksum.

        Raises:
            ConfigError: there is no such bin.
            ShardError: the shard is missing or damaged.
        """
        row = self.row(bin_id)
        location = locate(self.folder / shard_name(row.shard), row)
        parsed = parse_bin(read_bytes(location, verify=True), bin_id, where=str(location))
        check_samples(parsed, where=str(location))
        return parsed

    def packed_in(self, bin_id: int) -> list[LedgerRow]:
        """The rows of the ledger for the samples in a bin, by slot.

        Raises:
            ShardError: the ledger is missing or damaged.
        """
        return self.packed_in_bins([bin_id])[bin_id]

    def packed_in_bins(self, bin_ids: Collection[int]) -> dict[int, list[LedgerRow]]:
        """The same for several bins in one pass over the ledger.

        Raises:
            ShardError: the ledger is missing or damaged.
        """
        rows: dict[int, list[LedgerRow]] = {bin_id: [] for bin_id in bin_ids}
        if rows:
            table = read_packed(self.folder, filters=[("bin", "in", list(rows))])
            num_samples = sum(self.row(bin_id).num_samples for bin_id in rows)
            if len(table) != num_samples:  # before a row becomes an object of 600 bytes
                raise ShardError(
                    f"{self.folder / SAMPLES_FILE} has {len(table):,} rows of samples for {counted(len(rows), 'bin')}, "
                    f"which hold {num_samples:,}. {BUILD_AGAIN}."
                )
            for row in ledger_rows(table.sort_by("slot")):
                rows[row.bin].append(row)
        return rows


def open_set(folder: Location) -> ShardSet:
    """Open a folder or URL with a manifest.

    Raises:
        ConfigError: the folder holds no set of shards.
        ShardError: an incomplete set, or a damaged manifest or table of bins.
        StorageError: the store does not answer.
    """
    manifest = read_manifest(folder)
    return ShardSet(folder=folder, manifest=manifest, bins=read_bins(folder, manifest))


def find_sets(location: Location) -> list[Location]:
    """The folder itself if it holds a manifest, else its sub-folders with a manifest, sorted by name.

    A sub-folder with an unfinished build counts: opening it fails, so that it is not left out silently.

    Raises:
        ConfigError: there is none.
        ShardError: the folder holds an unfinished build, or cannot be read.
        StorageError: the store does not answer.
    """
    try:
        if _holds(location, MANIFEST_FILE):
            return [location]
        if isinstance(location, Path) and not location.is_dir():
            raise ConfigError(f"{location} is not a folder. {GIVE_SHARDS}")
        folders = [
            folder for folder in sub_folders(location) if _holds(folder, MANIFEST_FILE) or _is_unfinished(folder)
        ]
    except OSError as error:
        raise _unreadable(location, error) from error
    if not folders:
        if _is_unfinished(location):
            raise _no_manifest(location)
        raise ConfigError(
            f"{location} holds no {MANIFEST_FILE}, nor does a folder in it: no complete set of shards. Build one with "
            "`vlprep build annotations.jsonl --out DIR --model MODEL` (a registered dataset: `make shards "
            "DATASET=NAME`), or give the folder that holds the manifest."
        )
    return folders


def read_manifest(folder: Location) -> Manifest:
    """The manifest of a folder or URL.

    Raises:
        ConfigError: there is none, nor anything else of a build.
        ShardError: the build is not complete, or the manifest is damaged or of another version.
        StorageError: the store does not answer.
    """
    return decode_manifest(read_manifest_bytes(folder), where=str(folder / MANIFEST_FILE))


def read_manifest_bytes(folder: Location) -> bytes:
    """Contents of the manifest of a folder or URL.

    Raises:
        ConfigError: there is none, nor anything else of a build.
        ShardError: the build is not complete, or the manifest cannot be read, or is too large to be one.
        StorageError: the store does not answer.
    """
    path = folder / MANIFEST_FILE
    try:
        num_bytes = regular_size(path) if isinstance(path, Path) else stat(path).num_bytes
        if num_bytes > MAX_MANIFEST_BYTES:
            raise ShardError(f"{path} has {num_bytes:,} bytes; allowed: at most {MAX_MANIFEST_BYTES:,}. {MEND_SHARDS}")
        return path.read_bytes() if isinstance(path, Path) else read_range(path, 0, num_bytes)
    except (FileNotFoundError, NotADirectoryError, NotThereError):
        raise _no_manifest(folder) from None
    except OSError as error:
        raise ShardError(f"{path} cannot be read: {error.strerror or error}. {MEND_SHARDS}") from error


def check_files(folder: Location, manifest: Manifest) -> None:
    """Compare the sizes of all shards and tables with the manifest.

    Raises:
        ShardError: a file is missing or has another size.
        StorageError: the store does not answer.
    """
    files = [*manifest.shards, *manifest.tables]
    try:
        sizes = file_sizes(folder, [stored.file for stored in files])
    except OSError as error:
        raise _unreadable(folder, error) from error
    for stored in files:
        path, size = folder / stored.file, sizes.get(stored.file)
        if size is None:
            raise ShardError(f"{path} is missing, but the manifest lists it. {COPY_AGAIN}.")
        if size != stored.num_bytes:
            raise ShardError(f"{path} has {size} bytes, its manifest says {stored.num_bytes}. {COPY_AGAIN}.")


def read_bins(folder: Location, manifest: Manifest) -> pa.Table:
    """The table of bins: the file that the manifest seals, and the bins that it lists, each inside its shard.

    Raises:
        ShardError: it is missing or damaged, has a value out of its bounds, or contradicts the manifest.
        StorageError: the store does not answer.
    """
    path = folder / BINS_FILE
    sealed = next((table for table in manifest.tables if table.file == BINS_FILE), None)
    if sealed is None:
        raise ShardError(f"{folder / MANIFEST_FILE} does not list {BINS_FILE}. {BUILD_AGAIN}.")
    table = read_table(path, BINS_COLUMNS, sealed=sealed)
    check_columns(table, StoredBin, path)
    bins, shards, offsets, num_bytes = (table[name].to_numpy() for name in ("bin", "shard", "offset", "num_bytes"))
    names, sizes = zip(*((shard.file, shard.num_bins) for shard in manifest.shards)) if manifest.shards else ((), ())
    # A number is missing if every sample of a bin was unusable, a shard if all its bins were.
    shard_ids, counts = np.unique(shards, return_counts=True)
    if (
        tuple(map(shard_name, shard_ids.tolist())) != names
        or tuple(counts.tolist()) != sizes
        or bool((np.diff(bins) <= 0).any() or (np.diff(shards) < 0).any())
    ):
        raise ShardError(f"{path}: its rows are not the bins that the manifest lists, in order. {BUILD_AGAIN}.")
    most = FREE_BIN_BYTES + MAX_BYTES_PER_TOKEN * table["num_tokens"].to_numpy().astype(np.int64)
    if bool((num_bytes > most).any()):
        at = int((num_bytes > most).argmax())
        raise ShardError(f"{path}: {oversized_bin(bin_rows(table.slice(at, 1))[0])}. {BUILD_AGAIN}.")
    limits = np.repeat(np.array([shard.num_bytes for shard in manifest.shards], dtype=np.int64), sizes)
    outside = (num_bytes < TAR_BLOCK) | (offsets + num_bytes > limits)
    if bool(outside.any()):
        raise ShardError(f"{path}: bin {int(bins[outside.argmax()])} lies outside its shard. {BUILD_AGAIN}.")
    return table


def read_ledger(folder: Location, *, names: Sequence[str]) -> pa.Table:
    """Columns of the ledger.

    Raises:
        ShardError: it is missing or damaged, or has a value out of its bounds.
        StorageError: the store does not answer.
    """
    return _read_rows(folder, AnnotationRow, names, None)


def read_packed(
    folder: Location, *, names: Sequence[str] | None = None, filters: Sequence[tuple[str, str, object]] = ()
) -> pa.Table:
    """Rows of the ledger for packed samples.

    Args:
        folder: the set.
        names: columns to read, or None for all.
        filters: rows to read, as :func:`storage.tables.read_table` takes them.

    Raises:
        ShardError, StorageError: as :func:`read_ledger`.
    """
    return _read_rows(folder, LedgerRow, names, [("status", "=", STATUS_PACKED), *filters])


def read_rejected(folder: Location, *, names: Sequence[str]) -> pa.Table:
    """Rows of the ledger for rejected annotations; errors as :func:`read_ledger`."""
    return _read_rows(folder, RejectedRow, names, [("status", "=", STATUS_REJECTED)])


def _read_rows(
    folder: Location,
    row: type[msgspec.Struct],
    names: Sequence[str] | None,
    filters: list[tuple[str, str, object]] | None,
) -> pa.Table:
    path = folder / SAMPLES_FILE
    table = read_table(path, SAMPLES_COLUMNS, names=names, filters=filters)
    check_columns(table, row, path)
    return table


def oversized_bin(row: StoredBin) -> str | None:
    """What is wrong with the size of a bin, before memory is allocated for it, or None."""
    most = FREE_BIN_BYTES + MAX_BYTES_PER_TOKEN * row.num_tokens
    if row.num_bytes <= most:
        return None
    return f"bin {row.bin} of {counted(row.num_tokens, 'token')} has {row.num_bytes:,} bytes; allowed: at most {most:,}"


def locate(shard: Location, row: StoredBin) -> BinLocation:
    """Where the bin of a row lies in its shard."""
    return BinLocation(path=shard, offset=row.offset, num_bytes=row.num_bytes, xxh3=row.xxh3, local_bin=row.bin)


def bin_rows(table: pa.Table) -> list[StoredBin]:
    """Rows of ``bins.parquet`` as structs."""
    return msgspec.convert(table.to_pylist(), list[StoredBin])


def ledger_rows(table: pa.Table) -> list[LedgerRow]:
    """Rows of packed samples of ``samples.parquet`` as structs."""
    return msgspec.convert(table.select(LedgerRow.__struct_fields__).to_pylist(), list[LedgerRow])


def _holds(folder: Location, name: str) -> bool:
    return name in file_sizes(folder, [name])


def _is_unfinished(folder: Location) -> bool:
    if isinstance(folder, Url):
        return _holds(folder, shard_name(0))
    return (folder / WORK_FOLDER).is_dir() or next(folder.glob("bins-*.tar"), None) is not None


def _unreadable(folder: Location, error: OSError) -> ShardError:
    mend = COPY_AGAIN
    if error.errno != errno.EINVAL:  # which says that it is not a regular file
        mend = "Check that the file system answers and the folder may be read, then run the same command again"
    return ShardError(f"{error.filename or folder} cannot be read: {error.strerror or error}. {mend}.")


def _no_manifest(folder: Location) -> VlprepError:
    """Why there is no manifest: a wrong folder, or a set that is not complete."""
    if isinstance(folder, Path):
        if not folder.exists():
            return ConfigError(f"{folder} does not exist. Give the folder that holds {MANIFEST_FILE}.")
        if not folder.is_dir():
            return ConfigError(f"{folder} is not a folder. {GIVE_SHARDS}")
        inside = sorted(path.parent.name for path in folder.glob(f"*/{MANIFEST_FILE}"))
        if inside:
            shown = ", ".join(inside[:3]) + (", …" if len(inside) > 3 else "")
            return ConfigError(
                f"{folder} holds no {MANIFEST_FILE} itself, but folders that do ({shown}). Give one of them."
            )
    if _is_unfinished(folder):
        return ShardError(
            f"{folder} holds no {MANIFEST_FILE}: a build into it failed, was interrupted, or still runs. Run the "
            "same `vlprep build` again to finish it, or remove the folder."
        )
    if isinstance(folder, Url):
        return ConfigError(f"{folder} holds no {MANIFEST_FILE}: it is not a set of shards. {GIVE_SHARDS}")
    contents = describe_folder(folder)
    mend = GIVE_SHARDS
    if contents.is_run:
        mend = f"Show a step of it with `vlprep show {folder} --step 0`, or give the folder of its shards."
    elif contents.data_files:
        name = folder / contents.data_files[0]
        mend = f"Build shards from a file in it: `vlprep build {name} --out shards/mine`, or g{GIVE_SHARDS[1:]}"
    return ConfigError(f"{folder} holds no {MANIFEST_FILE}: it is {contents.what}, not a set of shards. {mend}")
