"""Floating-point operations of a bin, from the index alone: what balances the ranks of a step.

Counts about a bin -> operations of one forward pass (the backward pass takes about twice as many, in proportion).

Cost: a few array operations over all bins.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from schemas.qwen import MERGED_PATCHES, PATCH_DIM

STEPS_OF_A_CLIP = 4
"""Temporal steps a clip is taken to have, for the part of attention that is quadratic: the index does not say."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CostModel:
    """Dimensions of the model that decide what a bin costs. Defaults: ``config.json`` of Qwen2.5-VL-7B-Instruct.

    Attributes:
        hidden_size: width of the language model.
        num_layers: its layers.
        intermediate_size: width of its gated MLP.
        key_value_size: width of its keys, and of its values.
        vocab_size: rows of ``lm_head``, which is applied to target positions only.
        vision_hidden_size: width of the vision tower.
        vision_depth: its layers.
        vision_intermediate_size: width of its gated MLP.
        vision_full_layers: its layers with full attention; the others attend in windows.
        window_patches: patches of a full window.
    """

    hidden_size: int = 3584
    num_layers: int = 28
    intermediate_size: int = 18944
    key_value_size: int = 512
    vocab_size: int = 152064
    vision_hidden_size: int = 1280
    vision_depth: int = 32
    vision_intermediate_size: int = 3420
    vision_full_layers: int = 4
    window_patches: int = 64

    @property
    def flops_per_token(self) -> float:
        """Projections and MLP of the language model."""
        projections = 2 * self.hidden_size * (2 * self.hidden_size + 2 * self.key_value_size)
        return float(self.num_layers * (projections + 6 * self.hidden_size * self.intermediate_size))

    @property
    def flops_per_squared_length(self) -> float:
        """Causal attention of the language model: half of a square, two products."""
        return float(self.num_layers * 2 * self.hidden_size)

    @property
    def flops_per_target(self) -> float:
        """``lm_head``."""
        return float(2 * self.hidden_size * self.vocab_size)

    @property
    def flops_per_patch(self) -> float:
        """The vision tower and its merger, without full attention."""
        width = self.vision_hidden_size
        layers = self.vision_depth * (8 * width * width + 6 * width * self.vision_intermediate_size)
        windows = (self.vision_depth - self.vision_full_layers) * 4 * self.window_patches * width
        merged_width = MERGED_PATCHES * width
        merger = 2 * merged_width * (merged_width + self.hidden_size) / MERGED_PATCHES
        return layers + windows + merger + 2 * PATCH_DIM * width

    @property
    def flops_per_squared_patches(self) -> float:
        """Full attention of the vision tower, for each square of a temporal step's patches."""
        return float(self.vision_full_layers * 4 * self.vision_hidden_size)

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
        """Operations of the forward pass of every bin.

        Full attention of the vision tower is estimated as if all temporal steps of a bin were of one size.

        Args:
            num_tokens: (B,), as are all: columns of ``bins.parquet``.
            sum_squared_lengths: squares of the samples' lengths, summed.
            num_targets: labels that are trained.
            num_patches: patches of all media.
            num_images: images.
            num_videos: clips.

        Returns:
            (B,) float64.
        """
        patches = num_patches.astype(np.float64)
        steps = np.maximum(num_images + STEPS_OF_A_CLIP * num_videos, 1)
        flops: NDArray[np.float64] = (
            self.flops_per_token * num_tokens
            + self.flops_per_squared_length * sum_squared_lengths
            + self.flops_per_target * num_targets
            + self.flops_per_patch * patches
            + self.flops_per_squared_patches * patches * patches / steps
        )
        return flops
