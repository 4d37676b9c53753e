"""Every kind of damage, in every part of a bin, with every setting: reported with its location, or not checked."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import io
import os
import shutil
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.bins import ARRAY_MEMBERS
from schemas.errors import ConfigError, ShardError
from storage import reading as storage
from tests.train.synthetic import make_bins, make_medium, make_sample, write_shards
from train.main import main
from train.shards.index import ShardIndex, open_shards
from train.shards.reader import VERIFY, BinReader, ReadSettings, read_checked_bin

BIN_ID = 4
MEMBERS = {
    codec: [*ARRAY_MEMBERS, pixels, "samples.json"] for codec, pixels in (("zstd", "pixels.zst"), ("raw", "pixels.raw"))
}
MEMBER_PARTS = [
    (codec, member, part) for codec in MEMBERS for member in MEMBERS[codec] for part in ("header", "contents")
]


@pytest.fixture(scope="module")
def shard_sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    for codec in MEMBERS:
        write_shards(root / codec, make_bins(num_bins=8), codec=codec)
    return root


def copy_of(shard_sets: Path, tmp_path: Path, codec: str = "zstd") -> ShardIndex:
    return open_shards(shutil.copytree(shard_sets / codec, tmp_path / codec))


def byte_of(index: ShardIndex, member: str, part: str) -> int:
    """Offset in the shard of the header of a member of bin BIN_ID, or of the last byte of its contents."""
    location = index.locate(BIN_ID)
    assert isinstance(location.path, Path)
    data = location.path.read_bytes()[location.offset : location.offset + location.num_bytes]
    with tarfile.open(fileobj=io.BytesIO(data + bytes(1024))) as tar:
        info = tar.getmember(f"{BIN_ID:08d}.{member}")
    return location.offset + (info.offset if part == "header" else info.offset_data + info.size - 1)


def change_byte(index: ShardIndex, at: int) -> None:
    path = index.locate(BIN_ID).path
    assert isinstance(path, Path)
    data = bytearray(path.read_bytes())
    data[at] ^= 0x04
    path.write_bytes(data)


def read(index: ShardIndex, verify: str) -> None:
    BinReader(index, ReadSettings(verify=verify)).read(BIN_ID)


@pytest.mark.parametrize("verify", ["always", "first"])
@pytest.mark.parametrize(("codec", "member", "part"), MEMBER_PARTS)
def test_a_changed_byte_anywhere_stops_with_shard_bin_and_offset(
    shard_sets: Path, tmp_path: Path, codec: str, member: str, part: str, verify: str
) -> None:
    index = copy_of(shard_sets, tmp_path, codec)
    change_byte(index, byte_of(index, member, part))
    location = index.locate(BIN_ID)
    message = rf"{codec}/bins-00001\.tar, bin {BIN_ID} at offset {location.offset}: checksum is .* Copy it again"
    with pytest.raises(ShardError, match=message):
        read(index, verify)


@pytest.mark.parametrize(("codec", "member"), [(codec, member) for codec in MEMBERS for member in MEMBERS[codec]])
def test_without_checksums_the_structure_is_still_checked(
    shard_sets: Path, tmp_path: Path, codec: str, member: str
) -> None:
    index = copy_of(shard_sets, tmp_path, codec)
    change_byte(index, byte_of(index, member, "header"))
    with pytest.raises(ShardError, match=rf"bins-00001\.tar, bin {BIN_ID} at offset "):
        read(index, "never")


def test_without_checksums_a_changed_pixel_is_not_seen(shard_sets: Path, tmp_path: Path) -> None:
    """That is what `never` means."""
    index = copy_of(shard_sets, tmp_path, "raw")
    bin_id = 5
    before = read_checked_bin(index, bin_id).pixels.copy()
    location = index.locate(bin_id)
    assert isinstance(location.path, Path)
    data = bytearray(location.path.read_bytes())
    data[data.index(before.tobytes())] ^= 1
    location.path.write_bytes(data)
    pixels = BinReader(index, ReadSettings(verify="never")).read(bin_id).bin.pixels
    assert np.count_nonzero(pixels != before) == 1


def test_first_verifies_each_bin_once_and_always_verifies_every_read(shard_sets: Path, tmp_path: Path) -> None:
    index = copy_of(shard_sets, tmp_path)
    readers = {verify: BinReader(index, ReadSettings(verify=verify)) for verify in VERIFY}
    for reader in readers.values():
        reader.read(BIN_ID)
    change_byte(index, byte_of(index, "samples.json", "contents"))
    readers["first"].read(BIN_ID)
    readers["never"].read(BIN_ID)
    with pytest.raises(ShardError, match="checksum"):
        readers["always"].read(BIN_ID)
    with pytest.raises(ShardError, match="checksum"):
        read(index, "first")


@pytest.mark.parametrize("verify", VERIFY)
def test_a_shard_cut_short_after_the_start_stops(shard_sets: Path, tmp_path: Path, verify: str) -> None:
    index = copy_of(shard_sets, tmp_path)
    location = index.locate(BIN_ID)
    assert isinstance(location.path, Path)
    location.path.write_bytes(location.path.read_bytes()[: location.offset + 100])
    with pytest.raises(ShardError, match=rf"bin {BIN_ID} at offset \d+: the shard ends after 100 of the bin's"):
        read(index, verify)
    location.path.unlink()
    with pytest.raises(ShardError, match=rf"bin {BIN_ID} at offset \d+: the shard does not exist"):
        read(index, verify)


@pytest.mark.parametrize("verify", ["always", "first"])
def test_shards_of_another_build_stop_even_if_all_sizes_agree(shard_sets: Path, tmp_path: Path, verify: str) -> None:
    """Other samples of the same lengths and media: files of the same sizes with bins at the same offsets."""
    index = copy_of(shard_sets, tmp_path, "raw")
    other = write_shards(tmp_path / "other", make_bins(seed=9, num_bins=8), codec="raw")
    for shard in other.glob("*.tar"):
        shutil.copyfile(shard, tmp_path / "raw" / shard.name)
    reader = BinReader(index, ReadSettings(verify=verify))
    for bin_id in range(8):
        with pytest.raises(ShardError, match=rf"bins-0000\d\.tar, bin {bin_id} at offset \d+: .*of another build"):
            reader.read(bin_id)


@pytest.mark.parametrize(
    "says",
    [
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:22406",
        "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
    ],
)
def test_a_rank_that_waits_for_one_that_stopped_says_so_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], says: str
) -> None:
    """The one that met the damage tells of it; the others end too, without a traceback that would bury it."""

    def fail(*_: object) -> bool:
        raise RuntimeError(says)

    monkeypatch.setattr("train.run.loop.train", fail)
    assert main(["--shards", "set", "--model_name_or_path", "model"]) == 1
    assert capsys.readouterr().err == "error: another rank has failed: see its message, above or in its log.\n"
    with pytest.raises(RuntimeError):
        main(["--shards", "set", "--model_name_or_path", "model", "--debug"])
    says = "a mistake in the program"
    with pytest.raises(RuntimeError, match="a mistake"):
        main(["--shards", "set", "--model_name_or_path", "model"])


def test_ctrl_c_before_the_first_step_ends_a_run_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> bool:
        raise KeyboardInterrupt

    monkeypatch.setattr("train.run.loop.train", interrupt)
    assert main(["--shards", "set", "--model_name_or_path", "model"]) == 130
    expected = "\nstopped before the first step: nothing was trained; rerun the same command to start\n"
    assert capsys.readouterr().err == expected


FILES = ["bins-00001.tar", "bins.parquet", "manifest.json"]


@pytest.mark.parametrize(
    ("name", "damage"),
    [(name, damage) for name in FILES for damage in ("missing", "short", "long")]
    + [("bins.parquet", "of another build"), ("manifest.json", "of another build")],
)
def test_damage_before_the_start_stops_there(shard_sets: Path, tmp_path: Path, name: str, damage: str) -> None:
    copy_of(shard_sets, tmp_path)
    path = tmp_path / "zstd" / name
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "of another build":
        shutil.copyfile(write_shards(tmp_path / "other", make_bins(seed=9, num_bins=8)) / name, path)
    else:
        path.write_bytes(data[:-1] if damage == "short" else data + b"x")
    if (name, damage) == ("manifest.json", "short"):
        path.write_bytes(data[:-3])  # the last byte is a line end, which JSON does not need
    with pytest.raises(ShardError, match=r"again|complete"):
        open_shards(tmp_path / "zstd")


def test_a_broken_link_is_not_silently_left_out(shard_sets: Path, tmp_path: Path) -> None:
    """Otherwise the shards it links to would be missing from the run without an error."""
    copy_of(shard_sets, tmp_path)
    (tmp_path / "mp_doc").symlink_to("/mnt/not/mounted")
    with pytest.raises(ShardError, match=r"mp_doc is a link to /mnt/not/mounted, which does not exist"):
        open_shards(tmp_path)
    (tmp_path / "mp_doc").unlink()
    (tmp_path / "mp_doc").symlink_to("mp_doc")
    with pytest.raises(ShardError, match="mp_doc is a link to mp_doc, which does not exist"):
        open_shards(tmp_path)
    with pytest.raises(ShardError, match="Too many levels of symbolic links"):
        open_shards(tmp_path / "mp_doc")


def test_a_folder_named_twice_is_wrong_use(shard_sets: Path, tmp_path: Path) -> None:
    """By another name, through a link, inside another one, at a URL: its bins would be used twice."""
    (tmp_path / "link").symlink_to(shard_sets / "raw")
    for other in (f"{shard_sets}/zstd/../raw", tmp_path / "link", shard_sets, tmp_path):
        with pytest.raises(ConfigError, match=r"is named twice.*: its bins would be used twice\. Name it once"):
            open_shards(f"{shard_sets}/raw:1,{other}:2")
    with pytest.raises(ConfigError, match="raw is named twice: its bins"):
        open_shards(f"file://{shard_sets}/raw/,file://{shard_sets}")
    assert open_shards(f"{shard_sets}/raw,{shard_sets}/zstd").num_bins == 16


@pytest.mark.parametrize(
    ("shards", "says"),
    [
        ("", "'' names no folder"),
        (" ", "' ' has an empty part"),
        ("s3://", "'s3://' names no folder"),
        ("http:///", "'http:///' names no folder"),
    ],
)
def test_shards_without_a_name_are_wrong_use(shards: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        open_shards(shards)


def test_a_file_is_not_a_folder(shard_sets: Path) -> None:
    with pytest.raises(ConfigError, match=r"manifest\.json is not a folder\. Give the folder or URL that"):
        open_shards(shard_sets / "raw" / "manifest.json")


def test_a_shard_without_permission_is_distinguished_from_a_missing_one(
    shard_sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = copy_of(shard_sets, tmp_path)

    def refuse(*args: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(storage.os, "open", refuse)
    with pytest.raises(ShardError, match=rf"bin {BIN_ID} at offset .*: cannot be read: Permission denied\. Check that"):
        read(index, "always")


@pytest.mark.parametrize(
    ("member", "at", "value", "says"),
    [
        ("media_type.npy", 0, 1, r"holds 3 images, the index says 4"),
        ("media_type.npy", 0, 7, r"holds 3 images, the index says 4"),
        ("grid_thw.npy", 0, 2, r"holds 56 patches, the index says 48"),
        ("cu_seqlens.npy", 0, 1, r"cu_seqlens .* do not cut"),
        ("labels.npy", 0, 5, r"targets, the index says"),
        ("input_ids.npy", 8, 5, r"media pad tokens in input_ids, but its media have"),
    ],
)
def test_without_checksums_contents_that_do_not_fit_stop(
    shard_sets: Path, tmp_path: Path, member: str, at: int, value: int, says: str
) -> None:
    index = copy_of(shard_sets, tmp_path, "raw")
    location = index.locate(5)
    assert isinstance(location.path, Path)
    data = bytearray(location.path.read_bytes())
    with tarfile.open(location.path) as tar:
        info = tar.getmember(f"{5:08d}.{member}")
    data[info.offset_data + 128 + at] = value  # headers of arrays this small are 128 bytes with their prefix
    location.path.write_bytes(data)
    with pytest.raises(ShardError, match=rf"bins-00001\.tar, bin 5 at offset .*{says}"):
        BinReader(index, ReadSettings(verify="never")).read(5)


def test_an_image_of_several_temporal_steps_stops(shard_sets: Path, tmp_path: Path) -> None:
    """A writer's mistake: everything else about the bin agrees with the index."""
    samples = make_bins(num_bins=2)[1]
    video = make_medium(np.random.default_rng(0), 2, 2, steps=2)
    samples.append(make_sample(np.random.default_rng(1), [video]))
    folder = write_shards(tmp_path / "wrong", [samples])
    index = open_shards(folder)
    read_checked_bin(index, 0)
    wrong = dataclasses.replace(index, num_images=index.num_images + 1, num_videos=index.num_videos - 1)
    (path,) = (path for path in wrong.shard_paths if isinstance(path, Path))
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        info = tar.getmember("00000000.media_type.npy")
    data[info.offset_data + info.size - 1] = 0
    path.write_bytes(data)
    with pytest.raises(ShardError, match="grid_thw has an image of several temporal steps"):
        BinReader(wrong, ReadSettings(verify="never")).read(0)


@pytest.mark.parametrize("piece_bytes", [1, 700, 4096, 1 << 20])
def test_a_checksum_computed_in_pieces_is_that_of_the_bin(
    shard_sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece_bytes: int
) -> None:
    monkeypatch.setattr(storage, "_DIGEST_BYTES", piece_bytes)
    index = copy_of(shard_sets, tmp_path, "raw")
    read(index, "always")
    location = index.locate(BIN_ID)
    for at in (location.offset + 700, location.offset + location.num_bytes - 1):
        change_byte(index, at)
        with pytest.raises(ShardError, match="checksum is"):
            read(index, "always")
        change_byte(index, at)
    read(index, "always")


@given(st.binary(max_size=3000), st.integers(0, 3000), st.integers(0, 3000), st.integers(1, 700))
@settings(deadline=None, max_examples=60)
def test_a_digest_gets_the_bytes_once_and_in_order(content: bytes, offset: int, length: int, piece_bytes: int) -> None:
    """Also where the file ends before the range does."""
    with tempfile.NamedTemporaryFile() as file, pytest.MonkeyPatch.context() as monkeypatch:
        file.write(content)
        file.flush()
        monkeypatch.setattr(storage, "_DIGEST_BYTES", piece_bytes)
        digest, out = hashlib.sha256(), bytearray(length)
        got = storage.read_into(Path(file.name), offset, memoryview(out), digest=digest)
    expected = content[offset : offset + length]
    assert bytes(out[:got]) == expected
    assert digest.digest() == hashlib.sha256(expected).digest()


def test_invalid_read_settings_are_wrong_use() -> None:
    for changes in ({"verify": "sometimes"}, {"connections": 0}, {"cache_bytes": 0}):
        with pytest.raises(ConfigError, match=f"{next(iter(changes))} is"):
            ReadSettings(**changes)  # type: ignore[arg-type]
