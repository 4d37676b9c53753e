"""The local cache of remote bins: never too large, never wrong, whoever shares it and whoever is killed."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from schemas.errors import ConfigError, ShardError
from storage.request import RetryPolicy
from tests.train import cache_user
from tests.train.cache_user import data_of, key_of
from tests.train.synthetic import make_bins, write_shards
from train.shards import cache as cache_module
from train.shards.cache import BinCache
from train.shards.index import ShardIndex, open_shards
from train.shards.reader import BinReader, ReadSettings, read_checked_bin

QUICK = RetryPolicy(attempts=1, first_delay_s=0.0)


def read(cache: BinCache, bin_id: int, size: int = 1000) -> bytes | None:
    out = bytearray(size)
    return bytes(out) if cache.read(key_of(bin_id), memoryview(out)) else None


def held(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("??/*") if not path.name.startswith(".tmp"))


def test_another_process_reads_what_was_written(tmp_path: Path) -> None:
    cache = BinCache(tmp_path / "cache", 10_000)
    assert read(cache, 1) is None
    cache.write(key_of(1), memoryview(data_of(1)))
    assert read(cache, 1) == read(BinCache(tmp_path / "cache", 10_000), 1) == data_of(1)
    assert read(cache, 2) is None


def test_the_least_recently_used_bins_are_evicted_first(tmp_path: Path) -> None:
    """Ten bins fill the cache; bins 0 and 3 are used again; the eleventh pushes out bins 1 and 2, to nine tenths."""
    cache = BinCache(tmp_path, 10_000)
    for bin_id in range(10):
        cache.write(key_of(bin_id), memoryview(data_of(bin_id)))
        os.utime(tmp_path / key_of(bin_id)[:2] / key_of(bin_id), (bin_id, bin_id))
    assert read(cache, 0) and read(cache, 3)
    cache.write(key_of(10), memoryview(data_of(10)))
    assert [bin_id for bin_id in range(11) if read(cache, bin_id)] == [0, 3, 4, 5, 6, 7, 8, 9, 10]
    assert cache.size() == 9_000


def test_a_bin_larger_than_the_cache_is_not_stored(tmp_path: Path) -> None:
    cache = BinCache(tmp_path / "cache", 999)
    cache.write(key_of(0), memoryview(data_of(0)))
    assert cache.size() == 0


def test_an_incomplete_file_counts_as_missing_and_is_removed(tmp_path: Path) -> None:
    cache = BinCache(tmp_path, 10_000)
    cache.write(key_of(0), memoryview(data_of(0)))
    (path,) = held(tmp_path)
    for torn in (data_of(0)[:-1], data_of(0) + b"x", b""):
        path.write_bytes(torn)
        assert read(cache, 0) is None
        assert not path.exists()


def test_other_files_in_the_folder_are_neither_counted_nor_removed(tmp_path: Path) -> None:
    """Not even where their folders have names of two digits, are older than all bins, and the cache is full."""
    others = [tmp_path / name for name in ("en/a.txt", "ab/notes", "ab/0123456789abcdef", "00/.tmp-", "lock", "size")]
    others.append(tmp_path / key_of(0)[:2] / "folder" / key_of(0))
    for other in others:
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_bytes(b"not of the cache" * 1000)
        os.utime(other, (1, 1))
    (tmp_path / key_of(1)[:2]).mkdir(exist_ok=True)
    (tmp_path / key_of(1)[:2] / key_of(1)).symlink_to(others[0])
    cache = BinCache(tmp_path, 3_000)
    for bin_id in range(2, 12):
        cache.write(key_of(bin_id), memoryview(data_of(bin_id)))
    assert 0 < cache.size() <= 3_000
    assert read(cache, 11) == data_of(11)
    assert [other for other in others if other.read_bytes() != b"not of the cache" * 1000] == []


@pytest.mark.parametrize("noted", ["-9999999", "", "many", "99999999999999999999"])
def test_a_wrong_recorded_size_does_not_let_the_cache_grow(tmp_path: Path, noted: str) -> None:
    for bin_id in range(10):
        if cached := list(tmp_path.glob(".size")):
            cached[0].write_text(noted)
        BinCache(tmp_path, 3_000).write(key_of(bin_id), memoryview(data_of(bin_id)))
    assert 0 < BinCache(tmp_path, 3_000).size() <= 3_000


def test_a_read_only_cache_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that belongs to another user, or on a file system mounted for reading."""
    cache = BinCache(tmp_path, 10_000)
    cache.write(key_of(1), memoryview(data_of(1)))

    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for name in ("utime", "unlink"):
        monkeypatch.setattr(os, name, refuse)
    assert read(cache, 1) == data_of(1)
    (path,) = held(tmp_path)
    path.write_bytes(data_of(1)[:-1])
    assert read(cache, 1) is None, "a torn bin is not taken, though it cannot be removed"


def test_an_unwritable_cache_warns_once_and_is_then_not_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    cache = BinCache(tmp_path / "cache", 10_000)
    for bin_id in range(3):
        cache.write(key_of(bin_id), memoryview(data_of(bin_id)))
    assert [record.message for record in caplog.records if "is not writable" in record.message] == [
        caplog.records[0].message
    ]


def start_user(folder: Path, *, limit: int, seed: int, turns: int) -> subprocess.Popen[bytes]:
    """Let another process use the cache."""
    return subprocess.Popen([sys.executable, cache_user.__file__, *map(str, (folder, limit, seed, turns))])


@pytest.mark.slow
def test_processes_that_share_a_cache_respect_its_limit_and_read_what_was_written(tmp_path: Path) -> None:
    running = [start_user(tmp_path, limit=20_000, seed=seed, turns=150) for seed in range(3)]
    assert [process.wait(120) for process in running] == [0, 0, 0]
    assert 0 < BinCache(tmp_path, 20_000).size() <= 20_000


@pytest.mark.slow
def test_processes_that_are_killed_leave_no_wrong_bin_and_no_lock(tmp_path: Path) -> None:
    for seed in range(4):
        process = start_user(tmp_path, limit=20_000, seed=seed, turns=10**6)
        deadline = time.monotonic() + 60
        while len(held(tmp_path)) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05 * seed)
        process.send_signal(signal.SIGKILL)
        process.wait()
    cache = BinCache(tmp_path, 20_000)
    for bin_id in range(60):
        assert read(cache, bin_id) in (None, data_of(bin_id))
    assert start_user(tmp_path, limit=20_000, seed=9, turns=100).wait(60) == 0


def test_an_old_temporary_file_of_a_killed_process_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = BinCache(tmp_path, 3_000)
    cache.write(key_of(0), memoryview(data_of(0)))
    left = tmp_path / key_of(0)[:2] / ".tmp-left"
    left.write_bytes(bytes(500))
    assert cache.size() == 1_500
    monkeypatch.setattr(cache_module, "_STALE_S", -1.0)
    assert cache.size() == 1_000
    assert not left.exists()


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[ShardIndex]:
    folder = write_shards(tmp_path / "set", make_bins(num_bins=12))
    system = fsspec.filesystem("memory")
    for path in folder.iterdir():
        system.pipe_file(f"/cached/{path.name}", path.read_bytes())
    yield open_shards("memory://cached")
    system.rm("/cached", recursive=True)


def cut_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every read from a server fail, so that only the cache can answer."""

    def read_into(*args: object, **kwargs: object) -> int:
        raise OSError("the network is unreachable")

    monkeypatch.setattr("storage.bins.read_into", read_into)


def reader(index: ShardIndex, folder: Path, **changes: object) -> BinReader:
    return BinReader(index, ReadSettings(cache_dir=folder, retry_policy=QUICK, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("verify", ["always", "first", "never"])
def test_bins_read_before_come_from_the_cache(
    remote: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verify: str
) -> None:
    first = reader(remote, tmp_path / "cache", verify=verify)
    expected = [first.read(bin_id).bin.input_ids.tolist() for bin_id in range(12)]
    cut_network(monkeypatch)
    for bin_reader in (first, reader(remote, tmp_path / "cache", verify=verify)):
        assert [bin_reader.read(bin_id).bin.input_ids.tolist() for bin_id in range(12)] == expected


def test_a_damaged_bin_in_the_cache_is_read_from_its_shard(remote: ShardIndex, tmp_path: Path) -> None:
    bin_reader = reader(remote, tmp_path / "cache")
    bin_reader.read(4)
    (path,) = held(tmp_path / "cache")
    good = path.read_bytes()
    path.write_bytes(good[:900] + bytes([good[900] ^ 1]) + good[901:])
    assert bin_reader.read(4).bin.index == 4
    assert path.read_bytes() == good


def test_a_cached_file_that_is_not_a_bin_is_replaced_even_without_checksums(remote: ShardIndex, tmp_path: Path) -> None:
    bin_reader = reader(remote, tmp_path / "cache", verify="never")
    bin_reader.read(4)
    (path,) = held(tmp_path / "cache")
    good = path.read_bytes()
    path.write_bytes(bytes(len(good)))
    assert bin_reader.read(4).bin.index == 4
    assert path.read_bytes() == good


def test_wrong_bytes_of_a_shard_never_enter_the_cache(remote: ShardIndex, tmp_path: Path) -> None:
    """Not even where checksums are not asked for."""
    system = fsspec.filesystem("memory")
    data = bytearray(system.cat_file("/cached/bins-00000.tar"))
    data[int(remote.offset[1]) + 600] ^= 1
    system.pipe_file("/cached/bins-00000.tar", bytes(data))
    with pytest.raises(ShardError, match=r"bin 1 at offset .*checksum"):
        reader(remote, tmp_path / "cache", verify="never").read(1)
    assert not held(tmp_path / "cache")


def test_bins_of_another_build_are_not_taken_from_the_cache(
    remote: ShardIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bin at the same offset in the same shard of another build has another key."""
    reader(remote, tmp_path / "cache").read(0)
    system = fsspec.filesystem("memory")
    for path in write_shards(tmp_path / "other", make_bins(seed=5, num_bins=12)).iterdir():
        system.pipe_file(f"/cached/{path.name}", path.read_bytes())
    other = open_shards("memory://cached")
    expected = read_checked_bin(other, 0)
    assert reader(other, tmp_path / "cache").read(0).bin.input_ids.tolist() == expected.input_ids.tolist()


def test_a_cache_for_local_shards_is_wrong_use(tmp_path: Path) -> None:
    index = open_shards(write_shards(tmp_path / "set", make_bins(num_bins=1)))
    with pytest.raises(ConfigError, match="has no effect: all shards lie on a file system"):
        reader(index, tmp_path / "cache")
    with pytest.raises(ConfigError, match="cache of 0 bytes"):
        BinCache(tmp_path, 0)
