"""Qwen2.5-VL over packed bins: a :class:`MicroBatch` -> the summed cross-entropy of its targets.

One module wraps the Hugging Face model. Whatever the bins hold, a forward pass makes the same calls in the same order,
so that under ZeRO-3 every rank takes part in the same collectives:

1. the vision tower, once, over all media in sequence order (over a dummy image if there are none);
2. the embeddings; the vision features replace those of the pad tokens;
3. the language model, with attention confined to each sample;
4. ``lm_head``, once, on target positions only (:mod:`train.model.head`).

Cost: the model's own, plus one recomputation of the logits in the backward pass.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import Qwen2_5_VLForConditionalGeneration

from train.batches.batch import MicroBatch, VisionBatch
from train.model.attention import SDPA, isolate_samples
from train.model.head import TargetHead
from train.model.pixels import pixel_values

NO_MASK = {"full_attention": None, "sliding_attention": None}
"""Attention mask per kind of layer. Sample boundaries isolate the samples, so transformers must not build a mask."""


class PatchProjection(nn.Conv3d):
    """The patch embedding of the vision tower, computed as a matrix product.

    Kernel and stride of the convolution are equal, so each patch is one row. Several versions of cuDNN have no fast
    bfloat16 kernel for it. Name and shape of the weight stay, so checkpoints are the same.
    """

    @classmethod
    def of(cls, conv: nn.Conv3d) -> PatchProjection:
        """Wrap an existing convolution, sharing its weight."""
        assert conv.bias is None and conv.kernel_size == conv.stride
        wrapped = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,  # type: ignore[arg-type]
            stride=conv.stride,  # type: ignore[arg-type]
            bias=False,
            device="meta",
        )
        wrapped.weight = conv.weight
        return wrapped

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Project patches: (N, channels, frames, rows, columns) -> (N, embedding size)."""
        return functional.linear(input.flatten(1), self.weight.flatten(1))


class PackedQwen(nn.Module):
    """The Hugging Face model behind the interface of the training loop.

    It is wrapped rather than subclassed: transformers does not load weights into subclasses.

    Raises:
        VlprepError: transformers did not accept the attention that isolates samples.
    """

    def __init__(self, hf: Qwen2_5_VLForConditionalGeneration, *, attn_implementation: str) -> None:
        super().__init__()
        hf.lm_head = TargetHead.of(hf.lm_head)
        hf.model.visual.patch_embed.proj = PatchProjection.of(hf.model.visual.patch_embed.proj)
        self.hf = hf
        self.uses_sdpa = attn_implementation == SDPA
        isolate_samples(hf, attn_implementation)

    def forward(self, micro: MicroBatch, *, scores: bool = False) -> torch.Tensor:
        """Compute the cross-entropy of the targets of a micro-batch.

        Args:
            micro: a micro-batch on the device of the model.
            scores: return one score per target, without gradients.

        Returns:
            The sum over the targets, float32 scalar. Without targets it is 0, but still connected to every trained
            parameter. With ``scores``, (2, T) float32: see :class:`TargetHead`.
        """
        states = self.target_states(micro)
        result: torch.Tensor = self.hf.lm_head(states, micro.targets, scores=scores)
        return result

    def target_states(self, micro: MicroBatch) -> torch.Tensor:
        """Return the last hidden states at the target positions: (T, H), in the dtype of the model."""
        features = self.vision_features(micro.vision)
        # input_ids (1, L) -> embeddings (1, L, H)
        embeddings = self.hf.model.language_model.embed_tokens(micro.input_ids)
        # Pad k at position media_positions[k] takes row k of features (N/4, H). The row of a dummy image is left over.
        features = features[: micro.media_positions.numel()].to(embeddings.dtype)
        embeddings = embeddings[0].index_put((micro.media_positions,), features)[None]
        # hidden (1, L, H)
        hidden: torch.Tensor = self.hf.model.language_model(
            inputs_embeds=embeddings,
            attention_mask=NO_MASK,
            position_ids=micro.position_ids,
            use_cache=False,
            **self._sample_boundaries(micro),
        ).last_hidden_state
        return hidden[0].index_select(0, micro.target_positions)

    def vision_features(self, vision: VisionBatch) -> torch.Tensor:
        """Return the features of all media in sequence order: (N/4, H).

        The autograd graph starts at the first trained module, so a frozen vision tower keeps no activations.
        """
        visual = self.hf.model.visual
        is_trained = any(parameter.requires_grad for parameter in visual.parameters())
        with torch.set_grad_enabled(is_trained and torch.is_grad_enabled()):
            # pixel_values (N, 1176) -> one row per merged 2 x 2 block of patches (N/4, H)
            output = visual(
                pixel_values(vision, visual.dtype),
                grid_thw=None,
                position_ids=vision.position_ids,
                cu_seqlens=vision.cu_seqlens,
                max_seqlen=vision.max_seqlen,
                window_index=vision.window_index,
                cu_window_seqlens=vision.cu_window_seqlens,
                max_window_seqlen=vision.max_window_seqlen,
            )
        features: torch.Tensor = output.pooler_output
        return features

    def _sample_boundaries(self, micro: MicroBatch) -> dict[str, Any]:
        """Keyword arguments that tell attention where samples begin: lengths on the host, or offsets on the device."""
        if self.uses_sdpa:
            return {"lengths": micro.lengths}
        return {
            "cu_seq_lens_q": micro.cu_seqlens,
            "cu_seq_lens_k": micro.cu_seqlens,
            "max_length_q": micro.max_seqlen,
            "max_length_k": micro.max_seqlen,
        }


def checkpoint_activations(model: PackedQwen) -> None:
    """Recompute activations in the backward pass instead of storing them. A frozen vision tower stores none anyway."""
    modules = [model.hf.model.language_model]
    if any(parameter.requires_grad for parameter in model.hf.model.visual.blocks.parameters()):
        modules.append(model.hf.model.visual)
    for module in modules:
        with warnings.catch_warnings():
            # 5.23 renames this method; the transformers release for Python 3.10 has the old name only.
            warnings.simplefilter("ignore", FutureWarning)
            module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
