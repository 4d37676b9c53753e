"""JPEG pixels in the trainer: decoded in the reading threads, mixed with other codecs, and rejected when damaged."""

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
    """Return the bins with their pixels after JPEG compression."""
    return [
        [replace(sample, media=[as_stored(medium, "jpeg") for medium in sample.media]) for sample in samples_of_bin]
        for samples_of_bin in bins
    ]


def pixels_by_bin(shards: str) -> dict[tuple[int, ...], torch.Tensor]:
    index = open_shards(shards)
    order = DataOrder(index.cost(), seed=0, global_batch=4, epochs=1.0)
    layout = {"rank": 0, "world_size": 1, "accumulation": 4, "per_device": 1}
    micro: list[MicroBatch] = []
    with BinStream(index, order, **layout) as steps:
        for batch in steps:
            micro += batch.micro_batches
    return {batch.bins: pixel_values(batch.vision) for batch in micro}


def test_a_stream_of_jpeg_shards_yields_the_decoded_pixels(tmp_path: Path) -> None:
    write_shards(tmp_path / "jpeg", BINS, codec="jpeg")
    write_shards(tmp_path / "raw", decoded(BINS), codec="raw")
    actual, expected = pixels_by_bin(str(tmp_path / "jpeg")), pixels_by_bin(str(tmp_path / "raw"))
    assert actual.keys() == expected.keys()
    assert len(actual) == len(BINS)
    assert all(torch.equal(actual[bins], expected[bins]) for bins in actual)


def test_a_lossless_and_a_jpeg_folder_form_one_set(tmp_path: Path) -> None:
    write_shards(tmp_path / "mixed" / "a", BINS[:4], codec="zstd")
    write_shards(tmp_path / "mixed" / "b", BINS[4:], codec="jpeg")
    write_shards(tmp_path / "raw", BINS[:4] + decoded(BINS[4:]), codec="raw")
    actual, expected = pixels_by_bin(str(tmp_path / "mixed")), pixels_by_bin(str(tmp_path / "raw"))
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[bins], expected[bins]) for bins in actual)


@pytest.mark.parametrize("codecs", [("jpeg", "jpeg"), ("zstd", "jpeg"), ("jpeg", "raw"), ("raw", "jpeg", "zstd")])
def test_bins_of_several_codecs_share_a_micro_batch(codecs: tuple[str, ...]) -> None:
    samples = [BINS[1], BINS[3], BINS[2]][: len(codecs)]
    together = build_micro_batch(
        [as_bin(samples_of_bin, codec=codec) for samples_of_bin, codec in zip(samples, codecs)]
    )
    stored = [
        decoded([samples_of_bin])[0] if codec == "jpeg" else samples_of_bin
        for samples_of_bin, codec in zip(samples, codecs)
    ]
    apart = [pixel_values(build_micro_batch([as_bin(samples_of_bin, codec="raw")]).vision) for samples_of_bin in stored]
    assert together.vision.residuals == ("zstd" in codecs)
    assert torch.equal(pixel_values(together.vision), torch.cat(apart))


def test_a_text_only_bin_has_an_empty_pixel_member() -> None:
    bin_ = as_bin(BINS[0], codec="jpeg")
    assert bin_.pixels.size == 0
    assert torch.equal(build_micro_batch([bin_]).vision.planes, build_micro_batch([]).vision.planes)


def with_member(bin_: Bin, member: bytes) -> Bin:
    return replace(bin_, pixels=np.frombuffer(member, dtype=np.uint8))


def test_damaged_streams_raise_with_their_location() -> None:
    """Sizes reveal a table that does not match, the decoder reveals a corrupt stream."""
    medium = BINS[2][0].media[0]
    bin_ = as_bin(BINS[2], codec="jpeg")
    streams = [jpeg_of(frame) for frame in medium.frames]
    at = streams[1].index(b"\xff\xc4")  # Huffman tables; the code lengths are made impossible
    corrupt = streams[1][: at + 5] + b"\xff" * 16 + streams[1][at + 21 :]
    for member, message in (
        (jpeg_member(streams)[:-1], "shard, bin 3: pixels.jpeg has"),
        (jpeg_member([streams[0][:-1], *streams[1:]]), "shard, bin 3: frame 0 of pixels.jpeg has no end"),
        (jpeg_member([streams[0], corrupt, *streams[2:]]), "shard, bin 3: frame 1 of its pixels does not decode"),
    ):
        with pytest.raises(ShardError, match=f"^{message}"):
            build_micro_batch([with_member(bin_, member)], where=["shard, bin 3"])


def test_without_pillow_only_jpeg_shards_are_rejected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error comes before the first read and names the pip command; other shards do not need Pillow."""
    write_shards(tmp_path / "a", BINS[:4], codec="zstd")
    write_shards(tmp_path / "b", BINS[4:], codec="jpeg")
    monkeypatch.setitem(sys.modules, "PIL.JpegImagePlugin", None)
    assert BinReader(open_shards(str(tmp_path / "a"))).read(1).bin.codec == "zstd"
    for shards in (tmp_path / "b", tmp_path):
        with pytest.raises(ConfigError, match="pip install 'pillow>="):
            BinReader(open_shards(str(shards)))
