"""Attention confined to samples and media: which implementations there are, and the two that transformers lacks.

``varlen`` is torch's own variable-length flash kernel (:func:`torch.nn.attention.varlen.varlen_attn`): one call per
layer for all samples, windows or frames, as with flash-attn, and no package besides torch. ``sdpa`` calls SDPA for
every sample by itself, and runs everywhere.

Without them, transformers would build a mask over all pairs of tokens from the restarting positions. Its memory and
compute grow with the square of the bin, and SDPA has no fast kernel for a mask. Sample by sample, nothing is computed
across boundaries, so nothing can leak, and each call is plain causal attention.

Cost of SDPA: one call per sample and layer. On GPUs without a fast SDPA kernel for grouped-query attention (float32,
or older than Ampere), keys and values are first repeated for every head.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional
from torch.nn.attention.varlen import varlen_attn
from transformers import Qwen2_5_VLForConditionalGeneration
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from schemas.errors import ConfigError, VlprepError

SDPA = "sdpa"
VARLEN = "varlen"
FLASH_ATTENTION = "flash_attention_2"
FLASH_ATTENTION_3 = "flash_attention_3"
IMPLEMENTATIONS = (SDPA, VARLEN, FLASH_ATTENTION, FLASH_ATTENTION_3)
BY_SAMPLE = "sdpa_by_sample"
"""The name under which :func:`attend_by_sample` is registered with transformers."""

FLASH_VARLEN = "flash_varlen"
"""The name under which :func:`attend_varlen` is registered with transformers, which passes sample and window boundaries
to implementations with "flash" in their name."""

AMPERE = (8, 0)
"""Lowest compute capability with flash-attention kernels: those of SDPA, which support grouped-query attention, and all
others."""


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
            f"the checkpoint uses a sliding window of {window} tokens, which --attn_implementation {SDPA} cannot "
            f"compute: use {VARLEN} or {FLASH_ATTENTION} on a GPU, or set use_sliding_window to false in its "
            "config.json, as in the official checkpoints."
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


def attend_varlen(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention within each of several concatenated sequences, in one call of torch's variable-length kernel.

    Args:
        module: the attention layer; its ``is_causal`` is the default.
        query: (1, heads, L, D), float16 or bfloat16 on a GPU.
        key: (1, key-value heads, L, D).
        value: (1, key-value heads, L, D).
        attention_mask: always None.
        cu_seq_lens_q: (S+1,) int32, boundaries of the sequences.
        max_length_q: length of the longest sequence, known without asking the device.
        scaling: factor of the dot products; default 1 / sqrt(D).
        dropout: must be 0; the kernel has none, and neither has Qwen2.5-VL.
        is_causal: whether a position sees earlier positions only.
        sliding_window: number of positions that a causal position sees, itself included; default all.
        kwargs: further arguments of transformers attention functions; unused.

    Returns:
        (1, L, heads, D), and None in place of the attention weights.
    """
    assert dropout == 0.0, "varlen attention has no dropout"
    causal = bool(module.is_causal) if is_causal is None else is_causal
    before = -1 if sliding_window is None else sliding_window - 1
    # (1, heads, L, D) -> (L, heads, D)
    q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
    output = varlen_attn(
        q,
        k,
        v,
        cu_seq_lens_q,
        cu_seq_lens_q,
        max_length_q,
        max_length_q,
        scale=scaling,
        window_size=(before, 0) if causal else (-1, -1),
        enable_gqa=q.shape[1] != k.shape[1],
    )
    assert isinstance(output, torch.Tensor)
    return output[None], None


def loadable(attn_implementation: str) -> str:
    """The implementation to load a model with: one that transformers knows. :func:`isolate_samples` follows."""
    return SDPA if attn_implementation == VARLEN else attn_implementation


def isolate_samples(hf: Qwen2_5_VLForConditionalGeneration, attn_implementation: str) -> None:
    """Give the model the attention of an implementation that confines it to samples, windows and frames.

    Raises:
        ConfigError: the model has dropout in its attention, and the implementation has none.
        VlprepError: transformers did not accept it; it would only warn, and samples would attend to one another.
    """
    assert attn_implementation in IMPLEMENTATIONS, attn_implementation
    language_model, visual = hf.model.language_model, hf.model.visual
    if attn_implementation == VARLEN:
        if (dropout := language_model.config.attention_dropout) > 0:
            raise ConfigError(
                f"the checkpoint has attention_dropout {dropout}, which {VARLEN} attention does not have: use "
                f"--attn_implementation {SDPA}, or set it to 0 in its config.json, as in the official checkpoints."
            )
        # The public setters refuse names that transformers does not know, except with a hub kernel.
        for config in (language_model.config, visual.config):
            config._attn_implementation_internal = FLASH_VARLEN
        expected = FLASH_VARLEN
    elif attn_implementation == SDPA:
        language_model.set_attn_implementation(BY_SAMPLE)
        expected = BY_SAMPLE
    else:
        expected = attn_implementation
    if language_model.config._attn_implementation != expected:
        raise VlprepError(
            f"transformers {transformers.__version__} did not accept the attention that isolates packed samples. Pass "
            f"--attn_implementation {FLASH_ATTENTION}, or install the version of constraints.txt."
        )


ALL_ATTENTION_FUNCTIONS.register(BY_SAMPLE, attend_by_sample)
ALL_ATTENTION_FUNCTIONS.register(FLASH_VARLEN, attend_varlen)
