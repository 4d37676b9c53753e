"""Tests of complete builds: the balance, exact pixels, determinism, resuming after a kill, and wrong use."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import time
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset as wds
import zstandard
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

import prep.build.pipeline
from prep.annotations.registry import find_sources
from prep.build.metrics import read_metrics
from prep.build.pipeline import BuildRequest, build
from prep.build.scan import scan_chunk
from prep.build.work import WorkFolder
from prep.build.write import write_shard
from prep.engines import LocalEngine, SerialEngine
from schemas.bins import shard_name
from schemas.errors import ConfigError, VlprepError
from schemas.manifest import METRICS_FILE, WORK_FOLDER, Manifest
from schemas.pixels import decode_residuals
from schemas.settings import BuildSettings, MediaSettings
from storage.bins import parse_bin
from storage.shard_set import read_manifest
from tests.prep.commands import Command
from tests.prep.corpus import turn, write_corpus
from tests.prep.test_images import reference_pixel_values

pytestmark = pytest.mark.slow

SETTINGS = BuildSettings(max_length=1200, shard_bytes=1_500_000)


def request_for(annotations: Path, out: Path, model: Path, settings: BuildSettings = SETTINGS) -> BuildRequest:
    sources = find_sources(str(annotations), registry=None, media_root=None, media=settings.media)
    return BuildRequest(sources=tuple(sources), out=out, settings=settings, model=str(model), max_rejected=Fraction(1))


def contents(folder: Path) -> dict[str, bytes]:
    """The set of shards; ``build_metrics.json`` holds times and is not part of it."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != METRICS_FILE)
    return {path.name: path.read_bytes() for path in files}


def ledger(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / "samples.parquet").to_pylist()
    return rows


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, corpus: tuple[Path, dict[str, str]], tiny_checkpoint: Path) -> Path:
    out = tmp_path_factory.mktemp("built")
    build(request_for(corpus[0], out, tiny_checkpoint), SerialEngine())
    return out


def test_every_annotation_is_packed_or_rejected_with_its_code_and_place(
    built: Path, corpus: tuple[Path, dict[str, str]]
) -> None:
    rows = ledger(built)
    lines = corpus[0].read_text().splitlines()
    assert len(rows) == len(lines)
    statuses = Counter(row["status"] for row in rows)
    counts = read_manifest(built).counts
    assert (counts.num_packed, counts.num_rejected, counts.num_not_sampled) == (24, 5, 0)
    assert statuses == {"packed": 24, "rejected": 5}
    for row in rows:
        expected = corpus[1].get(row["id"] or "", "bad_json" if row["id"] is None else None)
        assert row["codes"] == ([expected] if expected else [])
        assert (row["message"] is None) == (expected is None)
        if row["id"] is not None:
            assert json.loads(lines[row["line"] - 1])["id"] == row["id"]
    assert {row["video_backend"] for row in rows if row["codes"] == []} == {None, "pyav"}


def test_tables_manifest_and_bins_agree(built: Path) -> None:
    manifest = read_manifest(built)
    table = pq.read_table(built / "bins.parquet").to_pylist()
    assert len(manifest.shards) > 1
    packed = {(row["bin"], row["slot"]): row for row in ledger(built) if row["status"] == "packed"}
    for row in table:
        data = (built / shard_name(row["shard"])).read_bytes()[row["offset"] : row["offset"] + row["num_bytes"]]
        parsed = parse_bin(data, row["bin"], where="test")
        lengths = np.diff(parsed.cu_seqlens)
        assert parsed.input_ids.size == row["num_tokens"] <= SETTINGS.max_length
        assert int((parsed.labels != -100).sum()) == row["num_targets"]
        assert int((lengths**2).sum()) == row["sum_squared_lengths"]
        assert (parsed.position_ids[:, parsed.cu_seqlens[:-1]] == 0).all()
        for slot, (reference, length) in enumerate(zip(parsed.samples(), lengths)):
            sample = packed.pop((row["bin"], slot))
            assert (sample["id"], sample["record"], sample["num_tokens"]) == (reference.id, reference.record, length)
    assert not packed
    assert manifest.counts.num_tokens == sum(row["num_tokens"] for row in table)


@pytest.mark.parametrize("codec", ["zstd", "raw"])
def test_plain_webdataset_reads_the_shards_and_pixels_equal_the_reference_processor(
    tmp_path: Path, tiny_checkpoint: Path, codec: str
) -> None:
    """From the tar to the reference's pixel_values, computed as the format's description defines it."""
    (tmp_path / "in").mkdir()
    rng = np.random.default_rng(0)
    records = []
    for index, mode in enumerate(["RGB", "L", "RGBA", "P", "CMYK"]):
        colours = Image.fromarray(rng.integers(0, 256, (5, 5, 4), dtype=np.uint8), "RGBA").resize(
            (150 + 40 * index, 200)
        )
        image = colours if mode == "RGBA" else colours.convert("RGB").convert(mode)
        image.save(tmp_path / "in" / f"{index}.tif")
        records.append({"id": index, "image": f"{index}.tif", "conversations": turn("<image>")})
    (tmp_path / "in" / "a.json").write_text(json.dumps(records))
    settings = replace_settings(pixels=codec)
    build(request_for(tmp_path / "in" / "a.json", tmp_path / "out", tiny_checkpoint, settings), SerialEngine())

    processor = Qwen2VLImageProcessorPil
    seen = 0
    for shard in sorted((tmp_path / "out").glob("*.tar")):
        for members in wds.WebDataset(str(shard), shardshuffle=False).decode():
            encoded = members["pixels.zst"] if codec == "zstd" else members["pixels.raw"]
            pixels = np.frombuffer(zstandard.decompress(encoded) if codec == "zstd" else encoded, np.uint8)
            at = 0
            for (_, h, w), kind, reference in zip(
                members["grid_thw.npy"], members["media_type.npy"], members["samples.json"]
            ):
                assert kind == 0
                frame = pixels[at : (at := at + 3 * 196 * h * w)].reshape(3, 14 * h, 14 * w)
                if codec == "zstd":
                    frame = decode_residuals(frame)
                with Image.open(tmp_path / "in" / f"{reference['id']}.tif") as image:
                    expected, _ = reference_pixel_values(image)
                mean, std = (np.float32(v).reshape(3, 1, 1) for v in (processor.image_mean, processor.image_std))
                values = ((frame * (1 / 255)).astype(np.float32) - mean) / std
                patches = values.reshape(3, h // 2, 2, 14, w // 2, 2, 14).transpose(1, 4, 2, 5, 0, 3, 6)
                rows = np.repeat(patches[:, :, :, :, :, None], 2, axis=5).reshape(h * w, 1176)
                assert np.abs(rows - expected).max() == 0.0
                seen += 1
            assert at == pixels.size
    assert seen == 5


def replace_settings(**changes: Any) -> BuildSettings:
    values = {name: getattr(SETTINGS, name) for name in SETTINGS.__struct_fields__}
    return BuildSettings(**{**values, **changes})


def test_bytes_are_the_same_for_any_number_of_workers_and_from_another_folder(
    built: Path, corpus: tuple[Path, dict[str, str]], tmp_path: Path, tiny_checkpoint: Path
) -> None:
    shutil.copytree(corpus[0].parent, tmp_path / "elsewhere")
    with LocalEngine(2) as engine:
        build(request_for(tmp_path / "elsewhere" / corpus[0].name, tmp_path / "out", tiny_checkpoint), engine)
    assert contents(tmp_path / "out") == contents(built)


def test_a_finished_build_does_nothing_and_a_damaged_one_is_repaired(
    built: Path,
    corpus: tuple[Path, dict[str, str]],
    tmp_path: Path,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    shutil.copytree(built, out)
    request = request_for(corpus[0], out, tiny_checkpoint)
    with monkeypatch.context() as patch:
        patch.setattr(prep.build.pipeline, "scan_chunk", None)
        patch.setattr(prep.build.pipeline, "write_shard", None)
        assert build(request, SerialEngine()) == read_manifest(built)
    (out / shard_name(0)).unlink()
    build(request, SerialEngine())
    assert contents(out) == contents(built)


class Interrupted(Exception):
    """Simulates a kill."""


@pytest.mark.parametrize("calls", [0, 1, 2])
@pytest.mark.parametrize("step", ["scan_chunk", "write_shard"])
def test_an_interrupted_build_resumes_and_ends_with_the_same_bytes(
    built: Path,
    corpus: tuple[Path, dict[str, str]],
    tmp_path: Path,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: str,
    calls: int,
) -> None:
    monkeypatch.setattr("prep.annotations.json_records.CHUNK_RECORDS", 7)
    request = request_for(corpus[0], tmp_path / "out", tiny_checkpoint)
    original = {"scan_chunk": scan_chunk, "write_shard": write_shard}[step]
    done = 0

    def dying(task: Any) -> Any:
        nonlocal done
        if done == calls:
            raise Interrupted
        done += 1
        return original(task)

    with monkeypatch.context() as patch:
        patch.setattr(prep.build.pipeline, step, dying)
        with pytest.raises(Interrupted):
            build(request, SerialEngine())
    assert not (tmp_path / "out" / "manifest.json").exists()
    build(request, SerialEngine())
    actual, expected = contents(tmp_path / "out"), contents(built)
    # The row groups of the ledger depend on the chunks, which this test makes smaller; its rows are the same.
    assert ledger(tmp_path / "out") == ledger(built)
    assert {name: actual[name] for name in actual if name.endswith(".tar")} == {
        name: expected[name] for name in expected if name.endswith(".tar")
    }


def test_shards_of_an_older_version_are_rewritten(
    tmp_path: Path, corpus: tuple[Path, dict[str, str]], tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = request_for(corpus[0], tmp_path / "out", tiny_checkpoint)
    written: list[dict[str, int]] = []
    for version in ("old", "old", "new"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(prep.build.pipeline, "SHARD_VERSION", version)
            patch.setattr(prep.build.pipeline, "seal", stop)
            build(request, SerialEngine())
        written.append({path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")})
    assert written[0] == written[1]
    assert all(written[1][name] < time_ns for name, time_ns in written[2].items())


def stop(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def build_arguments(corpus: Path, out: Path, model: Path, workers: int) -> list[object]:
    """The command line of what :func:`request_for` asks for."""
    options = ["--model", model, "--max-length", SETTINGS.max_length, "--shard-bytes", SETTINGS.shard_bytes]
    return ["build", corpus, "--out", out, *options, "--workers", workers]


def started(arguments: list[object], out: Path, folder: Path, shards: int = 1) -> Command:
    """Start the command; return once it has written some shards and is about to write the next."""
    command = Command(*arguments, folder=folder)
    while command.poll() is None and not (out / shard_name(shards - 1)).exists():
        time.sleep(0.002)
    return command


def leftovers(out: Path) -> list[Path]:
    return [path for path in out.rglob("*") if path.name.endswith(".tmp")]


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_build_that_is_killed_or_stopped_resumes(
    built: Path,
    corpus: tuple[Path, dict[str, str]],
    tmp_path: Path,
    tiny_checkpoint: Path,
    kind: signal.Signals,
    workers: int,
) -> None:
    out = tmp_path / "out"
    command = started(build_arguments(corpus[0], out, tiny_checkpoint, workers), out, tmp_path)
    command.send(kind)
    command.wait()
    if kind is not signal.SIGKILL and command.returncode != 0:
        assert command.returncode == 130
        assert "rerun the same command to continue" in command.errors
        assert "Traceback" not in command.errors
        assert leftovers(out) == []
    # One worker more starts two processes; after a kill, which leaves most behind, it is the very same command.
    again = workers if kind is signal.SIGKILL else 1
    assert Command(*build_arguments(corpus[0], out, tiny_checkpoint, again), folder=tmp_path).wait() == 0
    assert contents(out) == contents(built)
    assert leftovers(out) == []


def test_a_second_build_into_the_same_folder_names_the_process_that_locks_it(
    corpus: tuple[Path, dict[str, str]], tmp_path: Path, tiny_checkpoint: Path
) -> None:
    request = request_for(corpus[0], tmp_path / "out", tiny_checkpoint)
    message = f"is being built by process {os.getpid()} on "
    with WorkFolder(tmp_path / "out").locked(), pytest.raises(VlprepError, match=message):
        build(request, SerialEngine())
    assert build(request, SerialEngine()).counts.num_packed == 24


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, code: int
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with WorkFolder(tmp_path / "out").locked():
        assert "has no locks" in caplog.text and str(tmp_path / "out") in caplog.text


def test_another_failure_to_lock_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", fail)
    with (
        pytest.raises(ConfigError, match="cannot be locked: Input/output error"),
        WorkFolder(tmp_path / "out").locked(),
    ):
        pass


def test_media_that_appear_later_are_found_with_retry_media(
    corpus: tuple[Path, dict[str, str]], tmp_path: Path, tiny_checkpoint: Path
) -> None:
    shutil.copytree(corpus[0].parent, tmp_path / "in")
    request = request_for(tmp_path / "in" / corpus[0].name, tmp_path / "out", tiny_checkpoint)
    assert build(request, SerialEngine()).counts.rejects_by_code["media_missing"] == 1
    shutil.copy(tmp_path / "in" / "0.png", tmp_path / "in" / "none.png")
    assert build(request, SerialEngine()).counts.rejects_by_code["media_missing"] == 1
    manifest = build(replace(request, retry_media=True), SerialEngine())
    assert "media_missing" not in manifest.counts.rejects_by_code
    assert manifest.counts.num_packed == 25
    assert manifest == build(replace(request, out=tmp_path / "fresh"), SerialEngine())
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_a_build_that_retries_media_may_be_killed_at_any_moment(
    corpus: tuple[Path, dict[str, str]], tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When a part is rebuilt, none of its files is used together with a file of the previous part."""
    shutil.copytree(corpus[0].parent, tmp_path / "in")
    request = request_for(tmp_path / "in" / corpus[0].name, tmp_path / "out", tiny_checkpoint)
    build(request, SerialEngine())
    shutil.copy(tmp_path / "in" / "0.png", tmp_path / "in" / "none.png")

    def killed(*_: Any, **__: Any) -> None:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr("prep.build.parts.pq.write_table", killed)
        with pytest.raises(Interrupted):
            build(replace(request, retry_media=True), SerialEngine())
    (tmp_path / "out" / WORK_FOLDER / "finished").unlink()  # another command has used the folder, say
    build(request, SerialEngine())
    build(replace(request, out=tmp_path / "fresh"), SerialEngine())
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_annotations_that_change_before_they_are_scanned_are_noticed(
    corpus: tuple[Path, dict[str, str]], tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new file has the same size and offsets: its records must not be taken for those of the old file."""
    shutil.copytree(corpus[0].parent, tmp_path / "in")
    annotations = tmp_path / "in" / corpus[0].name
    old = annotations.read_bytes()
    request = request_for(annotations, tmp_path / "out", tiny_checkpoint)

    def late(task: Any) -> Any:
        annotations.write_bytes(old.replace(b"Say something", b"Say naughting"))
        return scan_chunk(task)

    with monkeypatch.context() as patch:
        patch.setattr(prep.build.pipeline, "scan_chunk", late)
        with pytest.raises(ConfigError, match=r"annotations.jsonl changed while it was being read; run the command"):
            build(request, SerialEngine())
    annotations.write_bytes(old)
    build(request, SerialEngine())
    build(replace(request, out=tmp_path / "fresh"), SerialEngine())
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_another_tokenizer_in_the_same_place_is_used_by_the_next_build_of_a_process(
    corpus: tuple[Path, dict[str, str]], tmp_path: Path, tiny_checkpoint: Path
) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    request = request_for(corpus[0], tmp_path / "one", tmp_path / "model")
    first = build(request, SerialEngine())
    content = json.loads((tmp_path / "model" / "tokenizer.json").read_text())
    content["model"]["merges"] = content["model"]["merges"][:1000]
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(content))
    other = build(replace(request, out=tmp_path / "other"), SerialEngine())
    assert other.counts.num_tokens > first.counts.num_tokens
    assert other.fingerprints.tokenizer != first.fingerprints.tokenizer


def test_leftovers_of_a_finished_build_that_was_killed_are_removed_by_the_next(
    built: Path, corpus: tuple[Path, dict[str, str]], tmp_path: Path, tiny_checkpoint: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(built, out)
    (out / WORK_FOLDER / "write-0123").mkdir()
    (out / WORK_FOLDER / "spool").mkdir(exist_ok=True)
    (out / WORK_FOLDER / "spool" / "0123.jsonl").write_text("{}")
    build(request_for(corpus[0], out, tiny_checkpoint), SerialEngine())
    assert sorted(path.name for path in (out / WORK_FOLDER).iterdir()) == [
        "finished",
        "index",
        "inputs",
        "lock",
        "scan",
    ]


def test_one_more_dataset_scans_only_that_one(
    corpus: tuple[Path, dict[str, str]], tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(corpus[0], corpus[0].with_name("more.jsonl"))
    corpus[0].with_name("more.jsonl").write_text(corpus[0].read_text().replace("good-", "more-"))
    registry = tmp_path / "datasets.toml"
    registry.write_text(
        "".join(
            f'[{name}]\nannotation_path = "{corpus[0].with_name(file)}"\nmedia_root = "{corpus[0].parent}"\n'
            for name, file in (("one", corpus[0].name), ("two", "more.jsonl"))
        )
    )

    def sources(expression: str) -> Any:
        return tuple(find_sources(expression, registry=registry, media_root=None, media=SETTINGS.media))

    request = replace(request_for(corpus[0], tmp_path / "out", tiny_checkpoint), sources=sources("one"))
    build(request, SerialEngine())
    scanned = watch_scans(monkeypatch)
    build(replace(request, sources=sources("one,two")), SerialEngine())
    assert scanned == [corpus[0].with_name("more.jsonl")]


def watch_scans(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are scanned into parts from now on, in order."""
    scanned: list[Path] = []

    def watched(task: Any) -> Any:
        before = set(task.folder.glob("*.parquet"))
        result = scan_chunk(task)
        if set(task.folder.glob("*.parquet")) != before:
            scanned.append(task.file)
        return result

    monkeypatch.setattr(prep.build.pipeline, "scan_chunk", watched)
    return scanned


@pytest.mark.parametrize(
    "changes",
    [{"packer": "binpacking"}, {"seed": 7}, {"max_patches": 2000}, {"shard_bytes": 9_000_000}, {"pixels": "raw"}],
)
def test_what_only_the_plan_or_the_shards_depend_on_scans_nothing(
    built: Path,
    corpus: tuple[Path, dict[str, str]],
    tmp_path: Path,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
) -> None:
    out = tmp_path / "out"
    shutil.copytree(built, out)
    scanned = watch_scans(monkeypatch)
    request = request_for(corpus[0], out, tiny_checkpoint, replace_settings(**changes))
    build(request, SerialEngine())
    assert scanned == []
    build(replace(request, out=tmp_path / "fresh"), SerialEngine())
    assert scanned == [corpus[0]]
    assert contents(out) == contents(tmp_path / "fresh") != contents(built)


def test_other_media_settings_scan_only_the_records_that_they_touch(
    corpus: tuple[Path, dict[str, str]], tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four files in one build: of texts, images, videos, and of both."""
    records = [json.loads(line) for line in corpus[0].read_text().splitlines() if line.startswith('{"')]
    good = [record for record in records if record["id"].startswith("good")]
    kinds = {
        "texts": [record for record in good if not {"image", "images", "video", "videos"} & record.keys()],
        "images": [record for record in good if "image" in record],
        "videos": [record for record in good if "video" in record],
    }
    kinds["both"] = [kinds["images"][0], kinds["videos"][0]]
    assert all(kinds.values())
    (tmp_path / "in").mkdir()
    for kind, selected in kinds.items():
        (tmp_path / "in" / f"{kind}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in selected))
    registry = tmp_path / "datasets.toml"

    def request(root: Path = corpus[0].parent, out: str = "out", **changes: Any) -> BuildRequest:
        settings = replace_settings(**changes)
        registry.write_text(f'[all]\nannotation_path = "{tmp_path}/in/*.jsonl"\nmedia_root = "{root}"\n')
        sources = tuple(find_sources("all", registry=registry, media_root=None, media=settings.media))
        return replace(request_for(corpus[0], tmp_path / out, tiny_checkpoint, settings), sources=sources)

    scanned = watch_scans(monkeypatch)

    def scanned_by(**changes: Any) -> list[str]:
        scanned.clear()
        build(request(**changes), SerialEngine())
        return [path.stem for path in scanned]

    media = SETTINGS.media
    assert scanned_by() == ["both", "images", "texts", "videos"]
    smaller = msgspec.structs.replace(media, max_pixels=100_000)
    assert scanned_by(media=smaller) == ["both", "images"]
    assert scanned_by(media=msgspec.structs.replace(media, video_max_frames=6)) == ["both", "videos"]
    assert scanned_by(media=msgspec.structs.replace(media, base_interval=1.0)) == ["both", "videos"]
    assert scanned_by(media=msgspec.structs.replace(media, decode_timeout=59.0)) == ["both", "images", "videos"]
    assert scanned_by() == []
    shutil.copytree(corpus[0].parent, tmp_path / "elsewhere")
    assert scanned_by(root=tmp_path / "elsewhere") == ["both", "images", "videos"]
    assert scanned_by(media=smaller) == []
    assert scanned_by(media=smaller, out="fresh") == ["both", "images", "texts", "videos"]
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


def test_another_max_length_plans_again_without_scanning(
    built: Path,
    corpus: tuple[Path, dict[str, str]],
    tmp_path: Path,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    shutil.copytree(built, out)
    stamps = {path: path.stat().st_mtime_ns for path in (out / WORK_FOLDER / "scan").iterdir()}
    request = request_for(corpus[0], out, tiny_checkpoint, replace_settings(max_length=4096))
    manifest = build(request, SerialEngine())
    assert {path: path.stat().st_mtime_ns for path in (out / WORK_FOLDER / "scan").iterdir()} == stamps
    assert manifest.counts.rejects_by_code.get("too_long") is None
    assert manifest.counts.num_packed == 25
    fresh = build(replace(request, out=tmp_path / "fresh"), SerialEngine())
    assert fresh == manifest
    assert contents(out) == contents(tmp_path / "fresh")


def test_shares_are_exact_and_what_is_not_taken_is_in_the_ledger(
    corpus: tuple[Path, dict[str, str]], tmp_path: Path, tiny_checkpoint: Path
) -> None:
    registry = tmp_path / "datasets.toml"
    registry.write_text(
        "".join(
            f'[{name}]\nannotation_path = "{corpus[0]}"\nmedia_root = "{corpus[0].parent}"\n'
            for name in ("half", "twice")
        )
    )
    sources = find_sources("half%50,twice%200", registry=registry, media_root=None, media=SETTINGS.media)
    request = replace(request_for(corpus[0], tmp_path / "out", tiny_checkpoint), sources=tuple(sources))
    counts = build(request, SerialEngine()).counts
    rows = ledger(tmp_path / "out")
    per_dataset = {name: Counter(row["status"] for row in rows if row["dataset"] == name) for name in ("half", "twice")}
    assert per_dataset["half"]["not_sampled"] == 29 - 29 // 2
    assert per_dataset["half"].total() == 29
    assert per_dataset["twice"] == {"packed": 48, "rejected": 10}
    assert counts.balances()
    assert counts.num_annotations == 29 + 58
    not_sampled = [row for row in rows if row["status"] == "not_sampled"]
    assert all(row["bin"] is None and row["line"] for row in not_sampled)


def test_a_medium_that_vanishes_after_the_scan_costs_its_sample_and_nothing_else(
    corpus: tuple[Path, dict[str, str]], tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(corpus[0].parent, tmp_path / "in")
    request = request_for(tmp_path / "in" / corpus[0].name, tmp_path / "out", tiny_checkpoint)

    def vanishing(task: Any) -> Any:
        (tmp_path / "in" / "2.png").unlink(missing_ok=True)
        return write_shard(task)

    monkeypatch.setattr(prep.build.pipeline, "write_shard", vanishing)
    counts = build(request, SerialEngine()).counts
    lost = [
        row for row in ledger(tmp_path / "out") if row["codes"] == ["media_missing"] and row["id"].startswith("good")
    ]
    assert len(lost) > 0
    assert counts.num_packed == 24 - len(lost)
    bins = Counter(row["bin"] for row in ledger(tmp_path / "out") if row["status"] == "packed")
    for row in ledger(tmp_path / "out"):
        assert row["status"] != "packed" or row["slot"] < bins[row["bin"]]


def test_nothing_stored_names_this_machine(built: Path, corpus: tuple[Path, dict[str, str]]) -> None:
    needles = [str(corpus[0].parent), str(built), str(Path.home())]
    for name, data in contents(built).items():
        for needle in needles:
            assert needle.encode() not in data, name


def test_too_many_rejects_stop_the_build_before_it_writes(
    corpus: tuple[Path, dict[str, str]], tmp_path: Path, tiny_checkpoint: Path
) -> None:
    request = replace(request_for(corpus[0], tmp_path / "out", tiny_checkpoint), max_rejected=Fraction(1, 10))
    with pytest.raises(VlprepError, match=r"4 of 29 annotations are rejected, more than --max-rejected 10\.00%"):
        build(request, SerialEngine())
    assert not (tmp_path / "out").exists()


def test_a_file_without_one_good_record_is_an_error_and_starts_no_tokenizer(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text("{}\n{}\n")
    monkeypatch.setattr("prep.build.scan.load_tokenizer", None)
    with pytest.raises(VlprepError, match="none of 2 annotations can be packed"):
        build(request_for(tmp_path / "a.jsonl", tmp_path / "out", tiny_checkpoint), SerialEngine())


def test_wrong_checkpoints_and_folders_are_named(
    corpus: tuple[Path, dict[str, str]], tmp_path: Path, tiny_checkpoint: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    shutil.copytree(tiny_checkpoint, tmp_path / "other", ignore=shutil.ignore_patterns("*.safetensors"))
    text = (tmp_path / "other" / "tokenizer.json").read_text()
    (tmp_path / "other" / "tokenizer.json").write_text(text.replace("<|im_end|>", "<|the_end|>"))
    request = request_for(corpus[0], tmp_path / "out", tiny_checkpoint)
    for changes, part in [
        ({"model": str(tmp_path / "empty")}, "has no tokenizer.json"),
        ({"model": str(tmp_path / "other")}, "not the tokenizer of Qwen2.5-VL"),
        ({"model": "./nowhere"}, "neither a folder nor a hub id"),
        ({"out": tmp_path / "file" / "out"}, "cannot be written"),
    ]:
        with pytest.raises(ConfigError, match=part):
            build(replace(request, **changes), SerialEngine())  # type: ignore[arg-type]


def test_statistics_count_what_the_ledger_holds(built: Path) -> None:
    rows = [row for row in ledger(built) if row["status"] == "packed"]
    (statistics,) = read_manifest(built).statistics
    assert (statistics.num_annotations, statistics.num_packed, statistics.num_rejected) == (29, 24, 5)
    assert statistics.modalities == {"image": 12, "text": 6, "video": 6}
    lengths = sorted(row["num_tokens"] for row in rows)
    tokens = statistics.tokens
    assert tokens is not None
    assert (tokens.total, tokens.min, tokens.max) == (sum(lengths), lengths[0], lengths[-1])
    assert (tokens.p50, tokens.p90) == (lengths[11], lengths[21])  # ranks 0.5 * 24 and ceil(0.9 * 24)
    assert tokens.mean == pytest.approx(sum(lengths) / 24)


def test_times_are_measured_for_every_sample_and_stage(built: Path) -> None:
    metrics = read_metrics(built)
    assert list(metrics.stages_s) == ["scan", "plan", "write", "seal"]
    assert {name: times.num for name, times in metrics.samples.items()} == {
        "validate": 29,
        "probe": 28,  # all but the line that is not JSON
        "tokenize": 26,
        "decode": 25,
        "store": 24,
    }
    for times in metrics.samples.values():
        assert 0 < times.p50_s <= times.p90_s <= times.p99_s <= times.max_s
    assert metrics.counts == read_manifest(built).counts


def test_real_images_and_videos(qwen_demo: Path, tmp_path: Path, tiny_checkpoint: Path) -> None:
    """One box lies outside its image, whatever its coordinates are, so it is left as text."""
    settings = BuildSettings(media=MediaSettings(boxes="off"))
    manifest: Manifest = build(
        request_for(qwen_demo / "annotations.jsonl", tmp_path / "out", tiny_checkpoint, settings), SerialEngine()
    )
    assert (manifest.counts.num_packed, manifest.counts.num_rejected) == (6, 1)
    assert manifest.counts.rejects_by_code == {"media_missing": 1}


def test_images_stay_with_their_samples_after_a_stop_between_question_and_answer(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    """Images of the same size: a worker that continued after a stop would give each sample the previous image."""
    rng = np.random.default_rng(0)
    records = []
    for index in range(64):
        colours = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        colours.resize((400, 400), Image.Resampling.NEAREST).save(tmp_path / f"{index}.png", compress_level=1)
        records.append({"id": index, "image": f"{index}.png", "conversations": turn("<image>")})
    annotations = tmp_path / "a.json"
    annotations.write_text(json.dumps(records))
    build(request_for(annotations, tmp_path / "undisturbed", tiny_checkpoint), SerialEngine())
    for kind in (signal.SIGINT, signal.SIGTERM):
        out = tmp_path / kind.name
        command = started(build_arguments(annotations, out, tiny_checkpoint, 2), out, tmp_path, shards=3)
        command.send(kind)
        assert command.wait() in (0, 130)
        assert Command(*build_arguments(annotations, out, tiny_checkpoint, 1), folder=tmp_path).wait() == 0
        assert contents(out) == contents(tmp_path / "undisturbed")


def test_a_refused_second_build_leaves_the_files_of_the_first_and_of_others(
    corpus: tuple[Path, dict[str, str]], tmp_path: Path, tiny_checkpoint: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / ".mine.tmp").write_text("")
    (out / "bins-backup.tar").write_text("")
    request = request_for(corpus[0], out, tiny_checkpoint)
    with WorkFolder(out).locked():
        (out / ".bins-00000.tar.tmp").write_text("being written")
        with pytest.raises(VlprepError, match="is being built by"):
            build(request, SerialEngine())
        assert (out / ".bins-00000.tar.tmp").exists()
    build(request, SerialEngine())
    assert (out / ".mine.tmp").exists()
    assert (out / "bins-backup.tar").exists()


def test_another_media_root_is_another_build(
    corpus: tuple[Path, dict[str, str]], tmp_path: Path, tiny_checkpoint: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (source,) = find_sources(str(corpus[0]), registry=None, media_root=tmp_path / "empty", media=SETTINGS.media)
    request = request_for(corpus[0], tmp_path / "out", tiny_checkpoint)
    wrong = build(replace(request, sources=(source,)), SerialEngine())
    assert wrong.counts.num_packed < 24
    assert build(request, SerialEngine()).counts.num_packed == 24
