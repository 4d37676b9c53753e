"""Speed of the resizing kernel compared with Pillow: ``python -m tests.benchmarks.resize``.

Drawn images, at their own size, become planes at the size that a build with default settings gives them. Pillow and the
kernel take turns on the same image in the same process. Each figure is the median of all turns, in processor time, and
contains everything from the decoded image to the planes. Every result is compared with Pillow's.
"""

from __future__ import annotations

import statistics
import time

import click
import numpy as np
from PIL import Image

from prep.media import bicubic
from prep.media.images import frames_shape, image_grid
from schemas.settings import MediaSettings
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.photographs import photograph

SIZES = ((640, 480), (1024, 768), (864, 1152), (1920, 1080), (2304, 1728), (4000, 3000), (300, 200))
"""Width and height. The last one is enlarged if ``min_pixels`` is that of a frame of a video."""


def compare(width: int, height: int, turns: int, settings: MediaSettings) -> tuple[str, float, float]:
    """Size after resizing, and milliseconds of Pillow and of the kernel."""
    grid = image_grid(height, width, min_pixels=settings.video_min_frame_pixels, max_pixels=settings.max_pixels)
    drawn = photograph(np.random.default_rng(width), min(height, 1200), min(width, 1200))
    repeats = (-(-height // drawn.shape[0]), -(-width // drawn.shape[1]), 1)
    image = Image.fromarray(np.ascontiguousarray(np.tile(drawn, repeats)[:height, :width]))
    ours, pillows = np.empty((2, *frames_shape(1, grid)[1:]), dtype=np.uint8)
    times: dict[str, list[float]] = {"pillow": [], "kernel": []}
    for _ in range(turns):
        began = time.process_time()
        bicubic._resize_with_pillow(pillows, image)
        between = time.process_time()
        bicubic.resize_into(ours, image)
        times["pillow"].append(between - began)
        times["kernel"].append(time.process_time() - between)
        if not np.array_equal(ours, pillows):
            raise click.ClickException(f"{width}x{height}: the kernel's planes differ from Pillow's")
    pillow_ms, kernel_ms = (statistics.median(times[name]) * 1e3 for name in ("pillow", "kernel"))
    return f"{pillows.shape[2]}×{pillows.shape[1]}", pillow_ms, kernel_ms


@click.command()
@click.option("--turns", type=click.IntRange(min=1), default=25, show_default=True)
def main(turns: int) -> None:
    """Compare the resizing kernel with Pillow."""
    click.echo(describe_machine("numpy", "pillow"))
    reason = bicubic.fallback_reason()
    if reason is not None:
        raise click.ClickException(reason)
    click.echo(f"\n{'from':<12}{'to':<12}{'Pillow ms':>11}{'kernel ms':>11}{'ratio':>8}")
    for width, height in SIZES:
        size, pillow_ms, kernel_ms = compare(width, height, turns, MediaSettings())
        click.echo(
            f"{f'{width}×{height}':<12}{size:<12}{pillow_ms:>11.2f}{kernel_ms:>11.2f}{kernel_ms / pillow_ms:>8.2f}"
        )


if __name__ == "__main__":
    main()
