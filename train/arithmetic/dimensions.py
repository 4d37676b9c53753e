"""Dimensions of a Qwen2.5-VL model: ``config.json`` -> :class:`Dimensions`, and the official sizes.

Cost: none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from schemas.errors import ConfigError
from schemas.qwen import PATCH_SIZE


@dataclass(frozen=True, kw_only=True, slots=True)
class Dimensions:
    """Everything in ``config.json`` that sizes, FLOPs and memory depend on.

    Attributes:
        hidden_size: width of the language model.
        num_layers: layers of the language model.
        num_heads: attention heads of a layer.
        key_value_size: width of its keys, and of its values.
        intermediate_size: width of its gated MLP.
        vocab_size: rows of the embeddings and of ``lm_head``.
        has_tied_embeddings: whether ``lm_head`` shares the weight of the embeddings.
        vision_hidden_size: width of the vision tower.
        vision_depth: blocks of the vision tower.
        vision_num_heads: attention heads of a block.
        vision_intermediate_size: width of its gated MLP.
        num_full_attention_blocks: blocks with full attention; the others attend within windows.
        window_patches: patches of a full window.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    key_value_size: int
    intermediate_size: int
    vocab_size: int
    has_tied_embeddings: bool
    vision_hidden_size: int
    vision_depth: int
    vision_num_heads: int
    vision_intermediate_size: int
    num_full_attention_blocks: int
    window_patches: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Dimensions:
        """Read the contents of ``config.json``, where the language model is in ``text_config`` or at the top.

        Raises:
            ConfigError: a size is missing or not a positive integer.
        """
        text, vision = config.get("text_config") or config, config.get("vision_config") or {}
        num_heads = _size(text, "num_attention_heads")
        window_side = _size(vision, "window_size") // PATCH_SIZE
        return cls(
            hidden_size=_size(text, "hidden_size"),
            num_layers=_size(text, "num_hidden_layers"),
            num_heads=num_heads,
            key_value_size=_size(text, "num_key_value_heads") * (_size(text, "hidden_size") // num_heads),
            intermediate_size=_size(text, "intermediate_size"),
            vocab_size=_size(text, "vocab_size"),
            # transformers 5 writes the flag at the top, older versions inside text_config.
            has_tied_embeddings=bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
            vision_hidden_size=_size(vision, "hidden_size"),
            vision_depth=_size(vision, "depth"),
            vision_num_heads=_size(vision, "num_heads"),
            vision_intermediate_size=_size(vision, "intermediate_size"),
            num_full_attention_blocks=len(vision.get("fullatt_block_indexes", ())),
            window_patches=window_side * window_side,
        )


def _size(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f"the model's config.json has {name} {value!r}; expected a positive integer.")
    return value


def _official_config(
    *, hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vision_intermediate: int, tied: bool
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "vocab_size": 151936 if tied else 152064,
        "tie_word_embeddings": tied,
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
    "3B": _official_config(
        hidden=2048, layers=36, heads=16, kv_heads=2, intermediate=11008, vision_intermediate=3420, tied=True
    ),
    "7B": _official_config(
        hidden=3584, layers=28, heads=28, kv_heads=4, intermediate=18944, vision_intermediate=3420, tied=False
    ),
    "32B": _official_config(
        hidden=5120, layers=64, heads=40, kv_heads=8, intermediate=27648, vision_intermediate=3456, tied=False
    ),
    "72B": _official_config(
        hidden=8192, layers=80, heads=64, kv_heads=8, intermediate=29568, vision_intermediate=3456, tied=False
    ),
}
"""The part of ``config.json`` that decides the size of each official checkpoint.

Source: ``config.json`` of Qwen/Qwen2.5-VL-{3B,7B,32B,72B}-Instruct.
"""


def official_size(config: Mapping[str, Any]) -> str | None:
    """The key of :data:`OFFICIAL` whose width and number of layers a ``config.json`` has; None for other models."""
    text = config.get("text_config") or config
    for size, official in OFFICIAL.items():
        if all(text.get(name) == official[name] for name in ("hidden_size", "num_hidden_layers")):
            return size
    return None
