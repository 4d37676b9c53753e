"""Stand-ins for the work of the GPU benchmark, which fail or never end. They import nothing large."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from multiprocessing.connection import Connection

PARTS = ("data", "first", "second", "third")


def hang(sender: Connection, over: frozenset[str]) -> None:
    """Do two parts, start a process, and stop in the middle of the third part."""
    started = subprocess.Popen(["sleep", "600"])
    sender.send(("parts", "\n".join(PARTS)))
    for part in PARTS[:2]:
        _do(sender, part)
    sender.send(("begin", "second"))
    for turn in (1, 2):
        sender.send(("partial", f"turns of second: {turn}"))
    sender.send(("line", f"hanging beside {started.pid}"))
    time.sleep(600)


def crash_in(part: str, sender: Connection, over: frozenset[str]) -> None:
    """Be killed in one of the parts; do the others, but for the last, for which there is no time."""
    sender.send(("parts", "\n".join(PARTS)))
    for name in PARTS[:3]:
        if name == part and part not in over:
            sender.send(("begin", part))
            os.kill(os.getpid(), signal.SIGKILL)
        if name not in over:
            _do(sender, name)
    sender.send(("end", ""))


def _do(sender: Connection, part: str) -> None:
    sender.send(("begin", part))
    sender.send(("partial", f"figures of {part}"))
    sender.send(("done", part))
