"""Probes or decodes a medium of either type, in the calling process.

Input: a source, its media type and the media settings. Output: a :class:`MediaInfo`, and when decoding also the stored
frames. Cost: a probe reads the header of an image, and decodes one frame of a video.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prep.media.frame_lists import decode_frames, probe_frames
from prep.media.images import Allocate, decode_image, new_frames, probe_image
from prep.media.item import NO_ITEM_SETTINGS, ItemSettings
from prep.media.source import HeadTooShortError, MediaSource
from prep.media.videos import VideoPlan, decode_video, probe_video
from schemas.bins import MEDIA_IMAGE
from schemas.errors import MediaError
from schemas.qwen import Grid
from schemas.settings import MediaSettings


@dataclass(frozen=True, slots=True)
class MediaInfo:
    """What the build needs to know about a medium before it decodes the pixels.

    Attributes:
        grid: patches of the stored frames (t, h, w).
        height: height of the image or of a video frame before resizing, upright, in pixels.
        width: width, likewise.
        second_per_grid_t: seconds of video per temporal step. 0 for an image.
        backend: decoder that served a video. None for an image.
    """

    grid: Grid
    height: int
    width: int
    second_per_grid_t: float = 0.0
    backend: str | None = None


def probe(
    source: MediaSource, media_type: int, settings: MediaSettings, item: ItemSettings = NO_ITEM_SETTINGS
) -> MediaInfo:
    """Read the header of a medium.

    Args:
        source: the encoded bytes, or their beginning.
        media_type: 0 image, 1 video.
        settings: sizes, frame rate and limits of the build.
        item: settings of the medium itself.

    Raises:
        HeadTooShortError: only the beginning of the medium is available, and the header is longer.
        MediaError: the medium cannot be used.
    """
    try:
        info = _probe(source, media_type, settings, item)
    except MediaError as error:
        # A library may report the missing rest as damage.
        if source.is_too_short:
            raise HeadTooShortError(source.name) from error
        raise
    if source.is_too_short:
        raise HeadTooShortError(source.name)
    return info


def _probe(source: MediaSource, media_type: int, settings: MediaSettings, item: ItemSettings) -> MediaInfo:
    if media_type == MEDIA_IMAGE:
        return MediaInfo(*probe_image(source, settings, item))
    return _video_info((probe_frames if source.frames else probe_video)(source, settings, item))


def decode(
    source: MediaSource,
    media_type: int,
    settings: MediaSettings,
    item: ItemSettings = NO_ITEM_SETTINGS,
    allocate: Allocate = new_frames,
) -> tuple[MediaInfo, NDArray[np.uint8]]:
    """Decode and resize a medium.

    Args:
        source: the encoded bytes.
        media_type: 0 image, 1 video.
        settings: sizes, frame rate and limits of the build.
        item: settings of the medium itself.
        allocate: makes the array that the frames are written to.

    Returns:
        The media info, and the stored frames (F, 3, H, W) uint8: one for an image, two per temporal step of a video.

    Raises:
        MediaError: the medium cannot be decoded.
    """
    if media_type == MEDIA_IMAGE:
        planes, grid, height, width = decode_image(source, settings, item, allocate)
        return MediaInfo(grid, height, width), planes[None]
    frames, plan = (decode_frames if source.frames else decode_video)(source, settings, item, allocate)
    return _video_info(plan), frames


def _video_info(plan: VideoPlan) -> MediaInfo:
    return MediaInfo(plan.grid, plan.height, plan.width, plan.second_per_grid_t, plan.backend)
