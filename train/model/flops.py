"""Operations of the steps that ran, and what the device could do: what the model FLOPs utilisation (MFU) is made of.

A :class:`PackedQwen` with its frozen parameters -> :class:`ModelFlops`; a micro-batch -> its operations. A
multiplication with an addition counts 2. What counts is what the model asks for, however it is computed:

- every matrix in the forward pass; in the backward pass once for the gradient of its input, where anything before it is
  trained, and once for that of its weight, where that is trained;
- attention inside each sample, causal half, and inside each window and frame of the vision tower;
- ``lm_head`` on target positions only;
- nothing for what is computed a second time to save memory, nor for norms and activation functions.

The order of computation decides what lies before a matrix, and each matrix is looked at alone: so a model with adapters
is counted like one with frozen parts. Where ``cost`` estimates from the index what a bin will take, recomputation
included, this counts exactly what a micro-batch held.

Cost: a walk over the modules at start; three sums over a few hundred borders for each micro-batch.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn

from schemas.errors import ConfigError
from schemas.qwen import MERGED_PATCHES
from train.batches.batch import MicroBatch
from train.model.packed import PackedQwen

Place = tuple[int, int, int, int]
"""Where a module stands in the order of computation: part, layer, position in the layer, after an adapter's first."""

_LAYER_POSITIONS = {
    **dict.fromkeys(("norm1", "input_layernorm"), 0),
    **dict.fromkeys(("attn.qkv", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), 1),
    **dict.fromkeys(("attn.proj", "self_attn.o_proj"), 2),
    **dict.fromkeys(("norm2", "post_attention_layernorm"), 3),
    **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), 4),
    "mlp.down_proj": 5,
}
_PATCH_EMBED, _BLOCKS, _MERGER, _EMBEDDINGS, _LAYERS, _NORM, _HEAD = range(7)
_PARTS = (
    (re.compile(r"\bvisual\.patch_embed\b"), _PATCH_EMBED),
    (re.compile(r"\bvisual\.blocks\.(?P<layer>\d+)\.(?P<place>\w+(\.\w+)?)"), _BLOCKS),
    (re.compile(r"\bvisual\.merger\.(?P<place>ln_q|mlp\.\d)"), _MERGER),
    (re.compile(r"\blanguage_model\.embed_tokens\b"), _EMBEDDINGS),
    (re.compile(r"\blanguage_model\.layers\.(?P<layer>\d+)\.(?P<place>\w+(\.\w+)?)"), _LAYERS),
    (re.compile(r"\blanguage_model\.norm\b"), _NORM),
    (re.compile(r"\blm_head\b"), _HEAD),
)
_QUERIES = re.compile(r"\b(q_proj|qkv)(\.base_layer)?$")
"""Matrices that tell the width of an attention: one in each layer, with or without an adapter around it."""

_MERGER_POSITIONS = {"ln_q": 0, "mlp.0": 1, "mlp.2": 2}

PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200 NVL": 835.5,
    "H200": 989.4,
    "H100 NVL": 835.5,
    "H100 PCIe": 756.5,
    "H100": 989.4,
    "H800": 989.4,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A30": 165.0,
    "A10": 125.0,
    "A10G": 70.0,
    "L40S": 362.1,
    "L40": 181.1,
    "L4": 121.0,
    "4090": 165.2,
    "3090": 71.0,
    "MI325X": 1307.4,
    "MI300X": 1307.4,
}
"""Most operations a second of a device in bfloat16 or float16 with float32 sums, without sparsity, in 10^12. Words that
the name of the device has; of several entries the longer one counts. Source: data sheets of NVIDIA and AMD (those that
give figures with sparsity: half of them)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFlops:
    """Operations of a training step, forward and backward, for each unit of work.

    Attributes:
        per_patch: matrices of the vision tower, for each patch.
        per_merged_patch: matrices of the merger, for each row of four patches.
        per_token: matrices of the language model, for each token.
        per_target: ``lm_head``, for each target.
        per_squared_length: causal attention of the language model, for each square of a sample's length.
        per_squared_window: attention of the vision tower in windows, for each square of a window's patches.
        per_squared_frame: its full attention, for each square of a temporal step's patches.
    """

    per_patch: float
    per_merged_patch: float
    per_token: float
    per_target: float
    per_squared_length: float
    per_squared_window: float
    per_squared_frame: float

    @classmethod
    def of(cls, model: PackedQwen) -> ModelFlops:
        """Count those of a model, whose parameters are frozen as they are going to be. Partitioned ones may be.

        Raises:
            ConfigError: a matrix has no place in the order of computation.
        """
        trained = [_place_of(name) for name, parameter in model.named_parameters() if parameter.requires_grad]
        first_trained = min(trained)
        matrices: dict[int, float] = dict.fromkeys((_PATCH_EMBED, _BLOCKS, _MERGER, _LAYERS, _HEAD), 0.0)
        language_attention = window_attention = frame_attention = 0.0
        frames = set(model.hf.model.visual.fullatt_block_indexes)
        for name, module in model.named_modules():
            if not isinstance(module, (nn.Linear, nn.Conv3d)):
                continue
            place = _place_of(name)
            passes = 1 + int(first_trained < place) + int(module.weight.requires_grad)
            matrices[place[0]] += 2 * _num_weights(module) * passes
            if isinstance(module, nn.Linear) and _QUERIES.search(name):
                part, layer, position, _ = place
                # Attention has no weights of its own: forward 1, and gradients of both factors of both products.
                passes = 3 if first_trained <= (part, layer, position, 1) else 1
                if part == _LAYERS:
                    language_attention += 2 * module.out_features * passes
                elif layer in frames:
                    frame_attention += 4 * module.in_features * passes
                else:
                    window_attention += 4 * module.in_features * passes
        return cls(
            per_patch=matrices[_PATCH_EMBED] + matrices[_BLOCKS],
            per_merged_patch=matrices[_MERGER],
            per_token=matrices[_LAYERS],
            per_target=matrices[_HEAD],
            per_squared_length=language_attention,
            per_squared_window=window_attention,
            per_squared_frame=frame_attention,
        )

    def count(self, micro: MicroBatch) -> float:
        """Operations of a micro-batch on the CPU; an empty place of the order asks for none.

        A micro-batch without media includes its dummy picture of four patches.
        """
        if not micro.bins:
            return 0.0
        vision = micro.vision
        return (
            self.per_patch * vision.num_patches
            + self.per_merged_patch * (vision.num_patches // MERGED_PATCHES)
            + self.per_token * micro.num_tokens
            + self.per_target * micro.targets.numel()
            + self.per_squared_length * _sum_squares(micro.cu_seqlens)
            + self.per_squared_window * _sum_squares(vision.cu_window_seqlens)
            + self.per_squared_frame * _sum_squares(vision.cu_seqlens)
        )


def peak_tflops(device: torch.device, dtype: torch.dtype) -> float | None:
    """What the device of this rank can do at most, in 10^12 operations a second; None where that is not known."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    return known_peak(torch.cuda.get_device_name(device))


def known_peak(name: str) -> float | None:
    """The entry of :data:`PEAK_TFLOPS` that fits a name such as ``NVIDIA H100 80GB HBM3``, if any."""
    words = re.split(r"[^0-9A-Za-z]+", name)
    fitting = [known for known in PEAK_TFLOPS if set(known.split()) <= set(words)]
    return PEAK_TFLOPS[max(fitting, key=len)] if fitting else None


def _place_of(name: str) -> Place:
    for pattern, part in _PARTS:
        match = pattern.search(name)
        if match is None:
            continue
        found = match.groupdict()
        layer = int(found.get("layer", 0))
        # The second matrix of an adapter works on the output of the first.
        after_first = int("lora_B" in name)
        if "place" not in found:
            return part, 0, 0, after_first
        positions = _MERGER_POSITIONS if part == _MERGER else _LAYER_POSITIONS
        place = found["place"]
        position = positions.get(place, positions.get(place.partition(".")[0]))
        if position is not None:
            return part, layer, position, after_first
    raise ConfigError(f"{name} has no place in the order of computation known to train/model/flops.py.")


def _num_weights(module: nn.Linear | nn.Conv3d) -> int:
    """Elements of the weight, also where ZeRO-3 leaves only a partition of it."""
    weight = module.weight
    return int(getattr(weight, "ds_numel", weight.numel()))


def _sum_squares(borders: torch.Tensor) -> int:
    lengths = torch.diff(borders.long())
    return int((lengths * lengths).sum())
