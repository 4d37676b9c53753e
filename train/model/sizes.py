"""How large a model is: its ``config.json`` and the flags -> :class:`Sizes`, without its weights.

The model is made without memory (torch's ``meta`` device), with adapters and parameter groups as in a run: so numbers
of parameters are those of the groups that are trained, whatever is frozen.

Cost: half a second for the 72B, 6 s with adapters in every layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

from train.model import adapters, optim
from train.model.attention import SDPA
from train.model.packed import PackedQwen
from train.settings.arguments import TrainArguments


def _official(
    hidden: int, layers: int, heads: int, intermediate: int, key_value_heads: int, vision_intermediate: int
) -> dict[str, Any]:
    is_tied = hidden == 2048
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": intermediate,
        "num_key_value_heads": key_value_heads,
        "vocab_size": 151936 if is_tied else 152064,
        "tie_word_embeddings": is_tied,
        "vision_config": {
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": vision_intermediate,
            "num_heads": 16,
            "out_hidden_size": hidden,
            "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    }


OFFICIAL = {
    "3B": _official(2048, 36, 16, 11008, 2, 3420),
    "7B": _official(3584, 28, 28, 18944, 4, 3420),
    "32B": _official(5120, 64, 40, 27648, 8, 3456),
    "72B": _official(8192, 80, 64, 29568, 8, 3456),
}
"""What decides the size of each checkpoint. Source: ``config.json`` of Qwen/Qwen2.5-VL-{3B,7B,32B,72B}-Instruct."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Numbers of a model that memory follows from. Counts are of scalars, over the whole model.

    Attributes:
        elements: of every parameter; a tied one stands once.
        num_trained: of all parameters that are trained.
        largest_group: of the largest trained parameter group.
        largest_trained: of the largest trained parameter.
        largest_module: of the parameters that one module holds itself, at most.
        trained_parts: parts of the model that are trained, be it by adapters.
        hidden_size: width of the language model; what follows is of it, too.
        num_layers: layers.
        intermediate_size: width of the gated MLP.
        key_value_size: width of the keys, and of the values.
        num_heads: heads.
        vocab_size: rows of ``lm_head``.
        vision_hidden_size: width of the vision tower; what follows is of it, too.
        vision_depth: blocks.
        vision_intermediate_size: width of the gated MLP.
        vision_num_heads: heads.
    """

    elements: tuple[int, ...]
    num_trained: int
    largest_group: int
    largest_trained: int
    largest_module: int
    trained_parts: frozenset[str]
    hidden_size: int
    num_layers: int
    intermediate_size: int
    key_value_size: int
    num_heads: int
    vocab_size: int
    vision_hidden_size: int
    vision_depth: int
    vision_intermediate_size: int
    vision_num_heads: int

    @property
    def num_parameters(self) -> int:
        """Scalars of all parameters."""
        return sum(self.elements)

    def num_in_small(self, most: int) -> int:
        """Scalars of the parameters that have ``most`` of them or fewer each."""
        return sum(number for number in self.elements if number <= most)


def sizes_of(config: Mapping[str, Any], args: TrainArguments) -> Sizes:
    """Sizes of the model that a run trains.

    Args:
        config: contents of ``config.json``.
        args: the flags; they say what is trained.

    Raises:
        ConfigError: the flags do not fit the model.
    """
    with torch.device("meta"):
        hf = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config))
        if (chosen := adapters.choose_adapters(args, config)) is not None:
            adapters.add_adapters(hf, chosen, seed=args.seed)
    model = PackedQwen(hf, attn_implementation=SDPA)
    groups = optim.group_parameters(model, optim.learning_rates(args, 1.0))
    trained = [group for group in groups if group.learning_rate is not None]
    text, vision = hf.config.text_config, hf.config.vision_config
    assert isinstance(text, Qwen2_5_VLTextConfig) and isinstance(vision, Qwen2_5_VLVisionConfig)
    return Sizes(
        elements=tuple(parameter.numel() for group in groups for parameter in group.parameters),
        num_trained=sum(group.num_elements for group in trained),
        largest_group=max(group.num_elements for group in trained),
        largest_trained=max(parameter.numel() for group in trained for parameter in group.parameters),
        largest_module=max(_own_elements(module) for module in model.modules()),
        trained_parts=frozenset(group.part for group in trained),
        hidden_size=text.hidden_size,
        num_layers=text.num_hidden_layers,
        intermediate_size=text.intermediate_size,
        key_value_size=hf.model.language_model.layers[0].self_attn.k_proj.out_features,
        num_heads=text.num_attention_heads,
        vocab_size=text.vocab_size,
        vision_hidden_size=vision.hidden_size,
        vision_depth=vision.depth,
        vision_intermediate_size=vision.intermediate_size,
        vision_num_heads=vision.num_heads,
    )


def _own_elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters(recurse=False))
