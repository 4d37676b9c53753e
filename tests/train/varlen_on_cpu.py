"""SDPA in place of torch's variable-length attention kernel, which exists on GPUs only."""

from __future__ import annotations

import torch
from torch.nn import functional


def attend_in_parts(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """SDPA part by part behind the signature of torch's variable-length kernel, which exists on GPUs only."""
    lengths = cu_seq_q.diff().tolist()
    # (L, heads, D) -> per part (1, heads, length, D)
    parts = zip(*(states.transpose(0, 1)[None].split(lengths, dim=2) for states in (query, key, value)))
    outputs = [
        functional.scaled_dot_product_attention(
            *part, is_causal=window_size == (-1, 0), scale=scale, enable_gqa=enable_gqa
        )
        for part in parts
    ]
    return torch.cat([output.transpose(1, 2) for output in outputs], dim=1)[0]
