"""Memory of a micro-batch: parameter counts, what is trained, and the contents of the micro-batch -> memory terms.

The backward pass keeps the tensors that autograd saves in the layers of transformers 5.23, which are counted exactly
for SDPA. Flash attention keeps a little less; keys and values that are repeated for every head
(:func:`train.model.attention.has_grouped_kernel`) come on top. Adapters count as trained weights, a slight
overestimate. Gradients between the operations of a layer are counted where they are largest: in its gated MLP.

Cost: none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from schemas.qwen import MERGED_PATCHES, PATCH_DIM
from train.arithmetic.weights import Stage, matrix_inputs
from train.memory.terms import Phase, Term
from train.model.head import CHUNK
from train.model.optim import LANGUAGE_MODEL, MERGER, VISION_TOWER
from train.model.sizes import Sizes

STORED_PIXELS = "stored pixels"
VISION_ROTARY, ROTARY = "rotary embeddings of patches", "rotary embeddings of tokens"
"""Cosines and sines, shared by all layers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """Contents of a micro-batch.

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
    """Memory that forward and backward pass of a micro-batch hold, without weights and gradients."""
    return [*_vision_terms(sizes, load, dtype.itemsize), *_language_terms(sizes, load, dtype.itemsize)]


def _vision_terms(sizes: Sizes, load: Load, width: int) -> list[Term]:
    dims, patches = sizes.dims, load.num_patches
    hidden, depth = dims.vision_hidden_size, dims.vision_depth
    terms = [
        _term(STORED_PIXELS, PATCH_DIM, patches, "patches"),
        _term("pixels being normalized", (4 + 2 * width) * PATCH_DIM, patches, "patches", Phase.TRANSIENT),
    ]
    # A frozen vision tower keeps nothing.
    if VISION_TOWER in sizes.trained_parts:
        block = _vision_block_bytes(sizes, width)
        gradients = _gradient_bytes(hidden, dims.vision_intermediate_size, width, is_trained=True)
        terms.append(_term("pixels", width * PATCH_DIM, patches, "patches"))
        terms.append(_term(VISION_ROTARY, 2 * 4 * (hidden // dims.vision_num_heads), patches, "patches"))
        if load.is_checkpointed:
            terms.append(_term(f"inputs of {depth} blocks", width * hidden * depth, patches, "patches"))
            terms.append(_term("recomputed block", block + gradients, patches, "patches", Phase.TRANSIENT))
        else:
            terms.append(_term(f"{depth} blocks", block * depth, patches, "patches"))
            terms.append(_term("gradients inside a block", gradients, patches, "patches", Phase.TRANSIENT))
    if sizes.trained_parts & {VISION_TOWER, MERGER}:
        terms.append(_term("merger", _merger_bytes(sizes, width), patches, "patches"))
    return terms


def _language_terms(sizes: Sizes, load: Load, width: int) -> list[Term]:
    dims, tokens = sizes.dims, load.num_tokens
    hidden, depth = dims.hidden_size, dims.num_layers
    is_trained = LANGUAGE_MODEL in sizes.trained_parts
    layer = _language_layer_bytes(sizes, width)
    gradients = _gradient_bytes(hidden, dims.intermediate_size, width, is_trained=is_trained)
    terms = [_term(ROTARY, 2 * width * (hidden // dims.num_heads), tokens, "tokens")]
    if load.is_checkpointed:
        terms.append(_term(f"inputs of {depth} layers", width * hidden * depth, tokens, "tokens"))
        terms.append(_term("recomputed layer", layer + gradients, tokens, "tokens", Phase.TRANSIENT))
    else:
        terms.append(_term(f"{depth} layers", depth * layer, tokens, "tokens"))
        terms.append(_term("gradients inside a layer", gradients, tokens, "tokens", Phase.TRANSIENT))
    terms.append(_term("final norm", _norm_bytes(hidden, width, is_trained=is_trained), tokens, "tokens"))
    terms.append(_head_term(sizes, load, width))
    return terms


def _head_term(sizes: Sizes, load: Load, width: int) -> Term:
    """What ``lm_head`` needs: scalars of a chunk of logits, and rows of its inputs, one per target."""
    dims, rows = sizes.dims, min(CHUNK, load.num_targets)
    steps = (
        # Logits and their logarithms in float32.
        (8, width),
        # Backward pass: logits, also in float32, beside the float32 gradient of the inputs.
        (4 if width == 4 else 4 + width, 4 + width),
        # Their gradient, and a product that is added to the gradient of the inputs.
        (width, 4 + 2 * width),
    )
    of_logits, of_inputs = max(
        ((per_logit * dims.vocab_size, per_input * dims.hidden_size) for per_logit, per_input in steps),
        key=lambda rates: rates[0] * rows + rates[1] * load.num_targets,
    )
    return Term(
        name="lm_head",
        num_bytes=of_logits * rows + of_inputs * load.num_targets,
        formula=f"{of_logits:,} B x {rows:,} rows + {of_inputs:,} B x {load.num_targets:,} targets",
        phase=Phase.TRANSIENT,
    )


def _language_layer_bytes(sizes: Sizes, width: int) -> int:
    """Bytes that a layer of the language model saves per token.

    Attention saves queries, keys, values, its output and the float32 sums of its rows. The MLP saves gate, SiLU of the
    gate, and the other factor. Trained matrices save their inputs.
    """
    dims, is_trained = sizes.dims, LANGUAGE_MODEL in sizes.trained_parts
    norms = 2 * _norm_bytes(dims.hidden_size, width, is_trained=is_trained)
    attention = width * (2 * dims.hidden_size + 2 * dims.key_value_size) + 4 * dims.num_heads
    mlp = 3 * width * dims.intermediate_size
    inputs = width * matrix_inputs(dims, Stage.LAYERS) if is_trained else 0
    return norms + attention + mlp + inputs


def _vision_block_bytes(sizes: Sizes, width: int) -> int:
    """Bytes that a trained block of the vision tower saves per patch.

    Attention saves the output of ``qkv``, of which values are a part, queries and keys after rotation, the output and
    the float32 sums of its rows. The MLP saves the same as in the language model.
    """
    dims = sizes.dims
    norms = 2 * _norm_bytes(dims.vision_hidden_size, width, is_trained=True)
    attention = width * (3 + 2 + 1) * dims.vision_hidden_size + 4 * dims.vision_num_heads
    mlp = 3 * width * dims.vision_intermediate_size
    return norms + attention + mlp + width * matrix_inputs(dims, Stage.BLOCKS)


def _gradient_bytes(hidden: int, intermediate: int, width: int, *, is_trained: bool) -> int:
    """Bytes per row of the gradients that exist when the backward pass of a layer takes most memory.

    That is in its gated MLP: the gradients of the output, of the product, and of both factors of the product. The
    product itself, which a trained matrix saves, is released by then.
    """
    return width * (hidden + (2 if is_trained else 3) * intermediate)


def _merger_bytes(sizes: Sizes, width: int) -> int:
    """Bytes that the merger saves per patch: the input of GELU, and what its norm and its matrices need."""
    hidden = sizes.dims.vision_hidden_size
    saved = width * hidden
    if VISION_TOWER in sizes.trained_parts:
        saved += _norm_bytes(hidden, width, is_trained=False)
    if MERGER in sizes.trained_parts:
        saved += width * (hidden + matrix_inputs(sizes.dims, Stage.MERGER) // MERGED_PATCHES)
    return saved


def _norm_bytes(hidden: int, width: int, *, is_trained: bool) -> int:
    """Bytes that a norm saves per row: its input and root in float32, and what a trained weight is multiplied with."""
    return 4 * hidden + 4 + (width * hidden if is_trained else 0)


def _term(name: str, width: int, count: int, unit: str, phase: Phase = Phase.BACKWARD) -> Term:
    return Term(name=name, num_bytes=width * count, formula=f"{width:,} B x {count:,} {unit}", phase=phase)
