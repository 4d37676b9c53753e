"""Reading a complete set: exact images, and one sentence for a bin that is missing or incomplete."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zstandard
from PIL import Image

from schemas.bins import Bin
from schemas.errors import ConfigError, ShardError
from schemas.settings import BuildSettings, MediaSettings
from storage.pixels import decode_frames, decode_pixels
from storage.shard_set import ShardSet, open_set
from tests.prep import finished as sets
from tests.prep.corpus import turn


@pytest.fixture
def shards(finished: Path, tmp_path: Path) -> ShardSet:
    """A copy of the shared set, to be changed."""
    shutil.copytree(finished, tmp_path / "set")
    return open_set(tmp_path / "set")


@pytest.mark.parametrize("codec", ["zstd", "raw"])
def test_frames_equal_the_resized_image_bit_for_bit(tmp_path: Path, tiny_checkpoint: Path, codec: str) -> None:
    """56x84 pixels are a multiple of 28 and within bounds, so that nothing is resized."""
    pixels = np.random.default_rng(1).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels[::-1]).save(tmp_path / "b.png")
    record = {"images": ["a.png", "b.png"], "conversations": turn("<image><image>")}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    settings = BuildSettings(pixels=codec, media=MediaSettings(min_pixels=784))
    bin_ = open_set(sets.build_set(tmp_path / "a.jsonl", tmp_path / "out", tiny_checkpoint, settings)).read(0)
    assert bin_.codec == codec
    first, second = decode_frames(bin_, where="here")
    assert np.array_equal(first, pixels.transpose(2, 0, 1)[None])
    assert np.array_equal(second, pixels[::-1].transpose(2, 0, 1)[None])


def test_a_video_has_two_frames_for_every_temporal_step(finished: Path) -> None:
    shards = open_set(finished)
    bin_ = shards.read(1)
    for (grid, kind), frames in zip(bin_.grids(), decode_frames(bin_, where="here"), strict=True):
        assert frames.shape == ((2 * grid.t if kind else 1), 3, 14 * grid.h, 14 * grid.w)
    assert {kind for _, kind in bin_.grids()} == {0, 1}


def test_the_ledger_of_a_bin_is_sorted_by_slot(finished: Path) -> None:
    shards = open_set(finished)
    rows = shards.packed_in(1)
    assert [row.slot for row in rows] == list(range(shards.row(1).num_samples))
    assert [(row.dataset, row.record, row.id) for row in rows] == [
        (sample.dataset, sample.record, sample.id) for sample in shards.read(1).samples()
    ]


def test_a_missing_bin_is_wrong_use(finished: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no bin 99; it holds bins 0 to 3\."):
        open_set(finished).read(99)


def test_a_changed_byte_stops_with_shard_bin_and_offset(shards: ShardSet) -> None:
    path = sets.shard_of(shards.folder, 1)
    data = bytearray(path.read_bytes())
    data[shards.row(1).offset + 600] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardError, match=rf"{path.name}, bin 1 at offset {shards.row(1).offset}: checksum is"):
        shards.read(1)
    shards.read(0)


def test_a_short_or_missing_shard_stops(shards: ShardSet) -> None:
    path = sets.shard_of(shards.folder, 1)
    path.write_bytes(path.read_bytes()[: shards.row(1).offset + 100])
    with pytest.raises(ShardError, match=f"the shard ends {shards.row(1).num_bytes - 100} bytes before the bin does"):
        shards.read(1)
    path.unlink()
    with pytest.raises(ShardError, match="the shard does not exist"):
        shards.read(1)


def test_a_table_with_another_column_stops(shards: ShardSet) -> None:
    (shards.folder / "bins.parquet").write_bytes((shards.folder / "samples.parquet").read_bytes())
    sets.reseal(shards.folder)
    with pytest.raises(ShardError, match="shard is missing, not int32"):
        open_set(shards.folder)


def with_pixels(bin_: Bin, data: bytes) -> Bin:
    return replace(bin_, pixels=np.frombuffer(data, dtype=np.uint8))


def test_pixels_have_exactly_the_size_of_the_grids(finished: Path) -> None:
    bin_ = open_set(finished).read(0)
    content = decode_pixels(bin_, where="here").tobytes()
    compress = zstandard.ZstdCompressor().compress
    assert decode_pixels(with_pixels(bin_, compress(content)), where="here").tobytes() == content
    for data in (compress(content[:-1]), compress(content + b"\0"), compress(content)[:-1], compress(content) + b"\0"):
        with pytest.raises(ShardError, match=r"^here: the pixels "):
            decode_pixels(with_pixels(bin_, data), where="here")


def test_a_frame_that_claims_to_be_huge_is_not_decompressed(finished: Path) -> None:
    """A terabyte of zeros in a few bytes: refused by the size in its header, without room for it."""
    bin_ = open_set(finished).read(0)
    header = zstandard.ZstdCompressor().compressobj(size=1 << 40)
    frame = header.compress(b"\0" * 300_000) + header.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)
    assert zstandard.frame_content_size(frame) == 1 << 40
    with pytest.raises(ShardError, match="the pixels are 1,099,511,627,776 bytes"):
        decode_pixels(with_pixels(bin_, frame), where="here")
