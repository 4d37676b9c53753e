"""The three pixel codecs: exact round trips, or with JPEG a recorded drift, and fixed bytes."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from click.testing import CliRunner
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from prep.build.pipeline import build
from prep.cli import main
from prep.engines import LocalEngine, SerialEngine
from prep.inspect.show import save_frames
from prep.inspect.transcript import Transcriber
from prep.samples.media import Medium
from prep.samples.sample import EncodedSample
from prep.shards.codecs import PixelEncoder, require_storable
from prep.shards.drift import DRIFT_EVERY, DriftSums
from prep.shards.writer import ShardWriter
from schemas.annotation import SampleRef
from schemas.errors import ConfigError, MediaError, ShardError
from schemas.manifest import WORK_FOLDER
from schemas.qwen import Grid
from schemas.settings import BuildSettings
from storage.bins import parse_bin
from storage.pixels import decode_frames
from storage.shard_set import open_set, read_manifest
from tests.prep import finished as sets
from tests.prep.packed import packed_samples
from tests.prep.test_build import contents, ledger, request_for

JPEG = BuildSettings(max_length=1200, shard_bytes=4_000_000, pixels="jpeg", jpeg_quality=90)
MEMBER = {"zstd": "pixels.zst", "raw": "pixels.raw", "jpeg": "pixels.jpeg"}


def sample_of(media: list[tuple[int, Grid, NDArray[np.uint8]]]) -> EncodedSample:
    """A sample with media (kind, grid, frames) and arbitrary tokens."""
    ids = np.arange(8, dtype=np.int32)
    return EncodedSample(
        input_ids=ids,
        labels=np.full_like(ids, -100),
        position_ids=np.tile(ids, (3, 1)),
        grids=[grid for _, grid, _ in media],
        media_types=[kind for kind, _, _ in media],
        frames=[frame for _, _, frames in media for frame in frames],
        video_backend=None,
    )


def written(path: Path, codec: str, samples: list[EncodedSample], quality: int | None = None) -> tuple[bytes, Any]:
    """A shard with bin 7 only: its bytes, and its drift."""
    with ShardWriter(path, codec, quality) as writer:
        writer.write_bin(7, [(SampleRef("d", 3, "x"), sample) for sample in samples])
        writer.close()
    return path.read_bytes(), writer.drift


def test_bytes_reach_the_file_by_the_mebibyte(tmp_path: Path) -> None:
    """The page cache keeps small writes in small pages, which are slow to read. The size of the file jumps."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (1, 3, 280, 280), dtype=np.uint8)
    sample = sample_of([(0, Grid(1, 20, 20), frames)])
    sizes = {0}
    with ShardWriter(tmp_path / "bins-00000.tar", "raw") as writer:
        (file,) = tmp_path.iterdir()
        for index in range(40):
            writer.write_bin(index, [(SampleRef("d", 3, "x"), sample)])
            sizes.add(file.stat().st_size)
        writer.close()
    steps = np.diff(sorted(sizes))
    assert steps.size >= 2
    assert steps.min() >= 1 << 20


# Round trips

sides = st.integers(1, 3).map(lambda side: 2 * side)
media_shapes = st.lists(st.tuples(st.integers(0, 2), sides, sides), max_size=4)


@pytest.mark.parametrize("codec", ["zstd", "raw", "jpeg"])
@given(shapes=media_shapes, seed=st.integers(0, 99), quality=st.integers(1, 100))
@examples(max_examples=25, deadline=None)
def test_every_frame_is_read_back(
    codec: str, shapes: list[tuple[int, int, int]], seed: int, quality: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Images and videos of any sizes and contents, or text; with JPEG, the result equals that of Pillow."""
    rng = np.random.default_rng(seed)
    media = []
    for steps, rows, columns in shapes:
        shape = (2 * steps or 1, 3, 14 * rows, 14 * columns)
        frames = rng.integers(0, 256, shape, dtype=np.uint8) // rng.choice([1, 4, 255])
        media.append((int(steps > 0), Grid(steps or 1, rows, columns), frames.astype(np.uint8)))
    before = [frames.copy() for _, _, frames in media]
    path = tmp_path_factory.mktemp("shard") / "bins-00000.tar"
    data, _ = written(path, codec, [sample_of(media)], quality if codec == "jpeg" else None)
    decoded = decode_frames(parse_bin(data[:-1024], 7, where="here"), where="here")
    assert [frames.shape for frames in decoded] == [frames.shape for frames in before]
    for actual, (_, _, frames), original in zip(decoded, media, before):
        assert np.array_equal(frames, original), "the input frames are not modified"
        expected = original if codec != "jpeg" else np.stack([through_pillow(frame, quality) for frame in original])
        assert np.array_equal(actual, expected)


def through_pillow(frame: NDArray[np.uint8], quality: int) -> NDArray[np.uint8]:
    buffer = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(frame.transpose(1, 2, 0)))
    image.save(buffer, "JPEG", quality=quality, subsampling=0)
    return np.asarray(Image.open(buffer)).transpose(2, 0, 1)


# Fixed bytes


def golden_samples() -> list[EncodedSample]:
    """Twice an image and a video of 28 x 56 pixels, by a formula."""
    y, x = np.mgrid[:28, :56]
    frame = np.stack([3 * x + y, x * y, 255 - y * 5 + x]).astype(np.uint8)
    grid = Grid(1, 2, 4)
    return [sample_of([(0, grid, frame[None]), (1, grid, np.stack([255 - frame, frame]))])] * 2


def test_the_bytes_of_a_raw_shard_never_change(tmp_path: Path) -> None:
    data, drift = written(tmp_path / "bins-00000.tar", "raw", golden_samples())
    assert hashlib.sha256(data).hexdigest() == "d415b57b2858ba3c3aecd10f8ade1db3c0ca0d384efd8d0084476b9167e837c2"
    assert drift is None


def test_the_residuals_of_a_zstd_shard_never_change(tmp_path: Path) -> None:
    """The uncompressed residuals, since the compressed bytes depend on the release of zstd."""
    data, drift = written(tmp_path / "bins-00000.tar", "zstd", golden_samples())
    member = parse_bin(data[:-1024], 7, where="here").pixels.tobytes()
    residuals = zstandard.decompress(member)
    assert hashlib.sha256(residuals).hexdigest() == "1448c8948558d0352efad38e3c518e288671338d8c71e00c18f16b0a016258d9"
    assert zstandard.frame_content_size(member) == len(residuals) == 6 * 3 * 28 * 56
    assert drift is None


def test_frames_of_several_bins_do_not_mix() -> None:
    """The buffer for residuals is reused for smaller and larger frames."""
    rng = np.random.default_rng(0)
    encoder, bins = PixelEncoder("zstd"), []
    for size in (56, 28, 84, 28):
        frames = [rng.integers(0, 256, (3, size, size), dtype=np.uint8) for _ in range(2)]
        bins.append((b"".join(encoder.encode(frames)), b"".join(PixelEncoder("zstd").encode(frames))))
    assert all(reused == alone for reused, alone in bins)


@pytest.mark.parametrize(("codec", "quality"), [("jpeg", None), ("zstd", 95), ("raw", 95)])
def test_only_jpeg_has_a_quality(codec: str, quality: int | None) -> None:
    with pytest.raises(ValueError, match=f"codec {codec} with a JPEG quality of {quality}"):
        PixelEncoder(codec, quality)


# Drift


def test_one_frame_in_31_is_measured_over_the_bins_of_a_shard() -> None:
    assert DRIFT_EVERY == 31
    rng = np.random.default_rng(1)
    frames = [rng.integers(0, 256, (3, 28, 28 * (1 + index % 2)), dtype=np.uint8) for index in range(70)]
    encoder = PixelEncoder("jpeg", 50)
    for first, last in ((0, 7), (7, 7), (7, 30), (30, 70)):
        encoder.encode(frames[first:last])
    errors = [
        (frame.astype(np.float64) - through_pillow(frame, 50)) ** 2 for frame in (frames[0], frames[31], frames[62])
    ]
    assert encoder.drift is not None
    drift = encoder.drift.drift()
    assert (drift.every, drift.num_frames) == (31, 3)
    mean = np.concatenate([error.ravel() for error in errors]).mean()
    assert drift.mean_squared_error == pytest.approx(mean)
    assert drift.psnr_db == round(10 * np.log10(255**2 / mean), 3)
    assert drift.lowest_psnr_db == min(round(10 * np.log10(255**2 / error.mean()), 3) for error in errors)
    assert drift.lowest_psnr_db < drift.psnr_db


def test_drift_by_hand() -> None:
    """Every value is off by 2 in a frame and exact in another of three times the size: mean 1, 48.131 dB."""
    sums, other = DriftSums(), DriftSums()
    sums.measure(np.full((3, 2, 2), 100, np.uint8), np.full((3, 2, 2), 102, np.uint8))
    other.measure(np.zeros((3, 2, 6), np.uint8), np.zeros((3, 2, 6), np.uint8))
    exact = other.drift()
    assert (exact.mean_squared_error, exact.psnr_db, exact.lowest_psnr_db) == (0, None, None)
    sums.add(other)
    drift = sums.drift()
    assert (drift.num_frames, drift.mean_squared_error, drift.psnr_db, drift.lowest_psnr_db) == (2, 1, 48.131, 42.11)


def test_values_at_both_ends_do_not_overflow() -> None:
    sums = DriftSums()
    sums.measure(np.zeros((3, 40, 40), np.uint8), np.full((3, 40, 40), 255, np.uint8))
    assert sums.squared_error == 3 * 40 * 40 * 255**2
    assert sums.drift().psnr_db == 0.0


# Complete builds


@pytest.fixture(scope="module")
def lossy(corpus_file: Path, tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    out = tmp_path_factory.mktemp("jpeg")
    build(request_for(corpus_file, out, tiny_checkpoint, JPEG), SerialEngine())
    return out


def frames_of(folder: Path) -> dict[tuple[int, int], list[NDArray[np.uint8]]]:
    """Stored frames of every sample, by bin and slot."""
    samples = {(sample.bin, sample.slot): sample for copies in packed_samples(folder).values() for sample in copies}
    return {key: [frame for _, _, frames in sample.media for frame in frames] for key, sample in samples.items()}


def test_a_build_with_jpeg_differs_from_a_lossless_one_by_its_drift_alone(lossy: Path, finished: Path) -> None:
    """The same samples in the same bins; the manifest's drift is that of every 31st frame of each shard."""
    rows = [{**row, "message": None} for row in ledger(lossy)]
    assert rows == [{**row, "message": None} for row in ledger(finished)]
    manifest, exact = read_manifest(lossy), read_manifest(finished)
    assert (manifest.settings.jpeg_quality, manifest.counts) == (90, exact.counts)
    actual, originals = frames_of(lossy), frames_of(finished)
    assert actual.keys() == originals.keys()
    measured = []
    for shard in manifest.shards:
        with tarfile.open(lossy / shard.file) as tar:
            bins = sorted({int(name.partition(".")[0]) for name in tar.getnames()})
        keys = sorted(key for key in actual if key[0] in bins)
        pairs = [pair for key in keys for pair in zip(originals[key], actual[key], strict=True)]
        measured += pairs[::31]
    errors = [(before.astype(np.int64) - after) ** 2 for before, after in measured]
    mean = np.concatenate([error.ravel() for error in errors]).mean()
    drift = manifest.drift
    assert not isinstance(drift, type(exact.drift))
    assert drift.num_frames == len(measured) >= len(manifest.shards) > 1
    assert drift.mean_squared_error == pytest.approx(mean)
    assert drift.psnr_db == round(10 * np.log10(255**2 / mean), 3)
    assert drift.lowest_psnr_db == min(
        round(10 * np.log10(255**2 / error.mean()), 3) for error in errors if error.any()
    )


@pytest.mark.slow
def test_bytes_with_jpeg_are_the_same_for_any_number_of_workers(
    lossy: Path, corpus_file: Path, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    with LocalEngine(2) as engine:
        build(request_for(corpus_file, tmp_path / "out", tiny_checkpoint, JPEG), engine)
    assert contents(tmp_path / "out") == contents(lossy)


def test_the_manifest_of_a_lossless_set_says_nothing_of_jpeg(finished: Path, lossy: Path) -> None:
    """So that it has the same bytes as in versions with two codecs."""
    manifest = json.loads((finished / "manifest.json").read_text())
    assert "drift" not in manifest
    assert "jpeg_quality" not in manifest["settings"]
    assert list(json.loads((lossy / "manifest.json").read_text())["drift"]) == [
        "every",
        "num_frames",
        "mean_squared_error",
        "psnr_db",
        "lowest_psnr_db",
    ]


def test_images_of_a_jpeg_set_are_shown_as_they_are_stored(lossy: Path, tmp_path: Path) -> None:
    shards = open_set(lossy)
    bin_id = int(shards.bins.column("bin")[0].as_py())
    frames = [
        frame
        for (sample_bin, _), frames in sorted(frames_of(lossy).items())
        if sample_bin == bin_id
        for frame in frames
    ]
    saved = [
        np.asarray(Image.open(path)).transpose(2, 0, 1)
        for path in save_frames(shards, bin_id, tmp_path, Transcriber(None))
    ]
    assert len(saved) == len(frames) > 1
    assert all(np.array_equal(actual, expected) for actual, expected in zip(saved, frames))


def invoke(*words: object) -> Any:
    return CliRunner().invoke(main, [str(word) for word in words])


def test_the_drift_is_printed_by_build_verify_and_report(
    corpus_file: Path, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    command = ["build", corpus_file, "--out", tmp_path / "out", "--model", tiny_checkpoint, "--workers", 1]
    built = invoke(*command, "--pixels", "jpeg", "--max-length", 1200)
    assert built.exit_code == 0, built.output
    manifest = read_manifest(tmp_path / "out")
    assert manifest.settings.jpeg_quality == 95
    drift: Any = manifest.drift
    line = (
        f"pixels are JPEG of quality 95: PSNR {drift.psnr_db:.1f} dB, at least {drift.lowest_psnr_db:.1f} dB in a frame"
    )
    assert line in built.stdout
    verified = invoke("verify", tmp_path / "out", "--workers", 1)
    assert verified.exit_code == 0, verified.output
    assert line in verified.stdout
    assert invoke("report", tmp_path / "out", "--out", tmp_path / "page.html").exit_code == 0
    page = (tmp_path / "page.html").read_text()
    assert f"<b>{drift.psnr_db:.1f} dB</b>" in page
    assert "<dt>jpeg_quality</dt><dd>95</dd>" in page
    assert f"<dt>drift: psnr_db</dt><dd>{drift.psnr_db}</dd>" in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ("--jpeg-quality", 90),
            "setting jpeg_quality is 90, but pixels is zstd. Leave it out, or choose --pixels jpeg.",
        ),
        (("--pixels", "raw", "--jpeg-quality", 95), "setting jpeg_quality is 95, but pixels is raw."),
        (("--pixels", "jpeg", "--jpeg-quality", 0), "setting jpeg_quality is 0; allowed: 1 to 100"),
        (("--pixels", "jpeg", "--jpeg-quality", 101), "setting jpeg_quality is 101; allowed: 1 to 100"),
    ],
)
def test_a_quality_that_would_be_ignored_or_makes_no_sense_is_wrong_use(
    corpus_file: Path, tmp_path: Path, words: tuple[object, ...], message: str
) -> None:
    result = invoke("build", corpus_file, "--out", tmp_path / "out", *words)
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_settings_state_the_quality_with_jpeg_alone() -> None:
    assert BuildSettings(pixels="jpeg").jpeg_quality == 95
    assert BuildSettings(pixels="jpeg", jpeg_quality=80).jpeg_quality == 80
    assert not BuildSettings().jpeg_quality
    with pytest.raises(ConfigError, match="jpeg_quality"):
        BuildSettings(pixels="zstd", jpeg_quality=95)


# Size limits of JPEG


def test_a_side_longer_than_a_jpeg_can_have_is_refused_before_it_is_decoded() -> None:
    def medium(rows: int, columns: int) -> Medium:
        return Medium(media_type=0, name="long.png", grid=Grid(1, rows, columns), height=1, width=1)

    fits, too_long = [medium(4678, 2), medium(2, 4678)], [medium(2, 2), medium(2, 4680)]
    for codec in ("zstd", "raw", "jpeg"):
        require_storable(fits, codec)
    for codec in ("zstd", "raw"):
        require_storable(too_long, codec)
    with pytest.raises(MediaError, match=r"'long.png' becomes 65520x28 pixels; a JPEG has at most 65,500") as caught:
        require_storable(too_long, "jpeg")
    assert caught.value.code == "media_too_large"


def test_a_medium_too_long_for_jpeg_costs_its_samples_alone(
    corpus_file: Path, tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prep.shards.codecs.MAX_SIDE", 180)
    manifest = build(request_for(corpus_file, tmp_path / "out", tiny_checkpoint, JPEG), SerialEngine())
    refused = [row for row in ledger(tmp_path / "out") if "media_too_large" in row["codes"]]
    assert 0 < len(refused) == manifest.counts.rejects_by_code["media_too_large"]
    assert manifest.counts.balances() and manifest.counts.num_images > 0
    assert all("a JPEG has at most 180" in row["message"] for row in refused)


# Damage that verify detects


@pytest.fixture
def folder(lossy: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "set"
    shutil.copytree(lossy, copy, ignore=shutil.ignore_patterns(WORK_FOLDER))
    return copy


def bin_with_frames(folder: Path) -> int:
    rows = open_set(folder).bins.to_pylist()
    return next(int(row["bin"]) for row in rows if row["num_images"] > 1)


def table_of(member: bytes, num_frames: int) -> tuple[list[int], list[bytes]]:
    sizes = np.frombuffer(member, dtype="<u4", count=num_frames).tolist()
    boundaries = np.cumsum([4 * num_frames, *sizes]).tolist()
    return sizes, [member[at:end] for at, end in itertools.pairwise(boundaries)]


def rebuilt(sizes: list[int], streams: list[bytes]) -> bytes:
    return np.array(sizes, dtype="<u4").tobytes() + b"".join(streams)


def senseless(stream: bytes) -> bytes:
    """Huffman tables with impossible code lengths."""
    at = stream.index(b"\xff\xc4")
    return stream[: at + 5] + b"\xff" * 16 + stream[at + 21 :]


DAMAGE: dict[str, tuple[Callable[[list[int], list[bytes]], bytes], str]] = {
    "cut": (lambda sizes, streams: rebuilt(sizes, streams)[:-1], "its table of"),
    "longer": (lambda sizes, streams: rebuilt(sizes, streams) + b"\0", "its table of"),
    "empty": (lambda sizes, streams: b"", "pixels.jpeg has 0 bytes"),
    "sizes swapped": (
        lambda sizes, streams: rebuilt([sizes[1] + 1, sizes[0] - 1, *sizes[2:]], streams),
        "of pixels.jpeg has no end",
    ),
    "another shape": (
        lambda sizes, streams: rebuilt([len(wrong := another_shape(streams[0])), *sizes[1:]], [wrong, *streams[1:]]),
        "frame 0 of pixels.jpeg is 28x28 pixels",
    ),
    "bytes behind an image": (
        lambda sizes, streams: rebuilt([sizes[0] + 3, *sizes[1:]], [streams[0] + b"abc", *streams[1:]]),
        "frame 0 of pixels.jpeg has no end",
    ),
    "no image": (
        lambda sizes, streams: rebuilt(sizes, [b"\0" * sizes[0], *streams[1:]]),
        "frame 0 of pixels.jpeg is not a JPEG",
    ),
    "not decodable": (
        lambda sizes, streams: rebuilt(sizes, [senseless(streams[0]), *streams[1:]]),
        "frame 0 of its pixels does not decode",
    ),
}


def another_shape(_: bytes) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (28, 28)).save(buffer, "JPEG", subsampling=0)
    return buffer.getvalue()


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_member_is_found_at_its_bin(folder: Path, name: str) -> None:
    """The checksums are valid, so only the member itself shows the damage."""
    damage, message = DAMAGE[name]
    bin_id = bin_with_frames(folder)
    num_frames = open_set(folder).read(bin_id).num_frames

    def change(members: dict[str, bytes]) -> dict[str, bytes]:
        return {**members, "pixels.jpeg": damage(*table_of(members["pixels.jpeg"], num_frames))}

    sets.change_members(folder, bin_id, change)
    result = invoke("verify", folder, "--workers", 1)
    assert result.exit_code == 1
    (line,) = (line for line in result.stdout.splitlines() if f"bin {bin_id} at offset" in line)
    assert message in line
    shards = open_set(folder)
    with pytest.raises(ShardError, match=message):
        decode_frames(shards.read(bin_id), where="here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest.pop("drift"), "but it has no drift"),
        (lambda manifest: manifest["drift"].update(num_frames=99), "drift.num_frames is 99"),
        (lambda manifest: manifest["drift"].update(every=0), "drift.every is 0"),
        (lambda manifest: manifest["drift"].update(psnr_db=60.0), "drift.psnr_db is 60.0"),
        (lambda manifest: manifest["drift"].update(psnr_db=None), "drift.psnr_db is None"),
        (
            lambda manifest: manifest["drift"].update(mean_squared_error=0.0),
            "a mean_squared_error of 0.0 does not give",
        ),
        (lambda manifest: manifest["drift"].update(lowest_psnr_db=99.0), "drift.lowest_psnr_db is 99.0"),
        (lambda manifest: manifest["drift"].update(lowest_psnr_db=None), "drift.lowest_psnr_db is None"),
    ],
)
def test_a_drift_that_cannot_be_is_found(folder: Path, change: Callable[[dict[str, Any]], None], message: str) -> None:
    sets.change_manifest(folder, change)
    result = invoke("verify", folder, "--workers", 1)
    assert result.exit_code == 1
    assert message in result.output


def test_a_drift_of_lossless_pixels_is_found(finished: Path, lossy: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "set", ignore=shutil.ignore_patterns(WORK_FOLDER))
    drift = json.loads((lossy / "manifest.json").read_text())["drift"]
    sets.change_manifest(tmp_path / "set", lambda manifest: manifest.update(drift=drift))
    result = invoke("verify", tmp_path / "set", "--workers", 1)
    assert result.exit_code == 1
    assert "it has a drift, but the pixels are zstd" in result.stdout


def test_exact_pixels_have_no_noise_to_measure(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """A text-only set with JPEG has no measured frames, and verifies."""
    record = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
    manifest = build(request_for(tmp_path / "a.jsonl", tmp_path / "out", tiny_checkpoint, JPEG), SerialEngine())
    drift: Any = manifest.drift
    assert (drift.num_frames, drift.mean_squared_error, drift.psnr_db, drift.lowest_psnr_db) == (0, 0, None, None)
    verified = invoke("verify", tmp_path / "out", "--workers", 1)
    assert verified.exit_code == 0, verified.output
    assert "PSNR infinite" in verified.stdout
