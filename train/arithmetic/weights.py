"""The one table of a model's weights: :class:`Dimensions` -> a row for every matrix, embedding and norm.

Rows are in the order of computation. Parameter counts, FLOPs, bytes of saved activations and the order in which a
backward pass meets the weights all come from these rows. Names are those of transformers 5.23
(``Qwen2_5_VLForConditionalGeneration``).

Cost: microseconds.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from functools import cache

from schemas.qwen import MERGED_PATCHES, PATCH_DIM
from train.arithmetic.dimensions import Dimensions


class Unit(enum.Enum):
    """What a stage of the model computes one output row for."""

    PATCH = "patch"
    MERGED_PATCH = "merged patch"
    TOKEN = "token"
    TARGET = "target"


class Stage(enum.IntEnum):
    """Stages of the model, in the order of computation."""

    PATCH_EMBED = 0
    BLOCKS = 1
    MERGER = 2
    EMBEDDINGS = 3
    LAYERS = 4
    FINAL_NORM = 5
    HEAD = 6

    @property
    def unit(self) -> Unit:
        """What the stage computes an output row for."""
        if self in (Stage.PATCH_EMBED, Stage.BLOCKS):
            return Unit.PATCH
        if self == Stage.MERGER:
            return Unit.MERGED_PATCH
        return Unit.TARGET if self == Stage.HEAD else Unit.TOKEN


class Kind(enum.Enum):
    """How a weight is applied: multiplied, looked up, or scaled by."""

    MATRIX = "matrix"
    EMBEDDING = "embedding"
    NORM = "norm"


ATTENTION_STEP = 1
"""Step of the matrices that make queries, keys and values, in a block and in a layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weight:
    """A weight of the model, or the same weight of all its layers.

    Attributes:
        name: name of its module; ``{}`` stands for the index of the layer.
        stage: stage of the model.
        step: position inside the layer, in the order of computation. Weights of one step share their input.
        kind: how it is applied.
        inputs: width of its input; 1 for a norm.
        outputs: width of its output.
        copies: layers that have one.
        has_bias: whether a bias of width ``outputs`` is added.
        is_tied: whether it is the weight of another row.
    """

    name: str
    stage: Stage
    step: int
    kind: Kind
    inputs: int
    outputs: int
    copies: int
    has_bias: bool
    is_tied: bool

    @property
    def num_elements(self) -> int:
        """Scalars of one copy, without the bias."""
        return self.inputs * self.outputs


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    name: str
    kind: Kind
    inputs: int
    outputs: int
    has_bias: bool = False
    is_tied: bool = False


def _matrix(name: str, inputs: int, outputs: int, *, bias: bool = False, tied: bool = False) -> _Row:
    return _Row(name=name, kind=Kind.MATRIX, inputs=inputs, outputs=outputs, has_bias=bias, is_tied=tied)


def _norm(name: str, width: int) -> _Row:
    return _Row(name=name, kind=Kind.NORM, inputs=1, outputs=width)


@cache
def weight_table(dims: Dimensions) -> tuple[Weight, ...]:
    """The table: stage by stage, and inside a layer step by step."""
    vision, vision_mlp = dims.vision_hidden_size, dims.vision_intermediate_size
    hidden, mlp, keys, vocab = dims.hidden_size, dims.intermediate_size, dims.key_value_size, dims.vocab_size
    merged = MERGED_PATCHES * vision
    embeddings = _Row(name="embed_tokens", kind=Kind.EMBEDDING, inputs=vocab, outputs=hidden)
    block = [
        [_norm("norm1", vision)],
        [_matrix("attn.qkv", vision, 3 * vision, bias=True)],
        [_matrix("attn.proj", vision, vision, bias=True)],
        [_norm("norm2", vision)],
        [_matrix(f"mlp.{name}", vision, vision_mlp, bias=True) for name in ("gate_proj", "up_proj")],
        [_matrix("mlp.down_proj", vision_mlp, vision, bias=True)],
    ]
    merger = [
        [_norm("ln_q", vision)],
        [_matrix("mlp.0", merged, merged, bias=True)],
        [_matrix("mlp.2", merged, hidden, bias=True)],
    ]
    layer = [
        [_norm("input_layernorm", hidden)],
        [
            _matrix("self_attn.q_proj", hidden, hidden, bias=True),
            _matrix("self_attn.k_proj", hidden, keys, bias=True),
            _matrix("self_attn.v_proj", hidden, keys, bias=True),
        ],
        [_matrix("self_attn.o_proj", hidden, hidden)],
        [_norm("post_attention_layernorm", hidden)],
        [_matrix(f"mlp.{name}", hidden, mlp) for name in ("gate_proj", "up_proj")],
        [_matrix("mlp.down_proj", mlp, hidden)],
    ]
    head = [[_matrix("lm_head", hidden, vocab, tied=dims.has_tied_embeddings)]]
    return (
        *_rows(Stage.PATCH_EMBED, "model.visual.patch_embed.", [[_matrix("proj", PATCH_DIM, vision)]]),
        *_rows(Stage.BLOCKS, "model.visual.blocks.{}.", block, copies=dims.vision_depth),
        *_rows(Stage.MERGER, "model.visual.merger.", merger),
        *_rows(Stage.EMBEDDINGS, "model.language_model.", [[embeddings]]),
        *_rows(Stage.LAYERS, "model.language_model.layers.{}.", layer, copies=dims.num_layers),
        *_rows(Stage.FINAL_NORM, "model.language_model.", [[_norm("norm", hidden)]]),
        *_rows(Stage.HEAD, "", head),
    )


def _rows(stage: Stage, prefix: str, steps: list[list[_Row]], *, copies: int = 1) -> list[Weight]:
    return [
        Weight(
            name=f"{prefix}{row.name}",
            stage=stage,
            step=step,
            kind=row.kind,
            inputs=row.inputs,
            outputs=row.outputs,
            copies=copies,
            has_bias=row.has_bias,
            is_tied=row.is_tied,
        )
        for step, rows in enumerate(steps)
        for row in rows
    ]


def forward_flops(dims: Dimensions, unit: Unit) -> int:
    """FLOPs of all matrices in a forward pass, per unit. A multiplication with its addition counts 2."""
    return 2 * sum(
        row.copies * row.num_elements
        for row in weight_table(dims)
        if row.kind == Kind.MATRIX and row.stage.unit == unit
    )


def matrix_inputs(dims: Dimensions, stage: Stage) -> int:
    """Scalars per unit that the matrices of one layer of a stage read; an input that several share counts once."""
    inputs = {row.step: row.inputs for row in weight_table(dims) if row.kind == Kind.MATRIX and row.stage == stage}
    return sum(inputs.values())


def attention_flops(dims: Dimensions, stage: Stage) -> int:
    """FLOPs of attention in one layer in a forward pass, per squared length of what attends to itself.

    Attention is two products: of queries and keys, and of their weights and the values. The causal mask of the language
    model leaves half of the square.
    """
    return 2 * dims.hidden_size if stage == Stage.LAYERS else 4 * dims.vision_hidden_size
