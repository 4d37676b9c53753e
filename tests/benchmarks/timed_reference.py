"""The reference on some images, in fresh processes: ``python -m tests.benchmarks.timed_reference CORES LIST``.

``LIST`` is a JSON file with the paths of the images. One process per core opens each image and runs the Pillow image
processor of Qwen2-VL. Prints wall seconds and processor seconds, measured after the imports and a first round over a
few images.
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
"""Images per task of a process."""


def _process(paths: Sequence[str]) -> float:
    """Run the reference over some images and return the processor seconds."""
    from PIL import Image
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(size=SIZE)
    began = time.process_time()
    for path in paths:
        with Image.open(path) as image:
            processor(images=image, return_tensors="np")
    return time.process_time() - began


def main(cores: int, paths: Sequence[str]) -> None:
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    with ProcessPoolExecutor(cores, mp_context=multiprocessing.get_context("spawn")) as pool:
        # One task per process, so that each imports what it needs.
        list(pool.map(_process, [paths[:_RUN]] * cores))
        began = time.perf_counter()
        cpu_s = sum(pool.map(_process, [paths[start : start + _RUN] for start in range(0, len(paths), _RUN)]))
        cost = (time.perf_counter() - began, cpu_s)
    sys.stdout.write("\n" + json.dumps(cost) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
