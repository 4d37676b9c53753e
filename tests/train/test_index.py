"""What a set of shards holds is known, and checked, before a shard is opened."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.errors import ConfigError, ShardError
from schemas.manifest import Fingerprints, encode_manifest
from schemas.qwen import IMAGE_STD
from storage.shard_set import read_manifest
from tests.benchmarks.index import write_many_bins
from tests.train.synthetic import BINS_SCHEMA, make_bins, write_shards, write_table
from train.shards.index import open_shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_shards(tmp_path / "set", make_bins(num_bins=8))


def change_manifest(folder: Path, **changes: object) -> None:
    manifest = msgspec.structs.replace(read_manifest(folder), **changes)
    (folder / "manifest.json").write_bytes(encode_manifest(manifest))


def rewrite_bins_table(folder: Path, table: pa.Table) -> None:
    """Put another table of bins in place and seal it, so that its contents are what is wrong, not its checksum."""
    stored = write_table(folder / "bins.parquet", table.to_pylist(), table.schema)
    manifest = read_manifest(folder)
    change_manifest(folder, tables=[stored, *(t for t in manifest.tables if t.file != "bins.parquet")])


def test_every_column_is_what_the_bins_hold(folder: Path) -> None:
    bins = make_bins(num_bins=8)
    index = open_shards(folder)
    assert index.num_bins == 8
    assert index.num_tokens.tolist() == [sum(len(s.input_ids) for s in samples) for samples in bins]
    assert index.num_targets.tolist() == [15, 10, 5, 15, 15, 10, 5, 15]
    assert index.num_samples.tolist() == [3, 2, 1, 3, 3, 2, 1, 3]
    # 4x2, 2x6, 2x6, 4x4 patches; 3 steps of 4x6; 10x12, 2 steps of 2x2, 2x2
    assert index.num_patches.tolist() == [0, 48, 72, 132, 0, 48, 72, 132]
    assert index.num_images.tolist() == [0, 4, 0, 2, 0, 4, 0, 2]
    assert index.num_videos.tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
    assert index.sum_squared_lengths.tolist() == [sum(len(s.input_ids) ** 2 for s in samples) for samples in bins]
    assert index.shard.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    assert index.max_length == 4096


def test_a_bin_is_located_by_shard_offset_and_length(folder: Path) -> None:
    index = open_shards(folder)
    location = index.locate(4)
    assert location.path == folder / "bins-00001.tar"
    assert location.local_bin == 4
    data = location.path.read_bytes()[location.offset : location.offset + location.num_bytes]
    assert data.startswith(b"00000004.input_ids.npy\0")
    assert b"00000005." not in data
    with pytest.raises(IndexError):
        index.locate(8)
    with pytest.raises(IndexError):
        index.locate(-1)


def test_folders_are_mixed_in_the_order_of_their_names(tmp_path: Path) -> None:
    root = tmp_path / "mixed"
    write_shards(root / "b", make_bins(seed=1, num_bins=2), codec="raw", max_length=512)
    write_shards(root / "a", make_bins(seed=2, num_bins=5))
    (root / "notes").mkdir()
    index = open_shards(root)
    assert [folder.name for folder in index.folders] == ["a", "b"]
    assert index.first_bins.tolist() == [0, 5, 7]
    assert index.num_bins == 7
    assert index.max_length == 4096
    assert [index.locate(bin_id).local_bin for bin_id in range(7)] == [0, 1, 2, 3, 4, 0, 1]
    assert index.locate(4).path == root / "a" / "bins-00001.tar"
    assert (index.locate(6).path, index.locate(6).local_bin) == (root / "b" / "bins-00000.tar", 1)
    alone = open_shards(root / "b")
    assert np.array_equal(index.num_tokens[5:], alone.num_tokens)
    assert np.array_equal(index.xxh3[5:], alone.xxh3)


def test_the_fingerprint_depends_on_the_bytes_and_not_on_the_location(tmp_path: Path) -> None:
    first = open_shards(write_shards(tmp_path / "first", make_bins(seed=1))).fingerprint
    assert first == open_shards(write_shards(tmp_path / "moved", make_bins(seed=1))).fingerprint
    assert first != open_shards(write_shards(tmp_path / "other", make_bins(seed=2))).fingerprint


@pytest.mark.parametrize("path", ["nothing", "empty"])
def test_a_folder_without_shards_says_what_to_run(tmp_path: Path, path: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="vlprep build"):
        open_shards(tmp_path / path)


def test_an_unfinished_build_is_not_silently_left_out_of_a_mixture(tmp_path: Path, folder: Path) -> None:
    root = tmp_path / "mixed"
    shutil.copytree(folder, root / "complete")
    shutil.copytree(folder, root / "unfinished")
    (root / "unfinished" / "manifest.json").unlink()
    with pytest.raises(ShardError, match=r"unfinished holds no manifest\.json"):
        open_shards(root)


def test_reading_a_manifest_that_is_a_pipe_does_not_block(folder: Path) -> None:
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    with pytest.raises(ShardError, match=r"manifest\.json cannot be read: it is a named pipe, not a regular file\. "):
        open_shards(folder)


def test_a_set_without_bins_stops(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="holds no bins"):
        open_shards(write_shards(tmp_path / "none", []))


def test_a_missing_shard_stops_at_start(folder: Path) -> None:
    (folder / "bins-00001.tar").unlink()
    with pytest.raises(ShardError, match=r"bins-00001\.tar is missing"):
        open_shards(folder)


def test_a_shard_of_another_size_stops_at_start(folder: Path) -> None:
    path = folder / "bins-00002.tar"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ShardError, match=r"bins-00002\.tar has \d+ bytes, its manifest says \d+"):
        open_shards(folder)


def test_a_changed_table_of_bins_stops_at_start(folder: Path) -> None:
    path = folder / "bins.parquet"
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match="SHA-256"):
        open_shards(folder)
    path.unlink()
    with pytest.raises(ShardError, match=r"bins\.parquet is missing"):
        open_shards(folder)


def test_a_table_of_other_columns_stops_at_start(folder: Path) -> None:
    table = pq.read_table(folder / "bins.parquet")
    rewrite_bins_table(folder, table.drop_columns(["xxh3"]))
    with pytest.raises(ShardError, match="xxh3 is missing, not uint64"):
        open_shards(folder)
    rewrite_bins_table(folder, table.cast(BINS_SCHEMA.set(5, pa.field("num_tokens", pa.int64()))))
    with pytest.raises(ShardError, match="num_tokens is int64, not int32"):
        open_shards(folder)


def test_rows_that_are_not_the_bins_of_the_manifest_stop_at_start(folder: Path) -> None:
    table = pq.read_table(folder / "bins.parquet")
    rewrite_bins_table(folder, table.slice(0, 7))
    with pytest.raises(ShardError, match="not the bins that the manifest lists"):
        open_shards(folder)
    offsets = table["offset"].to_numpy().copy()
    offsets[5] += 10_000_000
    rewrite_bins_table(folder, table.set_column(2, "offset", pa.array(offsets)))
    with pytest.raises(ShardError, match="bin 5 lies outside its shard"):
        open_shards(folder)


def test_folders_of_different_tokenizers_are_not_mixed(tmp_path: Path) -> None:
    write_shards(tmp_path / "mixed" / "a", make_bins(num_bins=2))
    write_shards(tmp_path / "mixed" / "b", make_bins(num_bins=2), tokenizer="f" * 32)
    with pytest.raises(ShardError, match=r"mixed/a and .*mixed/b were made with different tokenizers"):
        open_shards(tmp_path / "mixed")


def test_shards_with_another_normalisation_stop(folder: Path) -> None:
    prints = Fingerprints(tokenizer="0" * 32, image_mean=(0.5, 0.5, 0.5), image_std=IMAGE_STD)
    change_manifest(folder, fingerprints=prints)
    with pytest.raises(ShardError, match="normalised with mean"):
        open_shards(folder)


def test_a_manifest_of_another_version_stops(folder: Path) -> None:
    change_manifest(folder, version=99)
    with pytest.raises(ShardError, match="format version 99"):
        open_shards(folder)


@pytest.mark.parametrize("damage", ["missing", "short", "long"])
def test_a_ledger_of_another_size_stops_at_start(folder: Path, damage: str) -> None:
    """It is needed only if a loss is not finite: late, and urgently."""
    path = folder / "samples.parquet"
    data = path.read_bytes()
    path.write_bytes(data[:-1] if damage == "short" else data + b"x")
    if damage == "missing":
        path.unlink()
    says = "is missing, but the manifest lists it" if damage == "missing" else r"has \d+ bytes, its manifest says \d+"
    with pytest.raises(ShardError, match=rf"samples\.parquet {says}"):
        open_shards(folder)


@pytest.mark.slow
def test_a_million_bins_are_opened_as_columns(tmp_path: Path) -> None:
    """68 bytes a bin; shards are files with a size and no contents. tests/benchmarks/stream.py measures how long it
    takes."""
    index = open_shards(write_many_bins(tmp_path / "many", 1_000_000))
    assert index.num_bins == 1_000_000
    assert index.locate(999_999).path.name == "bins-01999.tar"
    columns = [getattr(index, field.name) for field in dataclasses.fields(index)]
    arrays = [column for column in columns if isinstance(column, np.ndarray) and column.size == index.num_bins]
    assert sum(column.nbytes for column in arrays) == 68 * index.num_bins
