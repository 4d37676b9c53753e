"""One sample: measured from headers in the scan, encoded with its pixels in the write step.

Both steps use the same template and grids, so a bin holds exactly what the plan counted; the write step checks this
again. The scan hands a :class:`Measured` to the write step. It is small: token ids with one pad per medium.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from prep.annotations.annotation import Annotation, MediaItem
from prep.annotations.problems import Problems
from prep.media.access import LOCAL_MEDIA, MediaAccess, MediaRequest
from prep.media.caches import FrameCache, ProbeCache
from prep.media.decode import MediaInfo
from prep.media.images import image_grid
from prep.media.paths import embedded_media
from prep.media.sandbox import sandbox
from prep.media.source import HeadTooShortError, MediaSource
from prep.samples.mrope import position_ids
from prep.samples.text import Template, expand, num_tokens
from schemas.annotation import Problem, ReasonCode
from schemas.bins import MEDIA_IMAGE, MEDIA_VIDEO, stored_bytes
from schemas.errors import MediaError
from schemas.qwen import FACTOR, PATCH_SIZE, Grid
from schemas.settings import MediaSettings
from storage.urls import Location, location_key

_FACTORS = (*(part / 64 for part in range(63, 0, -1)), *(1 / (1 << power) for power in range(7, 13)), 0.0)
"""Factors that media can shrink by: 63/64, 62/64, … 1/64, then 1/128, 1/256, … 1/4096, and 0 for one token a frame (or
as few as the aspect ratio allows)."""


class Medium(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """One medium of a sample, as its header describes it.

    Attributes:
        media_type: 0 image, 1 video.
        name: in the annotation.
        grid: in patches.
        height: before resizing, in pixels.
        width: before resizing, in pixels.
        second_per_grid_t: seconds a temporal step, of a video.
        backend: decoder of a video.
        max_pixels: replaces the bound of the settings if the medium was shrunk to fit its sample into a bin.
        span: first byte and size in the part's media file, for an embedded medium.
    """

    media_type: int
    name: str
    grid: Grid
    height: int
    width: int
    second_per_grid_t: float = 0.0
    backend: str | None = None
    max_pixels: int | None = None
    span: tuple[int, int] | None = None


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


@dataclass(frozen=True, slots=True)
class MediaLocation:
    """The media of a sample lie below ``root``, or inside ``embedded`` (the media file of its part)."""

    root: Location
    embedded: Path | None = None
    access: MediaAccess = LOCAL_MEDIA

    def source(self, medium: Medium, max_bytes: int) -> MediaSource:
        """The encoded bytes of a medium.

        Raises:
            MediaError: it is missing, empty, too large, or outside the root.
        """
        if medium.span is not None:
            return MediaSource(medium.name, self.embedded, medium.span)
        return self.access.source(self.request(medium, max_bytes))

    def request(self, medium: Medium, max_bytes: int) -> MediaRequest:
        """The request for a medium below the root."""
        return MediaRequest(self.root, medium.name, medium.media_type, max_bytes)


def media_items(annotation: Annotation) -> list[tuple[int, MediaItem]]:
    """The media of an annotation with their kinds: the images and then the videos."""
    return [(MEDIA_IMAGE, item) for item in annotation.images] + [(MEDIA_VIDEO, item) for item in annotation.videos]


def media_requests(
    annotation: Annotation, root: Location, settings: MediaSettings, embedded: Mapping[str, bytes]
) -> list[MediaRequest]:
    """All media of a record that did not come inside it: the images and then the videos, in its order."""
    return [
        MediaRequest(root, item.name, kind, settings.max_source_bytes)
        for kind, item in media_items(annotation)
        if item.name not in embedded
    ]


def probe_media(
    annotation: Annotation,
    root: Location,
    settings: MediaSettings,
    embedded: Mapping[str, bytes],
    access: MediaAccess = LOCAL_MEDIA,
    probed: ProbeCache | None = None,
) -> tuple[list[Medium], list[Problem]]:
    """Read the headers of all media of a record.

    Args:
        annotation: the record.
        root: folder or URL of the media that are files.
        settings: bounds.
        embedded: encoded media that came inside the record, by name.
        access: to the media below ``root``.
        probed: cache of the media below ``root``, for records with the same settings.

    Returns:
        The images and then the videos, each in the order of the record, and the problems of all that failed.
    """
    media: list[Medium] = []
    problems = Problems()
    for media_type, item in media_items(annotation):
        name = item.name
        try:
            if name in embedded:
                source = embedded_media(name, embedded[name], max_bytes=settings.max_source_bytes)
                info = sandbox().probe(source, media_type, settings)
            else:
                request = MediaRequest(root, name, media_type, settings.max_source_bytes)
                probe = partial(_probe, request, settings, access)
                info = probe() if probed is None else probed.get(request, probe)
            media.append(_medium(media_type, name, info))
        except MediaError as error:
            problems.add(error.code, error.message)
    return media, problems.listed()


def _medium(media_type: int, name: str, info: MediaInfo) -> Medium:
    return Medium(
        media_type=media_type,
        name=name,
        grid=info.grid,
        height=info.height,
        width=info.width,
        second_per_grid_t=info.second_per_grid_t,
        backend=info.backend,
    )


def _probe(request: MediaRequest, settings: MediaSettings, access: MediaAccess) -> MediaInfo:
    try:
        return sandbox().probe(access.source(request), request.media_type, settings)
    except HeadTooShortError:
        return sandbox().probe(access.complete(request), request.media_type, settings)


def check_media(
    media: Sequence[Medium],
    root: Location,
    settings: MediaSettings,
    embedded: Mapping[str, bytes],
    access: MediaAccess = LOCAL_MEDIA,
) -> list[Problem]:
    """Decode all media of a record; returns the problems of those that fail."""
    problems = Problems()
    for medium in media:
        try:
            if medium.name in embedded:
                source = MediaSource(medium.name, data=embedded[medium.name])
            else:
                source = access.source(MediaRequest(root, medium.name, medium.media_type, settings.max_source_bytes))
            _checked(medium, sandbox().decode(source, medium.media_type, _settings_for(medium, settings)))
        except MediaError as error:
            problems.add(error.code, error.message)
    return problems.listed()


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


def media_key(medium: Medium, location: MediaLocation, settings: MediaSettings) -> bytes:
    """A key of 16 bytes for the frames of a medium: its location, and the settings that it is decoded with."""
    inside = None if medium.span is None else (str(location.embedded), medium.span)
    key = (location_key(location.root), medium.name, inside, medium.media_type, _settings_for(medium, settings))
    return xxhash.xxh3_128_digest(msgspec.msgpack.encode(key))


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
    decoded = [
        _checked(
            medium, frames.get(media_key(medium, location, settings), partial(_decode, medium, location, settings))
        )
        for medium in sample.media
    ]
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


def _decode(medium: Medium, location: MediaLocation, settings: MediaSettings) -> tuple[MediaInfo, NDArray[np.uint8]]:
    source = location.source(medium, settings.max_source_bytes)
    return sandbox().decode(source, medium.media_type, _settings_for(medium, settings))


def _joined(backends: Iterable[str | None]) -> str | None:
    return ",".join(sorted({backend for backend in backends if backend is not None})) or None


def _checked(medium: Medium, decoded: tuple[MediaInfo, NDArray[np.uint8]]) -> tuple[MediaInfo, NDArray[np.uint8]]:
    """Return media info and stored frames (F, 3, H, W) of a medium if they match what the scan saw."""
    info, _ = decoded
    if (info.grid, info.second_per_grid_t) != (medium.grid, medium.second_per_grid_t):
        raise MediaError(
            ReasonCode.MEDIA_UNREADABLE,
            f"{medium.name!r} decodes to a grid of {tuple(info.grid)} at {info.second_per_grid_t} s a step, but its "
            f"header promised {tuple(medium.grid)} at {medium.second_per_grid_t} s; the file changed after it was "
            "scanned (--retry-media scans it again), or its header is wrong",
        )
    return decoded


def _settings_for(medium: Medium, settings: MediaSettings) -> MediaSettings:
    """The settings, with the bounds of a medium that was shrunk."""
    if medium.max_pixels is None:
        return settings
    low, high = ("min_pixels", "max_pixels")
    if medium.media_type == MEDIA_VIDEO:
        low, high = ("video_min_frame_pixels", "video_max_frame_pixels")
    return msgspec.structs.replace(settings, **{low: FACTOR**2, high: medium.max_pixels})
