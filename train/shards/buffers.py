"""Memory that is used again: where bins are read to, and planes decompressed to.

A number of bytes -> a uint8 tensor of that size. Fresh memory costs as much as reading: the kernel clears every page
at its first touch. So a buffer goes back, once nothing refers to it or to a view of it any more, and serves again.

Cost: a buffer is handed out in microseconds. Sizes are rounded up to powers of two; pages that no bin touches are
never there.
"""

from __future__ import annotations

import mmap
import weakref
from collections import deque
from contextlib import suppress
from typing import Protocol

import numpy as np
import torch

_SMALLEST = 1 << 16
MAX_FREE_BYTES = 1 << 30
"""More unused memory than this is given back to the system."""


class Buffers(Protocol):
    """Where buffers come from."""

    def take(self, num_bytes: int) -> torch.Tensor:
        """A buffer, (num_bytes,) uint8 with any contents; it is the caller's while anything refers to it."""


class ReusedBuffers:
    """Ordinary memory, for training on the CPU. Threads may share an instance."""

    def __init__(self, max_free_bytes: int = MAX_FREE_BYTES) -> None:
        self._max_free_bytes = max_free_bytes
        self._free: dict[int, deque[mmap.mmap]] = {}

    @property
    def free_bytes(self) -> int:
        """Bytes that wait to be used again."""
        return sum(capacity * len(waiting) for capacity, waiting in list(self._free.items()))

    def take(self, num_bytes: int) -> torch.Tensor:
        """A buffer, (num_bytes,) uint8 with any contents; it is the caller's while anything refers to it."""
        capacity = max(_SMALLEST, 1 << max(0, num_bytes - 1).bit_length())
        free = self._free.setdefault(capacity, deque())
        try:
            memory = free.pop()
        except IndexError:
            memory = mmap.mmap(-1, capacity, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with suppress(OSError):  # a kernel without huge pages
                memory.madvise(mmap.MADV_HUGEPAGE)
        # All views refer to this array, which owns nothing: when it dies, the memory is free.
        lease = np.frombuffer(memory, dtype=np.uint8, count=num_bytes)
        weakref.finalize(lease, self._give_back, memory, capacity).atexit = False
        return torch.from_numpy(lease)

    def _give_back(self, memory: mmap.mmap, capacity: int) -> None:
        # Runs wherever the last reference goes, in the middle of anything: so it takes no lock.
        if self.free_bytes + capacity <= self._max_free_bytes:
            self._free[capacity].append(memory)


class PinnedBuffers:
    """Page-locked memory, from which copies to a CUDA device run beside the computation.

    It is that of torch's own caching allocator, which uses a block again only when no copy from it is under way: so
    what is copied must be a tensor of this memory, not one made anew over the same bytes.
    """

    def take(self, num_bytes: int) -> torch.Tensor:
        """A buffer, (num_bytes,) uint8 with any contents; it is the caller's while anything refers to it."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
