"""Reused memory for the bytes of bins and for decompressed planes.

In: a number of bytes. Out: a uint8 tensor of that size. Fresh memory costs as much as reading, since the kernel clears
every page at its first touch. A buffer is therefore reused once nothing refers to it or to a view of it.

Cost: microseconds per buffer. Sizes are rounded up to powers of two; pages that are never touched take no memory.
"""

from __future__ import annotations

import mmap
import weakref
from collections import defaultdict, deque
from contextlib import suppress
from typing import Protocol

import numpy as np
import torch

_SMALLEST = 1 << 16
MAX_FREE_BYTES = 1 << 30
"""Unused memory beyond this is returned to the system."""


class Buffers(Protocol):
    """A source of buffers."""

    def take(self, num_bytes: int) -> torch.Tensor:
        """A buffer, (num_bytes,) uint8 with arbitrary contents; the caller owns it while anything refers to it."""


class ReusedBuffers:
    """Ordinary memory, for training on the CPU. Threads may share an instance."""

    def __init__(self, max_free_bytes: int = MAX_FREE_BYTES) -> None:
        self._max_free_bytes = max_free_bytes
        self._free: defaultdict[int, deque[mmap.mmap]] = defaultdict(deque)

    @property
    def free_bytes(self) -> int:
        """Bytes of unused buffers."""
        return sum(capacity * len(waiting) for capacity, waiting in list(self._free.items()))

    def take(self, num_bytes: int) -> torch.Tensor:
        """A buffer, (num_bytes,) uint8 with arbitrary contents; the caller owns it while anything refers to it."""
        capacity = max(_SMALLEST, 1 << max(0, num_bytes - 1).bit_length())
        try:
            memory = self._free[capacity].pop()
        except IndexError:
            memory = mmap.mmap(-1, capacity, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with suppress(OSError):  # a kernel without huge pages
                memory.madvise(mmap.MADV_HUGEPAGE)
        # All views refer to this array, which owns no memory: when it is collected, the buffer is free.
        lease = np.frombuffer(memory, dtype=np.uint8, count=num_bytes)
        weakref.finalize(lease, self._give_back, memory, capacity).atexit = False
        return torch.from_numpy(lease)

    def _give_back(self, memory: mmap.mmap, capacity: int) -> None:
        # Runs wherever the last reference disappears, even inside other code, and so must not take a lock.
        if self.free_bytes + capacity <= self._max_free_bytes:
            self._free[capacity].append(memory)


class PinnedBuffers:
    """Page-locked memory, from which copies to a CUDA device overlap with computation.

    It comes from torch's caching allocator, which reuses a block only when no copy from it is in flight. Copies must
    therefore start from a tensor of this memory, not from a new tensor over the same bytes.
    """

    def take(self, num_bytes: int) -> torch.Tensor:
        """A buffer, (num_bytes,) uint8 with arbitrary contents; the caller owns it while anything refers to it."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
