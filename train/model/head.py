"""``lm_head`` with the loss of its targets: hidden states and expected tokens -> their summed cross-entropy.

At most as many logits exist at a time as ``CHUNK`` rows have, never those of all targets. The forward pass computes
some rows over the whole vocabulary. The backward pass computes the logits again, for all rows and a part of the
vocabulary. So each row of the weight's gradient is one matrix product that is rounded once. Sums of products over
chunks of rows, in bfloat16, would be off by 7e-3 after 32 chunks.

Cost: one recomputation of the logits in the backward pass. In transient memory, at most 8 bytes for each scalar of a
chunk of logits (0.6 GB for Qwen's vocabulary), then less and a float32 gradient of the hidden states.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

CHUNK = 512
"""Rows of logits computed at a time."""

ALIGNMENT = 128
"""The backward pass takes a multiple of this many tokens of the vocabulary at a time, as matrix kernels prefer."""


class TargetHead(nn.Linear):
    """An ``lm_head`` that can also return the loss without materialising all logits.

    All chunks are computed inside one call of the module, so ZeRO-3 gathers the weight once per pass. Nothing depends
    on the number of targets of other ranks.
    """

    @classmethod
    def of(cls, head: nn.Linear) -> TargetHead:
        """Wrap an existing head, sharing its weight (and thereby any tie to the embeddings)."""
        wrapped = cls(head.in_features, head.out_features, bias=False, device="meta")
        wrapped.weight = head.weight
        return wrapped

    def forward(
        self, input: torch.Tensor, targets: torch.Tensor | None = None, *, scores: bool = False
    ) -> torch.Tensor:
        """Compute logits, the summed loss, or per-target scores.

        Args:
            input: (T, H) hidden states; any leading shape if ``targets`` is None.
            targets: (T,) int64, the expected token of each row; T may be 0.
            scores: return one score per target instead of the sum, without gradients.

        Returns:
            Without ``targets``: logits (..., V). With ``targets``: cross-entropy summed over the rows, float32 scalar.
            With ``scores``: (2, T) float32, the cross-entropy of each target and 1.0 where it is the argmax.
        """
        if targets is None:
            return super().forward(input)
        if scores:
            chunks = zip(torch.split(input, CHUNK), torch.split(targets, CHUNK))
            return torch.cat([self._chunk_scores(*chunk) for chunk in chunks], dim=1)
        loss: torch.Tensor = _SummedCrossEntropy.apply(input, self.weight, targets)  # type: ignore[no-untyped-call]
        return loss

    @torch.no_grad()
    def _chunk_scores(self, states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        # states (C, H), targets (C,) -> logits (C, V) -> (2, C)
        logits = functional.linear(states, self.weight).float()
        losses = functional.cross_entropy(logits, targets, reduction="none")
        return torch.stack([losses, (logits.argmax(dim=1) == targets).float()])


class _SummedCrossEntropy(torch.autograd.Function):
    """Hidden states (T, H), weight (V, H) and targets (T,) -> the cross-entropy summed over the rows."""

    @staticmethod
    def forward(ctx: Any, states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        loss = torch.zeros((), dtype=torch.float32, device=states.device)
        normalizers = []
        for rows, expected in zip(torch.split(states, CHUNK), torch.split(targets, CHUNK)):
            chunk_loss, chunk_normalizers = _chunk_loss(rows, weight, expected)
            loss += chunk_loss
            normalizers.append(chunk_normalizers)
        ctx.save_for_backward(states, weight, targets, torch.cat(normalizers))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        states, weight, targets, normalizers = ctx.saved_tensors
        of_states, of_weight = ctx.needs_input_grad[:2]
        states_grad = torch.zeros_like(states, dtype=torch.float32) if of_states else None
        weight_grad = torch.empty_like(weight) if of_weight else None
        width = _slice_width(len(states), len(weight))
        for start in range(0, len(weight), width):
            part = weight[start : start + width]
            # (T, H) x (W, H) -> (T, W)
            logits_grad = _logits_grad(states, part, targets - start, normalizers).mul_(scale).to(weight.dtype)
            if states_grad is not None:
                states_grad += logits_grad @ part
            if weight_grad is not None:
                torch.mm(logits_grad.T, states, out=weight_grad[start : start + width])
            del logits_grad  # before the next one is made
        return None if states_grad is None else states_grad.to(states.dtype), weight_grad, None


def _chunk_loss(states: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed cross-entropy of some rows, and the logarithm of each row's sum of exponentials, (C,) float32."""
    # states (C, H), targets (C,) -> logits (C, V) -> scalar, (C,)
    logits = functional.linear(states, weight).float()
    logarithms = functional.log_softmax(logits, dim=1)
    at_target = targets[:, None]
    normalizers = logits.gather(1, at_target) - logarithms.gather(1, at_target)
    return functional.nll_loss(logarithms, targets, reduction="sum"), normalizers[:, 0]


def _logits_grad(
    states: torch.Tensor, part: torch.Tensor, targets: torch.Tensor, normalizers: torch.Tensor
) -> torch.Tensor:
    """Probability of each token in a part of the vocabulary, less 1 at the target, (T, W) float32.

    Args:
        states: (T, H) hidden states.
        part: (W, H) rows of the weight.
        targets: (T,) int64, relative to the first of these rows; outside of 0 to W - 1 if the target is not in it.
        normalizers: (T,) float32, see :func:`_chunk_loss`.
    """
    probabilities = functional.linear(states, part).float().sub_(normalizers[:, None]).exp_()
    is_inside = (targets >= 0) & (targets < len(part))
    columns = targets.clamp(0, len(part) - 1)[:, None]
    return probabilities.scatter_(1, columns, probabilities.gather(1, columns) - is_inside[:, None].float())


def _slice_width(num_rows: int, vocab_size: int) -> int:
    """Tokens of the vocabulary whose logits for all rows have as many scalars as a chunk."""
    width = CHUNK * vocab_size // max(1, num_rows)
    return min(vocab_size, max(1, width // ALIGNMENT) * ALIGNMENT)
