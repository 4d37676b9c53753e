"""The trainer, whose checkpoints take minutes after the first N: ``slow_saving.py N …``, with the trainer's flags.

What happens to a run that is stopped while it saves?
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

    from train.main import main
    from train.run import saving

    num_quick, *flags = sys.argv[1:]
    delays = iter([0.0] * int(num_quick))
    random_state = saving._random_state

    def save_slowly(device: object) -> object:
        until = time.monotonic() + next(delays, 300)
        while time.monotonic() < until:
            time.sleep(0.1)
        return random_state(device)  # type: ignore[arg-type]

    saving._random_state = save_slowly  # type: ignore[assignment]
    sys.exit(main(flags))
