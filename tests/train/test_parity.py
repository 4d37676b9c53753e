"""Samples have the same losses packed and alone, and a sample that sees a neighbour is reported."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from schemas.qwen import IMAGE_PAD
from tests.train.synthetic import make_bins, write_shards
from train.batches.batch import MicroBatch, build_micro_batch
from train.model.packed import PackedQwen
from train.preflight.parity import bins_to_compare, change_samples, compare_packed, split_samples
from train.shards.index import open_shards
from train.shards.reader import BinReader


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("parity") / "shards", make_bins(num_bins=8))


@pytest.fixture
def model(tiny_checkpoint: Path) -> PackedQwen:
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    return PackedQwen(hf, attn_implementation="sdpa")


def problems_of(model: PackedQwen, shards: Path, dtype: torch.dtype = torch.float32) -> list[str]:
    index = open_shards(shards)
    return compare_packed(model, BinReader(index), index, dtype=dtype, device=torch.device("cpu"), window_size=112)


def leaking(self: PackedQwen, micro: MicroBatch) -> dict[str, Any]:
    """Treat the bin as one long sample, so that each sample sees those before it."""
    return {"lengths": (micro.num_tokens,)}


@pytest.mark.parametrize("codec", ["raw", "zstd", "jpeg"])
def test_samples_of_a_bin_have_the_same_losses_alone(
    model: PackedQwen, tmp_path: Path, caplog: pytest.LogCaptureFixture, codec: str
) -> None:
    caplog.set_level(logging.INFO)
    shards = write_shards(tmp_path / "set", make_bins(num_bins=8), codec=codec)
    assert problems_of(model, shards) == []
    index = open_shards(shards)
    num_samples = sum(int(index.num_samples[bin_id]) for bin_id in bins_to_compare(index))
    assert f"{num_samples} samples of bin" in caplog.text


def test_a_sample_that_sees_its_neighbour_is_reported(
    model: PackedQwen, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PackedQwen, "_sample_boundaries", leaking)
    problems = problems_of(model, shards)
    assert sum("alone, more than 0.0001 apart" in problem for problem in problems) == 5
    assert sum("with other neighbours in the bin" in problem for problem in problems) == 5
    # The first sample of a bin has none before it.
    assert not any(problem.startswith("sample 0 ") for problem in problems)


def test_a_bin_is_split_into_its_samples(shards: Path) -> None:
    """Two samples, with one image and with three."""
    stored = BinReader(open_shards(shards)).read(1).bin
    micro = build_micro_batch([stored])
    samples = split_samples(stored, micro, 112)
    assert [len(sample.vision.media) for sample in samples] == [1, 3]
    assert torch.equal(torch.cat([sample.input_ids[0] for sample in samples]), micro.input_ids[0])
    assert torch.equal(torch.cat([sample.targets for sample in samples]), micro.targets)
    assert torch.equal(torch.cat([sample.vision.planes for sample in samples]), micro.vision.planes)
    assert {sample.vision.residuals for sample in samples} == {micro.vision.residuals}


def test_bins_of_every_kind_with_several_samples_are_compared(shards: Path) -> None:
    """Text, images, and both with videos; the bins with a video only hold one sample."""
    index = open_shards(shards)
    chosen = bins_to_compare(index)
    assert sorted(bin_id % 4 for bin_id in chosen) == [0, 1, 3]
    assert all(index.num_samples[chosen] > 1)


def test_a_leak_below_rounding_is_found_in_half_precision(model: PackedQwen, shards: Path) -> None:
    """A thousandth of the embedding of the previous token is added, which rounding hides."""
    embed = model.bfloat16().hf.model.language_model.embed_tokens
    assert problems_of(model, shards, torch.bfloat16) == []

    def leak(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output + 1e-3 * output.roll(1, dims=1)

    embed.register_forward_hook(leak)
    problems = problems_of(model, shards, torch.bfloat16)
    assert problems
    assert all("with other neighbours in the bin" in problem for problem in problems)


def test_nondeterministic_kernels_are_not_mistaken_for_a_leak(
    model: PackedQwen, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = PackedQwen.forward

    def noisy(self: PackedQwen, micro: MicroBatch, *, scores: bool = False) -> torch.Tensor:
        output = forward(self, micro, scores=scores)
        return output + 1e-3 * torch.rand_like(output)

    monkeypatch.setattr(PackedQwen, "forward", noisy)
    assert problems_of(model.bfloat16(), shards, torch.bfloat16) == []
    monkeypatch.setattr(PackedQwen, "_sample_boundaries", leaking)
    problems = problems_of(model, shards, torch.bfloat16)
    assert any("with other neighbours in the bin" in problem for problem in problems)


def test_a_changed_sample_keeps_its_length_and_its_images_their_positions(shards: Path) -> None:
    """Two samples, with one image and with three."""
    stored = BinReader(open_shards(shards)).read(1).bin
    micro = build_micro_batch([stored])
    end, num_bytes = int(stored.cu_seqlens[1]), 3 * 14 * 14 * 8
    for slot, ids, planes in ((0, slice(end), slice(num_bytes)), (1, slice(end, None), slice(num_bytes, None))):
        changed = change_samples(stored, micro, [slot])
        is_pad, is_same = micro.input_ids == IMAGE_PAD, changed.input_ids == micro.input_ids
        assert torch.equal(is_same[0, ids], is_pad[0, ids])
        assert torch.equal(changed.vision.planes[planes], ~micro.vision.planes[planes])
        both = change_samples(stored, changed, [slot])
        assert torch.equal(both.vision.planes, micro.vision.planes)
        assert int(is_same.sum()) == micro.num_tokens - int((~is_pad[0, ids]).sum())
        assert torch.equal(replace(changed, input_ids=micro.input_ids).position_ids, micro.position_ids)


def test_bins_of_one_sample_each_leave_nothing_to_compare(
    model: PackedQwen, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    samples = [sample for samples in make_bins(num_bins=4) for sample in samples]
    assert problems_of(model, write_shards(tmp_path / "set", [[sample] for sample in samples])) == []
    assert "no bin holds several samples: there is nothing to compare" in caplog.text
