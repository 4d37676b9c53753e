"""Progress on standard error: a live bar on a terminal, a plain line every 30 seconds in a log.

A step that takes less leaves no line in a log. ``TQDM_DISABLE=1`` turns progress off.
"""

from __future__ import annotations

import sys
import threading
from typing import Any, TextIO

from tqdm import tqdm

_TERMINAL_INTERVAL_S = 0.1
_LOG_INTERVAL_S = 30.0
_LOG_FORMAT = " ".join(("{desc}:", "{percentage:3.0f}%", "{n_fmt}/{total_fmt}", "[{elapsed}<{remaining}, {rate_fmt}]"))


class _Bar(tqdm):  # type: ignore[misc]
    """A bar that looks at the clock with every update, and so needs no thread that watches it."""

    monitor_interval = 0


# A lock between threads: the default one is also between processes, and takes multiprocessing to make.
_Bar.set_lock(threading.RLock())


class _Lines:
    """A stream that writes each state of a bar as a line, where tqdm would return to the start of the line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> None:
        """Write a line, if the text holds more than movements of the cursor."""
        if line := text.strip():
            self._stream.write(f"{line}\n")


def progress(desc: str, total: int, unit: str, *, unit_scale: bool = False) -> tqdm[Any]:
    """Create a bar to :meth:`~tqdm.tqdm.update`; a context manager. It is hidden if the total is 0.

    Args:
        desc: name of the step.
        total: number of units.
        unit: name of a unit.
        unit_scale: whether to shorten counts (``17.1M``).
    """
    is_terminal = sys.stderr.isatty()
    interval = _TERMINAL_INTERVAL_S if is_terminal else _LOG_INTERVAL_S
    return _Bar(
        total=total,
        desc=desc,
        unit=unit,
        unit_scale=unit_scale,
        mininterval=interval,
        miniters=1,
        file=sys.stderr if is_terminal else _Lines(sys.stderr),
        delay=0.0 if is_terminal else interval,
        bar_format=None if is_terminal else _LOG_FORMAT,
        # Without this argument, TQDM_DISABLE decides.
        **({} if total else {"disable": True}),
    )
