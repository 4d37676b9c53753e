"""Probing and decoding of any medium: what the scan and the write step ask for, and what comes back.

Input: a source, its kind, the settings. Output: :class:`MediaInfo` (probe) or facts and frames (decode).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prep.media.images import Allocate, decode_image, new_frames, probe_image
from prep.media.source import HeadTooShortError, MediaSource
from prep.media.videos import VideoPlan, decode_video, probe_video
from schemas.bins import MEDIA_IMAGE
from schemas.errors import MediaError
from schemas.qwen import Grid
from schemas.settings import MediaSettings


@dataclass(frozen=True, slots=True)
class MediaInfo:
    """What a medium becomes.

    Attributes:
        grid: in patches.
        height: of the picture or of a frame before resizing, as it is shown, in pixels.
        width: likewise.
        second_per_grid_t: seconds that a temporal step of a video stands for; 0 for an image.
        backend: decoder of a video; None for an image.
    """

    grid: Grid
    height: int
    width: int
    second_per_grid_t: float = 0.0
    backend: str | None = None


def probe(source: MediaSource, media_type: int, settings: MediaSettings) -> MediaInfo:
    """Probe the header of a medium.

    Raises:
        HeadTooShortError: only the beginning of the medium is here, and that is not enough to tell.
        MediaError: the medium cannot be used.
    """
    try:
        facts = _probe(source, media_type, settings)
    except MediaError as error:
        # A library may take the missing rest for damage.
        if source.beginning is not None and source.beginning.was_left:
            raise HeadTooShortError(source.name) from error
        raise
    if source.beginning is not None and source.beginning.was_left:
        raise HeadTooShortError(source.name)
    return facts


def _probe(source: MediaSource, media_type: int, settings: MediaSettings) -> MediaInfo:
    if media_type == MEDIA_IMAGE:
        return MediaInfo(*probe_image(source, settings))
    return _clip_facts(probe_video(source, settings))


def decode(
    source: MediaSource, media_type: int, settings: MediaSettings, allocate: Allocate = new_frames
) -> tuple[MediaInfo, NDArray[np.uint8]]:
    """Decode a medium to stored frames (F, 3, H, W) uint8: one frame of an image, two for each temporal step of a video.

    Args:
        source: the file or its bytes.
        media_type: a picture or a clip.
        settings: size, rate, limits.
        allocate: makes the array that the frames are written to.

    Raises:
        MediaError: the medium cannot be decoded.
    """
    if media_type == MEDIA_IMAGE:
        planes, grid, height, width = decode_image(source, settings, allocate)
        return MediaInfo(grid, height, width), planes[None]
    frames, plan = decode_video(source, settings, allocate)
    return _clip_facts(plan), frames


def _clip_facts(plan: VideoPlan) -> MediaInfo:
    return MediaInfo(plan.grid, plan.height, plan.width, plan.second_per_grid_t, plan.backend)
