"""One ``vlprep build`` in a fresh process: ``python -m tests.benchmarks.timed_build CORES ARGUMENT...``.

Prints wall seconds and processor seconds of all its processes, from the end of the imports until every process has
ended. It imports nothing else itself, since spawned workers import what their parent's main module imports.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time


def main(cores: int, arguments: list[str]) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    # As vlprep does, before numpy is imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    import prep.build.pipeline
    import prep.build.summary  # noqa: F401 - the command imports it
    from prep.cli import main as vlprep
    from prep.media.sandbox import sandbox

    before = _processor_seconds()
    began = time.perf_counter()
    try:
        vlprep(["build", *arguments])
    except SystemExit as end:
        if end.code:
            raise
    sandbox().close()
    cost = (time.perf_counter() - began, _processor_seconds() - before)
    sys.stdout.write("\n" + json.dumps(cost) + "\n")


def _processor_seconds() -> float:
    """Of this process and of all its children that have ended."""
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
