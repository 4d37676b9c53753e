"""Counts the bytes of all tensors that are alive, operation by operation, on any device; fake ones too."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """While active, follows the storages that operations create, until they are freed.

    Attributes:
        now: bytes alive.
        peak: most bytes alive after any operation. What a kernel allocates for itself is not seen.
    """

    def __init__(self, excluded: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._excluded = {tensor.untyped_storage()._cdata for tensor in excluded}
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                self._follow(tensor.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address not in self._alive and address not in self._excluded:
            self._alive[address] = storage.nbytes()
            self.now += storage.nbytes()
            weakref.finalize(storage, self._forget, address)

    def _forget(self, address: int) -> None:
        self.now -= self._alive.pop(address)
