"""Steps whose loss or gradient is NaN or infinite: skipped, reported with bins and samples, fatal if they repeat.

DeepSpeed detects them by the norm of the gradient, which all ranks know, and leaves weights and optimizer unchanged.
The ranks exchange which bins caused a skipped step only when there is one, so other steps cost nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from schemas.errors import VlprepError
from schemas.wording import counted, listed
from train.batches.batch import MicroBatch
from train.batches.stream import StepBatch
from train.order.explain import source_samples
from train.shards.index import ShardIndex

logger = logging.getLogger(__name__)

_MAX_SAMPLES_SHOWN = 20


class SkippedSteps:
    """Counts the skipped steps of a run."""

    def __init__(self, index: ShardIndex, *, max_consecutive: int, is_first: bool, order_command: str) -> None:
        """Start with no skipped step.

        Args:
            index: the bins, to look up their samples.
            max_consecutive: consecutive skipped steps that the run tolerates.
            is_first: whether this rank reports.
            order_command: command that shows a step of the run, without ``--step``.
        """
        self._index = index
        self._max_consecutive = max_consecutive
        self._is_first = is_first
        self._order_command = order_command
        self._consecutive = 0
        self.total = 0

    def note_done(self) -> None:
        """Note a step that was not skipped."""
        self._consecutive = 0

    def note_skipped(self, batch: StepBatch, losses: torch.Tensor, *, scales_loss: bool) -> None:
        """Note a skipped step. Collective.

        Args:
            batch: the step.
            losses: (A,) float32, loss of each micro-batch of this rank.
            scales_loss: whether a scaled float16 loss can still be scaled lower, so that an overflowing gradient is
                part of finding the scale.

        Raises:
            VlprepError: too many consecutive steps were skipped.
        """
        self.total += 1
        step = batch.step + 1
        bins = _gather_bins(batch.micro_batches, torch.isfinite(losses).tolist())
        if scales_loss and not bins:
            logger.info("step %d skipped: its gradient overflowed, lowering the loss scale", step)
            return
        self._consecutive += 1
        if bins:
            problem = f"the loss of step {step} is not finite in {listed('bin', bins)}"
        else:
            problem = f"the gradient of step {step} is not finite, though all losses are; {listed('bin', batch.bins)}"
        if self._is_first:
            lines = self._describe(bins or list(batch.bins))
            logger.warning("%s; skipping the step\n%s", problem, "\n".join(lines))
        if self._consecutive > self._max_consecutive:
            count = counted(self._consecutive, "consecutive skipped step")
            raise VlprepError(
                f"{problem}: {count}. Lower the learning rate, look at the samples of the bins "
                f"(`{self._order_command} --step {batch.step}`), or raise --max_skipped_steps."
            )

    def _describe(self, bins: list[int]) -> list[str]:
        try:
            samples = source_samples(self._index, bins)
        except VlprepError as error:
            return [f"  their samples are unknown: {error}"]
        lines = [f"  bin {bin_}: {sample.name}" for bin_ in bins for sample in samples[bin_]]
        rest = len(lines) - _MAX_SAMPLES_SHOWN
        return lines if rest <= 0 else [*lines[:_MAX_SAMPLES_SHOWN], f"  and {rest} more"]


def _gather_bins(micro_batches: Sequence[MicroBatch], is_finite: Sequence[bool]) -> list[int]:
    """Bins of the micro-batches of all ranks whose loss is not finite."""
    own = [bin_ for micro, finite in zip(micro_batches, is_finite) if not finite for bin_ in micro.bins]
    of_ranks: list[list[int]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(of_ranks, own)
    return sorted(bin_ for bins in of_ranks for bin_ in bins)
