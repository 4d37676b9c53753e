"""Background reading: keeps the micro-batches of the coming steps ready, so that training does not wait for data.

Shard index and order -> an iterator of :class:`StepBatch`. Threads (:mod:`train.batches.workers`) build a bounded
number of micro-batches ahead, in order. If one fails, training stops: a bin is never skipped and never substituted.

The state of a stream is the number of its next step. A stream started there continues exactly, on any number of ranks.

Cost: memory for ``prefetch`` micro-batches plus those of the step handed out; buffers are reused.
"""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import final

import numpy as np
import torch
from numpy.typing import NDArray

from schemas.errors import ConfigError, ShardError
from train.batches.batch import MicroBatch
from train.batches.vision_inputs import WINDOW_SIZE
from train.batches.workers import Builder, Stalled, StepWork, Workers
from train.order.dealing import EMPTY, DataOrder
from train.settings.declarations import READ_TIMEOUT_S
from train.shards.buffers import Buffers, PinnedBuffers, ReusedBuffers
from train.shards.index import ShardIndex
from train.shards.reader import BinReader, ReadSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBatch:
    """What one rank needs for one step.

    Attributes:
        step: counted from 0.
        micro_batches: the micro-batches of this rank, one per micro-step.
        num_targets: targets of the step over all ranks and micro-steps, known from the index without communication.
            The summed loss is divided by it.
        num_tokens: tokens of the step over all ranks and micro-steps.
        max_tokens: capacity of the step in tokens, including empty positions.
        num_samples: samples of the step over all ranks and micro-steps.
        efficiency: share of the step that ranks compute rather than wait for the slowest rank, by the costs of the
            order: over the micro-steps, mean cost of the ranks relative to the highest.
        bins: all bins of the step over all ranks.
        data_wait_s: seconds that the training thread waited for the data of this step.
    """

    step: int
    micro_batches: tuple[MicroBatch, ...]
    num_targets: int
    num_tokens: int
    max_tokens: int
    num_samples: int
    efficiency: float
    bins: tuple[int, ...]
    data_wait_s: float


@final
class BinStream(Iterator[StepBatch]):
    """The steps of one rank, in order.

    Threads start with the first step; :meth:`close`, or leaving the ``with`` block, ends them.

    Args:
        index: the bins.
        order: an order of the bins of ``index``.
        rank: rank of this process.
        world_size: number of ranks.
        accumulation: micro-steps per step.
        per_device: bins per rank and micro-step.
        start_step: first step to hand out.
        end_step: step before which the stream ends, unless the order ends earlier.
        window_size: ``vision_config.window_size`` of the model, in pixels.
        num_threads: micro-batches built at a time. Local bins are read by as many threads, remote bins by as many as
            there are connections.
        prefetch: micro-batches kept ready; for remote shards at least one per connection.
        read_timeout_s: a micro-batch that takes longer raises instead of hanging.
        pin_device: CUDA device to which the batches will be copied; they are then in page-locked memory.
        read: when checksums are compared, and how remote shards are read.

    Raises:
        ConfigError: a value is out of range, or the order covers other bins or other proportions than the index.
    """

    def __init__(
        self,
        index: ShardIndex,
        order: DataOrder,
        *,
        rank: int,
        world_size: int,
        accumulation: int,
        per_device: int,
        start_step: int = 0,
        end_step: int | None = None,
        window_size: int = WINDOW_SIZE,
        num_threads: int = 2,
        prefetch: int = 8,
        read_timeout_s: float = READ_TIMEOUT_S,
        pin_device: torch.device | None = None,
        read: ReadSettings | None = None,
    ) -> None:
        _check_order(index, order)
        _check_settings(rank, world_size, num_threads, prefetch, read_timeout_s, start_step)
        self._index, self._order, self._next_step = index, order, start_step
        self._accumulation, self._read_timeout_s = accumulation, read_timeout_s
        buffers: Buffers = ReusedBuffers() if pin_device is None else PinnedBuffers()
        read = read or ReadSettings()
        self._reader = BinReader(index, read, buffers)
        self._num_threads = max(num_threads, read.connections) if self._reader.is_remote else num_threads
        self._prefetch = max(prefetch, self._num_threads) if self._reader.is_remote else prefetch
        self._builder = Builder(
            reader=self._reader,
            buffers=buffers,
            window_size=window_size,
            pin_device=pin_device,
            build_slots=threading.BoundedSemaphore(num_threads) if self._reader.is_remote else nullcontext(),
        )
        dealt = order.deal(
            start_step, end_step, world_size=world_size, accumulation=accumulation, per_device=per_device
        )
        self._plan = _micro_steps(dealt, rank)
        self._steps: deque[StepWork] = deque()
        self._num_pending = 0
        self._workers: Workers | None = None
        self._is_closed = False

    def state_dict(self) -> dict[str, int]:
        """Return the state of the stream, the same on all ranks: a few integers for :meth:`DataOrder.step_of`."""
        return self._order.state_dict(self._next_step)

    def __iter__(self) -> BinStream:
        return self

    def __next__(self) -> StepBatch:
        """Return the next step.

        Raises:
            StopIteration: the stream has ended or was closed.
            ConfigError: the system does not allow that many threads.
            ShardError: a bin could not be read, is damaged, or took too long; the stream is closed.
        """
        start_s = time.perf_counter()
        with ExitStack() as close_on_error:
            close_on_error.callback(self.close)
            self._submit(self._accumulation + self._prefetch)
            if not self._steps:
                raise StopIteration
            work = self._steps.popleft()
            self._num_pending -= self._accumulation
            micro_batches = self._wait(work)
            close_on_error.pop_all()
        wait_s = time.perf_counter() - start_s
        step, self._next_step = self._next_step, self._next_step + 1
        # (A, W, P) with empty positions -> (K,)
        bins = work.dealt[work.dealt != EMPTY]
        return StepBatch(
            step=step,
            micro_batches=micro_batches,
            num_targets=int(self._index.num_targets[bins].sum(dtype=np.int64)),
            num_tokens=int(self._index.num_tokens[bins].sum(dtype=np.int64)),
            max_tokens=work.dealt.size * self._index.max_length,
            num_samples=int(self._index.num_samples[bins].sum(dtype=np.int64)),
            efficiency=self._order.efficiency(work.dealt),
            bins=tuple(bins.tolist()),
            data_wait_s=wait_s,
        )

    def close(self) -> None:
        """End the stream: stop the threads and drop what they prepared. Closing twice is allowed.

        Call it from the thread that takes the steps; another thread waiting in ``next`` would wait forever.
        """
        self._is_closed = True
        self._reader.close()
        self._steps.clear()
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    def __enter__(self) -> BinStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _submit(self, num_micro_steps: int) -> None:
        """Queue micro-steps until so many are pending: those of the step to hand out next, and prefetched ones."""
        if self._is_closed:
            return
        if self._workers is None:
            self._workers = Workers(self._num_threads, self._builder)
            # A stream that is dropped without being closed must not leave threads behind.
            weakref.finalize(self, self._workers.stop).atexit = False
        for work, position in itertools.islice(self._plan, num_micro_steps - self._num_pending):
            if position == 0:
                self._steps.append(work)
            self._workers.submit(work, position)
            self._num_pending += 1

    def _wait(self, work: StepWork) -> tuple[MicroBatch, ...]:
        """Wait for the micro-batches of a step."""
        try:
            return work.wait(self._read_timeout_s)
        except Stalled as stalled:
            locations = "; ".join(str(self._index.locate(bin_id)) for bin_id in stalled.bins)
            raise ShardError(
                f"{locations}: not read within {self._read_timeout_s:g} s. Check that the file system responds, or "
                "raise --read_timeout_s, then resume."
            ) from None


def _micro_steps(steps: Iterable[NDArray[np.int64]], rank: int) -> Iterator[tuple[StepWork, int]]:
    """Bins (A, W, P) of every step -> its A micro-steps of a rank, one after the other."""
    for dealt in steps:
        bins_of_rank: list[list[int]] = dealt[:, rank].tolist()
        work = StepWork(dealt, [tuple(bin_id for bin_id in bins if bin_id != EMPTY) for bins in bins_of_rank])
        for position in range(len(dealt)):
            yield work, position


def _check_order(index: ShardIndex, order: DataOrder) -> None:
    if order.num_bins != index.num_bins:
        raise ConfigError(f"the order is over {order.num_bins} bins, but the shards hold {index.num_bins}.")
    if order.mixture != index.mixture:
        raise ConfigError(
            f"the shards are to be mixed as {index.mixture}, but the order mixes them as {order.mixture}. Create the "
            "order with the mixture of the index."
        )


def _check_settings(
    rank: int, world_size: int, num_threads: int, prefetch: int, read_timeout_s: float, start_step: int
) -> None:
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank is {rank}; allowed: 0 to {world_size - 1}.")
    if min(num_threads, prefetch) < 1 or not 0 < read_timeout_s <= threading.TIMEOUT_MAX or start_step < 0:
        raise ConfigError(
            f"num_threads {num_threads}, prefetch {prefetch}, read_timeout_s {read_timeout_s}, start_step "
            f"{start_step}; allowed: 1 or more threads and micro-batches, a positive time of up to "
            f"{threading.TIMEOUT_MAX:.0f} s, a step from 0 on."
        )
