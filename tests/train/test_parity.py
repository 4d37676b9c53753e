"""Packed samples and the same alone have the same losses, and a sample that sees a neighbour is found."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
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


def plan_of(shards: Path, dtype: torch.dtype = torch.float32) -> Any:
    index, shape = open_shards(shards), SimpleNamespace(window_size=112)
    return SimpleNamespace(index=index, dtype=dtype, device=torch.device("cpu"), shape=shape)


def leaking(self: PackedQwen, micro: MicroBatch) -> dict[str, Any]:
    """The bin as one long sample: each sees the ones before."""
    return {"lengths": (micro.num_tokens,)}


@pytest.mark.parametrize("codec", ["raw", "zstd", "jpeg"])
def test_samples_of_a_bin_have_the_same_losses_alone(
    model: PackedQwen, tmp_path: Path, caplog: pytest.LogCaptureFixture, codec: str
) -> None:
    caplog.set_level(logging.INFO)
    plan = plan_of(write_shards(tmp_path / "set", make_bins(num_bins=8), codec=codec))
    assert compare_packed(model, plan, BinReader(plan.index)) == []
    num_samples = sum(int(plan.index.num_samples[number]) for number in bins_to_compare(plan.index))
    assert f"{num_samples} samples of bins" in caplog.text


def test_a_sample_that_sees_its_neighbour_is_found(
    model: PackedQwen, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PackedQwen, "_sample_boundaries", leaking)
    plan = plan_of(shards)
    problems = compare_packed(model, plan, BinReader(plan.index))
    assert sum("alone, more than 0.0001 apart" in problem for problem in problems) == 5
    assert sum("where its neighbours in the bin are others" in problem for problem in problems) == 5
    # The first sample of a bin has nobody before it.
    assert not any(problem.startswith("sample 0 ") for problem in problems)


def test_a_bin_falls_apart_into_its_samples(shards: Path) -> None:
    """Two samples, with one picture and with three."""
    plan = plan_of(shards)
    reader = BinReader(plan.index)
    one = reader.read(1).bin
    micro = build_micro_batch([one])
    samples = split_samples(one, micro, plan)
    assert [len(sample.vision.media) for sample in samples] == [1, 3]
    assert torch.equal(torch.cat([sample.input_ids[0] for sample in samples]), micro.input_ids[0])
    assert torch.equal(torch.cat([sample.targets for sample in samples]), micro.targets)
    assert torch.equal(torch.cat([sample.vision.planes for sample in samples]), micro.vision.planes)
    assert {sample.vision.residuals for sample in samples} == {micro.vision.residuals}


def test_bins_of_each_kind_are_compared_if_they_hold_several_samples(shards: Path) -> None:
    """Text alone, pictures, all together; the bins with a clip alone hold one sample."""
    index = open_shards(shards)
    chosen = bins_to_compare(index)
    assert sorted(number % 4 for number in chosen) == [0, 1, 3]
    assert all(index.num_samples[chosen] > 1)


def test_in_half_precision_a_little_of_a_neighbour_is_found_as_well(model: PackedQwen, shards: Path) -> None:
    """A thousandth of the embeddings of the token before makes a difference that rounding hides."""
    embed = model.bfloat16().hf.model.language_model.embed_tokens
    plan = plan_of(shards, torch.bfloat16)
    assert compare_packed(model, plan, BinReader(plan.index)) == []

    def leak(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output + 1e-3 * output.roll(1, dims=1)

    embed.register_forward_hook(leak)
    problems = compare_packed(model, plan, BinReader(plan.index))
    assert problems
    assert all("where its neighbours in the bin are others" in problem for problem in problems)


def test_kernels_that_never_give_the_same_twice_are_not_taken_for_a_leak(
    model: PackedQwen, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, plan = PackedQwen.forward, plan_of(shards, torch.bfloat16)

    def noisy(self: PackedQwen, micro: MicroBatch, *, scores: bool = False) -> torch.Tensor:
        found = forward(self, micro, scores=scores)
        return found + 1e-3 * torch.rand_like(found)

    monkeypatch.setattr(PackedQwen, "forward", noisy)
    assert compare_packed(model.bfloat16(), plan, BinReader(plan.index)) == []
    monkeypatch.setattr(PackedQwen, "_sample_boundaries", leaking)
    problems = compare_packed(model, plan, BinReader(plan.index))
    assert any("where its neighbours in the bin are others" in problem for problem in problems)


def test_a_changed_sample_keeps_its_length_and_its_pictures_their_places(shards: Path) -> None:
    """Two samples, with one picture and with three."""
    plan = plan_of(shards)
    one = BinReader(plan.index).read(1).bin
    micro = build_micro_batch([one])
    border, num_bytes = int(one.cu_seqlens[1]), 3 * 14 * 14 * 8
    for slot, ids, planes in ((0, slice(border), slice(num_bytes)), (1, slice(border, None), slice(num_bytes, None))):
        changed = change_samples(one, micro, [slot])
        is_pad, is_same = micro.input_ids == IMAGE_PAD, changed.input_ids == micro.input_ids
        assert torch.equal(is_same[0, ids], is_pad[0, ids])
        assert torch.equal(changed.vision.planes[planes], ~micro.vision.planes[planes])
        both = change_samples(one, changed, [slot])
        assert torch.equal(both.vision.planes, micro.vision.planes)
        assert int(is_same.sum()) == micro.num_tokens - int((~is_pad[0, ids]).sum())
        assert torch.equal(replace(changed, input_ids=micro.input_ids).position_ids, micro.position_ids)


def test_bins_of_one_sample_each_leave_nothing_to_compare(
    model: PackedQwen, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    samples = [sample for one in make_bins(num_bins=4) for sample in one]
    plan = plan_of(write_shards(tmp_path / "set", [[sample] for sample in samples]))
    assert compare_packed(model, plan, BinReader(plan.index)) == []
    assert "no bin holds several samples: there is nothing to compare" in caplog.text
