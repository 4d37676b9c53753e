"""Clips: how many frames to take, when, and at what size; and the decoders that deliver them.

Input: a file. Output: a :class:`VideoPlan` (probe: one frame is decoded, for its size) or frames (2·t, 3, H, W) uint8
(decode). An odd number of frames is made even by repeating the last one, so that every temporal step has two.

decord is tried first; the next backend is tried when one fails, and the ledger says which served.
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
"""A clip that claims to be longer has a damaged header; its temporal positions could leave the range of int32."""

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoPlan:
    """What will be taken from a clip.

    Attributes:
        grid: in patches; ``2 * grid.t`` frames are stored.
        indices: frames to decode, ascending; one fewer than stored where the last is repeated.
        height: of a frame before resizing, in pixels.
        width: likewise.
        second_per_grid_t: seconds of the clip that one temporal step stands for.
        backend: name of the decoder that opened the clip.
    """

    grid: Grid
    indices: tuple[int, ...]
    height: int
    width: int
    second_per_grid_t: float
    backend: str


def frame_indices(total: int, duration_s: float, settings: MediaSettings) -> tuple[int, ...]:
    """Frames to sample: one for each ``base_interval`` seconds, within bounds, evenly spread over the whole clip.

    ``unique(linspace(0, total - 1, n, dtype=int))`` with ``n = clamp(round(duration / base_interval), min, max)``: a
    clip with fewer frames than ``n`` gives each frame once.
    """
    wanted = min(max(round(duration_s / settings.base_interval), settings.video_min_frames), settings.video_max_frames)
    return tuple(int(index) for index in np.unique(np.linspace(0, total - 1, wanted, dtype=int)))


def plan_video(clip: Video, backend: str, settings: MediaSettings) -> VideoPlan:
    """Decide frames, size and rate of an open clip.

    Raises:
        MediaError: no frames, no duration, too many pixels, or an extreme aspect ratio.
    """
    if clip.num_frames < 1:
        raise MediaError(ReasonCode.MEDIA_EMPTY, "the clip has no frames")
    if not 0 < clip.duration_s <= MAX_DURATION_S:
        raise MediaError(ReasonCode.MEDIA_UNREADABLE, f"the clip has no usable duration (found {clip.duration_s} s)")
    if clip.height * clip.width > settings.max_source_pixels:
        raise MediaError(
            ReasonCode.MEDIA_TOO_LARGE,
            f"frames of {clip.width}x{clip.height} pixels; at most {settings.max_source_pixels:,} pixels are decoded "
            "(max_source_pixels)",
        )
    indices = frame_indices(clip.num_frames, clip.duration_s, settings)
    frame = image_grid(
        clip.height,
        clip.width,
        min_pixels=settings.video_min_frame_pixels,
        max_pixels=settings.video_max_frame_pixels,
    )
    return VideoPlan(
        grid=Grid(-(-len(indices) // TEMPORAL_PATCH_SIZE), frame.h, frame.w),
        indices=indices,
        height=clip.height,
        width=clip.width,
        second_per_grid_t=TEMPORAL_PATCH_SIZE * clip.duration_s / len(indices),
        backend=backend,
    )


def probe_video(source: MediaSource, settings: MediaSettings) -> VideoPlan:
    """Plan of a clip, from the first backend that can open it.

    Raises:
        MediaError: no backend can, or the clip cannot be used.
    """
    return _first_success(source, lambda clip, backend: plan_video(clip, backend, settings))


def decode_video(
    source: MediaSource, settings: MediaSettings, allocate: Allocate = new_frames
) -> tuple[NDArray[np.uint8], VideoPlan]:
    """Frames (2·t, 3, H, W) uint8 of a clip, resized, and the plan they follow.

    Raises:
        MediaError: no backend can decode it.
    """

    def decode(clip: Video, backend: str) -> tuple[NDArray[np.uint8], VideoPlan]:
        plan = plan_video(clip, backend, settings)
        pictures = clip.frames(plan.indices)
        if len(pictures) != len(plan.indices):
            raise MediaError(
                ReasonCode.MEDIA_UNREADABLE, f"{len(pictures)} of {len(plan.indices)} frames could be decoded"
            )
        frames = allocate(frames_shape(TEMPORAL_PATCH_SIZE * plan.grid.t, plan.grid))
        for planes, picture in zip(frames, pictures):
            resize_into(planes, Image.fromarray(picture))
        # A last step that lacks its second frame repeats the first.
        frames[len(pictures) :] = frames[len(pictures) - 1]
        return frames, plan

    return _first_success(source, decode)


def _first_success(source: MediaSource, use: Callable[[Video, str], _T]) -> _T:
    """Try the backends in order; a clip that is unusable as such (too large, no frames) is not tried again."""
    failures: list[str] = []
    for name, open_video in BACKENDS.items():
        try:
            return use(open_video(source), name)
        except MediaError as error:
            if error.code is not ReasonCode.MEDIA_UNREADABLE:
                raise MediaError(error.code, f"{source.name!r}: {error.message}") from error
            failures.append(f"{name}: {error.message}")
    raise MediaError(ReasonCode.MEDIA_UNREADABLE, f"{source.name!r} cannot be decoded ({'; '.join(failures)})")
