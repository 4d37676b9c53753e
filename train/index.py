"""What a set of shards holds, known at start without opening a shard.

A folder with a manifest, or a folder of such folders (which are mixed) -> :class:`ShardIndex`: one NumPy column for
each number known about a bin, and where its bytes lie. Incomplete, damaged or mismatched sets stop here.

Cost: reading ``bins.parquet`` (about 40 bytes a bin) and one ``stat`` a shard.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from schemas.bins import TAR_BLOCK
from schemas.errors import ConfigError, ShardError
from schemas.manifest import MANIFEST_FILE, Manifest, read_manifest
from schemas.qwen import IMAGE_MEAN, IMAGE_STD
from schemas.tables import BINS_COLUMNS, BINS_FILE
from train.cost import CostModel

_COPY_OR_BUILD = "Copy the folder again or build the shards again."


class BinLocation(NamedTuple):
    """Where a bin lies: ``num_bytes`` at ``offset`` of the shard at ``path``; ``local_bin`` is its number there."""

    path: Path
    offset: int
    num_bytes: int
    xxh3: int
    local_bin: int

    def __str__(self) -> str:
        return f"{self.path}, bin {self.local_bin} at offset {self.offset}"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ShardIndex:
    """All bins of one or several folders, numbered through in the order of the folders.

    Attributes:
        folders: the folders with a manifest, sorted by name where there are several.
        manifests: their manifests.
        first_bins: (folders + 1,) int64, number of the first bin of every folder, and the number of bins.
        shard_paths: the shards of all folders.
        shard: (B,) int32, position of the bin's shard in ``shard_paths``. This and what follows: one entry a bin.
        offset: (B,) int64, start of the bin in its shard, in bytes.
        num_bytes: (B,) int64.
        xxh3: (B,) uint64, XXH3-64 of those bytes.
        num_tokens: (B,) int32.
        num_targets: (B,) int32, labels that are trained.
        num_samples: (B,) int32.
        num_patches: (B,) int32.
        num_images: (B,) int32.
        num_videos: (B,) int32.
        sum_squared_lengths: (B,) int64, squares of the samples' lengths, summed.
    """

    folders: tuple[Path, ...]
    manifests: tuple[Manifest, ...]
    first_bins: NDArray[np.int64]
    shard_paths: tuple[Path, ...]
    shard: NDArray[np.int32]
    offset: NDArray[np.int64]
    num_bytes: NDArray[np.int64]
    xxh3: NDArray[np.uint64]
    num_tokens: NDArray[np.int32]
    num_targets: NDArray[np.int32]
    num_samples: NDArray[np.int32]
    num_patches: NDArray[np.int32]
    num_images: NDArray[np.int32]
    num_videos: NDArray[np.int32]
    sum_squared_lengths: NDArray[np.int64]

    @property
    def num_bins(self) -> int:
        """Bins of all folders."""
        return int(self.first_bins[-1])

    @property
    def max_length(self) -> int:
        """Tokens that a bin holds at most."""
        return max(manifest.settings.max_length for manifest in self.manifests)

    @property
    def tokenizer_fingerprint(self) -> str:
        """Fingerprint of the tokenizer that made the token ids, the same for all folders."""
        return self.manifests[0].fingerprints.tokenizer

    @property
    def fingerprint(self) -> str:
        """Identifies the bytes of all bins and their numbering, wherever the folders lie: 32 hexadecimal digits."""
        digest = hashlib.sha256()
        for manifest in self.manifests:
            files = [*manifest.shards, *(table for table in manifest.tables if table.file == BINS_FILE)]
            digest.update("".join(f"{stored.file} {stored.sha256}\n" for stored in files).encode() + b"\n")
        return digest.hexdigest()[:32]

    def cost(self, model: CostModel | None = None) -> NDArray[np.float64]:
        """Operations of a forward pass of every bin: (B,) float64; ``model`` is the 7B if not given."""
        return (model or CostModel()).bin_flops(
            num_tokens=self.num_tokens,
            sum_squared_lengths=self.sum_squared_lengths,
            num_targets=self.num_targets,
            num_patches=self.num_patches,
            num_images=self.num_images,
            num_videos=self.num_videos,
        )

    def folder_of(self, number: int) -> int:
        """Position in ``folders`` of the folder that holds bin ``number``."""
        if not 0 <= number < self.num_bins:
            raise IndexError(f"bin {number} of {self.num_bins}")
        return int(np.searchsorted(self.first_bins, number, side="right")) - 1

    def locate(self, number: int) -> BinLocation:
        """Where bin ``number`` lies."""
        first = int(self.first_bins[self.folder_of(number)])
        return BinLocation(
            path=self.shard_paths[self.shard[number]],
            offset=int(self.offset[number]),
            num_bytes=int(self.num_bytes[number]),
            xxh3=int(self.xxh3[number]),
            local_bin=number - first,
        )


def open_shards(path: str | Path) -> ShardIndex:
    """Read the manifests and tables of bins of a set of shards, and check them against the files.

    Args:
        path: a folder with a manifest, or one whose sub-folders have one.

    Raises:
        ShardError: no manifest, no bins, a file that is missing or of another size or content than the manifest says,
            or folders that were made for different models.
        ConfigError: ``path`` is a URL.
    """
    if "://" in str(path):
        raise ConfigError(
            f"--shards {path} is a URL; shards are read from a file system. Copy or mount them and give the folder."
        )
    folders = _find_folders(Path(path))
    manifests = [read_manifest(folder) for folder in folders]
    _check_agreement(folders, manifests)
    tables: list[dict[str, NDArray[Any]]] = []
    shard_paths: list[Path] = []
    for folder, manifest in zip(folders, manifests):
        _check_shard_files(folder, manifest)
        columns = _read_bins_table(folder, manifest)
        columns["shard"] = columns["shard"] + np.int32(len(shard_paths))
        tables.append(columns)
        shard_paths.extend(folder / shard.file for shard in manifest.shards)
    sizes = [len(columns["bin"]) for columns in tables]
    if not sum(sizes):
        raise ShardError(f"{path} holds no bins: every annotation was rejected. `vlprep report` shows the reasons.")
    joined = {name: np.concatenate([columns[name] for columns in tables]) for name in BINS_COLUMNS if name != "bin"}
    return ShardIndex(
        folders=tuple(folders),
        manifests=tuple(manifests),
        first_bins=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
        shard_paths=tuple(shard_paths),
        **joined,
    )


def _find_folders(path: Path) -> list[Path]:
    if (path / MANIFEST_FILE).is_file():
        return [path]
    if not path.is_dir():
        raise ShardError(f"{path} is not a folder. Give the folder that `vlprep build --out` wrote.")
    inside = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    folders = [entry for entry in inside if (entry / MANIFEST_FILE).is_file() or _looks_unfinished(entry)]
    if not folders:
        raise ShardError(
            f"{path} holds no {MANIFEST_FILE}, nor does a folder in it: no complete set of shards. "
            "Run `make shards DATASET=...` first, or give the folder that holds the manifest."
        )
    return folders


def _looks_unfinished(folder: Path) -> bool:
    """A build that was not sealed: reading its manifest fails, so that it is not left out silently."""
    return (folder / ".build").is_dir() or next(folder.glob("bins-*.tar"), None) is not None


def _check_agreement(folders: list[Path], manifests: list[Manifest]) -> None:
    for folder, manifest in zip(folders, manifests):
        prints, first = manifest.fingerprints, manifests[0].fingerprints
        if (prints.image_mean, prints.image_std) != (IMAGE_MEAN, IMAGE_STD):
            raise ShardError(
                f"{folder} was made for pixels normalised with mean {prints.image_mean} and deviation "
                f"{prints.image_std}; Qwen2.5-VL has {IMAGE_MEAN} and {IMAGE_STD}. Build it with --model of that kind."
            )
        if prints.tokenizer != first.tokenizer:
            raise ShardError(
                f"{folders[0]} and {folder} were made with different tokenizers ({first.tokenizer} and "
                f"{prints.tokenizer}) and cannot be mixed. Build both with the same --model."
            )


def _check_shard_files(folder: Path, manifest: Manifest) -> None:
    for shard in manifest.shards:
        path = folder / shard.file
        try:
            found = path.stat().st_size
        except FileNotFoundError:
            raise ShardError(f"{path} is missing, but the manifest lists it. {_COPY_OR_BUILD}") from None
        if found != shard.num_bytes:
            raise ShardError(f"{path} has {found} bytes, its manifest says {shard.num_bytes}. {_COPY_OR_BUILD}")


def _read_bins_table(folder: Path, manifest: Manifest) -> dict[str, NDArray[Any]]:
    path = folder / BINS_FILE
    stored = next((table for table in manifest.tables if table.file == BINS_FILE), None)
    if stored is None:
        raise ShardError(f"{folder / MANIFEST_FILE} does not list {BINS_FILE}. Build the shards again.")
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ShardError(f"{path} is missing. {_COPY_OR_BUILD}") from None
    if hashlib.sha256(data).hexdigest() != stored.sha256:
        raise ShardError(f"{path} is not the file that its manifest seals (SHA-256 differs). {_COPY_OR_BUILD}")
    table = pq.read_table(pa.BufferReader(data))
    found = {field.name: str(field.type) for field in table.schema}
    wrong = [f"{name} is {found.get(name)}" for name, dtype in BINS_COLUMNS.items() if found.get(name) != dtype]
    if wrong or any(table[name].null_count for name in BINS_COLUMNS):
        raise ShardError(f"{path}: {', '.join(wrong) or 'a column has nulls'}; expected {BINS_COLUMNS}. Build again.")
    columns = {name: table[name].to_numpy() for name in BINS_COLUMNS}
    _check_rows(path, columns, manifest)
    return columns


def _check_rows(path: Path, columns: dict[str, NDArray[Any]], manifest: Manifest) -> None:
    num_rows = len(columns["bin"])
    shard_of_row = np.repeat(np.arange(len(manifest.shards)), [shard.num_bins for shard in manifest.shards])
    if not np.array_equal(columns["bin"], np.arange(num_rows)) or not np.array_equal(columns["shard"], shard_of_row):
        raise ShardError(
            f"{path}: its rows are not the bins that the manifest lists, in order. Build the shards again."
        )
    ends = columns["offset"] + columns["num_bytes"]
    limits = np.array([shard.num_bytes for shard in manifest.shards], dtype=np.int64)[shard_of_row]
    outside = (columns["offset"] < 0) | (columns["num_bytes"] < TAR_BLOCK) | (ends > limits)
    if bool(outside.any()):
        raise ShardError(f"{path}: bin {int(outside.argmax())} lies outside its shard. Build the shards again.")
