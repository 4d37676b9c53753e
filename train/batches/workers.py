"""The threads that build micro-batches: a :class:`MicroStep` -> a future of its :class:`MicroBatch`.

Threads read and check bins, decompress their pixels and build the batch. Whatever goes wrong in a thread is raised by
the future, hence in the training thread.

Cost: reading, hashing and decompression run outside the interpreter lock; ``docs/benchmarks.md`` has their speed.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from queue import SimpleQueue
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from schemas.errors import ConfigError
from train.batches.batch import MicroBatch, build_micro_batch
from train.shards.buffers import Buffers
from train.shards.reader import BinReader

JOIN_TIMEOUT_S = 5.0
"""How long closing waits for a thread. A thread that hangs in a read is abandoned and ends with the process."""


class MicroStep(NamedTuple):
    """A micro-step of one rank.

    Attributes:
        dealt: (A, W, P) int64, the bins of the step as the order deals them to all ranks and micro-steps.
        bins: bins of this rank.
    """

    dealt: NDArray[np.int64]
    bins: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Builder:
    """Builds the micro-batch of a micro-step.

    It holds no reference to a stream, so that pending work and exceptions do not keep a dropped stream alive.

    Attributes:
        reader: reads and checks bins.
        buffers: source of memory for planes.
        window_size: ``vision_config.window_size`` of the model, in pixels.
        pin_device: CUDA device for which batches are pinned; None for ordinary memory.
        build_slots: bounds how many threads build at a time. Threads that wait for a server use no processor, so there
            can be more of them.
    """

    reader: BinReader
    buffers: Buffers
    window_size: int
    pin_device: torch.device | None
    build_slots: threading.BoundedSemaphore

    def build(self, micro_step: MicroStep) -> MicroBatch:
        """Read the bins and build their batch.

        Raises:
            ShardError: a bin cannot be read or is damaged.
        """
        if self.pin_device is not None:
            torch.cuda.set_device(self.pin_device)  # pinning would otherwise create a context on the first device
        loaded = [self.reader.read(bin_id) for bin_id in micro_step.bins]
        with self.build_slots:
            batch = build_micro_batch(
                [loaded_bin.bin for loaded_bin in loaded],
                bin_ids=micro_step.bins,
                where=[str(loaded_bin.location) for loaded_bin in loaded],
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
        self._tasks: SimpleQueue[tuple[Future[MicroBatch], MicroStep] | None] = SimpleQueue()
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

    def submit(self, micro_step: MicroStep) -> Future[MicroBatch]:
        """Queue a micro-step for a thread to build."""
        future: Future[MicroBatch] = Future()
        self._tasks.put((future, micro_step))
        return future

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
            future, micro_step = task
            try:
                future.set_result(self._builder.build(micro_step))
            except BaseException as error:  # noqa: BLE001 - any error is raised in the training thread
                future.set_exception(error)
            del task, future, micro_step  # an idle thread must not hold a batch
