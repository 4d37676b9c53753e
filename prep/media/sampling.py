"""Which frames of a video are sampled. Pure arithmetic.

Two ways: one frame per ``base_interval`` seconds, as the upstream fine-tuning code does, or ``fps`` frames a second, as
``qwen_vl_utils`` does at inference. A video whose record gives ``fps``, ``nframes``, ``min_frames`` or ``max_frames``
is always sampled in the second way.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from prep.media.item import ItemSettings
from schemas.annotation import ReasonCode
from schemas.errors import MediaError
from schemas.qwen import TEMPORAL_PATCH_SIZE
from schemas.settings import MediaSettings


def sampled_frames(num_frames: int, fps: float, settings: MediaSettings, item: ItemSettings) -> tuple[range, list[int]]:
    """Choose the frames of a video.

    Args:
        num_frames: frames of the video.
        fps: its frames a second.
        settings: of the build.
        item: of the video.

    Returns:
        The frames between ``video_start`` and ``video_end``, and those of them that are sampled, ascending.

    Raises:
        MediaError: ``bad_field``: the range is empty, or has too few frames.
    """
    frames = frame_range(num_frames, fps, item)
    if item.sets_rate or settings.video_sampling == "fps":
        count = frame_count(len(frames), fps, settings, item)
        return frames, torch_linspace(frames[0], frames[-1], count).round().astype(np.int64).tolist()
    indices = interval_frames(len(frames), len(frames) / fps, settings)
    return frames, [frames[index] for index in indices]


def interval_frames(total: int, duration_s: float, settings: MediaSettings) -> list[int]:
    """One frame per ``base_interval`` seconds, within bounds, spread evenly over the video.

    ``unique(linspace(0, total - 1, n, dtype=int))`` with ``n = clamp(round(duration / base_interval), min, max)``, as
    in the upstream fine-tuning code. A video with fewer than ``n`` frames yields each frame once.
    """
    count = min(max(round(duration_s / settings.base_interval), settings.video_min_frames), settings.video_max_frames)
    indices: list[int] = np.unique(np.linspace(0, total - 1, count, dtype=int)).tolist()
    return indices


def frame_range(num_frames: int, fps: float, item: ItemSettings) -> range:
    """The frames between ``video_start`` and ``video_end``.

    As ``calculate_video_frame_range`` of ``qwen_vl_utils``: both ends are included, the start is rounded up, the end
    down, and both are clamped to the video.

    Raises:
        MediaError: ``bad_field``: fewer than two frames lie between them.
    """
    if item.video_start is None and item.video_end is None:
        return range(num_frames)
    duration_s = num_frames / fps
    first, last = 0, num_frames - 1
    if item.video_start is not None:
        first = math.ceil(max(0.0, min(item.video_start, duration_s)) * fps)
    if item.video_end is not None:
        last = min(math.floor(max(0.0, min(item.video_end, duration_s)) * fps), last)
    if first >= last:
        raise MediaError(
            ReasonCode.BAD_FIELD,
            f"video_start {item.video_start} and video_end {item.video_end} have fewer than two frames between them; "
            f"the video lasts {duration_s:.2f} s at {fps:g} frames a second",
        )
    return range(first, last + 1)


def frame_count(total: int, fps: float, settings: MediaSettings, item: ItemSettings) -> int:
    """How many frames to sample at a frame rate: an even number.

    As ``smart_nframes`` of ``qwen_vl_utils``, with ``fps``, ``fps_min_frames`` and ``fps_max_frames`` of the build in
    place of its constants.

    Args:
        total: frames to choose from.
        fps: of the video.
        settings: of the build.
        item: of the video.

    Raises:
        MediaError: ``bad_field``: the settings request more frames than there are, or fewer than two.
    """
    step = TEMPORAL_PATCH_SIZE
    if item.nframes is not None:
        count = round(item.nframes / step) * step
    else:
        low = math.ceil((item.min_frames or settings.fps_min_frames) / step) * step
        high = math.floor((item.max_frames or min(settings.fps_max_frames, total)) / step) * step
        at_rate = total / fps * (item.fps or settings.fps)
        count = math.floor(min(max(at_rate, low), high, total) / step) * step
    if not step <= count <= total:
        raise MediaError(
            ReasonCode.BAD_FIELD,
            f"{count} frames would be sampled; allowed: 2 to {total}, the frames of the video (nframes, max_frames; a "
            "video of one frame can only be sampled with --video-sampling interval)",
        )
    return count


def torch_linspace(first: int, last: int, count: int) -> NDArray[np.float32]:
    """``torch.linspace(first, last, count)`` bit for bit, in numpy.

    torch counts from both ends in float32, with one rounding for each product and sum (fused). From some ten thousand
    frames on, that decides which of two neighbours a position is rounded to.

    Returns:
        (count,) float32.
    """
    step = np.float64((np.float32(last) - np.float32(first)) / np.float32(count - 1))
    index = np.arange(count)
    # A product of two float32 is exact in float64, so rounding the sum once is the fused operation.
    upward, downward = first + step * index, last - step * (count - 1 - index)
    return np.where(index < count // 2, upward, downward).astype(np.float32)
