"""FLOPs of every bin, estimated from the index alone: what balances the ranks of a step.

``config.json`` and what is trained -> :class:`CostModel`; columns of the index -> FLOPs of a training step, backward
pass and recomputation included. A frozen vision tower costs a third of a trained one.

Cost: a few array operations over all bins.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.qwen import MERGED_PATCHES
from train.arithmetic.dimensions import OFFICIAL, Dimensions
from train.arithmetic.weights import Stage, Unit, attention_flops, forward_flops

STEPS_PER_VIDEO = 4
"""Assumed temporal steps of a video. Full attention is quadratic in the patches of a step, and the index does not have
the number of steps."""

_DIMS_7B = Dimensions.of(OFFICIAL["7B"])


@dataclass(frozen=True, kw_only=True, slots=True)
class CostModel:
    """What a bin costs in a model. By default one forward pass of Qwen2.5-VL-7B.

    Attributes:
        dims: dimensions of the model.
        language_passes: cost of a step in the language model, in forward passes.
        vision_passes: cost of a step in the vision tower, in forward passes.
    """

    dims: Dimensions = _DIMS_7B
    language_passes: int = 1
    vision_passes: int = 1

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> CostModel:
        """A forward pass of the model that the contents of a ``config.json`` describe.

        Raises:
            ConfigError: a size is missing or not a positive integer.
        """
        return cls(dims=Dimensions.of(config))

    def in_training(
        self,
        *,
        tune_llm: bool = True,
        tune_vision: bool = True,
        uses_adapters: bool = False,
        gradient_checkpointing: bool = False,
    ) -> CostModel:
        """The same model with the passes of a training step.

        The forward pass, gradients of activations, gradients of weights, and a recomputed forward pass count 1 each.
        Gradients of activations pass through a frozen language model, because the merger or the vision tower behind it
        is trained, but not through a frozen vision tower. Frozen weights next to adapters have no gradients; those of
        the adapters are negligible.

        Args:
            tune_llm: whether the language model is trained.
            tune_vision: whether the vision tower is trained.
            uses_adapters: whether adapters are trained instead of the weights.
            gradient_checkpointing: whether activations are recomputed.
        """
        recomputed, weight_gradients = int(gradient_checkpointing), int(not uses_adapters)
        return replace(
            self,
            language_passes=2 + (weight_gradients if tune_llm else 0) + recomputed,
            vision_passes=2 + weight_gradients + recomputed if tune_vision else 1,
        )

    @property
    def flops_per_token(self) -> float:
        """Matrices of the language model."""
        return float(forward_flops(self.dims, Unit.TOKEN))

    @property
    def flops_per_squared_length(self) -> float:
        """Causal attention of the language model."""
        return float(self.dims.num_layers * attention_flops(self.dims, Stage.LAYERS))

    @property
    def flops_per_target(self) -> float:
        """``lm_head``."""
        return float(forward_flops(self.dims, Unit.TARGET))

    @property
    def flops_per_patch(self) -> float:
        """Matrices of the vision tower and merger, and attention within windows, all assumed full."""
        dims = self.dims
        num_window_blocks = dims.vision_depth - dims.num_full_attention_blocks
        windows = num_window_blocks * dims.window_patches * attention_flops(dims, Stage.BLOCKS)
        merger = forward_flops(dims, Unit.MERGED_PATCH) / MERGED_PATCHES
        return forward_flops(dims, Unit.PATCH) + windows + merger

    @property
    def flops_per_squared_patches(self) -> float:
        """Full attention of the vision tower, per square of a temporal step's patches."""
        return float(self.dims.num_full_attention_blocks * attention_flops(self.dims, Stage.BLOCKS))

    def bin_flops(
        self,
        *,
        num_tokens: NDArray[np.int32],
        sum_squared_lengths: NDArray[np.int64],
        num_targets: NDArray[np.int32],
        num_patches: NDArray[np.int32],
        num_images: NDArray[np.int32],
        num_videos: NDArray[np.int32],
    ) -> NDArray[np.float64]:
        """FLOPs of every bin. All temporal steps of a bin are assumed to have the same number of patches.

        Args:
            num_tokens: (B,) tokens, a column of ``bins.parquet`` like all others.
            sum_squared_lengths: (B,) sum of the squared lengths of the samples.
            num_targets: (B,) trained labels.
            num_patches: (B,) patches of all media.
            num_images: (B,) images.
            num_videos: (B,) videos.

        Returns:
            (B,) float64.
        """
        patches = num_patches.astype(np.float64)
        steps = np.maximum(num_images + STEPS_PER_VIDEO * num_videos, 1)
        language = (
            self.flops_per_token * num_tokens
            + self.flops_per_squared_length * sum_squared_lengths
            + self.flops_per_target * num_targets
        )
        vision = self.flops_per_patch * patches + self.flops_per_squared_patches * patches * patches / steps
        flops: NDArray[np.float64] = self.language_passes * language + self.vision_passes * vision
        return flops
