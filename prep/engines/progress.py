"""Progress bars on standard error: moving on a terminal, a line now and then in a log.

A log file keeps every state of a bar, so there a bar shows itself twice a minute. ``TQDM_DISABLE=1`` turns bars off.
"""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

_TERMINAL_INTERVAL_S = 0.1
_LOG_INTERVAL_S = 30.0
_MONITOR_INTERVAL_S = 10.0


def progress(desc: str, total: int, unit: str, *, unit_scale: bool = False) -> tqdm[Any]:
    """A bar to :meth:`~tqdm.tqdm.update`; a context manager. Without anything to do it is not shown.

    Args:
        desc: what is being done.
        total: units in all.
        unit: what is counted.
        unit_scale: whether counts are shortened (``17.1M``).
    """
    interval = _TERMINAL_INTERVAL_S if sys.stderr.isatty() else _LOG_INTERVAL_S
    return tqdm(
        total=total,
        desc=desc,
        unit=unit,
        unit_scale=unit_scale,
        mininterval=interval,
        # After so long tqdm's monitor thread shows a bar, whatever mininterval is.
        maxinterval=max(interval, _MONITOR_INTERVAL_S),
        # Unless given, this is left to TQDM_DISABLE.
        **({} if total else {"disable": True}),
    )
