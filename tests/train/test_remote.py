"""Shards behind a URL: the same bins as from a disk, from servers that are slow, fail, stall or die."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

import storage
from schemas.errors import ConfigError, ShardError, VlprepError
from storage import request
from storage.request import RetryPolicy
from storage.shard_set import read_ledger
from storage.urls import Url
from tests.train import http_server
from tests.train.synthetic import make_bins, write_shards
from train.batches.batch import MicroBatch
from train.batches.stream import BinStream
from train.order.dealing import DataOrder
from train.order.explain import source_samples
from train.shards.index import ShardIndex, open_shards
from train.shards.reader import BinReader, ReadSettings

QUICK = RetryPolicy(attempts=3, timeout_s=10.0, first_delay_s=0.01, max_delay_s=0.05)
BINS = make_bins(num_bins=24)


class Server:
    """A server process of our own, and where it answers."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, str(Path(http_server.__file__)), str(folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.address = f"http://127.0.0.1:{int(self.process.stdout.readline())}"

    def die(self) -> None:
        self.process.kill()
        self.process.wait()

    def stats(self) -> dict[str, int]:
        with urllib.request.urlopen(f"{self.address}/stats") as answer:
            counts: dict[str, int] = json.load(answer)
        return counts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("served") / "set", BINS, bins_per_shard=5)


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    running = Server(folder.parent)
    yield running
    running.die()
    assert running.process.stdout is not None
    running.process.stdout.close()


@pytest.fixture
def in_memory(folder: Path) -> Iterator[str]:
    system = fsspec.filesystem("memory")
    for path in folder.iterdir():
        system.pipe_file(f"/bucket/set/{path.name}", path.read_bytes())
    yield "memory://bucket"
    system.rm("/bucket", recursive=True)


def stream_of(index: ShardIndex, read: ReadSettings | None = None, **changes: object) -> BinStream:
    order = DataOrder(index.cost(), seed=1, global_batch=4, epochs=1)
    settings: dict[str, object] = {"rank": 0, "world_size": 1, "accumulation": 4, "per_device": 1, **changes}
    return BinStream(index, order, read=read or ReadSettings(retry_policy=QUICK), **settings)  # type: ignore[arg-type]


def tensors_of(micro: MicroBatch) -> list[torch.Tensor]:
    tensors: list[torch.Tensor] = []
    micro.map(lambda tensor: (tensors.append(tensor), tensor)[1])
    return tensors


def assert_same_stream(url: str, folder: Path, read: ReadSettings | None = None) -> None:
    """All tensors of an epoch equal those read from the disk."""
    with stream_of(open_shards(url), read) as remote, stream_of(open_shards(folder)) as local:
        num_steps = 0
        for remote_batch, local_batch in zip(remote, local):
            assert remote_batch.bins == local_batch.bins
            for remote_micro, local_micro in zip(remote_batch.micro_batches, local_batch.micro_batches):
                assert all(torch.equal(a, b) for a, b in zip(tensors_of(remote_micro), tensors_of(local_micro)))
            num_steps += 1
    assert num_steps == 6


@pytest.mark.parametrize("behaviour", ["plain", "slow", "flaky", "cut", "short"])
def test_an_epoch_over_http_equals_that_of_the_disk(server: Server, folder: Path, behaviour: str) -> None:
    """Also where every first answer is an error, is cut off, or has too few bytes."""
    assert_same_stream(f"{server.address}/{behaviour}/set", folder)
    assert server.stats()["requests"] == (24 if behaviour in ("plain", "slow") else 48)


def test_an_epoch_from_an_object_store_equals_that_of_the_disk(in_memory: str, folder: Path) -> None:
    assert_same_stream(f"{in_memory}/set", folder)
    index = open_shards(in_memory)
    assert [str(path) for path in index.folders] == ["memory://bucket/set"], "sub-folders are found by listing"
    assert index.fingerprint == open_shards(folder).fingerprint
    assert source_samples(index, [7]) == source_samples(open_shards(folder), [7])


def test_no_thread_of_pyarrow_gets_a_python_file(in_memory: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a thread may release the file while the interpreter shuts down, which aborts the process."""
    reads: list[tuple[object, dict[str, object]]] = []

    class Recorded(pq.ParquetFile):
        def __init__(self, source: object, **options: object) -> None:
            super().__init__(source, **options)
            self.opened = source, options

        def read_row_group(self, *arguments: object, **options: object) -> pa.Table:
            reads.append((self.opened[0], {**self.opened[1], **options}))
            return super().read_row_group(*arguments, **options)

    remote, local = open_shards(in_memory), open_shards(folder)
    monkeypatch.setattr(pq, "ParquetFile", Recorded)
    monkeypatch.setattr("storage.tables._PART_BYTES", 0)
    assert source_samples(remote, [7]) == source_samples(local, [7])
    (remote_source, options), (local_source, _) = reads
    assert not isinstance(remote_source, Path)
    assert not options["use_threads"]
    assert not options["pre_buffer"]
    assert isinstance(local_source, Path)


def test_a_stalled_answer_is_retried(server: Server, folder: Path) -> None:
    policy = RetryPolicy(attempts=6, timeout_s=3.0, first_delay_s=0.01)
    assert_same_stream(f"{server.address}/stall/set", folder, ReadSettings(retry_policy=policy, connections=24))


def test_requests_run_concurrently_up_to_the_limit(server: Server, folder: Path) -> None:
    """24 bins of 0.2 s each: 8 at a time take 0.6 s, one after the other would take 4.8 s."""
    read = ReadSettings(retry_policy=QUICK, connections=8)
    with stream_of(open_shards(f"{server.address}/slow/set"), read, num_threads=1, prefetch=1) as stream:
        assert len(list(stream)) == 6
    assert 4 <= server.stats()["most"] <= 8


@pytest.mark.parametrize(
    ("behaviour", "says"),
    [
        ("broken", r"no valid response in 3 attempts over \d+ s, last error: 503.*to resume"),
        ("silent", r"no valid response in 3 attempts over \d+ s, last error: no complete answer in time.*to resume"),
        ("whole", "the server does not support range requests"),
        ("refused", r"the store refuses access \(403.*Check that the credentials"),
        ("garbled", r"no valid response in 3 attempts over \d+ s, last error: 400, .*Bad status line.*to resume"),
    ],
)
def test_a_server_that_always_fails_stops_with_shard_bin_and_offset(server: Server, behaviour: str, says: str) -> None:
    index = open_shards(f"{server.address}/{behaviour}/set")
    policy = RetryPolicy(attempts=3, timeout_s=0.3, first_delay_s=0.01)
    began = time.monotonic()
    location = r"/set/bins-0000\d\.tar, bin \d+ at offset \d+: "
    with pytest.raises(VlprepError, match=rf"{location}.*{says}") as failed:
        next(stream_of(index, ReadSettings(retry_policy=policy)))
    assert "\n" not in str(failed.value)
    assert time.monotonic() - began < 30


def test_a_server_that_dies_stops_the_stream(server: Server) -> None:
    """What was read ahead is still handed out; then the training thread learns of it, soon."""
    stream = stream_of(open_shards(f"{server.address}/plain/set"), ReadSettings(retry_policy=QUICK, connections=2))
    next(stream)
    server.die()
    began = time.monotonic()
    with pytest.raises(storage.StorageError, match=r"bin \d+ at offset \d+: no valid response in 3 attempts .*resume"):
        list(stream)
    assert time.monotonic() - began < 30
    assert next(stream, None) is None


def test_reads_wait_for_a_server_that_restarts(server: Server, folder: Path, tmp_path: Path) -> None:
    """A port that refuses connections for a while, as behind a load balancer that restarts."""
    index = open_shards(f"{server.address}/plain/set")
    port = server.address.rpartition(":")[2]
    server.die()
    code = f"import time; time.sleep(1); import sys; sys.argv[1:] = [{str(folder.parent)!r}]; " + (
        f"sys.path.insert(0, {str(Path(http_server.__file__).parent)!r}); import http_server as h; "
        f"h.ThreadingHTTPServer(('127.0.0.1', {port}), h.Handler).serve_forever()"
    )
    later = subprocess.Popen([sys.executable, "-c", code])
    try:
        policy = RetryPolicy(attempts=40, timeout_s=5.0, first_delay_s=0.2, max_delay_s=0.2)
        result = BinReader(index, ReadSettings(retry_policy=policy)).read(3)
        assert result.bin.index == 3
    finally:
        later.kill()
        later.wait()


def test_closing_a_stream_does_not_wait_for_a_dead_server(server: Server) -> None:
    index = open_shards(f"{server.address}/plain/set")
    stream = stream_of(index, ReadSettings(retry_policy=RetryPolicy(attempts=9, first_delay_s=30.0, max_delay_s=30.0)))
    server.die()
    with pytest.raises(ShardError, match="not read within"):
        stream._read_timeout_s = 0.5
        next(stream)
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 5


def test_a_missing_set_is_distinguished_from_a_dead_server_at_start(
    server: Server, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"holds no manifest\.json"):
        open_shards(f"{server.address}/plain/nothing")
    monkeypatch.setattr(request, "DEFAULT_POLICY", QUICK)
    served = Url(f"{server.address}/plain/set")
    assert storage.file_sizes(served, ["bins-00000.tar", "none.tar"]) == {
        "bins-00000.tar": (folder / "bins-00000.tar").stat().st_size
    }
    server.die()
    with pytest.raises(storage.StorageError, match="no valid response in 3 attempts"):
        storage.file_sizes(served, ["bins-00000.tar"])


def test_a_server_without_content_lengths_is_refused(server: Server) -> None:
    with pytest.raises(storage.RefusedError, match=r"http://.*/sizeless/set/.*: the store does not report its size"):
        open_shards(f"{server.address}/sizeless/set")


def test_an_index_page_is_a_listing_without_sizes(server: Server, folder: Path) -> None:
    """Sub-folders come from the page, and the size of each file is requested separately."""
    root = f"{server.address}/indexed"
    assert [str(path) for path in open_shards(root).folders] == [f"{root}/set"]
    assert sorted(storage.file_names(Url(f"{root}/set"))) == sorted(path.name for path in folder.iterdir())


def test_a_shard_of_another_size_stops_at_start(in_memory: str, folder: Path) -> None:
    system = fsspec.filesystem("memory")
    system.pipe_file("/bucket/set/bins-00002.tar", (folder / "bins-00002.tar").read_bytes()[:-1])
    with pytest.raises(ShardError, match=r"memory://bucket/set/bins-00002\.tar has \d+ bytes, its manifest says \d+"):
        open_shards(in_memory)
    system.rm("/bucket/set/bins-00002.tar")
    with pytest.raises(ShardError, match=r"memory://bucket/set/bins-00002\.tar is missing"):
        open_shards(in_memory)
    system.rm("/bucket/set/manifest.json")
    with pytest.raises(ShardError, match=r"memory://bucket/set holds no manifest\.json"):
        open_shards(in_memory)


def test_a_changed_byte_in_an_object_store_stops(in_memory: str) -> None:
    index = open_shards(in_memory)
    location = index.locate(13)
    system = fsspec.filesystem("memory")
    data = bytearray(system.cat_file("/bucket/set/bins-00002.tar"))
    data[location.offset + 700] ^= 1
    system.pipe_file("/bucket/set/bins-00002.tar", bytes(data))
    with pytest.raises(ShardError, match=rf"memory://bucket/set/bins-00002\.tar, bin 13 at offset {location.offset}: "):
        list(stream_of(index))


def test_a_url_of_an_unsupported_protocol_names_the_package_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts: list[str] = []
    open_system = request._system
    monkeypatch.setattr(request, "_system", lambda root, *rest: (attempts.append(root), open_system(root, *rest))[1])
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(
        ConfigError, match=r"gs://bucket/set/manifest\.json needs a package that is not installed: pip install gcsfs"
    ):
        open_shards("gs://bucket/set")
    with pytest.raises(ConfigError, match=r"no-such://x/manifest\.json cannot be used: Protocol not known"):
        open_shards("no-such://x")
    assert attempts == ["gs://bucket", "no-such://x"]


def test_a_failed_listing_is_not_an_empty_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets of shards in it would be left out."""

    class Failing(MemoryFileSystem):
        def ls(self, path: str, detail: bool = True, **kwargs: object) -> list[object]:
            raise RuntimeError("busy")

    monkeypatch.setattr(request, "_system", lambda *_: Failing())
    monkeypatch.setattr(request, "DEFAULT_POLICY", QUICK)
    with pytest.raises(
        storage.StorageError, match=r"s3://bucket/sets: no valid response in 3 attempts .* RuntimeError: busy"
    ):
        open_shards("s3://bucket/sets")


def test_a_refusal_is_not_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Missing credentials, which botocore reports with this error, are reported at once."""

    class NoCredentialsError(Exception):
        pass

    class Refusing(MemoryFileSystem):
        num_requests = 0

        def info(self, path: str, **kwargs: object) -> dict[str, object]:
            Refusing.num_requests += 1
            raise NoCredentialsError("Unable to locate credentials")

    monkeypatch.setattr(request, "_system", lambda *_: Refusing())
    with pytest.raises(storage.RefusedError, match=r"the store refuses access \(Unable to locate credentials"):
        storage.read(Url("s3://bucket/set/manifest.json"))
    assert Refusing.num_requests == 1


def test_a_signed_url_is_joined_in_front_of_its_query_and_never_printed(server: Server, folder: Path) -> None:
    """As `vlprep verify` does: the server answers 403 where the signature is missing or is not the last part."""
    signed = f"{server.address}/signed/set?X-Amz-Signature=SECRET"
    assert_same_stream(signed, folder)
    index = open_shards(signed)
    assert str(index.folders[0]) == f"{server.address}/signed/set?***"
    assert "SECRET" not in f"{index.locate(0)} {index.folders} {index.shard_paths}"
    with pytest.raises(ConfigError, match=r"holds no manifest\.json") as missing:
        open_shards(f"{server.address}/signed/nothing?X-Amz-Signature=SECRET")
    with pytest.raises(VlprepError, match=r"/signed/set/manifest\.json\?\*\*\*: the store refuses access") as refused:
        open_shards(f"{server.address}/signed/set?X-Amz-Signature=SECRET2")
    with pytest.raises(ConfigError, match=r"names http.*\?\*\*\* twice") as twice:
        open_shards(f"{signed},{signed}")
    with pytest.raises(
        storage.StorageError, match=r"bins-0000\d\.tar\?\*\*\*, bin \d+ at offset \d+: no valid response"
    ) as dead:
        server.die()
        list(stream_of(index))
    assert all("SECRET" not in str(failed.value) for failed in (missing, refused, twice, dead))


@pytest.mark.parametrize("password", ["secret", "sec:ret", "sec@ret", "@ret"])
def test_messages_contain_no_password(password: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(Url(f"http://user:{password}@host/a") / "b@c") == "http://***@host/a/b%40c"
    monkeypatch.setattr(request, "DEFAULT_POLICY", RetryPolicy(attempts=1))
    with pytest.raises(storage.StorageError, match="no valid response in 1 attempt ") as failed:
        storage.read(Url(f"http://user:{password}@127.0.0.1:1/a"))
    assert "ret" not in str(failed.value)


def test_a_small_ledger_is_one_request_even_if_tables_are_always_answered_whole(folder: Path, server: Server) -> None:
    ledger = read_ledger(Url(f"{server.address}/plain/set"), names=["bin", "slot"])
    assert ledger.equals(read_ledger(folder, names=["bin", "slot"]))
