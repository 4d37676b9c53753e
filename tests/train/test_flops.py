"""FLOPs are those that torch counts, less what is masked or computed twice."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2_5_VLForConditionalGeneration

from schemas.checkpoints import read_config
from schemas.errors import ConfigError
from tests.train.synthetic import Sample, as_bin, make_medium, make_sample
from train.arithmetic.cost import CostModel
from train.batches.batch import MicroBatch, build_micro_batch
from train.model import optim
from train.model.flops import ModelFlops, known_peak, peak_tflops
from train.model.packed import PackedQwen, checkpoint_activations

PARTS = (optim.LANGUAGE_MODEL, optim.MERGER, optim.VISION_TOWER)
FROZEN_SETS = [trained for trained in itertools.product((True, False), repeat=3) if any(trained)]


@pytest.fixture
def model(demo_checkpoint: Path) -> PackedQwen:
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(demo_checkpoint, dtype=torch.float32)
    return PackedQwen(hf, attn_implementation="sdpa").train()


def packed(*samples: Sample) -> MicroBatch:
    return build_micro_batch([as_bin(list(samples))])


def media_and_text() -> list[Sample]:
    """An image of several windows, text alone, and a video between images."""
    rng = np.random.default_rng(0)
    video = [make_medium(rng, 4, 2), make_medium(rng, 6, 10, steps=2), make_medium(rng, 2, 2)]
    return [make_sample(rng, [make_medium(rng, 10, 12)]), make_sample(rng, num_text=20), make_sample(rng, video)]


def freeze(model: PackedQwen, trained: tuple[bool, ...]) -> None:
    optim.group_parameters(model, {part: 1e-3 if is_trained else None for part, is_trained in zip(PARTS, trained)})


def counted_by_torch(model: PackedQwen, micro: MicroBatch) -> int:
    """FLOPs of a forward and a backward pass. Attention runs as plain matrix products, so that torch counts them."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(micro).backward()
    return counter.get_total_flops()


def squares(micro: MicroBatch) -> int:
    """Number of token pairs within samples."""
    return sum(length**2 for length in np.diff(micro.cu_seqlens.numpy()).tolist())


def executed(model: PackedQwen, micro: MicroBatch) -> float:
    """The count, plus the masked half of each sample's square, plus ``lm_head`` once more, which is recomputed."""
    flops = ModelFlops.of(model)
    masked = flops.per_squared_length * squares(micro)
    head = model.hf.lm_head
    return flops.count(micro) + masked + 2 * head.in_features * head.out_features * micro.targets.numel()


@pytest.mark.parametrize("trained", FROZEN_SETS)
def test_the_count_equals_that_of_torch_whatever_is_frozen(model: PackedQwen, trained: tuple[bool, ...]) -> None:
    freeze(model, trained)
    micro = packed(*media_and_text())
    assert executed(model, micro) == counted_by_torch(model, micro)


def test_text_alone_runs_the_vision_tower_on_its_dummy_image(model: PackedQwen) -> None:
    freeze(model, (True, True, True))
    micro = packed(*media_and_text()[1:2])
    assert micro.vision.num_patches == 4
    assert executed(model, micro) == counted_by_torch(model, micro)


@pytest.mark.parametrize(
    ("targets", "needs_keys"),
    [("q_proj k_proj v_proj", True), ("q_proj v_proj", False), ("o_proj down_proj", True), ("qkv q_proj proj", True)],
)
def test_adapters_are_counted_at_their_matrix(model: PackedQwen, targets: str, needs_keys: bool) -> None:
    """Frozen weights have no gradients, nor does anything before the first adapter.

    Attention as separate products also skips the gradient of the keys if the first layer does not need it; the fused
    kernels of real runs always compute it.
    """
    config = peft.LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=targets.split())
    peft.inject_adapter_in_model(config, model.hf)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    micro = packed(*media_and_text())
    unneeded = 0 if needs_keys else 2 * 64 * squares(micro)
    assert executed(model, micro) - unneeded == counted_by_torch(model, micro)


def test_recomputation_does_not_count(model: PackedQwen) -> None:
    """With checkpointing torch counts the forward pass of the layers once more; the count stays the same."""
    freeze(model, (True, True, False))
    micro = packed(*media_and_text())
    before = ModelFlops.of(model)
    unchecked = counted_by_torch(model, micro)
    checkpoint_activations(model)
    assert ModelFlops.of(model) == before
    forward = (
        before.per_token / 3 * micro.num_tokens
        # full squares, of which the count has the causal half
        + before.per_squared_length / 3 * 2 * squares(micro)
    )
    # Recomputation ends with the last product whose factors are needed: the last matrix of a layer does not run again.
    last_matrices = 2 * 64 * 128 * 2 * micro.num_tokens
    assert counted_by_torch(model, micro) - unchecked == forward - last_matrices


def test_a_packed_bin_costs_as_much_as_its_samples_alone(model: PackedQwen) -> None:
    freeze(model, (True, True, True))
    flops = ModelFlops.of(model)
    samples = media_and_text()
    dummy = flops.count(packed(samples[1])) - flops.count(packed(*samples[:2])) + flops.count(packed(samples[0]))
    assert dummy > 0
    alone = sum(flops.count(packed(sample)) for sample in samples)
    assert flops.count(packed(*samples)) == alone - dummy


def test_an_empty_slot_of_the_order_costs_nothing(model: PackedQwen) -> None:
    freeze(model, (True, True, True))
    assert ModelFlops.of(model).count(build_micro_batch([])) == 0.0


def test_the_cost_estimate_from_the_index_agrees(model: PackedQwen, demo_checkpoint: Path) -> None:
    """The estimate is exact for a video of four steps whose frames consist of full windows."""
    freeze(model, (True, True, True))
    rng = np.random.default_rng(0)
    micro = packed(make_sample(rng, [make_medium(rng, 8, 16, steps=4)], num_targets=5))
    counts = {
        "num_tokens": micro.num_tokens,
        "sum_squared_lengths": micro.num_tokens**2,
        "num_targets": 5,
        "num_patches": 512,
        "num_images": 0,
        "num_videos": 1,
    }
    columns = {name: np.array([value]) for name, value in counts.items()}
    estimate = CostModel.of(read_config(demo_checkpoint)).in_training().bin_flops(**columns)
    counted = ModelFlops.of(model).count(micro)
    # The estimate includes the gradient of the pixels, which nothing needs.
    assert estimate[0] - counted == pytest.approx(2 * 1176 * 32 * 512)


def test_a_matrix_missing_from_the_table_is_an_error(model: PackedQwen) -> None:
    freeze(model, (True, True, True))
    model.hf.extra = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"hf\.extra.* is not in the table of weights"):
        ModelFlops.of(model)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA A10", 125.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.1),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("AMD Instinct MI300X", 1307.4),
        ("Tesla T4", None),
        ("NVIDIA A1000 Laptop GPU", None),
    ],
)
def test_the_peak_is_looked_up_by_the_name_that_torch_gives_a_device(name: str, expected: float | None) -> None:
    assert known_peak(name) == expected


def test_a_cpu_and_float32_have_no_known_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    gpu = torch.device("cuda", 0)
    assert peak_tflops(gpu, torch.bfloat16) == peak_tflops(gpu, torch.float16) == 989.4
    assert peak_tflops(gpu, torch.float32) is None
    assert peak_tflops(torch.device("cpu"), torch.bfloat16) is None
