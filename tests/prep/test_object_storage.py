"""Annotations, media and shards on object storage: a real S3 server, with errors and slow answers put in between."""

from __future__ import annotations

import gzip
import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import prep.build.pipeline
import storage
from prep.annotations.annotation import Annotation, MediaItem
from prep.annotations.registry import find_sources
from prep.build.metrics import read_metrics
from prep.build.output import open_output
from prep.build.pipeline import BuildRequest, build
from prep.build.work import WorkFolder
from prep.cli import main
from prep.engines import LocalEngine, SerialEngine
from prep.inspect.validate import ValidateRequest, validate
from prep.media import fetch
from prep.media.access import LocalMedia, MediaRequest
from prep.media.decode import MediaInfo, probe
from prep.media.fetch import open_media
from prep.media.paths import media_url
from prep.media.source import HeadTooShortError
from prep.samples.media import check_media, probe_media
from schemas.annotation import ReasonCode
from schemas.bins import MEDIA_IMAGE, MEDIA_VIDEO, shard_name
from schemas.errors import ConfigError, MediaError, VlprepError
from schemas.manifest import METRICS_FILE
from schemas.settings import BuildSettings, MediaSettings
from storage import request as storage_request
from storage.errors import Verdict, verdict
from storage.request import RetryPolicy
from storage.shard_set import read_manifest
from storage.urls import Location, Url, names_below_common_folder, parse_location, without_secrets
from tests import typed
from tests.guides import guide
from tests.prep.commands import Command
from tests.prep.corpus import turn
from tests.prep.finished import SETTINGS
from tests.prep.s3_server import KINDS, Proxy, s3_server, seeded

pytestmark = pytest.mark.slow

CORPUS = Url("s3://bucket/corpus")
QUICK = RetryPolicy(attempts=6, timeout_s=20, first_delay_s=0.01, max_delay_s=0.05)


@pytest.fixture(scope="module")
def running(corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """The server with the corpus in a bucket, and an environment that names it."""
    with s3_server() as proxy, pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "FSSPEC_S3_ENDPOINT_URL"):
            patch.delenv(name, raising=False)
        patch.setenv("AWS_ACCESS_KEY_ID", "test")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir("bucket")
        for path in corpus_file.parent.iterdir():
            storage.upload(path, CORPUS / path.name)
        yield proxy


@pytest.fixture
def proxy(running: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """The server without faults and without recorded requests; retries are quick."""
    monkeypatch.setattr(storage_request, "DEFAULT_POLICY", QUICK)
    running.reset()
    yield running
    running.reset()


def request_for(
    out: Location, model: Path, settings: BuildSettings = SETTINGS, *, annotations: str = f"{CORPUS}/annotations.jsonl"
) -> BuildRequest:
    sources = find_sources(annotations, registry=None, media_root=None, media=settings.media)
    return BuildRequest(sources=tuple(sources), out=out, settings=settings, model=str(model), max_rejected=Fraction(1))


def local_contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != METRICS_FILE}


def remote_contents(folder: Url) -> dict[str, bytes]:
    return {name: storage.read(folder / name) for name in storage.listing(folder) if name != METRICS_FILE}


# The whole build.


def test_a_build_between_buckets_has_the_bytes_of_a_local_one_through_faults_of_every_kind(
    proxy: Proxy, finished: Path, tiny_checkpoint: Path
) -> None:
    proxy.rule = seeded(7, 0.25)
    out = Url("s3://bucket/faulty")
    manifest = build(request_for(out, tiny_checkpoint), SerialEngine())
    assert {seen.fault for seen in proxy.seen} >= set(KINDS)
    stored = proxy.stored()
    proxy.reset()
    assert remote_contents(out) == local_contents(finished)
    assert manifest == read_manifest(finished)
    assert read_metrics(out) is not None
    # Complete as soon as the manifest is there: everything else that belongs to the set came before it.
    before = stored[: stored.index("faulty/manifest.json")]
    assert {f"faulty/{file.file}" for file in (*manifest.shards, *manifest.tables)} <= set(before)


def test_workers_upload_shards_themselves_and_nothing_is_left_in_the_work_folder(
    proxy: Proxy, finished: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    proxy.rule = seeded(11, 0.1)
    out = Url("s3://bucket/parallel")
    with LocalEngine(2) as engine:
        build(replace(request_for(out, tiny_checkpoint), work_dir=tmp_path / "work"), engine)
    proxy.reset()
    assert remote_contents(out) == local_contents(finished)
    left = {path.relative_to(tmp_path / "work").parts[0] for path in (tmp_path / "work").rglob("*") if path.is_file()}
    assert left == {"lock", "finished", "scan", "index", "inputs"}


def test_a_finished_build_only_lists_what_exists(
    proxy: Proxy, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Url("s3://bucket/twice")
    first = build(request_for(out, tiny_checkpoint), SerialEngine())
    monkeypatch.setattr(prep.build.pipeline, "scan_chunk", None)
    monkeypatch.setattr(prep.build.pipeline, "write_shard", None)
    again = request_for(out, tiny_checkpoint)
    proxy.seen.clear()
    assert build(again, SerialEngine()) == first
    assert {seen.method for seen in proxy.seen} == {"GET", "HEAD"}
    assert [seen.key for seen in proxy.seen if seen.method == "GET" and "." in seen.key] == [
        "bucket/twice/manifest.json"
    ]


def test_a_shard_that_was_lost_or_changed_is_written_again_and_no_other(
    proxy: Proxy, finished: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = Url("s3://bucket/mended")
    request = request_for(out, tiny_checkpoint)
    build(request, SerialEngine())
    # As if the build had been killed before the seal: its results are there, the manifest is not.
    shutil.rmtree(WorkFolder(out)._root / "index")
    (WorkFolder(out)._root / "finished").unlink()
    (tmp_path / "other").write_bytes(os.urandom(len(storage.read(out / shard_name(1)))))
    storage.upload(tmp_path / "other", out / shard_name(1))
    storage.remove(out / shard_name(0))
    proxy.seen.clear()
    build(request, SerialEngine())
    assert remote_contents(out) == local_contents(finished)


def test_another_plan_removes_the_manifest_first_and_the_shards_of_the_old_plan(
    proxy: Proxy, tiny_checkpoint: Path, tmp_path: Path, corpus_file: Path
) -> None:
    out = Url("s3://bucket/replanned")
    build(request_for(out, tiny_checkpoint), SerialEngine())
    many = set(storage.listing(out))
    larger = BuildSettings(max_length=4096, shard_bytes=1 << 29)
    proxy.seen.clear()
    build(request_for(out, tiny_checkpoint, larger), SerialEngine())
    changes = [(seen.method, seen.key) for seen in proxy.seen if seen.method in ("PUT", "DELETE", "POST")]
    assert changes[0] == ("DELETE", "bucket/replanned/manifest.json")
    assert sum(name.endswith(".tar") for name in many) > sum(name.endswith(".tar") for name in storage.listing(out))
    build(request_for(tmp_path / "local", tiny_checkpoint, larger, annotations=str(corpus_file)), SerialEngine())
    assert remote_contents(out) == local_contents(tmp_path / "local")


def test_a_build_killed_during_an_upload_resumes(
    proxy: Proxy, finished: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = Url("s3://bucket/killed")
    last = shard_name(len(read_manifest(finished).shards) - 1)
    proxy.rule = lambda method, key, earlier: "stall" if method == "PUT" and key.endswith(last) else None
    arguments = ["build", f"{CORPUS}/annotations.jsonl", "--out", out.url, "--work-dir", tmp_path / "work"]
    arguments += ["--model", tiny_checkpoint, "--max-length", 1200, "--shard-bytes", 1_500_000, "--workers", 1]
    environment = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "XDG_"))}
    command = Command(*arguments, folder=tmp_path, environment=environment)
    while command.poll() is None and not any(seen.fault == "stall" for seen in proxy.seen):
        time.sleep(0.02)
    with pytest.raises(VlprepError, match=r"s3://bucket/killed is being built by process \d+ on "):
        build(replace(request_for(out, tiny_checkpoint), work_dir=tmp_path / "work"), SerialEngine())
    command.send(signal.SIGKILL)
    command.wait()
    proxy.reset()
    done = storage.listing(out)
    assert "manifest.json" not in done
    assert done
    proxy.seen.clear()
    assert Command(*arguments, folder=tmp_path, environment=environment).wait() == 0
    assert {key for key in proxy.stored() if key.endswith(".tar")}.isdisjoint(f"killed/{name}" for name in done)
    assert remote_contents(out) == local_contents(finished)


# Network faults that stay, and refusals.


def test_a_fault_that_outlasts_all_retries_stops_the_build_and_loses_no_sample(
    proxy: Proxy, finished: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    request = request_for(tmp_path / "out", tiny_checkpoint)
    for kind in ("slowdown", "reset", "cut"):
        proxy.rule = lambda method, key, _, kind=kind: kind if key.endswith("4.png") else None  # type: ignore[misc]
        with pytest.raises(storage.StorageError, match=r"s3://bucket/corpus/4\.png: no valid response in 6 attempts"):
            build(request, SerialEngine())
        assert not (tmp_path / "out" / "manifest.json").exists()
    proxy.reset()
    build(request, SerialEngine())
    assert local_contents(tmp_path / "out") == local_contents(finished)


def test_a_fault_in_the_write_step_stops_the_build_too(
    proxy: Proxy, finished: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    request = request_for(tmp_path / "out", tiny_checkpoint)
    original = prep.build.pipeline.write_shard

    def unlucky(task: Any) -> Any:
        proxy.rule = lambda method, key, earlier: "error" if key.endswith("clip.mp4") else None
        return original(task)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prep.build.pipeline, "write_shard", unlucky)
        with pytest.raises(storage.StorageError, match=r"clip\.mp4: no valid response"):
            build(request, SerialEngine())
    proxy.reset()
    build(request, SerialEngine())
    assert local_contents(tmp_path / "out") == local_contents(finished)


def test_credentials_that_expire_stop_the_build_and_a_single_refusal_costs_one_sample(
    proxy: Proxy, finished: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    def expired(method: str, key: str, earlier: int) -> str | None:
        return "expired" if any(seen.key.endswith("2.png") for seen in proxy.seen) else None

    request = request_for(tmp_path / "out", tiny_checkpoint)
    proxy.rule = expired
    with pytest.raises(storage.RefusedError, match="temporary credentials have expired"):
        build(request, SerialEngine())
    proxy.reset()
    build(request, SerialEngine())
    assert local_contents(tmp_path / "out") == local_contents(finished)

    proxy.rule = lambda method, key, earlier: "denied" if key.endswith("/4.png") else None
    rejects = build(replace(request, out=tmp_path / "one"), SerialEngine()).counts.rejects_by_code
    expected = dict(read_manifest(finished).counts.rejects_by_code)
    with_4 = [line for line in storage.read(CORPUS / "annotations.jsonl").splitlines() if b'"4.png"' in line]
    assert with_4
    expected["media_unreadable"] += len(with_4)
    assert rejects == expected


def test_a_silent_server_ends_in_an_error(proxy: Proxy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(storage_request, "DEFAULT_POLICY", RetryPolicy(attempts=2, timeout_s=0.3, first_delay_s=0.01))
    proxy.rule = lambda method, key, earlier: "stall"
    path = tmp_path / "file"
    path.write_bytes(b"x" * 1000)
    for call in (
        lambda: storage.stat(CORPUS / "0.png"),
        lambda: storage.read_range(CORPUS / "0.png", 0, 10),
        lambda: storage.upload(path, CORPUS.parent / "file"),
        lambda: storage.remove(CORPUS.parent / "file"),
        lambda: storage.check_folder(CORPUS),
    ):
        with pytest.raises(
            storage.StorageError, match=r"no valid response in 2 attempts .* no complete answer in time"
        ):
            call()


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, list(arguments))
    assert not isinstance(result.exception, Exception) or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_a_final_answer_is_one_sentence_without_retries(
    proxy: Proxy, tiny_checkpoint: Path, tmp_path: Path, corpus_file: Path
) -> None:
    annotations = f"{CORPUS}/annotations.jsonl"
    model = ["--model", str(tiny_checkpoint), "--workers", "1"]
    local = ["--out", str(tmp_path / "out"), *model]
    for arguments, message in (
        (["build", "s3://nobucket/a.jsonl", *local], "s3://nobucket/a.jsonl does not exist (NoSuchBucket"),
        (["build", "s3://bucket/none.jsonl", *local], "s3://bucket/none.jsonl does not exist"),
        (["build", "s3://bucket/none*.jsonl", *local], "s3://bucket/none*.jsonl matches no file"),
        (["build", annotations, "--out", "s3://nobucket/x", *model], "s3://nobucket/x does not exist (NoSuchBucket"),
        (["build", annotations, "--media-root", "s3://bucket/none", *local], "s3://bucket/none does not exist"),
        (["build", annotations, "--out", "abfs://box/x", *model], "pip install adlfs"),
        (["build", annotations, "--out", "nonsense://box/x", *model], "Protocol not known: nonsense"),
        (["build", annotations, "--work-dir", str(tmp_path), *local], "--work-dir has no effect unless --out is a URL"),
        (["validate", "s3://bucket/none.jsonl"], "s3://bucket/none.jsonl does not exist"),
    ):
        proxy.seen.clear()
        code, output = run(*arguments)
        assert (code, message in output) == (2, True), output
        assert "Traceback" not in output
        failures = [(seen.method, seen.key, seen.query) for seen in proxy.seen if seen.status >= 400]
        assert len(failures) == len(set(failures)), "requested again"
    assert run("verify", "s3://bucket/corpus", "--workers", "1")[0] == 2

    proxy.rule = lambda method, key, earlier: "denied"
    for arguments in (
        ["build", annotations, *local],
        ["build", str(corpus_file), "--media-root", str(CORPUS), *local],
        ["build", str(corpus_file), "--out", "s3://bucket/refused", *model],
        ["validate", annotations],
    ):
        code, output = run(*arguments)
        assert (code, "the store refuses access" in output, "Traceback" in output) == (2, True, False), output


def test_wrong_credentials_are_distinguished_from_faults() -> None:
    class NoCredentialsError(Exception):
        pass

    class ClientPayloadError(OSError):
        code = 400

    def answered(status: int, code: str = "") -> OSError:
        error = OSError("told by s3fs")
        error.__cause__ = Exception()
        error.__cause__.response = {  # type: ignore[attr-defined]
            "Error": {"Code": code},
            "ResponseMetadata": {"HTTPStatusCode": status},
        }
        return error

    lost = FileNotFoundError("https://host/file")
    lost.__cause__ = ConnectionResetError()
    for error, expected in (
        (NoCredentialsError(), Verdict.REFUSED),
        (PermissionError(), Verdict.REFUSED),
        (answered(403), Verdict.REFUSED),
        (FileNotFoundError(), Verdict.MISSING),
        (answered(404), Verdict.MISSING),
        (answered(400), Verdict.FINAL),
        (answered(400, "BadDigest"), Verdict.TRANSIENT),
        (answered(400, "RequestTimeout"), Verdict.TRANSIENT),
        (answered(429), Verdict.TRANSIENT),
        (answered(503, "SlowDown"), Verdict.TRANSIENT),
        (answered(501), Verdict.FINAL),
        (ClientPayloadError(), Verdict.TRANSIENT),
        (TimeoutError(), Verdict.TRANSIENT),
        (ConnectionResetError(), Verdict.TRANSIENT),
        (lost, Verdict.TRANSIENT),
        (ValueError("bad bucket name"), Verdict.FINAL),
        (json.JSONDecodeError("cut", "{", 1), Verdict.TRANSIENT),
    ):
        assert verdict(error) is expected, repr(error)


# Media.


@pytest.fixture(scope="module")
def image_folder(running: Proxy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images whose headers are long, late, or as most are; the same here and below s3://bucket/pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (700, 500, 3), dtype=np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    noise.save(folder / "plain.jpg", quality=95)
    noise.save(folder / "turned.jpg", quality=95, exif=turned)
    noise.save(folder / "profile.jpg", quality=95, icc_profile=os.urandom(300_000), exif=turned)
    noise.save(folder / "plain.png")
    late = folder / "late.png"
    noise.save(late, exif=turned)
    _move_exif_behind_the_pixels(late)
    noise.save(folder / "plain.webp", lossless=True)
    noise.save(folder / "plain.tif")
    noise.save(folder / "plain.gif")
    noise.save(folder / "plain.bmp")
    noise.resize((200, 100)).save(folder / "small.png")
    (folder / "text.jpg").write_bytes(b"no picture " * 20_000)
    (folder / "cut.jpg").write_bytes((folder / "plain.jpg").read_bytes()[:200])
    (folder / "empty.jpg").write_bytes(b"")
    for path in folder.iterdir():
        if path.stat().st_size:
            storage.upload(path, Url("s3://bucket/pictures") / path.name)
    fsspec.filesystem("s3", skip_instance_cache=True).pipe_file("bucket/pictures/empty.jpg", b"")
    return folder


def _move_exif_behind_the_pixels(path: Path) -> None:
    data = path.read_bytes()
    at = data.index(b"eXIf") - 4
    length = 12 + int.from_bytes(data[at : at + 4], "big")
    chunk, rest = data[at : at + length], data[:at] + data[at + length :]
    path.write_bytes(rest[:-12] + chunk + rest[-12:])


def outcome(root: Location, name: str, scratch: Path, *, beginnings: bool = True) -> MediaInfo | tuple[ReasonCode, str]:
    request = MediaRequest(root, name, MEDIA_IMAGE, MediaSettings(max_source_bytes=1_500_000).max_source_bytes)
    try:
        with open_media([root], beginnings=beginnings, scratch=scratch) as access:
            try:
                return probe(access.source(request), MEDIA_IMAGE, MediaSettings())
            except HeadTooShortError:
                return probe(access.complete(request), MEDIA_IMAGE, MediaSettings())
    except MediaError as error:
        return error.code, error.message


def test_probing_the_beginning_finds_what_probing_the_file_finds(
    proxy: Proxy, image_folder: Path, tmp_path: Path
) -> None:
    root = Url("s3://bucket/pictures")
    for path in sorted(image_folder.iterdir()):
        assert outcome(root, path.name, tmp_path) == outcome(image_folder, path.name, tmp_path), path.name
    assert isinstance(outcome(root, "late.png", tmp_path), MediaInfo)
    proxy.seen.clear()
    assert outcome(root, "plain.jpg", tmp_path) == outcome(root, "plain.jpg", tmp_path, beginnings=False)
    assert [seen.method for seen in proxy.seen] == ["HEAD", "GET", "HEAD", "GET"]


@pytest.mark.parametrize(
    "name",
    ["none.jpg", "", " ", "../corpus/0.png", "a/../../corpus/0.png", "/etc/passwd", "..", "a\0b", "https://host/a.jpg",
     "s3://bucket/corpus/0.png", "empty.jpg", "plain.bmp/..", "x/../plain.jpg", "./plain.jpg", "x" * 2000],
)  # fmt: skip
def test_names_mean_below_a_url_what_they_mean_below_a_folder(
    proxy: Proxy, image_folder: Path, tmp_path: Path, name: str
) -> None:
    (image_folder / "x").mkdir(exist_ok=True)
    result, expected = outcome(Url("s3://bucket/pictures"), name, tmp_path), outcome(image_folder, name, tmp_path)
    if isinstance(expected, MediaInfo):
        assert result == expected
    else:
        assert isinstance(result, tuple)
        assert result[0] is expected[0]


def test_urls_of_media_stay_below_the_root() -> None:
    root = Url("s3://bucket/images")
    assert media_url(root, "a b#%20?.jpg").url == "s3://bucket/images/a b#%20?.jpg"
    assert media_url(root, "s3://bucket/images/a.jpg").url == "s3://bucket/images/a.jpg"
    assert media_url(Url("https://host/i?sig=1"), "a b#1.jpg").url == "https://host/i/a%20b%231.jpg?sig=1"
    assert media_url(Url("https://host/i"), "https://host/i/a%20b.jpg").url == "https://host/i/a%20b.jpg"
    for name in ("s3://bucket/images2/a.jpg", "s3://bucket/images/../a.jpg", "gs://bucket/images/a.jpg"):
        with pytest.raises(MediaError, match="media root"):
            media_url(root, name)


def test_more_media_than_the_memory_budget_are_read_in_any_order_and_leave_no_file(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One item wants far more bytes than may be ahead, and asks from the last medium on; so does an unforeseen one."""
    monkeypatch.setattr(fetch, "_MAX_BYTES_AHEAD", 3000)
    root = Url("s3://bucket/held")
    (tmp_path / "file").write_bytes(os.urandom(1000))
    names = [f"{index}.mp4" for index in range(40)]
    for name in (*names, "unforeseen.mp4"):
        storage.upload(tmp_path / "file", root / name)
    requests = [MediaRequest(root, name, MEDIA_VIDEO, 1 << 20) for name in names]
    items = [requests[:30], requests[5:35], requests[35:], []]
    scratch = tmp_path / "scratch"
    with open_media([root], beginnings=False, scratch=scratch) as access:
        for item in access.prefetch(items, lambda item: item):
            unforeseen = MediaRequest(root, "unforeseen.mp4", MEDIA_VIDEO, 1 << 20)
            for each in [*reversed(item), unforeseen]:
                assert access.source(each).open().read() == (tmp_path / "file").read_bytes()
        assert list(scratch.iterdir()) == []
    assert not scratch.exists()


def test_a_video_below_a_url_can_be_a_list_of_frames_but_not_a_folder(proxy: Proxy, tmp_path: Path) -> None:
    root = Url("s3://bucket/frames")
    long_header = b"\xff\xd8" + 3 * (b"\xff\xfe\xff\xff" + bytes(0xFFFD))
    for index in range(3):
        Image.new("RGB", (90, 60), (80 * index, 0, 0)).save(tmp_path / "frame.jpg")
        (tmp_path / "frame.jpg").write_bytes(long_header + (tmp_path / "frame.jpg").read_bytes()[2:])
        storage.upload(tmp_path / "frame.jpg", root / f"clip/{index}.jpg")
    frames = Annotation(turns=[], videos=[MediaItem("x", frames=("clip/0.jpg", "clip/1.jpg", "clip/2.jpg"))])
    folder = Annotation(turns=[], videos=[MediaItem("clip")])
    with open_media([root], beginnings=True, scratch=tmp_path / "scratch") as access:
        (medium,), problems = probe_media(frames, root, MediaSettings(), {}, access)
        assert (medium.grid.t, medium.second_per_grid_t, problems) == (2, 1.0, [])
        media, problems = probe_media(folder, root, MediaSettings(), {}, access)
        assert (media, [problem.code.value for problem in problems]) == ([], ["unsupported_media"])
    with open_media([root], beginnings=False, scratch=tmp_path / "scratch") as access:
        assert check_media([medium], root, MediaSettings(), {}, access) == []


def test_media_of_the_next_items_are_prefetched(proxy: Proxy, tmp_path: Path) -> None:
    requests = [MediaRequest(CORPUS, f"{index}.png", MEDIA_IMAGE, 1 << 20) for index in range(6)]
    with open_media([CORPUS], beginnings=True, scratch=tmp_path) as access:
        items = access.prefetch([[each] for each in requests], lambda item: item)
        access.source(next(items)[0])
        deadline = time.monotonic() + 60
        while len({seen.key for seen in proxy.seen if seen.method == "GET"}) < len(requests):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_medium_of_many_samples_is_downloaded_once_per_chunk_and_once_per_shard(
    proxy: Proxy, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    records = [{"id": n, "image": f"{n % 3}.png", "conversations": turn("<image>")} for n in range(60)]
    (tmp_path / "a.json").write_text(json.dumps(records))
    (source,) = find_sources(str(tmp_path / "a.json"), registry=None, media_root=CORPUS, media=MediaSettings())
    request = BuildRequest(
        sources=(source,), out=tmp_path / "out", settings=BuildSettings(max_length=256), model=str(tiny_checkpoint),
        max_rejected=Fraction(0),
    )  # fmt: skip
    proxy.seen.clear()
    assert build(request, SerialEngine()).counts.num_packed == 60
    fetched = sorted(seen.key for seen in proxy.seen if seen.method == "GET" and seen.key.endswith(".png"))
    assert fetched == [f"bucket/corpus/{index}.png" for index in range(3) for _ in ("scan", "write")]


# Annotations.


def test_annotations_of_every_kind_are_read_by_url_glob_and_registry(
    proxy: Proxy, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq

    records = [{"id": str(index), "conversations": turn(f"Question {index}?")} for index in range(9)]
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.json").write_text(json.dumps(records[:3]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, records[3:6])).encode()))
    pq.write_table(pa.Table.from_pylist(records[6:]), folder / "c.parquet")
    for path in folder.iterdir():
        storage.upload(path, Url("s3://bucket/kinds/deep") / path.name)
    (tmp_path / "here.toml").write_text('[set]\nannotation_path = "in/*"\nmedia_root = "in"\n')
    (tmp_path / "there.toml").write_text(
        '[set]\nannotation_path = "s3://bucket/kinds/**/*.*"\nmedia_root = "s3://bucket/kinds"\n'
    )

    def built(expression: str, registry: str | None, out: str) -> dict[str, bytes]:
        path = None if registry is None else tmp_path / registry
        sources = find_sources(expression, registry=path, media_root=None, media=MediaSettings())
        request = BuildRequest(
            sources=tuple(sources), out=tmp_path / out, settings=BuildSettings(), model=str(tiny_checkpoint),
            max_rejected=Fraction(0),
        )  # fmt: skip
        build(request, SerialEngine())
        return local_contents(tmp_path / out)

    expected = built("set", "here.toml", "one")
    assert built("set", "there.toml", "two") == expected
    by_glob = built("s3://bucket/kinds/*/*", None, "three")
    assert json.loads(by_glob["manifest.json"])["inputs"][0]["dataset"] == "kinds"
    assert [file["file"] for file in json.loads(by_glob["manifest.json"])["inputs"][0]["files"]] == [
        "a.json", "b.jsonl.gz", "c.parquet",
    ]  # fmt: skip
    code, output = run("datasets", "--registry", str(tmp_path / "there.toml"))
    assert code == 0
    assert "ready: s3://bucket/kinds/deep/a.json" in output


def test_a_changed_annotation_file_is_downloaded_again(proxy: Proxy, tiny_checkpoint: Path, tmp_path: Path) -> None:
    path, url = tmp_path / "a.jsonl", Url("s3://bucket/changing/a.jsonl")
    for answer in ("Red.", "Blue"):
        path.write_text(json.dumps({"conversations": turn("Colour?", answer)}))
        storage.upload(path, url)
        build(request_for(tmp_path / "out", tiny_checkpoint, annotations=url.url), SerialEngine())
        fresh = tmp_path / answer
        build(request_for(fresh, tiny_checkpoint, annotations=str(path)), SerialEngine())
        assert local_contents(tmp_path / "out") == local_contents(fresh)


@pytest.mark.parametrize("deep", [False, True])
def test_validate_reports_the_same_of_a_url_as_of_the_file(proxy: Proxy, corpus_file: Path, deep: bool) -> None:
    proxy.rule = seeded(3, 0.1)

    def report(file: Location) -> Any:
        request = ValidateRequest(
            files=(file,), media_root=None, deep=deep, rejects=None, fixed=None, reserved="reject",
            media=MediaSettings(),
        )  # fmt: skip
        return validate(request, SerialEngine())

    remote, local = report(CORPUS / "annotations.jsonl"), report(corpus_file)
    assert remote.text() == local.text().replace(str(corpus_file), f"{CORPUS}/annotations.jsonl")
    assert remote.num_rejected > 0


# Looking at finished sets.


def test_verify_show_and_report_read_sets_behind_urls(
    proxy: Proxy, finished: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    out = Url("s3://bucket/looked-at")
    for path in finished.iterdir():
        if path.is_file():
            storage.upload(path, out / path.name)
    proxy.rule = seeded(5, 0.1)
    model = ["--model", str(tiny_checkpoint)]
    for arguments in (["verify", "{}", "--workers", "1"], ["show", "{}", "--bin", "0", *model]):
        remote, local = (
            CliRunner().invoke(main, [argument.format(location) for argument in arguments])
            for location in (out, finished)
        )
        assert (remote.exit_code, remote.stdout) == (0, local.stdout.replace(str(finished), str(out)))
    code, _ = run("report", out.url, "--out", str(tmp_path / "page.html"), *model)
    run("report", str(finished), "--out", str(tmp_path / "local.html"), *model)
    assert code == 0
    page, expected = ((tmp_path / name).read_text() for name in ("page.html", "local.html"))
    # The command in the page names the URL.
    assert page.count(str(out)) == 1
    assert page.replace(str(out), finished.name).replace(out.name, finished.name) == expected
    proxy.reset()
    storage.remove(out / shard_name(1))
    code, output = run("verify", out.url, "--workers", "1")
    assert code == 1
    assert f"{shard_name(1)}: the shard cannot be read" in output


# Single requests.


def test_an_upload_damaged_in_transit_is_repeated(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.writing._opaque_tags", set())
    path = tmp_path / "file"
    path.write_bytes(os.urandom(20 << 20))
    proxy.rule = lambda method, key, earlier: "damage" if method == "PUT" and earlier == 0 else None
    storage.upload(path, Url("s3://bucket/damaged"))
    assert storage.read(Url("s3://bucket/damaged")) == path.read_bytes()
    assert sum(seen.fault == "damage" for seen in proxy.seen) > 0


def test_the_first_upload_is_read_back_if_etags_are_not_digests(
    proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.writing._opaque_tags", set())
    (tmp_path / "file").write_bytes(os.urandom(1000))
    proxy.rule = lambda method, key, earlier: "opaque"
    for name in ("first", "second"):
        storage.upload(tmp_path / "file", Url("s3://bucket/encrypted") / name)
    assert [(seen.method, seen.key.rpartition("/")[2]) for seen in proxy.seen] == [
        ("PUT", "first"), ("HEAD", "first"), ("GET", "first"), ("PUT", "second"), ("HEAD", "second"),
    ]  # fmt: skip


def test_a_task_that_runs_twice_uploads_its_shard_and_never_fails(proxy: Proxy, tmp_path: Path) -> None:
    output = open_output(Url("s3://bucket/two"), tmp_path)
    (tmp_path / "shard").write_bytes(b"the same bytes")
    first = output.put("shard")
    assert list(tmp_path.iterdir()) == []
    assert output.put("shard") == first
    assert storage.read(Url("s3://bucket/two/shard")) == b"the same bytes"
    assert proxy.stored() == ["two/shard"]


def test_a_large_upload_repeats_only_the_part_that_failed(proxy: Proxy, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(20 << 20))
    proxy.rule = lambda method, key, earlier: "slowdown" if method == "PUT" and earlier == 0 else None
    storage.upload(path, Url("s3://bucket/large"))
    assert storage.read(Url("s3://bucket/large")) == path.read_bytes()
    assert sum(seen.query == "uploads" for seen in proxy.seen) == 1


def test_downloads_are_complete_or_absent(proxy: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.reading.PIECE_BYTES", 1000)
    data = storage.read(CORPUS / "annotations.jsonl")
    proxy.rule = lambda method, key, earlier: "error" if len(proxy.seen) > 4 else None
    with pytest.raises(storage.StorageError):
        storage.download(CORPUS / "annotations.jsonl", tmp_path / "a")
    assert list(tmp_path.iterdir()) == []
    proxy.rule = seeded(1, 0.3)
    storage.download(CORPUS / "annotations.jsonl", tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == data


def test_a_build_in_memory_equals_a_local_one(corpus_file: Path, finished: Path, tiny_checkpoint: Path) -> None:
    """``memory://``: any file system that fsspec knows, without a server."""
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    for path in corpus_file.parent.iterdir():
        memory.pipe_file(f"/corpus/{path.name}", path.read_bytes())
    out = Url("memory://shards/set")
    shutil.rmtree(WorkFolder(out)._root, ignore_errors=True)
    build(request_for(out, tiny_checkpoint, annotations="memory://corpus/annotations.jsonl"), SerialEngine())
    assert remote_contents(out) == local_contents(finished)
    memory.store.clear()


# URLs.


def test_urls_never_show_passwords_or_signatures() -> None:
    assert str(Url("s3://key:secret@bucket/a")) == "s3://***@bucket/a"
    assert repr(Url("s3://key:secret@bucket/a")) == "Url('s3://***@bucket/a')"
    assert str(Url("https://host/a?X-Amz-Signature=abc")) == "https://host/a?***"
    text = "cannot connect to 'https://user:pw@host/a?sig=1': reset"
    assert without_secrets(text) == "cannot connect to 'https://***@host/a?***': reset"
    assert str(Url("hf://datasets/org/name@main/a.jsonl")) == "hf://datasets/org/name@main/a.jsonl"
    assert str(Url("s3://bucket/what?.jpg")) == "s3://bucket/what?.jpg"


def test_urls_are_distinguished_from_paths() -> None:
    assert parse_location("s3://bucket/a/") == Url("s3://bucket/a")
    assert parse_location("simplecache::s3://bucket/a").__class__ is Url
    assert parse_location("file:///data/a") == Path("/data/a")
    assert parse_location("data/a:b") == Path("data/a:b")
    files = [Url("s3://bucket/a/x.jsonl"), Url("s3://bucket/a/b/y.jsonl")]
    assert names_below_common_folder(files) == ("x.jsonl", "b/y.jsonl")
    assert names_below_common_folder([Path("/data/a.jsonl"), files[0]]) == ("a.jsonl", "s3://bucket/a/x.jsonl")


def test_local_roots_need_no_downloads(tmp_path: Path) -> None:
    with open_media([tmp_path, tmp_path / "a"], beginnings=True, scratch=tmp_path / "scratch") as access:
        assert isinstance(access, LocalMedia)
    with pytest.raises(ConfigError, match="is not a folder"):
        find_sources(__file__, registry=None, media_root=tmp_path / "none", media=MediaSettings())


# The commands of the page.


def test_the_commands_of_the_page_about_object_storage(
    proxy: Proxy, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stores that have no server here stand in the same bucket."""
    monkeypatch.chdir(tmp_path)
    typed.prepare_folder(tiny_checkpoint)
    Image.new("RGB", (60, 40), "red").save("red.png")
    record = json.dumps({"image": "red.png", "conversations": turn("<image>Which colour?", "Red.")})
    Path("annotations.jsonl").write_text(record)
    Path("part.jsonl.gz").write_bytes(gzip.compress(record.encode()))
    stored = {
        "annotations.jsonl": ["mp_doc/annotations.jsonl"],
        "part.jsonl.gz": ["cambrian/part-0.jsonl.gz", "cambrian/part-1.jsonl.gz"],
        "red.png": ["mp_doc/images/red.png", "cambrian/images/red.png", "name/images/red.png"],
    }
    for path, names in stored.items():
        for name in names:
            storage.upload(Path(path), Url(f"s3://bucket/{name}"))
    here = {
        "gs://images/cambrian": "s3://bucket/cambrian/images",
        "hf://datasets/org/name/images": "s3://bucket/name/images",
    }
    environment = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "XDG_"))}
    with guide("object_storage.md") as page:
        for command in page.take():
            typed.run([here.get(word, word) for word in command.words], environment=environment)
    counts = read_manifest(Path("shards/cambrian")).counts
    assert (counts.num_packed, counts.num_images) == (2, 2)
