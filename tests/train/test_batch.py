"""A micro-batch holds exactly the contents of its bins, in the form that the model expects."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.bins import Bin
from schemas.errors import ShardError
from schemas.qwen import Grid
from tests.train.synthetic import Sample, as_bin, make_bins, make_medium, make_sample
from train.batches.batch import MicroBatch, build_micro_batch
from train.model.pixels import pixel_values


def text_sample(ids: list[int], trained: list[int]) -> Sample:
    """Create a sample of these ids; the positions in ``trained`` are trained."""
    labels = [token if position in trained else -100 for position, token in enumerate(ids)]
    positions = np.tile(np.arange(len(ids), dtype=np.int32), (3, 1))
    return Sample(np.array(ids, dtype=np.int32), np.array(labels, dtype=np.int32), positions)


def test_two_bins_worked_out_by_hand() -> None:
    """Samples 10 11 12 | 20 21 in one bin and 30 31 32 33 in another; 11, 12, 21 and 33 are trained."""
    micro = build_micro_batch(
        [
            as_bin([text_sample([10, 11, 12], [1, 2]), text_sample([20, 21], [1])], index=4),
            as_bin([text_sample([30, 31, 32, 33], [3])], index=9),
        ]
    )
    assert micro.input_ids.tolist() == [[10, 11, 12, 20, 21, 30, 31, 32, 33]]
    assert micro.position_ids.tolist() == [[[0, 1, 2, 0, 1, 0, 1, 2, 3]]] * 3
    assert micro.cu_seqlens.tolist() == [0, 3, 5, 9]
    assert micro.lengths == (3, 2, 4)
    assert micro.max_seqlen == 4
    assert micro.target_positions.tolist() == [0, 1, 3, 7]
    assert micro.targets.tolist() == [11, 12, 21, 33]
    assert (micro.bins, micro.num_tokens, micro.num_samples) == ((4, 9), 9, 3)
    dtypes = {name: getattr(micro, name).dtype for name in ("input_ids", "position_ids", "target_positions", "targets")}
    assert set(dtypes.values()) == {torch.int64}, dtypes
    assert micro.cu_seqlens.dtype == torch.int32


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(2, 9), st.sets(st.integers(1, 8))), min_size=1, max_size=6), st.integers(1, 3))
def test_no_token_predicts_a_token_of_the_next_sample(samples: list[tuple[int, set[int]]], num_bins: int) -> None:
    """A position and its target belong to one sample, and every trained label is a target exactly once."""
    text_samples = [text_sample(list(range(100 * n, 100 * n + size)), sorted(t)) for n, (size, t) in enumerate(samples)]
    parts = [part.tolist() for part in np.array_split(np.arange(len(text_samples)), num_bins) if part.size]
    micro = build_micro_batch([as_bin([text_samples[n] for n in part]) for part in parts])
    sources = micro.input_ids[0, micro.target_positions]
    assert torch.equal(sources + 1, micro.targets)
    assert torch.equal(sources // 100, micro.targets // 100)
    assert sorted(micro.targets.tolist()) == sorted(
        int(label) for sample in text_samples for label in sample.labels if label != -100
    )


def test_position_ids_of_a_bin_with_media_are_the_stored_ones() -> None:
    samples = make_bins(num_bins=4)[3]
    micro = build_micro_batch([as_bin(samples)])
    stored = np.concatenate([sample.position_ids for sample in samples], axis=1)
    assert np.array_equal(micro.position_ids[:, 0].numpy(), stored)


def test_media_of_all_bins_are_in_sequence_order() -> None:
    rng = np.random.default_rng(0)
    first = [make_sample(rng, [make_medium(rng, 2, 4), make_medium(rng, 4, 2, steps=2)])]
    second = [make_sample(rng), make_sample(rng, [make_medium(rng, 6, 2)])]
    vision = build_micro_batch([as_bin(first), as_bin(second)]).vision
    assert vision.media == ((Grid(1, 2, 4), 0), (Grid(2, 4, 2), 1), (Grid(1, 6, 2), 0))
    assert vision.num_patches == 8 + 16 + 12
    assert vision.cu_seqlens.tolist() == [0, 8, 16, 24, 36]
    assert vision.position_ids.shape == (36, 2)
    assert vision.planes.numel() == 3 * 14 * 14 * (8 + 2 * 16 + 12)


def test_bins_of_both_codecs_share_one_batch() -> None:
    """A mix of folders may hold both; the pixels equal those of each bin alone."""
    rng = np.random.default_rng(1)
    samples = [[make_sample(rng, [make_medium(rng, 2, 4), make_medium(rng, 4, 2, steps=1)])] for _ in range(3)]
    codecs = ["raw", "zstd", "raw"]
    mixed = build_micro_batch([as_bin(samples_of_bin, codec=codec) for samples_of_bin, codec in zip(samples, codecs)])
    alone = [build_micro_batch([as_bin(samples_of_bin, codec="raw")]) for samples_of_bin in samples]
    assert torch.equal(pixel_values(mixed.vision), torch.cat([pixel_values(micro.vision) for micro in alone]))
    assert mixed.vision.residuals
    assert not alone[0].vision.residuals


def test_raw_planes_of_one_bin_are_not_copied() -> None:
    bin_ = as_bin(make_bins(num_bins=2)[1], codec="raw")
    assert build_micro_batch([bin_]).vision.planes.data_ptr() == bin_.pixels.ctypes.data


@pytest.mark.filterwarnings("error")
def test_read_only_bytes_are_copied_without_a_warning() -> None:
    bin_ = as_bin(make_bins(num_bins=2)[1], codec="raw", writable=False)
    assert np.array_equal(build_micro_batch([bin_]).vision.planes.numpy(), bin_.pixels)


@pytest.mark.parametrize("bins", [[], [as_bin([text_sample([10, 11], [1])])]], ids=["empty position", "text only"])
def test_a_batch_without_media_has_one_dummy_image(bins: list[Bin]) -> None:
    """Every rank must call the vision tower once, whatever its bins hold."""
    vision = build_micro_batch(bins).vision
    assert vision.media == ((Grid(1, 2, 2), 0),)
    assert vision.num_patches == 4
    assert vision.planes.tolist() == [0] * (3 * 28 * 28)
    assert vision.window_index.tolist() == [0]
    assert vision.cu_seqlens.tolist() == vision.cu_window_seqlens.tolist() == [0, 4]


def test_an_empty_position_is_one_token_without_targets() -> None:
    micro = build_micro_batch([])
    assert micro.input_ids.shape == (1, 1)
    assert micro.position_ids.tolist() == [[[0]]] * 3
    assert micro.cu_seqlens.tolist() == [0, 1]
    assert micro.lengths == (1,)
    assert micro.targets.shape == micro.target_positions.shape == (0,)
    assert micro.targets.dtype == micro.target_positions.dtype == torch.int64
    assert (micro.bins, micro.num_tokens, micro.num_samples) == ((), 0, 0)


def test_moving_a_batch_moves_every_tensor() -> None:
    moved = build_micro_batch([as_bin(make_bins(num_bins=4)[3])]).to("meta")
    for batch in (moved, moved.vision):
        for field in dataclasses.fields(batch):
            value = getattr(batch, field.name)
            if isinstance(value, torch.Tensor):
                assert value.device.type == "meta", field.name


def test_bin_ids_of_a_mix_replace_those_of_the_folders() -> None:
    bins = [as_bin([text_sample([10, 11], [1])], index=3)]
    assert build_micro_batch(bins).bins == (3,)
    assert build_micro_batch(bins, bin_ids=[17]).bins == (17,)


def test_the_window_size_of_the_model_is_used() -> None:
    rng = np.random.default_rng(2)
    bin_ = as_bin([make_sample(rng, [make_medium(rng, 8, 8)])])
    assert build_micro_batch([bin_]).vision.max_window_seqlen == 64
    assert build_micro_batch([bin_], window_size=56).vision.max_window_seqlen == 16


def with_pixels(bin_: Bin, pixels: bytes) -> Bin:
    return dataclasses.replace(bin_, pixels=np.frombuffer(pixels, dtype=np.uint8))


@pytest.mark.parametrize("codec", ["zstd", "raw"])
@pytest.mark.parametrize("change", [-1, 1])
def test_pixels_of_the_wrong_size_raise(codec: str, change: int) -> None:
    rng = np.random.default_rng(3)
    bin_ = as_bin([make_sample(rng, [make_medium(rng, 4, 4)])], index=6, codec=codec)
    other = dataclasses.replace(bin_, grid_thw=np.array([[1, 4, 4 + 2 * change]], dtype=np.int32))
    with pytest.raises(ShardError, match=r"bin 6: its pixels have .* bytes, its media need"):
        build_micro_batch([other])


def test_pixels_that_do_not_decompress_raise() -> None:
    bin_ = as_bin(make_bins(num_bins=2)[1], index=1)
    stored = bin_.pixels.tobytes()
    with pytest.raises(ShardError, match="shard 5: its pixels have"):
        build_micro_batch([with_pixels(bin_, stored[: len(stored) // 2])], where=["shard 5"])
    with pytest.raises(ShardError, match="bin 1: its pixels do not decompress"):
        build_micro_batch([with_pixels(bin_, b"no zstd frame at all")])


def test_a_micro_batch_is_immutable() -> None:
    micro: MicroBatch = build_micro_batch([])
    with pytest.raises(dataclasses.FrozenInstanceError):
        micro.num_tokens = 3  # type: ignore[misc]
