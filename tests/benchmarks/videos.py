"""Videos as a camera records them: a view that moves over an image with the statistics of photographs.

A seed -> MP4 files (H.264, 640×360, 20 s at 24 frames per second), all identical.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import av
import numpy as np

from tests.benchmarks.photographs import photograph

WIDTH, HEIGHT = 640, 360
_SECONDS, _RATE = 20, 24


def write_videos(folder: Path, num_videos: int, seed: int = 0) -> list[Path]:
    """Write ``num_videos`` videos and return their paths in order."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{index}.mp4" for index in range(num_videos)]
    image = photograph(np.random.default_rng(seed), 2 * HEIGHT, 2 * WIDTH)
    with av.open(str(paths[0]), "w") as container:
        stream = container.add_stream("libx264", rate=_RATE)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for at in range(_SECONDS * _RATE):
            view = np.ascontiguousarray(image[at % HEIGHT : at % HEIGHT + HEIGHT, at : at + WIDTH])
            for packet in stream.encode(av.VideoFrame.from_ndarray(view, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    for path in paths[1:]:
        shutil.copyfile(paths[0], path)
    return paths
