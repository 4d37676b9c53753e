"""Background reading: keeps the micro-batches of the coming steps ready, so that training waits for no data.

Index and order -> an iterator of :class:`StepBatch`. Threads read and check bins, decompress their pixels and build
the micro-batches; a bounded number is kept ready, in order. Whatever goes wrong in a thread is raised in the training
thread: a bin is never skipped and never replaced.

The state of a stream is the number of its next step; a stream started there goes on exactly, on any number of ranks.

Cost: memory for ``prefetch`` micro-batches and those of the step handed out, used again and again. Reading, hashing and
decompression run outside the interpreter lock; ``docs/benchmarks.md`` has their speed.
"""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, TimeoutError
from contextlib import ExitStack
from dataclasses import dataclass
from queue import SimpleQueue
from types import TracebackType
from typing import NamedTuple, final

import numpy as np
import torch
from numpy.typing import NDArray

from schemas.errors import ConfigError, ShardError
from train.batches.batch import MicroBatch, build_micro_batch
from train.batches.vision_inputs import WINDOW_SIZE
from train.order.dealing import DataOrder
from train.shards.buffers import Buffers, PinnedBuffers, ReusedBuffers
from train.shards.index import ShardIndex
from train.shards.reader import BinReader, ReadSettings

_JOIN_S = 5.0
"""How long ``close`` waits for a thread. One that hangs in a read is left behind: it ends with the process."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepBatch:
    """What one rank needs for one step.

    Attributes:
        step: counted from 0.
        micro_batches: one for each micro-step, for this rank.
        num_targets: targets of the step over all ranks and micro-steps, known from the index without communication:
            what the summed loss is divided by.
        num_tokens: tokens of the step over all ranks and micro-steps.
        max_tokens: what its bins could have held, empty places included.
        num_samples: samples of the step over all ranks and micro-steps.
        efficiency: share of the time of a step that ranks compute rather than wait for the slowest one, by the costs of
            the order: in each micro-step the mean over the ranks against the highest.
        bins: all bins of the step over all ranks.
        data_wait_s: seconds that the training thread waited for this step's data.
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
    """The steps of one rank, in order. Threads start with the first step; ``close`` or leaving a ``with`` ends them."""

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
        read_timeout_s: float = 600.0,
        pin_device: torch.device | None = None,
        read: ReadSettings | None = None,
    ) -> None:
        """Describe a stream; nothing is read yet.

        Args:
            index: the bins.
            order: over the bins of ``index``.
            rank: of this process.
            world_size: number of ranks.
            accumulation: micro-steps of a step.
            per_device: bins of a rank in a micro-step.
            start_step: first step to hand out.
            end_step: the step before which the stream ends, unless the order ends before.
            window_size: ``vision_config.window_size`` of the model, in pixels.
            num_threads: micro-batches built at once. Local bins are read by as many threads, remote ones by as many as
                there are connections.
            prefetch: micro-batches kept ready; of remote shards at least one for each connection.
            read_timeout_s: a micro-batch that takes longer raises instead of hanging.
            pin_device: the CUDA device that the batches will be copied to: they are then in page-locked memory.
            read: when checksums are compared, and how remote shards are read.

        Raises:
            ConfigError: a value that makes no sense, or an order over other bins or in other proportions.
        """
        if order.num_bins != index.num_bins:
            raise ConfigError(f"the order is over {order.num_bins} bins, the shards hold {index.num_bins}.")
        if order.mixture != index.mixture:
            raise ConfigError(
                f"the shards are to be mixed as {index.mixture}, the order mixes them as {order.mixture}. Make the "
                "order with the mixture of the index."
            )
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank is {rank}; allowed: 0 to {world_size - 1}.")
        if min(num_threads, prefetch) < 1 or not 0 < read_timeout_s <= threading.TIMEOUT_MAX or start_step < 0:
            raise ConfigError(
                f"num_threads {num_threads}, prefetch {prefetch}, read_timeout_s {read_timeout_s}, start_step "
                f"{start_step}; allowed: 1 or more threads and micro-batches, a positive time of up to "
                f"{threading.TIMEOUT_MAX:.0f} s, a step from 0 on."
            )
        ends = [end for end in (end_step, order.num_steps) if end is not None]
        self._index = index
        self._order = order
        self._accumulation = accumulation
        self._next_step = start_step
        self._read_timeout_s = read_timeout_s
        buffers: Buffers = ReusedBuffers() if pin_device is None else PinnedBuffers()
        read = read or ReadSettings()
        self._reader = BinReader(index, read, buffers)
        # Threads that wait for a server take no processor; only so many of them build at a time.
        self._num_threads = max(num_threads, read.connections) if self._reader.is_remote else num_threads
        self._prefetch = max(prefetch, self._num_threads) if self._reader.is_remote else prefetch
        self._builder = _Builder(
            reader=self._reader,
            buffers=buffers,
            window_size=window_size,
            pin_device=pin_device,
            at_once=threading.BoundedSemaphore(num_threads),
        )
        self._plan = _micro_steps(
            index,
            order,
            rank=rank,
            world_size=world_size,
            accumulation=accumulation,
            per_device=per_device,
            start=start_step,
            end=min(ends) if ends else None,
        )
        self._under_way: deque[_Pending] = deque()
        self._workers: _Workers | None = None
        self._closed = False

    @property
    def next_step(self) -> int:
        """The step that comes next."""
        return self._next_step

    def state_dict(self) -> dict[str, int]:
        """The whole state of the stream, the same on all ranks: a few integers for :meth:`DataOrder.step_of`."""
        return self._order.state_dict(self._next_step)

    def __iter__(self) -> BinStream:
        return self

    def __next__(self) -> StepBatch:
        """The next step.

        Raises:
            StopIteration: the stream has ended, or was closed.
            ConfigError: the system does not allow so many threads.
            ShardError: a bin could not be read, is damaged, or took too long; the stream is closed.
        """
        began = time.perf_counter()
        with ExitStack() as unless_complete:
            unless_complete.callback(self.close)
            self._fill()
            if not self._under_way:
                raise StopIteration
            places = self._under_way[0].planned.places
            micro_batches = tuple(self._take() for _ in range(self._accumulation))
            self._fill()
            unless_complete.pop_all()
        waited = time.perf_counter() - began
        step, self._next_step = self._next_step, self._next_step + 1
        bins = places[places >= 0]
        return StepBatch(
            step=step,
            micro_batches=micro_batches,
            num_targets=int(self._index.num_targets[bins].sum(dtype=np.int64)),
            num_tokens=int(self._index.num_tokens[bins].sum(dtype=np.int64)),
            max_tokens=places.size * self._index.max_length,
            num_samples=int(self._index.num_samples[bins].sum(dtype=np.int64)),
            efficiency=self._order.efficiency(places),
            bins=tuple(bins.tolist()),
            data_wait_s=waited,
        )

    def close(self) -> None:
        """Stop the threads and drop what they prepared. The stream has ended then; closing twice does no harm.

        It is for the thread that takes the steps: one that waits in ``next`` meanwhile would wait in vain.
        """
        self._closed = True
        self._reader.close()
        self._under_way.clear()
        if self._workers is not None:
            self._workers.close(_JOIN_S)
            self._workers = None

    def __enter__(self) -> BinStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _fill(self) -> None:
        """Give the threads work until ``prefetch`` micro-batches are under way."""
        if self._closed:
            return
        if self._workers is None:
            self._workers = _Workers(self._num_threads, self._builder)
            # A stream that is dropped instead of closed leaves no threads behind either.
            weakref.finalize(self, self._workers.dismiss).atexit = False
        while len(self._under_way) < self._prefetch and (planned := next(self._plan, None)) is not None:
            self._under_way.append(_Pending(planned, self._workers.submit(planned)))

    def _take(self) -> MicroBatch:
        """Wait for the next micro-batch; another one takes its place under way."""
        self._fill()
        planned, batch = self._under_way.popleft()
        try:
            return batch.result(timeout=self._read_timeout_s)
        except TimeoutError:
            if batch.done():  # it was the thread's own, or it finished just now
                return batch.result()
            places = "; ".join(str(self._index.locate(number)) for number in planned.bins)
            raise ShardError(
                f"{places}: not read within {self._read_timeout_s:g} s. See that the file system answers, or raise "
                "--read_timeout_s, then resume."
            ) from None


class _Planned(NamedTuple):
    """A micro-step of this rank: all places (A, W, P) of its step, its own bins, and the most targets of any rank."""

    places: NDArray[np.int64]
    bins: tuple[int, ...]
    most_targets: int


def _micro_steps(
    index: ShardIndex,
    order: DataOrder,
    *,
    rank: int,
    world_size: int,
    accumulation: int,
    per_device: int,
    start: int,
    end: int | None,
) -> Iterator[_Planned]:
    for step in itertools.count(start) if end is None else range(start, end):
        places = order.bins_of_step(step, world_size=world_size, accumulation=accumulation, per_device=per_device)
        num_targets = np.where(places >= 0, index.num_targets[places], 0).sum(axis=2, dtype=np.int64)
        for mine, most in zip(places[:, rank], num_targets.max(axis=1).tolist()):
            yield _Planned(places, tuple(mine[mine >= 0].tolist()), most)


class _Pending(NamedTuple):
    """A micro-step that a thread works at, or has finished."""

    planned: _Planned
    batch: Future[MicroBatch]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Builder:
    """Micro-step -> micro-batch. It knows no stream: what threads work or fail at keeps no dropped stream alive."""

    reader: BinReader
    buffers: Buffers
    window_size: int
    pin_device: torch.device | None
    at_once: threading.BoundedSemaphore

    def build(self, planned: _Planned) -> MicroBatch:
        if self.pin_device is not None:
            torch.cuda.set_device(self.pin_device)  # pinning would otherwise open a context on the first device
        loaded = [self.reader.read(number) for number in planned.bins]
        with self.at_once:
            batch = build_micro_batch(
                [one.bin for one in loaded],
                numbers=planned.bins,
                where=[str(one.location) for one in loaded],
                most_targets=planned.most_targets,
                window_size=self.window_size,
                memory=[one.buffer for one in loaded],
                buffers=self.buffers,
            )
            # Planes are page-locked already; this copies the small tensors.
            return batch if self.pin_device is None else batch.pin_memory()


class _Workers:
    """Daemon threads, so that one which hangs in a read cannot keep the program from ending."""

    def __init__(self, count: int, builder: _Builder) -> None:
        self._tasks: SimpleQueue[tuple[Future[MicroBatch], _Planned] | None] = SimpleQueue()
        self._builder = builder
        self._dismissed = False
        self._threads: list[threading.Thread] = []
        try:
            for number in range(count):
                thread = threading.Thread(target=self._run, name=f"bin-stream-{number}", daemon=True)
                thread.start()
                self._threads.append(thread)
        except RuntimeError as error:
            self.close(_JOIN_S)
            raise ConfigError(
                f"the system allows {len(self._threads)} of {count} threads ({error}). Lower --dataloader_num_workers "
                "or --read_connections."
            ) from None

    def submit(self, planned: _Planned) -> Future[MicroBatch]:
        """Let a thread build the micro-batch of a micro-step."""
        future: Future[MicroBatch] = Future()
        self._tasks.put((future, planned))
        return future

    def close(self, timeout_s: float) -> None:
        """End the threads once they are done with what they work at; work that waits is passed over."""
        self.dismiss()
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def dismiss(self) -> None:
        """Let the threads end by themselves, once they are done with what they work at.

        Whatever runs may be interrupted by this: it waits for nothing. So it does not stop the reader, which has a
        lock; a thread that waits for a server goes on until its patience ends.
        """
        self._dismissed = True
        for _ in self._threads:
            self._tasks.put(None)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None and not self._dismissed:
            future, planned = task
            try:
                future.set_result(self._builder.build(planned))
            except BaseException as error:  # noqa: BLE001 - whatever it is, the training thread raises it
                future.set_exception(error)
            del task, future, planned  # an idle thread holds no batch
