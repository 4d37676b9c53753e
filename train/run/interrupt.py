"""A run that is told to stop: SIGTERM or SIGUSR1 to any rank -> all ranks stop at the border of the same step.

Schedulers send such a signal some minutes before they take the machines away. The run then saves a checkpoint and ends
with :data:`REQUEUE_EXIT_CODE`; the same command goes on from there.

Cost: one number that the ranks exchange at the end of each step.
"""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType
from typing import Any

import torch

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

REQUEUE_EXIT_CODE = 85
"""Exit code of a run that was told to stop and can go on. It is ERESTART of Linux, and the code that HTCondor's manual
takes for it (``checkpoint_exit_code``); shells (from 126 on) and this program (0 to 2) mean nothing else by it."""

SAME_REQUEST_S = 5.0
"""A signal that comes again within this time is the same request on another way: a process group, a container or a job
is told to stop as a whole, and a launcher among it tells its ranks once more."""


class StopRequest:
    """Listens for the signals inside a ``with`` block, in the main thread. A second request has its usual effect."""

    def __init__(self) -> None:
        self._received_at: float | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def is_agreed(self, device: torch.device) -> bool:
        """Whether any rank was told to stop. All ranks call this together and get the same answer."""
        told = torch.tensor([self._received_at is not None], dtype=torch.int32, device=device)
        torch.distributed.all_reduce(told, op=torch.distributed.ReduceOp.MAX)
        return bool(told.item())

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Nothing is written here: the signal may have come in the middle of writing.
        now = time.monotonic()
        if self._received_at is None:
            self._received_at = now
        elif now - self._received_at > SAME_REQUEST_S:
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
