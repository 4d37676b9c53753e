"""Attention of packed samples without flash attention: SDPA, called once for each sample.

A mask over all pairs of tokens would keep samples apart as well, and is what transformers makes of positions that
restart: its memory and the operations grow with the square of the bin, and with a mask SDPA has no fast kernel. Sample
by sample nothing is computed across borders, so that nothing can leak, and each call is plain causal attention.

Cost: one call a sample and layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SDPA = "sdpa"
FLASH_ATTENTION = "flash_attention_2"
BY_SAMPLE = "sdpa_by_sample"
"""The name under which transformers finds :func:`attend_by_sample`."""


def attend_by_sample(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    lengths: tuple[int, ...] | None = None,
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
        attention_mask: only without ``lengths``.
        lengths: tokens of each sample, which sum to L. Without them, as where the model is called by itself and not
            with a packed bin, this is the SDPA of transformers.
        dropout: share of the weights that are dropped.
        scaling: of the products; 1 / sqrt(D) if not given.
        others: what else transformers hands to attention functions.

    Returns:
        (1, L, heads, D), and None in place of the weights, which are not kept.
    """
    if lengths is None:
        others |= {"dropout": dropout, "scaling": scaling}
        found: tuple[torch.Tensor, None] = ALL_ATTENTION_FUNCTIONS[SDPA](
            module, query, key, value, attention_mask, **others
        )
        return found
    is_grouped = key.shape[1] != query.shape[1]
    parts = [
        functional.scaled_dot_product_attention(
            q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=is_grouped
        ).transpose(1, 2)
        for q, k, v in zip(*(torch.split(states, list(lengths), dim=2) for states in (query, key, value)))
    ]
    return torch.cat(parts, dim=1), None


ALL_ATTENTION_FUNCTIONS.register(BY_SAMPLE, attend_by_sample)
ALL_MASK_ATTENTION_FUNCTIONS.register(BY_SAMPLE, sdpa_mask)
