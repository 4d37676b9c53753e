"""Stopping on request: SIGTERM or SIGUSR1 to any rank -> all ranks stop after the same step.

Schedulers send such a signal some minutes before they reclaim the machines. The run then saves a checkpoint and exits
with :data:`REQUEUE_EXIT_CODE`. The same command resumes it.

Cost: the ranks exchange one integer per step.
"""

from __future__ import annotations

import signal
import time
from types import FrameType, TracebackType
from typing import Any

import torch

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

REQUEUE_EXIT_CODE = 85
"""Exit code of a run that was stopped on request and can be resumed. It is ERESTART of Linux, and the code that
HTCondor's manual uses for this purpose (``checkpoint_exit_code``). Neither shells (126 and above) nor this program
(0 to 2) use it for anything else."""

SAME_REQUEST_S = 5.0
"""A signal repeated within this many seconds is the same request: a process group, a container or a job is signalled as
a whole, and a launcher inside it forwards the signal to its ranks once more."""


class StopRequest:
    """Listens for the signals inside a ``with`` block, in the main thread. A second request has its default effect."""

    def __init__(self) -> None:
        self._received_at: float | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for signum in SIGNALS:
            self._previous[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def is_agreed(self, device: torch.device) -> bool:
        """Whether any rank has received a request; the same answer on all ranks. Collective."""
        received = torch.tensor([self._received_at is not None], dtype=torch.int32, device=device)
        torch.distributed.all_reduce(received, op=torch.distributed.ReduceOp.MAX)
        return bool(received.item())

    def _note(self, signum: int, frame: FrameType | None) -> None:
        # No logging here: the signal may have interrupted a write.
        now = time.monotonic()
        if self._received_at is None:
            self._received_at = now
        elif now - self._received_at > SAME_REQUEST_S:
            self._restore()
            signal.raise_signal(signum)

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()
