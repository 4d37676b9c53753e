"""Videos that are given as the images of their frames: a list of names, or a folder.

Input: a source with frames. Output: as :mod:`prep.media.videos`. All frames are taken, in their order, each decoded as
an image is; they must have one size. The last one is repeated to make their number even, as ``qwen_vl_utils`` does.
Cost: a probe reads the header of every frame.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from prep.media.bicubic import resize_into
from prep.media.images import Allocate, frames_shape, image_size, new_frames, opened_rgb
from prep.media.item import NO_ITEM_SETTINGS, ItemSettings
from prep.media.source import MediaSource
from prep.media.videos import VideoPlan, video_grid
from schemas.annotation import ReasonCode
from schemas.errors import MediaError
from schemas.qwen import TEMPORAL_PATCH_SIZE
from schemas.settings import MediaSettings

DEFAULT_FPS = 2.0
"""Rate at which the frames of a list were taken if its record does not say (``sample_fps`` in ``qwen_vl_utils``)."""

BACKEND = "pillow"
"""The decoder's name in the ledger."""

_OF_FILES_ONLY = ("nframes", "min_frames", "max_frames", "video_start", "video_end")


def probe_frames(source: MediaSource, settings: MediaSettings, item: ItemSettings = NO_ITEM_SETTINGS) -> VideoPlan:
    """Plan a video from the headers of its frames.

    Raises:
        MediaError: a frame cannot be used, the frames have different sizes, or the item has settings that choose frames
            from a video file.
    """
    useless = [name for name in _OF_FILES_ONLY if getattr(item, name) is not None]
    if useless:
        raise MediaError(
            ReasonCode.BAD_FIELD,
            f"{source.name!r} is a list of frames, all of which are taken; {useless[0]} chooses frames from a video "
            "file. Name only the frames that you want",
        )
    height, width = image_size(source.frames[0], settings)
    for frame in source.frames[1:]:
        _check_size(frame, source, image_size(frame, settings), (height, width))
    num_frames = len(source.frames)
    return VideoPlan(
        grid=video_grid(num_frames, height, width, settings, item),
        indices=tuple(range(num_frames)),
        height=height,
        width=width,
        second_per_grid_t=TEMPORAL_PATCH_SIZE / (item.fps or DEFAULT_FPS),
        backend=BACKEND,
    )


def decode_frames(
    source: MediaSource,
    settings: MediaSettings,
    item: ItemSettings = NO_ITEM_SETTINGS,
    allocate: Allocate = new_frames,
) -> tuple[NDArray[np.uint8], VideoPlan]:
    """Decode and resize the frames of a video, one at a time.

    Returns:
        Frames (2·t, 3, H, W) uint8, and the plan that they follow.

    Raises:
        MediaError: as :func:`probe_frames`, or the pixels of a frame are truncated or damaged.
    """
    plan = probe_frames(source, settings, item)
    frames = allocate(frames_shape(TEMPORAL_PATCH_SIZE * plan.grid.t, plan.grid))  # (2·t, 3, H', W')
    for planes, frame in zip(frames, source.frames):
        with opened_rgb(frame, settings) as rgb:
            _check_size(frame, source, (rgb.height, rgb.width), (plan.height, plan.width))
            resize_into(planes, rgb)
    frames[len(source.frames) :] = frames[len(source.frames) - 1]
    return frames, plan


def _check_size(frame: MediaSource, video: MediaSource, size: tuple[int, int], expected: tuple[int, int]) -> None:
    if size != expected:
        raise MediaError(
            ReasonCode.UNSUPPORTED_MEDIA,
            f"{frame.name!r} has {size[1]}x{size[0]} pixels, but {video.frames[0].name!r}, the first frame of its "
            f"video, has {expected[1]}x{expected[0]}; all frames of a video must have one size",
        )
