"""FLOPs of the steps that ran, and the peak of the device: the two parts of model FLOPs utilisation (MFU).

A :class:`PackedQwen` with its frozen parameters -> :class:`ModelFlops`; a micro-batch -> its FLOPs. A multiplication
with its addition counts 2. What the model requires counts, however it is computed:

- every matrix in the forward pass; in the backward pass once for the gradient of its input, if anything before it is
  trained, and once for the gradient of its weight, if that is trained;
- attention within each sample (the causal half), and within each window and frame of the vision tower;
- ``lm_head`` on target positions only;
- nothing for recomputation, norms and activation functions.

The table of weights (:mod:`train.arithmetic.weights`) says what comes before a matrix. Matrices are counted one by one,
so adapters and frozen parts need no special case. :mod:`train.arithmetic.cost` estimates from the index what a bin will
take, recomputation included; this module counts exactly what a micro-batch held.

Cost: a walk over the modules at start; three sums over a few hundred boundaries per micro-batch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from schemas.errors import ConfigError
from schemas.qwen import MERGED_PATCHES
from train.arithmetic.dimensions import Dimensions
from train.arithmetic.weights import ATTENTION_STEP, Stage, Unit, Weight, attention_flops, weight_table
from train.batches.batch import MicroBatch
from train.model.packed import PackedQwen

Position = tuple[Stage, int, int, bool]
"""Position of a module in the order of computation: stage, layer, step in the layer, whether it is the second matrix
of an adapter, which multiplies the output of the first."""

_LAYER_INDEX = re.compile(r"\d+")

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
"""Peak dense FLOPs per second of a device in bfloat16 or float16 with float32 accumulation, in 10^12.

Keys are words in the name of the device; the longest matching key counts. Source: data sheets of NVIDIA and AMD (half
of the figures that are given with sparsity).
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFlops:
    """FLOPs of a training step, forward and backward, per unit of work.

    Attributes:
        per_patch: matrices of the vision tower, per patch.
        per_merged_patch: matrices of the merger, per row of four patches.
        per_token: matrices of the language model, per token.
        per_target: ``lm_head``, per target.
        per_squared_length: causal attention of the language model, per squared length of a sample.
        per_squared_window: attention of the vision tower within windows, per squared number of a window's patches.
        per_squared_frame: its full attention, per squared number of a temporal step's patches.
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
        """Count the FLOPs of a model whose parameters are frozen as in training. They may be partitioned (ZeRO-3).

        Raises:
            ConfigError: the table of weights does not have a module.
        """
        dims = Dimensions.of(model.hf.config.to_dict())
        rows = weight_table(dims)
        trained = (_position(name, rows) for name, parameter in model.named_parameters() if parameter.requires_grad)
        first_trained = min(trained)
        matrices: Counter[Unit] = Counter()
        for name, module in model.named_modules():
            if isinstance(module, (nn.Linear, nn.Conv3d)):
                position = _position(name, rows)
                passes = 1 + int(first_trained < position) + int(module.weight.requires_grad)
                matrices[position[0].unit] += 2 * _num_weights(module) * passes

        def attention(stage: Stage, layers: Iterable[int]) -> float:
            # Attention has no weights of its own: forward 1, and gradients of both factors of both products 2.
            needs_gradients = [first_trained <= (stage, layer, ATTENTION_STEP, True) for layer in layers]
            return float(attention_flops(dims, stage) * sum(3 if needed else 1 for needed in needs_gradients))

        full_blocks = set(model.hf.model.visual.fullatt_block_indexes)
        return cls(
            per_patch=float(matrices[Unit.PATCH]),
            per_merged_patch=float(matrices[Unit.MERGED_PATCH]),
            per_token=float(matrices[Unit.TOKEN]),
            per_target=float(matrices[Unit.TARGET]),
            per_squared_length=attention(Stage.LAYERS, range(dims.num_layers)),
            per_squared_window=attention(Stage.BLOCKS, set(range(dims.vision_depth)) - full_blocks),
            per_squared_frame=attention(Stage.BLOCKS, full_blocks),
        )

    def count(self, micro: MicroBatch) -> float:
        """FLOPs of a micro-batch on the CPU; 0 for an empty slot of the order.

        A micro-batch without media includes its dummy image of four patches.
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
    """Peak of the device of this rank in 10^12 FLOPs per second; None if it is unknown."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    return known_peak(torch.cuda.get_device_name(device))


def known_peak(name: str) -> float | None:
    """The entry of :data:`PEAK_TFLOPS` that matches a name such as ``NVIDIA H100 80GB HBM3``, if any."""
    words = re.split(r"[^0-9A-Za-z]+", name)
    matching = [key for key in PEAK_TFLOPS if set(key.split()) <= set(words)]
    return PEAK_TFLOPS[max(matching, key=len)] if matching else None


def _position(name: str, rows: Sequence[Weight]) -> Position:
    """Position of a module or parameter, by its name in :class:`PackedQwen`; adapters have that of their matrix."""
    path = f"{name.removeprefix('hf.')}."
    for row in rows:
        # "model.visual.blocks.{}.attn.qkv" -> "model.visual.blocks.", ".attn.qkv."
        prefix, _, suffix = f"{row.name}.".partition("{}")
        index = _LAYER_INDEX.match(path, len(prefix)) if suffix else None
        layer = int(index[0]) if index else 0
        if path.startswith(f"{row.name.format(layer)}."):
            return row.stage, layer, row.step, ".lora_B." in path
    raise ConfigError(f"{name} is not in the table of weights (train/arithmetic/weights.py): add it there.")


def _num_weights(module: nn.Linear | nn.Conv3d) -> int:
    """Elements of the weight, including those that ZeRO-3 keeps on other ranks."""
    weight = module.weight
    return int(getattr(weight, "ds_numel", weight.numel()))


def _sum_squares(boundaries: torch.Tensor) -> int:
    lengths = torch.diff(boundaries.long())
    return int((lengths * lengths).sum())
