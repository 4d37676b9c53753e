"""Steps whose loss or gradient is NaN or infinite: reported with bins and samples, skipped, and fatal when repeated.

DeepSpeed finds them by the norm of the gradient, which all ranks know, and leaves weights and optimizer as they were.
Which micro-batches are to blame is asked only then, so other steps cost nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from schemas.errors import VlprepError
from train.batches.batch import MicroBatch
from train.batches.stream import StepBatch
from train.order.explain import source_samples
from train.shards.index import ShardIndex

logger = logging.getLogger(__name__)

_MAX_SAMPLES_SHOWN = 20


class SkippedSteps:
    """Counts the skipped steps of a run."""

    def __init__(self, index: ShardIndex, *, max_in_a_row: int, is_first: bool, order_command: str) -> None:
        """Begin to count.

        Args:
            index: the bins, to name them.
            max_in_a_row: one more stops the run.
            is_first: whether this rank reports.
            order_command: what shows a step of the run, but for ``--step``.
        """
        self._index = index
        self._max_in_a_row = max_in_a_row
        self._is_first = is_first
        self._order_command = order_command
        self._in_a_row = 0
        self.total = 0

    def note_done(self) -> None:
        """A step was not skipped."""
        self._in_a_row = 0

    def note_skipped(self, batch: StepBatch, losses: torch.Tensor, *, scales_loss: bool) -> None:
        """A step was skipped. All ranks call this together.

        Args:
            batch: the step.
            losses: (A,) float32, loss of each micro-batch of this rank.
            scales_loss: whether the loss is scaled for float16 and the scale can be lower: a gradient that overflows is
                then nothing unusual.

        Raises:
            VlprepError: too many steps in a row were skipped.
        """
        self.total += 1
        to_blame = _gather_bins(batch.micro_batches, torch.isfinite(losses).tolist())
        if scales_loss and not to_blame:
            logger.info("step %d skipped: its gradient overflowed, the scale of the loss is lowered", batch.step + 1)
            return
        self._in_a_row += 1
        if to_blame:
            found = f"the loss of step {batch.step + 1} is not finite in bins {to_blame}"
        else:
            found = (
                f"the gradient of step {batch.step + 1} is not finite, though all losses are; bins {list(batch.bins)}"
            )
        if self._is_first:
            lines = self._describe(to_blame or list(batch.bins))
            logger.warning("%s; the step is skipped\n%s", found, "\n".join(lines))
        if self._in_a_row > self._max_in_a_row:
            raise VlprepError(
                f"{found}, the {self._in_a_row}. such step in a row. Lower the learning rate, look at the samples of "
                f"the bins (`{self._order_command} --step {batch.step}`), or raise --max_skipped_steps."
            )

    def _describe(self, bins: list[int]) -> list[str]:
        try:
            samples = source_samples(self._index, bins)
        except VlprepError as error:
            return [f"  their samples are not known: {error}"]
        lines = [
            f"  bin {number}: {sample.dataset} {sample.file}:{sample.line} record {sample.record} id {sample.id}"
            for number in bins
            for sample in samples[number]
        ]
        rest = len(lines) - _MAX_SAMPLES_SHOWN
        return lines if rest <= 0 else [*lines[:_MAX_SAMPLES_SHOWN], f"  and {rest} more"]


def _gather_bins(micro_batches: Sequence[MicroBatch], finite: Sequence[bool]) -> list[int]:
    """Bins of the micro-batches of all ranks whose loss is not finite."""
    mine = [number for micro, is_finite in zip(micro_batches, finite) if not is_finite for number in micro.bins]
    of_ranks: list[list[int]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(of_ranks, mine)
    return sorted(number for bins in of_ranks for number in bins)
