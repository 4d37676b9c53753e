"""The reference on some pictures, in fresh processes: ``python -m tests.benchmarks.timed_reference CORES LIST``.

``LIST`` is a JSON file with the paths of the pictures. As many processes as cores open each picture and run the Pillow
image processor of Qwen2-VL, nothing else. Prints wall seconds and seconds of processor time after the imports and a
first round over some pictures.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

SIZE = {"shortest_edge": 16 * 28 * 28, "longest_edge": 576 * 28 * 28}
_RUN = 8
"""Pictures that a process takes at once."""


def _process(paths: Sequence[str]) -> float:
    """Run the reference over some pictures; returns seconds of processor time."""
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(size=SIZE)
    began = time.process_time()
    for path in paths:
        with Image.open(path) as picture:
            processor(images=picture, return_tensors="np")
    return time.process_time() - began


def main(cores: int, paths: Sequence[str]) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    with ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("spawn")) as pool:
        # As many at once as there are processes: each imports what it needs.
        list(pool.map(_process, [paths[:_RUN]] * cores))
        began = time.perf_counter()
        cpu_s = sum(pool.map(_process, [paths[start : start + _RUN] for start in range(0, len(paths), _RUN)]))
        cost = (time.perf_counter() - began, cpu_s)
    sys.stdout.write("\n" + json.dumps(cost) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
