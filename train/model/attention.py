"""Attention over packed samples without flash-attn: SDPA, one call per sample.

transformers would instead build a mask over all pairs of tokens from the restarting positions. Its memory and compute
grow with the square of the bin, and SDPA has no fast kernel for a mask. Sample by sample, nothing is computed across
boundaries, so nothing can leak, and each call is plain causal attention.

Cost: one call per sample and layer. On GPUs without a fast SDPA kernel for grouped-query attention (float32, or older
than Ampere), keys and values are first repeated for every head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from schemas.errors import ConfigError

SDPA = "sdpa"
FLASH_ATTENTION = "flash_attention_2"
BY_SAMPLE = "sdpa_by_sample"
"""The name under which :func:`attend_by_sample` is registered with transformers."""

AMPERE = (8, 0)
"""Lowest compute capability with a flash-attention kernel in SDPA, which supports grouped-query attention."""


def check_window(window: int | None, attn_implementation: str) -> None:
    """Check that the attention implementation supports the sliding window of the language model.

    Args:
        window: tokens; None if the model has no window, like the official checkpoints.
        attn_implementation: attention implementation.

    Raises:
        ConfigError: the model has a window and the implementation is SDPA.
    """
    if window is not None and attn_implementation == SDPA:
        raise ConfigError(
            f"the checkpoint uses a sliding window of {window} tokens, which needs --attn_implementation "
            f"{FLASH_ATTENTION}: install flash-attn, or set use_sliding_window to false in its config.json, as in the "
            "official checkpoints."
        )


def attend_by_sample(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    lengths: tuple[int, ...],
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each of several concatenated samples.

    Args:
        module: the attention layer.
        query: (1, heads, L, D).
        key: (1, key-value heads, L, D).
        value: (1, key-value heads, L, D).
        attention_mask: always None.
        lengths: tokens of each sample; they sum to L.
        dropout: probability of dropping an attention weight.
        scaling: factor of the dot products; default 1 / sqrt(D).
        kwargs: further arguments of transformers attention functions; unused.

    Returns:
        (1, L, heads, D), and None in place of the attention weights.
    """
    is_grouped = key.shape[1] != query.shape[1]
    if is_grouped and not has_grouped_kernel(query):
        # torch would otherwise fall back to the math kernel, which stores the weights of all pairs of tokens.
        # (1, key-value heads, L, D) -> (1, heads, L, D)
        key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for states in (key, value))
        is_grouped = False
    # per sample: (1, heads, length, D) -> (1, length, heads, D)
    outputs = [
        functional.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=is_grouped
        ).transpose(1, 2)
        for q, k, v in zip(*(torch.split(states, list(lengths), dim=2) for states in (query, key, value)))
    ]
    return torch.cat(outputs, dim=1), None


def has_grouped_kernel(query: torch.Tensor) -> bool:
    """Whether SDPA has a fast kernel for grouped-query attention: flash attention on a GPU, or the CPU kernel."""
    if not query.is_cuda:
        return True
    return query.dtype != torch.float32 and torch.cuda.get_device_capability(query.device) >= AMPERE


ALL_ATTENTION_FUNCTIONS.register(BY_SAMPLE, attend_by_sample)
