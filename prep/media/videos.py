"""Videos: which frames to sample, at what size, and their pixels.

Input: a source. Output: a :class:`VideoPlan` (probe), or frames (2·t, 3, H, W) uint8 (decode). A probe decodes one
frame to learn its size. A temporal step has two frames, so an odd count repeats the last frame.

decord is tried first. When a backend fails, the next one is tried. The ledger records which backend served.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prep.media.backends import BACKENDS, Video
from prep.media.images import Allocate, frames_shape, image_grid, new_frames, resize_into
from prep.media.source import MediaSource
from schemas.annotation import ReasonCode
from schemas.errors import MediaError
from schemas.qwen import TEMPORAL_PATCH_SIZE, Grid
from schemas.settings import MediaSettings

MAX_DURATION_S = 7 * 24 * 3600
"""Longest accepted duration. A longer one means a damaged header, and its temporal positions could overflow int32."""

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoPlan:
    """The frames that are sampled from a video, and their size.

    Attributes:
        grid: patches (t, h, w). ``2 * grid.t`` frames are stored.
        indices: frames to decode, ascending. One fewer than stored if the last frame is repeated.
        height: height of a frame before resizing, in pixels.
        width: width, likewise.
        second_per_grid_t: seconds of video per temporal step.
        backend: name of the decoder that opened the video.
    """

    grid: Grid
    indices: tuple[int, ...]
    height: int
    width: int
    second_per_grid_t: float
    backend: str


def frame_indices(total: int, duration_s: float, settings: MediaSettings) -> tuple[int, ...]:
    """Choose the frames to sample: one per ``base_interval`` seconds, within bounds, spread evenly over the video.

    ``unique(linspace(0, total - 1, n, dtype=int))`` with ``n = clamp(round(duration / base_interval), min, max)``, as
    in the upstream fine-tuning code. A video with fewer than ``n`` frames yields each frame once.
    """
    count = min(max(round(duration_s / settings.base_interval), settings.video_min_frames), settings.video_max_frames)
    return tuple(int(index) for index in np.unique(np.linspace(0, total - 1, count, dtype=int)))


def plan_video(video: Video, backend: str, settings: MediaSettings) -> VideoPlan:
    """Choose the frames, the size and the rate of an open video.

    Raises:
        MediaError: no frames, no duration, too many pixels, or an extreme aspect ratio.
    """
    if video.num_frames < 1:
        raise MediaError(ReasonCode.MEDIA_EMPTY, "the video has no frames")
    if not 0 < video.duration_s <= MAX_DURATION_S:
        raise MediaError(
            ReasonCode.MEDIA_UNREADABLE,
            f"the video lasts {video.duration_s} s; it must last more than 0 s and at most {MAX_DURATION_S:,} s",
        )
    if video.height * video.width > settings.max_source_pixels:
        raise MediaError(
            ReasonCode.MEDIA_TOO_LARGE,
            f"its frames have {video.width}x{video.height} pixels; at most {settings.max_source_pixels:,} pixels are "
            "decoded (max_source_pixels)",
        )
    indices = frame_indices(video.num_frames, video.duration_s, settings)
    frame = image_grid(
        video.height,
        video.width,
        min_pixels=settings.video_min_frame_pixels,
        max_pixels=settings.video_max_frame_pixels,
    )
    return VideoPlan(
        grid=Grid(-(-len(indices) // TEMPORAL_PATCH_SIZE), frame.h, frame.w),
        indices=indices,
        height=video.height,
        width=video.width,
        second_per_grid_t=TEMPORAL_PATCH_SIZE * video.duration_s / len(indices),
        backend=backend,
    )


def probe_video(source: MediaSource, settings: MediaSettings) -> VideoPlan:
    """Plan a video with the first backend that can open it.

    Raises:
        MediaError: no backend can open it, or the video cannot be used.
    """
    return _first_success(source, lambda video, backend: plan_video(video, backend, settings))


def decode_video(
    source: MediaSource, settings: MediaSettings, allocate: Allocate = new_frames
) -> tuple[NDArray[np.uint8], VideoPlan]:
    """Decode and resize the sampled frames of a video with the first backend that can.

    Returns:
        Frames (2·t, 3, H, W) uint8, and the plan that they follow.

    Raises:
        MediaError: no backend can decode it, or the video cannot be used.
    """

    def decode(video: Video, backend: str) -> tuple[NDArray[np.uint8], VideoPlan]:
        plan = plan_video(video, backend, settings)
        decoded = video.frames(plan.indices)  # (n, H, W, 3)
        if len(decoded) != len(plan.indices):
            raise MediaError(
                ReasonCode.MEDIA_UNREADABLE, f"only {len(decoded)} of {len(plan.indices)} frames could be decoded"
            )
        frames = allocate(frames_shape(TEMPORAL_PATCH_SIZE * plan.grid.t, plan.grid))  # (2·t, 3, H', W')
        for planes, frame in zip(frames, decoded):
            resize_into(planes, Image.fromarray(frame))
        # An odd count leaves the last temporal step with one frame: repeat it.
        frames[len(decoded) :] = frames[len(decoded) - 1]
        return frames, plan

    return _first_success(source, decode)


def _first_success(source: MediaSource, use: Callable[[Video, str], _T]) -> _T:
    """Try the backends in order. A video that no backend could use (too large, no frames) is not tried again."""
    failures: list[str] = []
    for name, open_video in BACKENDS.items():
        try:
            return use(open_video(source), name)
        except MediaError as error:
            if error.code is not ReasonCode.MEDIA_UNREADABLE:
                raise MediaError(error.code, f"{source.name!r}: {error.message}") from error
            failures.append(f"{name}: {error.message}")
    raise MediaError(ReasonCode.MEDIA_UNREADABLE, f"{source.name!r} cannot be decoded ({'; '.join(failures)})")
