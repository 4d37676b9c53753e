"""Attention of packed samples without flash attention: SDPA, called once for each sample.

A mask over all pairs of tokens would keep samples apart as well, and is what transformers makes of positions that
restart: its memory and the operations grow with the square of the bin, and with a mask SDPA has no fast kernel. Sample
by sample nothing is computed across borders, so that nothing can leak, and each call is plain causal attention.

Cost: one call a sample and layer. On GPUs where SDPA has no fast kernel for grouped heads (in float32, or older than
Ampere), keys and values are repeated for every head first.
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
"""The name under which transformers finds :func:`attend_by_sample`."""

AMPERE = (8, 0)
"""Compute capability from which on SDPA has flash attention, which takes grouped heads as they are."""


def check_window(window: int | None, attn_implementation: str) -> None:
    """See that attention can keep to the sliding window of a language model.

    Args:
        window: tokens; None, as in the official checkpoints, where there is no window.
        attn_implementation: attention implementation.

    Raises:
        ConfigError: there is a window, which SDPA has not.
    """
    if window is not None and attn_implementation == SDPA:
        raise ConfigError(
            f"the checkpoint attends in a sliding window of {window} tokens, which needs --attn_implementation "
            f"{FLASH_ATTENTION}: install flash-attn, or set use_sliding_window in its config.json to false, as the "
            "official checkpoints have it."
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
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention inside each of the samples that follow one another.

    Args:
        module: the attention layer that calls.
        query: (1, heads, L, D).
        key: (1, key-value heads, L, D).
        value: (1, key-value heads, L, D).
        attention_mask: there is none.
        lengths: tokens of each sample, which sum to L.
        dropout: share of the weights that are dropped.
        scaling: of the products; 1 / sqrt(D) if not given.
        others: what else transformers hands to attention functions.

    Returns:
        (1, L, heads, D), and None in place of the weights, which are not kept.
    """
    is_grouped = key.shape[1] != query.shape[1]
    if is_grouped and not has_grouped_kernel(query):
        # Without a kernel of their own torch would fall back to one that keeps the weights of all pairs of tokens.
        key, value = (states.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for states in (key, value))
        is_grouped = False
    parts = [
        functional.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=is_grouped
        ).transpose(1, 2)
        for q, k, v in zip(*(torch.split(states, list(lengths), dim=2) for states in (query, key, value)))
    ]
    return torch.cat(parts, dim=1), None


def has_grouped_kernel(query: torch.Tensor) -> bool:
    """Whether SDPA has a fast kernel for fewer key-value heads than heads: flash attention, and that of CPUs."""
    if not query.is_cuda:
        return True
    return query.dtype != torch.float32 and torch.cuda.get_device_capability(query.device) >= AMPERE


ALL_ATTENTION_FUNCTIONS.register(BY_SAMPLE, attend_by_sample)
