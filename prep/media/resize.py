"""The size of a resized image: multiples of 28, a bounded number of pixels, the aspect ratio kept. Pure arithmetic."""

from __future__ import annotations

import math

from schemas.annotation import ReasonCode
from schemas.errors import MediaError
from schemas.qwen import FACTOR, MAX_ASPECT_RATIO


def smart_resize(
    height: int, width: int, *, min_pixels: int, max_pixels: float, keeps_thin: bool = False
) -> tuple[int, int]:
    """Compute height and width after resizing, both multiples of 28.

    The formula is ``smart_resize`` of the Qwen2-VL image processor (transformers 5.23,
    ``image_processing_qwen2_vl.py``), with its rounding of halves to even. ``smart_resize`` of ``qwen_vl_utils`` 0.0.14
    differs for sides of less than 15 pixels: it rounds them up to 28 before it applies the bounds.

    Args:
        height: height of the upright image in pixels.
        width: width, likewise.
        min_pixels: lower bound on the pixels of the result.
        max_pixels: upper bound on the pixels of the result.
        keeps_thin: treat such sides as ``qwen_vl_utils`` does.

    Raises:
        MediaError: ``media_empty`` for a side of 0, ``bad_aspect_ratio`` above 200.
    """
    if min(height, width) < 1:
        raise MediaError(
            ReasonCode.MEDIA_EMPTY, f"the image has {width}x{height} pixels; both sides must be at least 1"
        )
    ratio = max(height, width) / min(height, width)
    if ratio > MAX_ASPECT_RATIO:
        raise MediaError(
            ReasonCode.BAD_ASPECT_RATIO,
            f"an image of {width}x{height} pixels has an aspect ratio of {ratio:.1f}; the limit is {MAX_ASPECT_RATIO}",
        )
    rows, columns = round(height / FACTOR) * FACTOR, round(width / FACTOR) * FACTOR
    if keeps_thin:
        rows, columns = max(rows, FACTOR), max(columns, FACTOR)
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = max(FACTOR, math.floor(height / shrink / FACTOR) * FACTOR)
        columns = max(FACTOR, math.floor(width / shrink / FACTOR) * FACTOR)
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / FACTOR) * FACTOR
        columns = math.ceil(width * grow / FACTOR) * FACTOR
    return rows, columns
