"""The estimate of a backward pass equals the bytes of the tensors that autograd saves."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from schemas.checkpoints import read_config
from tests.train.synthetic import as_bin, make_medium, make_sample
from train.batches.batch import MicroBatch, build_micro_batch
from train.memory.activations import ROTARY, STORED_PIXELS, VISION_ROTARY, Load, activation_terms
from train.memory.terms import Phase
from train.model import optim
from train.model.packed import PackedQwen, checkpoint_activations
from train.model.sizes import Sizes, sizes_of
from train.settings.arguments import TrainArguments

FROZEN_SETS = [trained for trained in itertools.product((True, False), repeat=3) if any(trained)]
PARTS = ("llm", "mlp", "vision")


def saved_bytes(model: PackedQwen, micro: MicroBatch) -> int:
    """Bytes of the tensors that the graph keeps up to the last hidden states, without the weights."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in weights:
            saved[address] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.target_states(micro)
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def kept_bytes(sizes: Sizes, micro: MicroBatch, dtype: torch.dtype, *, checkpointed: bool) -> int:
    load = Load(
        num_tokens=micro.num_tokens,
        num_targets=micro.targets.numel(),
        num_patches=micro.vision.num_patches,
        is_checkpointed=checkpointed,
    )
    terms = activation_terms(sizes, load, dtype)
    # Planes are not part of the graph; nor are rotary embeddings, if checkpointing holds them.
    outside = {STORED_PIXELS, *((ROTARY, VISION_ROTARY) if checkpointed else ())}
    return sum(term.num_bytes for term in terms if term.phase == Phase.BACKWARD and term.name not in outside)


def one_sample(rows: int, num_text: int) -> MicroBatch:
    rng = np.random.default_rng(0)
    return build_micro_batch([as_bin([make_sample(rng, [make_medium(rng, rows, 16)], num_text=num_text)])])


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("trained", FROZEN_SETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_token_and_a_patch_keep_what_was_estimated(
    tiny_checkpoint: Path, dtype: torch.dtype, trained: tuple[bool, ...], checkpointed: bool
) -> None:
    """The difference of two bins is compared, so that constants drop out.

    The estimate leaves out indices: 8 bytes per token (its id), 8 per pad token (its position; 4 patches share one) and
    4 per patch (the order of the windows).
    """
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=dtype)
    model = PackedQwen(hf, attn_implementation="sdpa").train()
    flags = {f"tune_mm_{part}": is_trained for part, is_trained in zip(PARTS, trained)}
    args = TrainArguments(shards="shards", **flags)
    optim.group_parameters(model, optim.learning_rates(args, 1e-3))
    if checkpointed:
        checkpoint_activations(model)
    sizes = sizes_of(read_config(tiny_checkpoint), args)
    small, long, wide = one_sample(8, 500), one_sample(8, 900), one_sample(16, 500)
    for other in (long, wide):
        measured = saved_bytes(model, other) - saved_bytes(model, small)
        expected = kept_bytes(sizes, other, dtype, checkpointed=checkpointed)
        expected -= kept_bytes(sizes, small, dtype, checkpointed=checkpointed)
        num_tokens, num_patches = (
            other.num_tokens - small.num_tokens,
            other.vision.num_patches - small.vision.num_patches,
        )
        indices = 8 * num_tokens + 8 * num_patches // 4 + 4 * num_patches
        assert 0 <= measured - expected <= indices


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_samples_keep_no_more_than_their_tokens(
    tiny_checkpoint: Path, dtype: torch.dtype, checkpointed: bool
) -> None:
    """Nothing grows with the square of a bin."""
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_checkpoint, dtype=dtype)
    model = PackedQwen(hf, attn_implementation="sdpa").train()
    args = TrainArguments(shards="shards")
    optim.group_parameters(model, optim.learning_rates(args, 1e-3))
    if checkpointed:
        checkpoint_activations(model)
    sizes = sizes_of(read_config(tiny_checkpoint), args)
    rng = np.random.default_rng(0)
    small, large = (
        build_micro_batch([as_bin([make_sample(rng, num_text=num_text) for num_text in lengths])])
        for lengths in ((198, 302), (298, 606))
    )
    assert (small.num_tokens, large.num_tokens) == (504, 908)
    measured = saved_bytes(model, large) - saved_bytes(model, small)
    expected = kept_bytes(sizes, large, dtype, checkpointed=checkpointed)
    expected -= kept_bytes(sizes, small, dtype, checkpointed=checkpointed)
    assert 0 <= measured - expected <= 9 * (large.num_tokens - small.num_tokens)
