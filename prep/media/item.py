"""The settings that a record can give to one of its images or videos, and what they mean beside those of the build.

Names and meaning are those of ``qwen_vl_utils`` 0.0.14 (``vision_process.py``). What an item leaves out comes from the
:class:`~schemas.settings.MediaSettings` of its dataset, not from the defaults of that package.
"""

from __future__ import annotations

import msgspec

from schemas.qwen import FACTOR, TEMPORAL_PATCH_SIZE
from schemas.settings import MediaSettings

_FRAME_MARGIN = 1.05
"""``total_pixels`` lowers the bound of a frame to this multiple of its lower bound at most (``fetch_video``)."""


class ItemSettings(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Settings of one image or video that replace those of the build. Names and meaning are those of ``qwen_vl_utils``.

    Attributes:
        min_pixels: lower bound of the pixels of the image, or of a frame.
        max_pixels: upper bound.
        resized_height: height after resizing, rounded to a multiple of 28; comes with ``resized_width``.
        resized_width: width after resizing, likewise.
        fps: frames to sample a second; of a list of frames, the rate at which they were taken.
        nframes: frames to sample.
        min_frames: lower bound of the frames, with ``fps``.
        max_frames: upper bound of the frames, with ``fps``.
        total_pixels: bound of the pixels of all frames together, divided by two (frames are merged in pairs).
        video_start: second at which sampling starts.
        video_end: second at which sampling ends.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    resized_height: int | None = None
    resized_width: int | None = None
    fps: float | None = None
    nframes: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    total_pixels: int | None = None
    video_start: float | None = None
    video_end: float | None = None

    @property
    def resized(self) -> tuple[int, int] | None:
        """Height and width that the item asks for, before they are rounded."""
        if self.resized_height is None or self.resized_width is None:
            return None
        return self.resized_height, self.resized_width

    @property
    def sets_size(self) -> bool:
        """Whether any setting changes the size after resizing."""
        bounds = (self.min_pixels, self.max_pixels, self.total_pixels)
        return self.resized is not None or any(bound is not None for bound in bounds)

    @property
    def sets_rate(self) -> bool:
        """Whether any setting asks for sampling at a frame rate or for a number of frames."""
        return any(value is not None for value in (self.fps, self.nframes, self.min_frames, self.max_frames))

    def without_size(self) -> ItemSettings:
        """The settings that choose frames, without those that decide their size."""
        sizes = ("min_pixels", "max_pixels", "resized_height", "resized_width", "total_pixels")
        return msgspec.structs.replace(self, **dict.fromkeys(sizes))


NO_ITEM_SETTINGS = ItemSettings()


def image_bounds(settings: MediaSettings, item: ItemSettings) -> tuple[int, int]:
    """Lower and upper bound of the pixels of an image.

    If the item gives one bound, and it lies beyond the build's other bound, the build's bound gives way.
    """
    low = _lower_bound(settings.min_pixels, item)
    return low, item.max_pixels or max(settings.max_pixels, low)


def frame_bounds(settings: MediaSettings, item: ItemSettings, num_frames: int) -> tuple[int, float]:
    """Lower and upper bound of the pixels of a frame.

    The formula is that of ``fetch_video`` in ``qwen_vl_utils``, with ``video_min_frame_pixels``,
    ``video_max_frame_pixels`` and ``video_total_pixels`` of the build in place of its constants. Without any bound for
    this video or for its frames together, the bounds are those of the build.

    Args:
        settings: of the build.
        item: of the video.
        num_frames: stored frames, an even number.
    """
    low, high = settings.video_min_frame_pixels, settings.video_max_frame_pixels
    total = item.total_pixels or settings.video_total_pixels
    if total is None and item.min_pixels is None and item.max_pixels is None:
        return low, high
    low = _lower_bound(low, item)
    shared = high if total is None else min(high, total / num_frames * TEMPORAL_PATCH_SIZE)
    limit = max(shared, int(low * _FRAME_MARGIN))
    return low, min(item.max_pixels or limit, limit)


def _lower_bound(low: int, item: ItemSettings) -> int:
    """The item's lower bound or else that of the build, which does not hold above an upper bound of the item."""
    if item.min_pixels is not None:
        return item.min_pixels
    return low if item.max_pixels is None or low <= item.max_pixels else FACTOR**2
