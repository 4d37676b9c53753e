"""Videos: which frames to sample, at what size, and their pixels.

Input: a source. Output: a :class:`VideoPlan` (probe), or frames (2·t, 3, H, W) uint8 (decode). A probe decodes one
frame to learn its size. A temporal step has two frames, so an odd count repeats the last frame.

PyAV decodes. Where it is not installed or does not know the format, decord or torchcodec does. The ledger records
which backend served.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from prep.media.backends import BACKENDS, BackendUnavailableError, Video
from prep.media.bicubic import resize_into
from prep.media.images import Allocate, frames_shape, image_grid, new_frames
from prep.media.item import NO_ITEM_SETTINGS, ItemSettings, frame_bounds
from prep.media.sampling import sampled_frames
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


def plan_video(video: Video, backend: str, settings: MediaSettings, item: ItemSettings = NO_ITEM_SETTINGS) -> VideoPlan:
    """Choose the frames, the size and the rate of an open video.

    Raises:
        MediaError: no frames, no duration, too many pixels, an extreme aspect ratio, or settings of the item that do
            not suit the video.
    """
    if video.num_frames < 1:
        raise MediaError(ReasonCode.MEDIA_EMPTY, "the video has no frames")
    duration_s = video.num_frames / video.fps if video.fps > 0 else math.nan
    if not 0 < duration_s <= MAX_DURATION_S:
        raise MediaError(
            ReasonCode.MEDIA_UNREADABLE,
            f"the video lasts {duration_s} s; it must last more than 0 s and at most {MAX_DURATION_S:,} s",
        )
    if video.height * video.width > settings.max_source_pixels:
        raise MediaError(
            ReasonCode.MEDIA_TOO_LARGE,
            f"its frames have {video.width}x{video.height} pixels; at most {settings.max_source_pixels:,} pixels are "
            "decoded (max_source_pixels)",
        )
    frames, indices = sampled_frames(video.num_frames, video.fps, settings, item)
    return VideoPlan(
        grid=video_grid(len(indices), video.height, video.width, settings, item),
        indices=tuple(indices),
        height=video.height,
        width=video.width,
        second_per_grid_t=TEMPORAL_PATCH_SIZE * (len(frames) / video.fps) / len(indices),
        backend=backend,
    )


def video_grid(num_frames: int, height: int, width: int, settings: MediaSettings, item: ItemSettings) -> Grid:
    """Patch grid of a video of which ``num_frames`` frames of ``height`` by ``width`` pixels are taken."""
    steps = -(-num_frames // TEMPORAL_PATCH_SIZE)
    min_pixels, max_pixels = frame_bounds(settings, item, steps * TEMPORAL_PATCH_SIZE)
    frame = image_grid(height, width, min_pixels=min_pixels, max_pixels=max_pixels, item=item)
    return Grid(steps, frame.h, frame.w)


def probe_video(source: MediaSource, settings: MediaSettings, item: ItemSettings = NO_ITEM_SETTINGS) -> VideoPlan:
    """Plan a video with the first backend that can open it.

    Raises:
        MediaError: no backend can open it, or the video cannot be used.
    """
    return _first_success(source, lambda video, backend: plan_video(video, backend, settings, item))


def decode_video(
    source: MediaSource,
    settings: MediaSettings,
    item: ItemSettings = NO_ITEM_SETTINGS,
    allocate: Allocate = new_frames,
) -> tuple[NDArray[np.uint8], VideoPlan]:
    """Decode and resize the sampled frames of a video with the first backend that can.

    Returns:
        Frames (2·t, 3, H, W) uint8, and the plan that they follow.

    Raises:
        MediaError: no backend can decode it, or the video cannot be used.
    """

    def decode(video: Video, backend: str) -> tuple[NDArray[np.uint8], VideoPlan]:
        plan = plan_video(video, backend, settings, item)
        frames = allocate(frames_shape(TEMPORAL_PATCH_SIZE * plan.grid.t, plan.grid))  # (2·t, 3, H', W')
        num_decoded = 0
        for frame, planes in zip(video.frames(plan.indices), frames):  # frame: (H, W, 3)
            resize_into(planes, frame)
            num_decoded += 1
        if num_decoded != len(plan.indices):
            raise MediaError(
                ReasonCode.MEDIA_UNREADABLE, f"only {num_decoded} of {len(plan.indices)} frames could be decoded"
            )
        # An odd count leaves the last temporal step with one frame: repeat it.
        frames[num_decoded:] = frames[num_decoded - 1]
        return frames, plan

    return _first_success(source, decode)


def _first_success(source: MediaSource, use: Callable[[Video, str], _T]) -> _T:
    """Use the first backend that is installed and knows the format. Its verdict is final.

    Otherwise another backend might make frames of a damaged video, and not the same ones every time.
    """
    failures: list[str] = []
    for name, open_video in BACKENDS.items():
        try:
            return use(open_video(source), name)
        except BackendUnavailableError as error:
            failures.append(f"{name}: {error.message}")
        except MediaError as error:
            if error.code is not ReasonCode.MEDIA_UNREADABLE:
                raise MediaError(error.code, f"{source.name!r}: {error.message}") from error
            failures.append(f"{name}: {error.message}")
            break
    raise MediaError(ReasonCode.MEDIA_UNREADABLE, f"{source.name!r} cannot be decoded ({'; '.join(failures)})")
