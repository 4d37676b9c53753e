"""The threads that build micro-batches: the bins of a step (:class:`StepWork`) -> its :class:`MicroBatch` objects.

Threads read and check bins, decompress their pixels and build the batch. Whatever goes wrong in a thread is raised in
the training thread.

Cost: reading, hashing and decompression run outside the interpreter lock; ``docs/benchmarks.md`` has their speed. The
training thread is woken once per step, since waking a thread takes as long as building a tenth of a micro-batch.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
import torch
from numpy.typing import NDArray

from schemas.errors import ConfigError
from train.batches.batch import MicroBatch, build_micro_batch
from train.shards.buffers import Buffers
from train.shards.reader import BinReader

JOIN_TIMEOUT_S = 5.0
"""How long closing waits for a thread. A thread that hangs in a read is abandoned and ends with the process."""


class StepWork:
    """The micro-batches of a step for one rank, while threads build them.

    Attributes:
        dealt: (A, W, P) int64, the bins of the step as the order deals them to all ranks and micro-steps.
        bins: bins of this rank in each micro-step.
    """

    def __init__(self, dealt: NDArray[np.int64], bins: Sequence[tuple[int, ...]]) -> None:
        self.dealt = dealt
        self.bins = tuple(bins)
        self._batches: list[MicroBatch | None] = [None] * len(self.bins)
        self._built_s = [0.0] * len(self.bins)
        self._num_left = len(self.bins)
        self._error: BaseException | None = None
        self._lock = threading.Lock()
        self._done_event = threading.Event()

    def set_batch(self, position: int, batch: MicroBatch) -> None:
        """Hand in the batch of a micro-step."""
        with self._lock:
            self._batches[position], self._built_s[position] = batch, time.monotonic()
            self._num_left -= 1
            if not self._num_left:
                self._done_event.set()

    def set_error(self, error: BaseException) -> None:
        """Hand in why a micro-step has no batch. The first error counts."""
        with self._lock:
            self._error = self._error or error
            self._done_event.set()

    def is_done(self) -> bool:
        """Whether all batches, or an error, have been handed in."""
        return self._done_event.is_set()

    def wait(self, timeout_s: float) -> tuple[MicroBatch, ...]:
        """Return the micro-batches, once: they are not kept here.

        Args:
            timeout_s: how long to wait for the next micro-batch in order.

        Raises:
            Stalled: a micro-batch takes longer.
            BaseException: what was handed in as an error.
        """
        start_s = time.monotonic()
        deadline_s = start_s + timeout_s
        while not self._done_event.wait(max(0.0, deadline_s - time.monotonic())):
            with self._lock:
                first = next((position for position, batch in enumerate(self._batches) if batch is None), None)
                if first is None:  # the last one came just now
                    continue
                deadline_s = max([start_s, *self._built_s[:first]]) + timeout_s
            if deadline_s <= time.monotonic():
                raise Stalled(self.bins[first])
        if self._error is not None:
            try:
                raise self._error
            finally:
                del self  # the traceback of the error would refer to it
        batches, self._batches = self._batches, []
        return tuple(batch for batch in batches if batch is not None)


class Stalled(Exception):
    """A micro-batch of these bins was not built in time."""

    def __init__(self, bins: tuple[int, ...]) -> None:
        super().__init__(bins)
        self.bins = bins


@dataclass(frozen=True, kw_only=True, slots=True)
class Builder:
    """Builds the micro-batch of a micro-step.

    It holds no reference to a stream, so that pending work and exceptions do not keep a dropped stream alive.

    Attributes:
        reader: reads and checks bins.
        buffers: source of memory for planes.
        window_size: ``vision_config.window_size`` of the model, in pixels.
        pin_device: CUDA device for which batches are pinned; None for ordinary memory.
        build_slots: bounds how many threads build at a time, where more of them wait for a server.
    """

    reader: BinReader
    buffers: Buffers
    window_size: int
    pin_device: torch.device | None
    build_slots: AbstractContextManager[object]

    def build(self, bins: tuple[int, ...]) -> MicroBatch:
        """Read the bins of a micro-step and build their batch.

        Raises:
            ShardError: a bin cannot be read or is damaged.
        """
        if self.pin_device is not None:
            torch.cuda.set_device(self.pin_device)  # pinning would otherwise create a context on the first device
        loaded = [self.reader.read(bin_id) for bin_id in bins]
        with self.build_slots:
            batch = build_micro_batch(
                [loaded_bin.bin for loaded_bin in loaded],
                bin_ids=bins,
                where=[loaded_bin.location for loaded_bin in loaded],
                window_size=self.window_size,
                memory=[loaded_bin.buffer for loaded_bin in loaded],
                buffers=self.buffers,
            )
            # Planes are page-locked already; this copies the small tensors.
            return batch if self.pin_device is None else batch.pin_memory()


class Workers:
    """A pool of daemon threads. Unlike those of an executor, one that hangs in a read does not block process exit.

    Raises:
        ConfigError: the system does not allow that many threads.
    """

    def __init__(self, num_threads: int, builder: Builder) -> None:
        self._tasks: SimpleQueue[tuple[StepWork, int] | None] = SimpleQueue()
        self._builder = builder
        self._is_stopping = False
        self._threads: list[threading.Thread] = []
        try:
            for index in range(num_threads):
                thread = threading.Thread(target=self._run, name=f"bin-stream-{index}", daemon=True)
                thread.start()
                self._threads.append(thread)
        except RuntimeError as error:
            self.close()
            raise ConfigError(
                f"the system allows {len(self._threads)} of {num_threads} threads ({error}). Lower "
                "--dataloader_num_workers or --read_connections."
            ) from None

    def submit(self, work: StepWork, position: int) -> None:
        """Queue a micro-step for a thread to build."""
        self._tasks.put((work, position))

    def close(self) -> None:
        """Stop the threads once they finish their current task, and wait for them; queued tasks are dropped."""
        self.stop()
        deadline = time.monotonic() + JOIN_TIMEOUT_S
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))

    def stop(self) -> None:
        """Ask the threads to end once they finish their current task, without waiting for them.

        A finalizer calls this, possibly in the middle of any other code, so it must not take a lock. Therefore it does
        not stop the reader, and a thread that waits for a server continues until its retries end.
        """
        self._is_stopping = True
        for _ in self._threads:
            self._tasks.put(None)

    def _run(self) -> None:
        while (task := self._tasks.get()) is not None and not self._is_stopping:
            work, position = task
            try:
                work.set_batch(position, self._builder.build(work.bins[position]))
            except BaseException as error:  # noqa: BLE001 - any error is raised in the training thread
                work.set_error(error)
            del task, work  # an idle thread must not hold a batch
