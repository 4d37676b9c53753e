"""Floating-point operations of a bin, from the index alone: what balances the ranks of a step.

The configuration of a model -> :class:`CostModel`; counts about a bin -> operations of a training step, backward pass
and recomputation included: a frozen vision tower costs a third of a trained one.

Cost: a few array operations over all bins.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.errors import ConfigError
from schemas.qwen import MERGED_PATCHES, PATCH_DIM, PATCH_SIZE

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
        language_passes: what a step takes in the language model, in forward passes.
        vision_passes: what it takes in the vision tower, in forward passes.
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
    language_passes: int = 1
    vision_passes: int = 1

    @classmethod
    def of_training(
        cls,
        config: Mapping[str, Any],
        *,
        tune_llm: bool = True,
        tune_vision: bool = True,
        uses_adapters: bool = False,
        gradient_checkpointing: bool = False,
    ) -> CostModel:
        """What bins cost in a run: the sizes of a model, and :meth:`in_training`.

        Args:
            config: contents of ``config.json``; sizes of the language model stand in ``text_config`` or at the top.
            tune_llm: whether the language model is trained.
            tune_vision: whether the vision tower is trained.
            uses_adapters: whether that is done by adapters beside frozen weights.
            gradient_checkpointing: whether activations are recomputed.

        Raises:
            ConfigError: a size is missing or no positive number.
        """
        text, vision = config.get("text_config") or config, config.get("vision_config") or {}
        head_size = _size(text, "hidden_size") // _size(text, "num_attention_heads")
        window = _size(vision, "window_size") // PATCH_SIZE
        sizes = cls(
            hidden_size=_size(text, "hidden_size"),
            num_layers=_size(text, "num_hidden_layers"),
            intermediate_size=_size(text, "intermediate_size"),
            key_value_size=_size(text, "num_key_value_heads") * head_size,
            vocab_size=_size(text, "vocab_size"),
            vision_hidden_size=_size(vision, "hidden_size"),
            vision_depth=_size(vision, "depth"),
            vision_intermediate_size=_size(vision, "intermediate_size"),
            vision_full_layers=len(vision.get("fullatt_block_indexes", ())),
            window_patches=window * window,
        )
        return sizes.in_training(
            tune_llm=tune_llm,
            tune_vision=tune_vision,
            uses_adapters=uses_adapters,
            gradient_checkpointing=gradient_checkpointing,
        )

    def in_training(
        self,
        *,
        tune_llm: bool = True,
        tune_vision: bool = True,
        uses_adapters: bool = False,
        gradient_checkpointing: bool = False,
    ) -> CostModel:
        """The same sizes with the passes of a training step.

        A forward pass counts 1, gradients of activations 1, gradients of weights 1, a recomputed forward pass 1.
        Gradients pass through the language model even where it is frozen, since the merger or the vision tower behind
        it is trained; through a frozen vision tower they do not. Weights beside adapters have no gradients, and those
        of the adapters are not worth counting.

        Args:
            tune_llm: whether the language model is trained.
            tune_vision: whether the vision tower is trained.
            uses_adapters: whether that is done by adapters beside frozen weights.
            gradient_checkpointing: whether activations are recomputed.
        """
        recomputed, of_weights = int(gradient_checkpointing), int(not uses_adapters)
        return replace(
            self,
            language_passes=2 + (of_weights if tune_llm else 0) + recomputed,
            vision_passes=2 + of_weights + recomputed if tune_vision else 1,
        )

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
        """Operations that every bin takes.

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
        language = (
            self.flops_per_token * num_tokens
            + self.flops_per_squared_length * sum_squared_lengths
            + self.flops_per_target * num_targets
        )
        vision = self.flops_per_patch * patches + self.flops_per_squared_patches * patches * patches / steps
        flops: NDArray[np.float64] = self.language_passes * language + self.vision_passes * vision
        return flops


def read_config(folder: Path) -> dict[str, Any]:
    """Contents of the ``config.json`` of a checkpoint.

    Raises:
        ConfigError: there is none, or it is no JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}. Give the folder of a complete checkpoint.") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} is no JSON object. Give the folder of a complete checkpoint.")
    return config


def _size(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"the model's config.json has {name} {value!r}; expected a positive whole number.")
    return value
