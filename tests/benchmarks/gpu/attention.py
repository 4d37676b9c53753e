"""Attention of the upstream trainer on the kernel that this project uses, so that contenders differ in nothing else.

Upstream needs flash-attn, whose functions are replaced by :func:`torch.nn.attention.varlen.varlen_attn` here. As there,
each layer finds out by itself, from values on the device, how long the longest sample is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.train.varlen_on_cpu import attend_in_parts
from train.model import attention

FLASH_UPSTREAM = "flash_upstream"
"""The name under which :func:`attend_upstream` is registered with transformers."""


def attend_upstream(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within samples that are padded or concatenated.

    Args:
        module: the attention layer.
        query: (S, heads, L, D).
        key: (S, key-value heads, L, D).
        value: (S, key-value heads, L, D).
        attention_mask: (S, L) bool, False at padding; or (S+1,) int32, boundaries of concatenated samples (S is then
            1 in the shapes of the others).
        scaling: factor of the dot products.
        kwargs: further arguments of transformers attention functions; unused.

    Returns:
        (S, L, heads, D), and None in place of the attention weights.
    """
    if attention_mask.ndim == 1:
        lengths = [attention_mask[i + 1] - attention_mask[i] for i in range(attention_mask.numel() - 1)]
        longest = int(max(lengths).item())  # type: ignore[type-var]
        output, _ = attention.attend_varlen(
            module, query, key, value, None, cu_seq_lens_q=attention_mask, max_length_q=longest, scaling=scaling
        )
        return output, None
    # As transformers does it: rows without padding are gathered, and their outputs scattered.
    rows = torch.nonzero(attention_mask.flatten(), as_tuple=False).flatten()
    lengths = attention_mask.sum(dim=1, dtype=torch.int32)
    boundaries = functional.pad(torch.cumsum(lengths, dim=0, dtype=torch.int32), (1, 0))
    # (S, heads, L, D) -> (S L, heads, D) -> (1, heads, rows, D)
    gathered = [
        states.transpose(1, 2).flatten(0, 1).index_select(0, rows).transpose(0, 1)[None]
        for states in (query, key, value)
    ]
    output, _ = attention.attend_varlen(
        module, *gathered, None, cu_seq_lens_q=boundaries, max_length_q=int(lengths.max().item()), scaling=scaling
    )
    num_samples, num_heads, length, size = query.shape
    padded = output.new_zeros(num_samples * length, num_heads, size).index_copy(0, rows, output[0])
    return padded.view(num_samples, length, num_heads, size), None


def _without_flag(kernel: Callable[..., Any], *args: Any, enable_gqa: bool, **kwargs: Any) -> Any:
    return kernel(*args, **kwargs)


@contextmanager
def kernel_for(device: torch.device) -> Iterator[None]:
    """Adapt torch's variable-length kernel to this machine.

    On a CPU, SDPA stands in for it. In torch 2.11, it has no flag for grouped-query attention and computes it anyway.
    """
    original = attention.varlen_attn
    if device.type != "cuda":
        attention.varlen_attn = attend_in_parts  # type: ignore[assignment]
    elif "enable_gqa" not in signature(original).parameters:
        attention.varlen_attn = partial(_without_flag, original)
    try:
        yield
    finally:
        attention.varlen_attn = original


ALL_ATTENTION_FUNCTIONS.register(FLASH_UPSTREAM, attend_upstream)
