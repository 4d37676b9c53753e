"""Stopping on request: Ctrl-C, SIGTERM or SIGUSR1 to any rank -> all ranks stop after the same step.

Schedulers send such a signal some minutes before they reclaim the machines, and people press Ctrl-C. The run then saves
a checkpoint and exits with :data:`REQUEUE_EXIT_CODE`. The same command resumes it.

One request may reach a rank twice, since launchers pass signals on. If a process group gets SIGINT, `deepspeed` also
sends SIGTERM to its ranks. (In a terminal, Ctrl-C reaches its ranks alone, see :mod:`train.run.terminal`.) `torchrun`
passes on the first Ctrl-C as SIGINT and the second one as SIGTERM. So a copy is recognized by its time and kind, see
:func:`is_copy`.

Python runs handlers of signals only between two of its own instructions, and a main thread that waits for other ranks
or writes a file gets there late. So a thread watches for the second Ctrl-C.

Cost: the ranks exchange one integer per step.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

import torch

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

REQUEUE_EXIT_CODE = 85
"""Exit code of a run that was stopped on request and can be resumed. It is ERESTART of Linux, and the code that
HTCondor's manual uses for this purpose (``checkpoint_exit_code``). Neither shells (126 and above) nor this program
(0 to 2) use it for anything else."""

INTERRUPTED_EXIT_CODE = 130
"""Exit code that shells report for a program ended by Ctrl-C."""

SAME_REQUEST_S = 5.0
"""A signal repeated within this many seconds is the same request: a process group, a container or a job is signalled as
a whole, and a launcher inside it forwards the signal to its ranks once more."""

SAME_KEY_S = 1.0
"""The same for Ctrl-C, which people repeat sooner than schedulers repeat a signal."""

END_AT_ONCE = f"press Ctrl-C again, {SAME_KEY_S:g} s later or more, to end at once"
"""What the screen says about a second Ctrl-C."""

_TORCHRUN_VARIABLE = "TORCHELASTIC_RUN_ID"
"""Set by `torchrun` for its ranks."""


def is_copy(first: int, signum: int, seconds_later: float) -> bool:
    """Whether a signal is the first request once more, passed on by a launcher.

    A Ctrl-C that comes later is a new one. So is SIGTERM from `torchrun` after a Ctrl-C. From `deepspeed`, it is a
    copy.
    """
    is_repeated_key = first == signal.SIGINT and _TORCHRUN_VARIABLE in os.environ
    return seconds_later <= (SAME_KEY_S if signum == signal.SIGINT or is_repeated_key else SAME_REQUEST_S)


class StopRequest:
    """Listens for the signals inside a ``with`` block, in the main thread.

    A second request ends the process: with exit code 130 if one of them was Ctrl-C, else by the effect that the signal
    has by default.
    """

    def __init__(self, *, is_first: bool = True) -> None:
        """Create a listener.

        Args:
            is_first: whether this rank reports on the screen.
        """
        self._is_first = is_first
        self._received: int | None = None
        self._received_at = 0.0
        self._previous: dict[signal.Signals, Any] = {}
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)

    def __enter__(self) -> StopRequest:
        self._arrived, writer = socket.socketpair()
        writer.setblocking(False)
        self._writer = writer
        # The interpreter writes the number of each signal there at once, whatever the main thread does.
        self._previous_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        for signum in SIGNALS:
            self._previous[signum] = signal.signal(signum, self._note)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        signal.set_wakeup_fd(self._previous_fd)
        self._writer.close()
        self._thread.join()
        self._arrived.close()

    def finish(self) -> None:
        """Ignore Ctrl-C from now on, also after the block: the run is over, and its exit code stands."""
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self._previous[signal.SIGINT] = signal.SIG_IGN

    def is_agreed(self, device: torch.device) -> bool:
        """Whether any rank has received a request; the same answer on all ranks. Collective."""
        received = torch.tensor([self._received is not None], dtype=torch.int32, device=device)
        torch.distributed.all_reduce(received, op=torch.distributed.ReduceOp.MAX)
        return bool(received.item())

    def _note(self, signum: int, frame: FrameType | None) -> None:
        """Note the first request. Let the second one end the process, unless the thread handles it."""
        now = time.monotonic()
        if self._received is None:
            self._received, self._received_at = signum, now
        elif signal.SIGINT not in (self._received, signum) and not is_copy(
            self._received, signum, now - self._received_at
        ):
            self._restore()
            signal.raise_signal(signum)

    def _watch(self) -> None:
        """Report the first request when it arrives, and end the process at the second one if one was Ctrl-C."""
        first: tuple[int, float] | None = None
        while arrived := self._arrived.recv(1):
            signum, now = arrived[0], time.monotonic()
            if signum not in SIGNALS:
                continue
            if first is None:
                first = signum, now
                repeat = f"; {END_AT_ONCE}" if signum == signal.SIGINT else ""
                self._print(f"\n{signal.Signals(signum).name}: finishing the step, then saving{repeat}\n")
            elif signal.SIGINT in (first[0], signum) and not is_copy(first[0], signum, now - first[1]):
                self._print("\nstopped at once: rerun the same command to resume from the newest checkpoint\n")
                # An exception would unwind through collectives that other ranks no longer join.
                os._exit(INTERRUPTED_EXIT_CODE)

    def _print(self, text: str) -> None:
        """Write to the screen, past the buffers of Python, which the main thread may be writing to."""
        if self._is_first:
            with suppress(OSError):  # `… | tee`: Ctrl-C has ended the reader
                os.write(2, text.encode())

    def _restore(self) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)
        self._previous.clear()
