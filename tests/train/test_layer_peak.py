"""The estimate of a layer's backward pass covers the peak of tracing one, at the sizes of the official checkpoints.

Tensors are fake: they have shapes but no memory. What a kernel allocates for itself is not seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLDecoderLayer, Qwen2_5_VLVisionBlock

from tests.train.live_bytes import LiveBytes
from train.arithmetic.dimensions import OFFICIAL
from train.memory.activations import Load, activation_terms
from train.memory.terms import Phase
from train.model.attention import BY_SAMPLE, FLASH_VARLEN, SDPA, VARLEN
from train.model.head import CHUNK, TargetHead
from train.model.sizes import sizes_of
from train.settings.arguments import TrainArguments

NUM_PARTS = 8
"""Samples or windows."""

DTYPE = torch.bfloat16


@pytest.fixture(autouse=True)
def _half_precision() -> Iterator[None]:
    """Fake layers cannot be converted, so they are created in half precision."""
    torch.set_default_dtype(DTYPE)
    yield
    torch.set_default_dtype(torch.float32)


def build(kind: str, size: str, implementation: str, num_rows: int) -> tuple[nn.Module, torch.Tensor, dict[str, Any]]:
    """A layer of an official size, its input and its further arguments."""
    text = {key: value for key, value in OFFICIAL[size].items() if key != "vision_config"}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=OFFICIAL[size]["vision_config"])
    lengths = (num_rows // NUM_PARTS,) * NUM_PARTS
    boundaries = torch.empty(NUM_PARTS + 1, dtype=torch.int32)
    if kind == "layer":
        config.text_config._attn_implementation_internal = FLASH_VARLEN if implementation == VARLEN else BY_SAMPLE
        layer: nn.Module = Qwen2_5_VLDecoderLayer(config.text_config, 0)
        hidden, heads, shape = config.text_config.hidden_size, config.text_config.num_attention_heads, (1, num_rows)
        options: dict[str, Any] = {"attention_mask": None, "use_cache": False}
        if implementation == VARLEN:
            options |= {"cu_seq_lens_q": boundaries, "max_length_q": lengths[0]}
        else:
            options["lengths"] = lengths
    else:
        config.vision_config._attn_implementation_internal = FLASH_VARLEN if implementation == VARLEN else SDPA
        layer = Qwen2_5_VLVisionBlock(config.vision_config)
        hidden, heads, shape = config.vision_config.hidden_size, config.vision_config.num_heads, (num_rows,)
        # SDPA reads the boundaries, and fake tensors have no values.
        at = boundaries if implementation == VARLEN else np.cumsum((0, *lengths))
        options = {"cu_seqlens": at, "max_seqlen": lengths[0]}
    rotary_dtype = DTYPE if kind == "layer" else torch.float32
    options["position_embeddings"] = [torch.empty(*shape, hidden // heads, dtype=rotary_dtype) for _ in range(2)]
    return layer, torch.empty(*shape, hidden, requires_grad=True), options


def peak(kind: str, size: str, implementation: str, num_rows: int, *, trained: bool, checkpointed: bool) -> int:
    """Most bytes alive in a forward and backward pass, without weights and input."""
    with FakeTensorMode():
        layer, states, options = build(kind, size, implementation, num_rows)
        layer.requires_grad_(trained).train()
        compute = partial(layer, **options)
        with LiveBytes((states, *options["position_embeddings"], *layer.parameters())) as alive:
            output = checkpoint(compute, states, use_reentrant=False) if checkpointed else compute(states)
            # In a model, the output of a layer is released before its backward pass, or counted as an input.
            edge, gradient = torch.autograd.graph.get_gradient_edge(output), torch.empty_like(output)
            del output
            torch.autograd.backward((edge,), (gradient,))
    return alive.peak


def estimate(kind: str, size: str, num_rows: int, *, trained: bool, checkpointed: bool) -> int:
    """What the terms of one layer say."""
    args = TrainArguments(shards="shards", tune_mm_llm=trained, tune_mm_mlp=True, tune_mm_vision=True)
    load = Load(num_tokens=num_rows, num_targets=0, num_patches=num_rows, is_checkpointed=checkpointed)
    sizes = sizes_of(OFFICIAL[size], args)
    terms = activation_terms(sizes, load, DTYPE)
    transient = {term.name: term.num_bytes for term in terms if term.phase == Phase.TRANSIENT}
    if checkpointed:
        return transient[f"recomputed {kind}"]
    depth = sizes.dims.num_layers if kind == "layer" else sizes.dims.vision_depth
    saved = next(term.num_bytes for term in terms if term.name == f"{depth} {kind}s")
    return saved // depth + transient[f"gradients inside a {kind}"]


@pytest.mark.parametrize("checkpointed", [True, False], ids=["recomputed", "stored"])
@pytest.mark.parametrize("implementation", [VARLEN, SDPA])
@pytest.mark.parametrize(
    ("kind", "size", "trained"),
    [
        ("layer", "3B", True),
        ("layer", "7B", True),
        ("layer", "7B", False),
        ("block", "7B", True),
        ("block", "72B", True),
    ],
)
def test_the_backward_pass_of_a_layer_takes_what_was_estimated(
    kind: str, size: str, trained: bool, implementation: str, checkpointed: bool
) -> None:
    """To the byte with SDPA, which keeps the outputs of samples and their concatenation; varlen keeps one of them.

    Two lengths are compared, so that gradients of weights drop out: they are terms of their own.
    """
    options = {"trained": trained, "checkpointed": checkpointed}
    short, long = 16384, 32768
    measured = peak(kind, size, implementation, long, **options) - peak(kind, size, implementation, short, **options)
    expected = estimate(kind, size, long, **options) - estimate(kind, size, short, **options)
    if implementation == SDPA:
        assert measured == expected
    else:
        assert 0.95 * expected < measured <= expected


def test_a_layer_of_the_7b_takes_more_than_it_saves() -> None:
    """316 kB a token, of which 83 kB are gradients; a patch of a block 82 kB."""
    options = {"trained": True, "checkpointed": True}
    assert estimate("layer", "7B", 1, **options) == 315_512
    assert estimate("block", "7B", 1, **options) == 82_072


@pytest.mark.parametrize("num_targets", [100, CHUNK, 16384, 65536])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_loss_takes_what_was_estimated(dtype: torch.dtype, num_targets: int) -> None:
    """Forward and backward pass of a frozen ``lm_head``; the gradient of its weight is a term of its own."""
    sizes = sizes_of(OFFICIAL["7B"], TrainArguments(shards="shards"))
    with FakeTensorMode():
        head = TargetHead(sizes.dims.hidden_size, sizes.dims.vocab_size, bias=False, dtype=dtype).requires_grad_(False)
        states = torch.empty(num_targets, sizes.dims.hidden_size, dtype=dtype, requires_grad=True)
        targets = torch.empty(num_targets, dtype=torch.int64)
        with LiveBytes((*head.parameters(), states, targets)) as alive:
            head(states, targets).backward()
    load = Load(num_tokens=0, num_targets=num_targets, num_patches=0, is_checkpointed=True)
    terms = activation_terms(sizes, load, dtype)
    (expected,) = (term.num_bytes for term in terms if term.name == "lm_head")
    measured = alive.peak + states.nbytes
    assert 0.95 * expected < measured < 1.001 * expected
