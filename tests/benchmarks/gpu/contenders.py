"""Who takes part: a set of shards and a corpus -> contenders, each with its batches and its loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from schemas.wording import counted
from tests.benchmarks.gpu.corpus import Corpus
from tests.benchmarks.gpu.models import Arrangement
from tests.benchmarks.gpu.online import Content, OnlineBatch, OnlineFeed
from train.batches.batch import MicroBatch, build_micro_batch
from train.batches.stream import BinStream
from train.model.attention import SDPA, VARLEN
from train.order.dealing import DataOrder
from train.shards.index import ShardIndex
from train.shards.reader import read_checked_bin

PREFETCH, NUM_THREADS = 8, 2
"""Defaults of the trainer."""

NUM_EPOCHS = 8
"""More than a contender gets through in the time there is."""


class Feed(Protocol):
    """Batches of a contender, in the order of the bins."""

    def start(self) -> None:
        """Begin a turn. What was prepared during the turns of others is dropped."""

    def next(self) -> MicroBatch | OnlineBatch:
        """The next batch, on the CPU."""

    def stop(self) -> None:
        """End a turn."""

    def batch_of(self, bin_id: int) -> MicroBatch | OnlineBatch:
        """The batch of a bin, made here and now."""

    def close(self) -> None:
        """Stop all background work."""


class Contender(Protocol):
    """A way to train."""

    name: str
    feed: Feed
    is_ours: bool

    def arrange(self, arrangement: Arrangement) -> None:
        """Arrange the model for this contender."""

    def loss(self, arrangement: Arrangement, batch: MicroBatch | OnlineBatch) -> torch.Tensor:
        """Mean cross-entropy of a batch on the device."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ours:
    """This project: bins from shards, attention of one implementation."""

    name: str
    feed: Feed
    attn_implementation: str
    is_ours: bool = True

    def arrange(self, arrangement: Arrangement) -> None:
        """Arrange the model as this project does."""
        arrangement.arrange_ours(self.attn_implementation)

    def loss(self, arrangement: Arrangement, batch: MicroBatch | OnlineBatch) -> torch.Tensor:
        """Sum over the targets, divided by their number, which the index knows beforehand."""
        assert isinstance(batch, MicroBatch)
        loss: torch.Tensor = arrangement.packed(batch) / max(1, batch.targets.numel())
        return loss


@dataclass(frozen=True, kw_only=True, slots=True)
class Upstream:
    """The upstream trainer: batches processed online, the model of transformers with all logits."""

    name: str
    feed: Feed
    is_ours: bool = False

    def arrange(self, arrangement: Arrangement) -> None:
        """Arrange the model as the upstream trainer does."""
        arrangement.arrange_upstream()

    def loss(self, arrangement: Arrangement, batch: MicroBatch | OnlineBatch) -> torch.Tensor:
        """The loss of the model of transformers."""
        assert isinstance(batch, OnlineBatch)
        loss: torch.Tensor | None = arrangement.hf(
            input_ids=batch.input_ids,
            labels=batch.labels,
            position_ids=batch.position_ids,
            # Layers get the mask as it is. A tensor would be dropped: transformers does not know this attention.
            attention_mask={"full_attention": batch.attention_mask},
            pixel_values=batch.pixel_values,
            image_grid_thw=batch.image_grid_thw,
            use_cache=False,
        ).loss
        assert loss is not None
        return loss


class ShardFeed:
    """Batches from the stream of the trainer."""

    def __init__(self, index: ShardIndex, order: DataOrder, device: torch.device) -> None:
        pin_device = device if device.type == "cuda" else None
        self._index = index
        layout = {"rank": 0, "world_size": 1, "accumulation": 1, "per_device": 1}
        self._stream = BinStream(
            index, order, **layout, num_threads=NUM_THREADS, prefetch=PREFETCH, pin_device=pin_device
        )
        self._has_started = False

    def start(self) -> None:
        """Begin a turn. What was prepared during the turns of others is dropped."""
        if self._has_started:
            for _ in range(PREFETCH):
                self.next()
        self._has_started = True

    def next(self) -> MicroBatch:
        """The next batch; the order has more epochs than a run takes."""
        return next(self._stream).micro_batches[0]

    def stop(self) -> None:
        """End a turn. The threads stop once their few batches are ready."""

    def batch_of(self, bin_id: int) -> MicroBatch:
        """The batch of a bin, made here and now."""
        return build_micro_batch([read_checked_bin(self._index, bin_id)])

    def close(self) -> None:
        """Stop the threads."""
        self._stream.close()


def make_contenders(
    corpus: Corpus,
    checkpoint: Path,
    index: ShardIndex,
    records: Sequence[NDArray[np.int64]],
    *,
    num_workers: tuple[int, int],
    device: torch.device,
) -> list[Contender]:
    """All contenders over one set of shards, which all take its bins in the same order."""
    order = DataOrder(index.cost(), seed=0, global_batch=1, epochs=NUM_EPOCHS)
    dealt = [
        int(order.bins_of_step(step, world_size=1, accumulation=1, per_device=1).item())
        for step in range(NUM_EPOCHS * index.num_bins)
    ]

    def online(num: int, *, padded: bool) -> OnlineFeed:
        return OnlineFeed(
            corpus,
            checkpoint,
            records,
            dealt,
            padded=padded,
            num_workers=num,
            pinned=device.type == "cuda",
        )

    few, many = num_workers
    return [
        Ours(name=f"ours, {VARLEN}", feed=ShardFeed(index, order, device), attn_implementation=VARLEN),
        Ours(name=f"ours, {SDPA}", feed=ShardFeed(index, order, device), attn_implementation=SDPA),
        Upstream(name=f"upstream, padded, {counted(few, 'worker')}", feed=online(few, padded=True)),
        Upstream(name=f"upstream, padded, {counted(many, 'worker')}", feed=online(many, padded=True)),
        Upstream(name=f"upstream, flattened, {counted(many, 'worker')}", feed=online(many, padded=False)),
    ]


def content_of(batch: MicroBatch | OnlineBatch) -> Content:
    """What a batch holds."""
    if isinstance(batch, OnlineBatch):
        return batch.content
    grids = tuple(grid for grid, _ in batch.vision.media)
    return Content(lengths=batch.lengths, num_targets=batch.targets.numel(), grids=grids)
