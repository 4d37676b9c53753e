"""A launcher like `deepspeed`, with two ranks that report each Ctrl-C and end at the second one. Nothing is trained.

Like the real one, it notices the end of its ranks late, and a Ctrl-C until then ends it with a traceback.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def _launch() -> int:
    environments = ({**os.environ, "FAKE_RANK": str(rank), "CROSS_RANK": "0", "LOCAL_SIZE": "2"} for rank in range(2))
    ranks = [subprocess.Popen([sys.executable, __file__], env=environment) for environment in environments]
    code = max(rank.wait() % 256 for rank in ranks)
    time.sleep(0.5)
    return code


def _be_rank(rank: int) -> int:
    from train.run.terminal import keys_to_ranks

    presses = 0

    def count(*_: object) -> None:
        nonlocal presses
        presses += 1
        _say(f"rank {rank}: {presses} of 2")

    with keys_to_ranks(rank):
        signal.signal(signal.SIGINT, count)
        _say(f"rank {rank} = {os.getpid()}")
        while presses < 2:
            time.sleep(0.01)
    return 85


def _say(text: str) -> None:
    os.write(1, f"<{text}>\n".encode())


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    sys.exit(_be_rank(int(os.environ["FAKE_RANK"])) if "FAKE_RANK" in os.environ else _launch())
