"""The trainer, whose checkpoints take minutes: what happens to a run that is stopped while it saves?"""

from __future__ import annotations

import sys
import time
from pathlib import Path


def _save_slowly(*_: object) -> None:
    for _ in range(3000):
        time.sleep(0.1)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])

    from train.main import main
    from train.run import saving

    saving._random_state = _save_slowly  # type: ignore[assignment]
    sys.exit(main(sys.argv[1:]))
