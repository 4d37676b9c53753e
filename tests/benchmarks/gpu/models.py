"""A random model that all contenders use in turn: a configuration -> :class:`Arrangement`, with or without AdamW."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.benchmarks.gpu.attention import FLASH_UPSTREAM
from tests.benchmarks.gpu.online import Content
from train.memory.activations import Load, activation_terms
from train.memory.terms import Memory, Phase, Term
from train.model import optim
from train.model.attention import BY_SAMPLE, FLASH_VARLEN, SDPA
from train.model.flops import ModelFlops
from train.model.packed import PackedQwen, checkpoint_activations
from train.model.sizes import sizes_of
from train.settings.arguments import TrainArguments

LEARNING_RATE = 1e-6
DTYPE = torch.bfloat16


class Arrangement:
    """A model with random weights, arranged for one contender or another; the weights are shared.

    Weights, gradients and AdamW moments are bfloat16, so that a step of the 3B fits 80 GB without partitioning.
    """

    def __init__(self, config: Qwen2_5_VLConfig, device: torch.device) -> None:
        with torch.device(device):
            hf = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=DTYPE)
        _randomize(hf)
        self.hf: Qwen2_5_VLForConditionalGeneration = hf
        self._convolution, self._head = hf.model.visual.patch_embed.proj, hf.lm_head
        self.packed = PackedQwen(hf, attn_implementation=SDPA).train()
        self._projection, self._target_head = hf.model.visual.patch_embed.proj, hf.lm_head
        self._config: Mapping[str, Any] = config.to_dict()
        self._args = TrainArguments(shards="shards")
        self.optimizer: torch.optim.Optimizer | None = None

    def prepare(self, *, trains_vision: bool, optimized: bool) -> None:
        """Freeze what is not trained, and start with a new optimizer."""
        self._args = TrainArguments(shards="shards", tune_mm_vision=trains_vision)
        optim.group_parameters(self.packed, optim.learning_rates(self._args, LEARNING_RATE))
        checkpoint_activations(self.packed)
        self.packed.zero_grad(set_to_none=True)
        trained = [parameter for parameter in self.packed.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True) if optimized else None

    def arrange_ours(self, attn_implementation: str) -> None:
        """As this project trains: the patch embedding as a product, logits of targets only."""
        self.hf.model.visual.patch_embed.proj, self.hf.lm_head = self._projection, self._target_head
        self.packed.uses_sdpa = attn_implementation == SDPA
        self._attend(*((BY_SAMPLE, SDPA) if self.packed.uses_sdpa else (FLASH_VARLEN, FLASH_VARLEN)))

    def arrange_upstream(self) -> None:
        """As the upstream trainer: the model of transformers as it is, with all logits."""
        self.hf.model.visual.patch_embed.proj, self.hf.lm_head = self._convolution, self._head
        self._attend(FLASH_UPSTREAM, FLASH_VARLEN)

    def _attend(self, language_model: str, vision: str) -> None:
        self.hf.model.language_model.config._attn_implementation_internal = language_model
        self.hf.model.visual.config._attn_implementation_internal = vision

    def flops(self) -> ModelFlops:
        """FLOPs of a step per unit of work, with the parts that are trained now."""
        self.arrange_ours(SDPA)
        return ModelFlops.of(self.packed)

    def memory(self, content: Content) -> int:
        """Peak of a step by the arithmetic of :mod:`train.memory`, for weights and gradients in bfloat16."""
        load = Load(
            num_tokens=content.num_tokens,
            num_targets=content.num_targets,
            num_patches=sum(grid.num_patches for grid in content.grids),
            is_checkpointed=True,
        )
        sizes, width = sizes_of(self._config, self._args), DTYPE.itemsize
        moments = 2 * width * sizes.num_trained if self.optimizer is not None else 0
        states = (
            ("weights", width * sizes.num_parameters, Phase.ALWAYS),
            ("moments", moments, Phase.ALWAYS),
            ("gradients", width * sizes.num_trained, Phase.BACKWARD),
            ("largest gradient and its copy", 2 * width * sizes.largest_trained, Phase.TRANSIENT),
        )
        terms = [Term(name=name, num_bytes=size, formula="", phase=phase) for name, size, phase in states]
        return Memory((*terms, *activation_terms(sizes, load, DTYPE))).peak()


@torch.no_grad()
def _randomize(hf: Qwen2_5_VLForConditionalGeneration) -> None:
    """Give matrices weights that keep the scale of their input, so that the loss depends on all of them."""
    torch.manual_seed(0)
    for parameter in hf.parameters():
        if parameter.ndim >= 2:
            parameter.normal_(0.0, 1 / math.sqrt(parameter[0].numel()))
