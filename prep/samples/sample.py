"""One sample: measured from headers in the scan, encoded with its pixels in the write step.

Both steps use the same template and grids, so a bin holds exactly what the plan counted; the write step checks this
again. The scan hands a :class:`Measured` to the write step. It is small: token ids with one pad per medium.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import msgspec
import numpy as np
from numpy.typing import NDArray

from prep.media.caches import FrameCache
from prep.media.decode import MediaInfo
from prep.media.images import image_grid
from prep.samples.media import MediaLocation, Medium, decode_medium, media_key, require_as_scanned
from prep.samples.mrope import position_ids
from prep.samples.text import Template, expand, num_tokens
from schemas.bins import MEDIA_IMAGE, MEDIA_VIDEO, stored_bytes
from schemas.qwen import FACTOR, PATCH_SIZE, Grid
from schemas.settings import MediaSettings

_FACTORS = (*(part / 64 for part in range(63, 0, -1)), *(1 / (1 << power) for power in range(7, 13)), 0.0)
"""Factors that media can shrink by: 63/64, 62/64, … 1/64, then 1/128, 1/256, … 1/4096, and 0 for one token a frame (or
as few as the aspect ratio allows)."""


class Measured(msgspec.Struct, frozen=True, array_like=True):
    """A valid sample without its pixels. ``ids`` (n,) int32 and ``trained`` (n,) bool are the template's bytes."""

    ids: bytes
    trained: bytes
    media: list[Medium]

    def template(self) -> Template:
        """The token ids with one pad a medium."""
        return Template(
            ids=np.frombuffer(self.ids, dtype=np.int32),
            trained=np.frombuffer(self.trained, dtype=np.bool_),
            media_types=tuple(medium.media_type for medium in self.media),
        )

    @property
    def grids(self) -> list[Grid]:
        """Sizes of the media in sequence order."""
        return [medium.grid for medium in self.media]

    @property
    def num_tokens(self) -> int:
        """Length of the sample with all pads."""
        pads = sum(medium.grid.num_tokens for medium in self.media)
        return len(self.trained) - len(self.media) + pads

    @property
    def num_targets(self) -> int:
        """Labels that are not -100."""
        return self.trained.count(1)

    @property
    def num_patches(self) -> int:
        """Rows of ``pixel_values`` of all media."""
        return sum(grid.num_patches for grid in self.grids)

    def num_media(self, media_type: int) -> int:
        """Media of one kind."""
        return sum(medium.media_type == media_type for medium in self.media)

    @property
    def pixel_bytes(self) -> int:
        """Bytes of all stored frames, before compression."""
        return sum(stored_bytes(medium.grid, medium.media_type) for medium in self.media)

    @property
    def video_backend(self) -> str | None:
        """Decoders that opened the videos, joined by commas; None without videos."""
        return _joined(medium.backend for medium in self.media)


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedSample:
    """A sample ready for its bin.

    Attributes:
        input_ids: (L,) int32.
        labels: (L,) int32, not shifted.
        position_ids: (3, L) int32.
        grids: size of every medium in sequence order.
        media_types: 0 image, 1 video, of every medium.
        frames: stored frames of all media in sequence order, each (3, H, W) uint8.
        video_backend: decoders that were used, joined by commas; None without videos.
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    position_ids: NDArray[np.int32]
    grids: list[Grid]
    media_types: list[int]
    frames: list[NDArray[np.uint8]]
    video_backend: str | None


def shrink(template_of: Callable[[Sequence[Medium]], Template], media: list[Medium], max_length: int) -> Measured:
    """Lower the pixels of all media by one factor, the largest of :data:`_FACTORS` at which the sample fits.

    Args:
        template_of: the template with media of given sizes: coordinates in a text follow the sizes of its images.
        media: the probed media, images first, then videos.
        max_length: tokens that the sample may have.

    Returns:
        The sample with smaller media, or with all media as they are if no factor suffices.
    """
    for factor in _FACTORS:
        smaller = [_reduced(medium, factor) for medium in media]
        template = template_of(smaller)
        if num_tokens(template, [medium.grid for medium in smaller]) <= max_length:
            return measure(template, smaller)
    return measure(template_of(media), media)


def _reduced(medium: Medium, factor: float) -> Medium:
    pixels = medium.grid.h * medium.grid.w * PATCH_SIZE**2
    max_pixels = max(FACTOR**2, int(pixels * factor))
    frame = image_grid(medium.height, medium.width, min_pixels=FACTOR**2, max_pixels=max_pixels)
    grid = Grid(medium.grid.t, frame.h, frame.w)
    return msgspec.structs.replace(medium, grid=grid, max_pixels=max_pixels)


def measure(template: Template, media: list[Medium]) -> Measured:
    """Join a template and its probed media (images first, then videos) into a sample, media in sequence order."""
    waiting: dict[int, Iterator[Medium]] = {
        kind: iter([medium for medium in media if medium.media_type == kind]) for kind in (MEDIA_IMAGE, MEDIA_VIDEO)
    }
    ordered = [next(waiting[kind]) for kind in template.media_types]
    return Measured(template.ids.tobytes(), template.trained.tobytes(), ordered)


def encode(sample: Measured, location: MediaLocation, settings: MediaSettings, frames: FrameCache) -> EncodedSample:
    """Decode the media of a sample and expand its tokens.

    Args:
        sample: a measured sample.
        location: of its media.
        settings: of its dataset.
        frames: decoded media of earlier samples.

    Raises:
        MediaError: a medium cannot be decoded, or is not what the scan saw.
    """
    decoded: list[tuple[MediaInfo, NDArray[np.uint8]]] = []
    for medium in sample.media:
        key = media_key(medium, location, settings)
        decoded.append(frames.get(key, partial(decode_medium, medium, location, settings)))
        require_as_scanned(medium, decoded[-1][0])
    input_ids, labels = expand(sample.template(), sample.grids)
    return EncodedSample(
        input_ids=input_ids,
        labels=labels,
        position_ids=position_ids(input_ids, sample.grids, [medium.second_per_grid_t for medium in sample.media]),
        grids=sample.grids,
        media_types=[medium.media_type for medium in sample.media],
        frames=[frame for _, stored in decoded for frame in stored],
        video_backend=_joined([info.backend for info, _ in decoded]),
    )


def _joined(backends: Iterable[str | None]) -> str | None:
    return ",".join(sorted({backend for backend in backends if backend is not None})) or None
