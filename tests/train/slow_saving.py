"""The trainer, whose checkpoints take minutes: what happens to a run that is stopped while it saves?

Of ``--quick_checkpoints N``, the first N are as quick as usual. All other flags are the trainer's.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

    from train.main import main
    from train.run import saving

    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--quick_checkpoints", type=int, default=0)
    own, flags = parser.parse_known_args()
    delays = iter([0.0] * own.quick_checkpoints)
    random_state = saving._random_state

    def save_slowly(device: object) -> object:
        until = time.monotonic() + next(delays, 300)
        while time.monotonic() < until:
            time.sleep(0.1)
        return random_state(device)  # type: ignore[arg-type]

    saving._random_state = save_slowly  # type: ignore[assignment]
    sys.exit(main(flags))
