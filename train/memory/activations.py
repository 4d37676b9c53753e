"""Memory that a micro-batch takes: sizes of a model and contents of the micro-batch -> memory terms.

What a backward pass keeps is the sum of the tensors that autograd saves in the layers of transformers 5.23, exact but
for the kernel of attention: what is said here is of SDPA, flash attention keeps a little less; keys and values that are
repeated for every head (:func:`train.model.attention.has_grouped_kernel`) come on top. Adapters are taken for trained
weights, which is a little too much.

Cost: none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from schemas.qwen import PATCH_DIM
from train.memory.states import Phase, Term
from train.model import optim
from train.model.packed import CHUNK
from train.model.sizes import Sizes

VISION_ANGLES, ANGLES = "angles of patches", "angles of tokens"
"""Cosines and sines of rotary positions, shared by all layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What a micro-batch holds at most.

    Attributes:
        num_tokens: tokens.
        num_targets: targets.
        num_patches: patches.
        is_checkpointed: whether activations are recomputed.
    """

    num_tokens: int
    num_targets: int
    num_patches: int
    is_checkpointed: bool


def activation_terms(sizes: Sizes, load: Load, dtype: torch.dtype) -> list[Term]:
    """What forward and backward pass of a micro-batch hold beside weights and gradients."""
    return [*_vision_terms(sizes, load, dtype.itemsize), *_language_terms(sizes, load, dtype.itemsize)]


def _vision_terms(sizes: Sizes, load: Load, width: int) -> list[Term]:
    hidden, depth, patches = sizes.dims.vision_hidden_size, sizes.dims.vision_depth, load.num_patches
    terms = [
        _term("pixels, as stored", PATCH_DIM, patches, "patches"),
        _term("pixels, on their way", (4 + 2 * width) * PATCH_DIM, patches, "patches", Phase.MOMENT),
    ]
    if optim.VISION_TOWER in sizes.trained_parts:
        block = _vision_block(sizes, width)
        terms.append(_term("pixels", width * PATCH_DIM, patches, "patches"))
        terms.append(_term(VISION_ANGLES, 2 * 4 * (hidden // sizes.dims.vision_num_heads), patches, "patches"))
        if load.is_checkpointed:
            terms.append(_term(f"inputs of {depth} blocks", width * hidden * depth, patches, "patches"))
            terms.append(_term("a block, recomputed", block, patches, "patches", Phase.MOMENT))
        else:
            terms.append(_term(f"{depth} blocks", block * depth, patches, "patches"))
    # Nothing is kept of a frozen vision tower.
    if sizes.trained_parts & {optim.VISION_TOWER, optim.MERGER}:
        terms.append(_term("merger", _merger(sizes, width), patches, "patches"))
    return terms


def _language_terms(sizes: Sizes, load: Load, width: int) -> list[Term]:
    hidden, depth, tokens = sizes.dims.hidden_size, sizes.dims.num_layers, load.num_tokens
    num_layers, phase = (1, Phase.MOMENT) if load.is_checkpointed else (depth, Phase.BACKWARD)
    layers = _term(
        "a layer, recomputed" if load.is_checkpointed else f"{depth} layers",
        num_layers * _language_layer(sizes, width),
        tokens,
        "tokens",
        phase,
    )
    terms = [_term(ANGLES, 2 * width * (hidden // sizes.dims.num_heads), tokens, "tokens")]
    if load.is_checkpointed:
        terms.append(_term(f"inputs of {depth} layers", width * hidden * depth, tokens, "tokens"))
    terms.append(layers)
    is_trained = optim.LANGUAGE_MODEL in sizes.trained_parts
    last = 4 * hidden + 4 + (width * hidden if is_trained else 0)
    terms.append(_term("last norm", last, tokens, "tokens"))
    # Of a chunk: logits, the same in float32, their logarithms, and gradients of all three.
    logits = 12 if width == 4 else 12 + 2 * width
    rows = min(CHUNK, load.num_targets)
    terms.append(_term("a chunk of logits", logits * sizes.dims.vocab_size, rows, "targets", Phase.MOMENT))
    return terms


def _language_layer(sizes: Sizes, width: int) -> int:
    """Bytes that a layer of the language model saves for each token.

    Two norms save their inputs in float32 and their root; where weights are trained, what they multiply, too. Attention
    saves queries, keys, values, its output and the sums of its rows. The MLP saves gate, gate after SiLU, the other
    factor and, where weights are trained, the product. Trained matrices save their inputs; that of the last one of
    attention is its output once more, joined.
    """
    hidden, keys = sizes.dims.hidden_size, sizes.dims.key_value_size
    norms = 2 * (4 * hidden + 4)
    attention = width * (2 * hidden + 2 * keys) + 4 * sizes.dims.num_heads
    mlp = 3 * width * sizes.dims.intermediate_size
    if optim.LANGUAGE_MODEL in sizes.trained_parts:
        norms += 2 * width * hidden
        attention += 2 * width * hidden
        mlp += width * (hidden + sizes.dims.intermediate_size)
    return norms + attention + mlp


def _vision_block(sizes: Sizes, width: int) -> int:
    """Bytes that a trained block of the vision tower saves for each patch.

    Values are a part of the output of ``qkv``, which is kept with them; the outputs of the windows are kept once alone
    and once joined.
    """
    hidden = sizes.dims.vision_hidden_size
    return (
        width * (11 * hidden + 4 * sizes.dims.vision_intermediate_size)
        + 8 * (hidden + 1)
        + 4 * sizes.dims.vision_num_heads
    )


def _merger(sizes: Sizes, width: int) -> int:
    """Bytes that the merger saves for each patch: what its norm needs, and the inputs of its matrices and GELU."""
    hidden = sizes.dims.vision_hidden_size
    saved = width * hidden
    if optim.VISION_TOWER in sizes.trained_parts:
        saved += 4 * hidden + 4
    if optim.MERGER in sizes.trained_parts:
        saved += 3 * width * hidden
    return saved


def _term(name: str, width: int, number: int, unit: str, phase: Phase = Phase.BACKWARD) -> Term:
    return Term(name=name, num_bytes=width * number, arithmetic=f"{width:,} B x {number:,} {unit}", phase=phase)
