"""Qwen2.5-VL over packed bins: a :class:`MicroBatch` -> the summed cross-entropy of its targets.

One module wraps the Hugging Face model. A forward pass makes, whatever the bins hold, the same calls in the same order,
so that all ranks take part in the same collectives under ZeRO-3:

1. the vision tower, once, over all media in sequence order (a dummy picture where there are none);
2. the embeddings, into which the features are scattered in place of the pad tokens;
3. the language model, with samples isolated from one another;
4. ``lm_head`` once, on target positions only, in as many chunks on every rank, whose logits are never kept.

Cost: next to that of the model itself, one recomputation of the logits in the backward pass. Logits exist for ``CHUNK``
rows at a time (0.3 GB in float32 for Qwen's vocabulary), not for every token.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2_5_VLForConditionalGeneration

from schemas.errors import VlprepError
from train.batches.batch import MicroBatch, VisionBatch
from train.model.attention import BY_SAMPLE, FLASH_ATTENTION, SDPA
from train.model.pixels import pixel_values

CHUNK = 512
"""Rows of logits that exist at a time."""

NO_MASK = {"full_attention": None, "sliding_attention": None}
"""By kind of layer: samples are isolated by their lengths or borders, so that transformers has no mask to make."""


class TargetHead(nn.Linear):
    """An ``lm_head`` that can also give the loss without ever holding all logits.

    The loop over chunks is inside one call of the module: under ZeRO-3 the weight is gathered once for a call. All
    ranks take as many chunks as the one with most targets; those that a rank has no rows for are empty.
    """

    @classmethod
    def of(cls, head: nn.Linear) -> TargetHead:
        """A head that shares the weight of ``head`` (which stays tied to the embeddings where it was)."""
        made = cls(head.in_features, head.out_features, bias=False, device="meta")
        made.weight = head.weight
        return made

    def forward(
        self,
        input: torch.Tensor,
        targets: torch.Tensor | None = None,
        *,
        most_targets: int = 0,
        scores: bool = False,
    ) -> torch.Tensor:
        """Logits, or the loss, or a score of each target.

        Args:
            input: (T, H) hidden states (any leading shape where there are no targets).
            targets: (T,) int64, the token wanted at each row; T may be 0.
            most_targets: T of the rank that has most.
            scores: whether to give numbers of each target instead of their sum; these have no gradient.

        Returns:
            Without targets, the logits (..., V). With them, the cross-entropy summed over the rows: float32, scalar.
            With scores, (2, T) float32: the cross-entropy of each target, and 1 where it is the likeliest token.
        """
        if targets is None:
            return super().forward(input)
        chunks = list(zip(torch.split(input, CHUNK), torch.split(targets, CHUNK)))
        chunks += [(input[:0], targets[:0])] * (math.ceil(most_targets / CHUNK) - len(chunks))
        if scores:
            return torch.cat([self._chunk_scores(rows, wanted) for rows, wanted in chunks], dim=1)
        loss = torch.zeros((), dtype=torch.float32, device=input.device)
        for rows, wanted in chunks:
            part: torch.Tensor = checkpoint(
                self._chunk_loss, rows, wanted, use_reentrant=False, preserve_rng_state=False
            )
            loss = loss + part
        return loss

    def _chunk_loss(self, rows: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        logits = functional.linear(rows, self.weight).float()
        return functional.cross_entropy(logits, wanted, reduction="sum")

    @torch.no_grad()
    def _chunk_scores(self, rows: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        logits = functional.linear(rows, self.weight).float()
        losses = functional.cross_entropy(logits, wanted, reduction="none")
        return torch.stack([losses, (logits.argmax(dim=1) == wanted).float()])


class PackedQwen(nn.Module):
    """The Hugging Face model behind the interface of the training loop.

    It is wrapped, never subclassed: transformers leaves subclasses without their weights.

    Raises:
        VlprepError: transformers did not take the attention that isolates samples.
    """

    def __init__(self, hf: Qwen2_5_VLForConditionalGeneration, *, attn_implementation: str) -> None:
        super().__init__()
        assert attn_implementation in (SDPA, FLASH_ATTENTION), attn_implementation
        hf.lm_head = TargetHead.of(hf.lm_head)
        self.hf = hf
        self.has_sdpa = attn_implementation == SDPA
        if self.has_sdpa:
            language_model = hf.model.language_model
            language_model.set_attn_implementation(BY_SAMPLE)
            if language_model.config._attn_implementation != BY_SAMPLE:
                # transformers itself only warns, and samples would see one another.
                raise VlprepError(
                    f"transformers {transformers.__version__} did not take the attention that keeps packed samples "
                    f"apart. Give --attn_implementation {FLASH_ATTENTION}, or install the version of constraints.txt."
                )

    def forward(self, micro: MicroBatch, *, scores: bool = False) -> torch.Tensor:
        """Cross-entropy of the targets of a micro-batch.

        Args:
            micro: a micro-batch on the device of the model.
            scores: whether to give numbers of each target, without gradients.

        Returns:
            The sum over the targets, float32 scalar; 0 for a micro-batch without targets, yet connected to every
            trained parameter. With scores, (2, T) float32: see :class:`TargetHead`.
        """
        states = self.target_states(micro)
        found: torch.Tensor = self.hf.lm_head(states, micro.targets, most_targets=micro.most_targets, scores=scores)
        return found

    def target_states(self, micro: MicroBatch) -> torch.Tensor:
        """Last hidden states at the target positions: (T, H), in the dtype of the model."""
        features = self.vision_features(micro.vision)
        embeddings = self.hf.model.language_model.embed_tokens(micro.input_ids)
        config = self.hf.config
        is_pad = (micro.input_ids == config.image_token_id) | (micro.input_ids == config.video_token_id)
        embeddings = embeddings.masked_scatter(is_pad[..., None], features.to(embeddings.dtype))
        hidden: torch.Tensor = self.hf.model.language_model(
            inputs_embeds=embeddings,
            attention_mask=NO_MASK,
            position_ids=micro.position_ids,
            use_cache=False,
            **self._isolation(micro),
        ).last_hidden_state
        return hidden[0, micro.target_positions]

    def vision_features(self, vision: VisionBatch) -> torch.Tensor:
        """Features of all media in sequence order: (N/4, H). The graph begins at the first trained part."""
        visual = self.hf.model.visual
        trained = any(parameter.requires_grad for parameter in visual.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
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

    def _isolation(self, micro: MicroBatch) -> dict[str, Any]:
        """What keeps packed samples apart in attention: their borders on the device, or their lengths on the host."""
        if self.has_sdpa:
            return {"lengths": micro.lengths}
        return {
            "cu_seq_lens_q": micro.cu_seqlens,
            "cu_seq_lens_k": micro.cu_seqlens,
            "max_length_q": micro.max_seqlen,
            "max_length_k": micro.max_seqlen,
        }


def checkpoint_activations(model: PackedQwen) -> None:
    """Recompute activations in the backward pass instead of keeping them; a frozen vision tower keeps none anyway."""
    parts = [model.hf.model.language_model]
    if any(parameter.requires_grad for parameter in model.hf.model.visual.blocks.parameters()):
        parts.append(model.hf.model.visual)
    for part in parts:
        with warnings.catch_warnings():
            # 5.23 renames this method; transformers for Python 3.10 has the old name only.
            warnings.simplefilter("ignore", FutureWarning)
            part.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
