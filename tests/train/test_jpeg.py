"""JPEG pixels in the trainer: decoded where bins are read, mixed with other codecs, and refused when damaged."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from schemas.bins import Bin
from schemas.errors import ConfigError, ShardError
from tests.train.synthetic import Sample, as_bin, as_stored, jpeg_member, jpeg_of, make_bins, write_shards
from train.batches.batch import MicroBatch, build_micro_batch
from train.batches.stream import BinStream
from train.model.pixels import pixel_values
from train.order.dealing import DataOrder
from train.shards.index import open_shards
from train.shards.reader import BinReader

BINS = make_bins(num_bins=8)


def decoded(bins: list[list[Sample]]) -> list[list[Sample]]:
    """The same bins with the pixels that a JPEG leaves of theirs."""
    return [
        [replace(sample, media=[as_stored(medium, "jpeg") for medium in sample.media]) for sample in one]
        for one in bins
    ]


def pixels_by_bin(shards: str) -> dict[tuple[int, ...], torch.Tensor]:
    index = open_shards(shards)
    order = DataOrder(index.cost(), seed=0, global_batch=4, epochs=1.0)
    places = {"rank": 0, "world_size": 1, "accumulation": 4, "per_device": 1}
    micro: list[MicroBatch] = []
    with BinStream(index, order, **places) as steps:
        for batch in steps:
            micro += batch.micro_batches
    return {one.bins: pixel_values(one.vision) for one in micro}


def test_a_stream_of_jpeg_shards_has_the_decoded_pixels(tmp_path: Path) -> None:
    write_shards(tmp_path / "jpeg", BINS, codec="jpeg")
    write_shards(tmp_path / "raw", decoded(BINS), codec="raw")
    found, wanted = pixels_by_bin(str(tmp_path / "jpeg")), pixels_by_bin(str(tmp_path / "raw"))
    assert found.keys() == wanted.keys()
    assert len(found) == len(BINS)
    assert all(torch.equal(found[bins], wanted[bins]) for bins in found)


def test_a_lossless_and_a_jpeg_folder_make_one_set(tmp_path: Path) -> None:
    write_shards(tmp_path / "mixed" / "a", BINS[:4], codec="zstd")
    write_shards(tmp_path / "mixed" / "b", BINS[4:], codec="jpeg")
    write_shards(tmp_path / "raw", BINS[:4] + decoded(BINS[4:]), codec="raw")
    found, wanted = pixels_by_bin(str(tmp_path / "mixed")), pixels_by_bin(str(tmp_path / "raw"))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[bins], wanted[bins]) for bins in found)


@pytest.mark.parametrize("codecs", [("jpeg", "jpeg"), ("zstd", "jpeg"), ("jpeg", "raw"), ("raw", "jpeg", "zstd")])
def test_bins_of_several_codecs_share_a_micro_batch(codecs: tuple[str, ...]) -> None:
    samples = [BINS[1], BINS[3], BINS[2]][: len(codecs)]
    together = build_micro_batch([as_bin(one, codec=codec) for one, codec in zip(samples, codecs)])
    kept = [decoded([one])[0] if codec == "jpeg" else one for one, codec in zip(samples, codecs)]
    apart = [pixel_values(build_micro_batch([as_bin(one, codec="raw")]).vision) for one in kept]
    assert together.vision.residuals == ("zstd" in codecs)
    assert torch.equal(pixel_values(together.vision), torch.cat(apart))


def test_text_alone_has_an_empty_member() -> None:
    one = as_bin(BINS[0], codec="jpeg")
    assert one.pixels.size == 0
    assert torch.equal(build_micro_batch([one]).vision.planes, build_micro_batch([]).vision.planes)


def with_member(one: Bin, member: bytes) -> Bin:
    return replace(one, pixels=np.frombuffer(member, dtype=np.uint8))


def test_damaged_streams_stop_with_their_place() -> None:
    """A table that does not fit is found by its sizes, a stream without sense by its decoder."""
    medium = BINS[2][0].media[0]
    one = as_bin(BINS[2], codec="jpeg")
    streams = [jpeg_of(frame) for frame in medium.frames]
    at = streams[1].index(b"\xff\xc4")  # Huffman tables: code lengths that no table has
    senseless = streams[1][: at + 5] + b"\xff" * 16 + streams[1][at + 21 :]
    for member, message in (
        (jpeg_member(streams)[:-1], "shard, bin 3: pixels.jpeg has"),
        (jpeg_member([streams[0][:-1], *streams[1:]]), "shard, bin 3: frame 0 of pixels.jpeg has no end"),
        (jpeg_member([streams[0], senseless, *streams[2:]]), "shard, bin 3: frame 1 of its pixels does not decode"),
    ):
        with pytest.raises(ShardError, match=f"^{message}"):
            build_micro_batch([with_member(one, member)], where=["shard, bin 3"])


def test_without_pillow_only_jpeg_shards_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence before the first read, with the command that mends it; other shards do not need it."""
    write_shards(tmp_path / "a", BINS[:4], codec="zstd")
    write_shards(tmp_path / "b", BINS[4:], codec="jpeg")
    monkeypatch.setitem(sys.modules, "PIL.JpegImagePlugin", None)
    assert BinReader(open_shards(str(tmp_path / "a"))).read(1).bin.codec == "zstd"
    for shards in (tmp_path / "b", tmp_path):
        with pytest.raises(ConfigError, match="pip install 'pillow>="):
            BinReader(open_shards(str(shards)))
