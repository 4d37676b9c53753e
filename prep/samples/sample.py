"""One sample: measured from headers in the scan, encoded with its pixels in the write step.

Both steps go through the same template and grids, so that what the plan counted is what the bin holds; the write step
checks it again. A :class:`Measured` is small (ids with one pad a medium) and is what the scan hands to the write
step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from prep.annotations.problems import Problems
from prep.annotations.validation import media_names
from prep.media.access import LOCAL_MEDIA, MediaAccess, Wanted
from prep.media.caches import FrameCache, ProbeCache
from prep.media.decode import MediaInfo
from prep.media.images import image_grid
from prep.media.paths import embedded_media
from prep.media.sandbox import sandbox
from prep.media.source import HeadTooShortError, MediaSource
from prep.samples.mrope import position_ids
from prep.samples.text import Template, expand, num_tokens
from schemas.annotation import Annotation, Problem, ReasonCode
from schemas.bins import MEDIA_IMAGE, MEDIA_VIDEO, stored_bytes
from schemas.errors import MediaError
from schemas.qwen import FACTOR, PATCH_SIZE, Grid
from schemas.settings import MediaSettings
from storage.urls import Location, location_key

_FACTORS = (*(part / 64 for part in range(63, 0, -1)), *(1 / (1 << power) for power in range(7, 13)), 0.0)
"""By what the pixels of media can be lowered: 63/64, 62/64, … 1/64, then 1/128, 1/256, … 1/4096, at last to one token a
frame (as near to it as the aspect ratio allows)."""


class Medium(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """One medium of a sample as its header tells.

    Attributes:
        media_type: 0 image, 1 video.
        name: in the annotation.
        grid: in patches.
        height: before resizing, in pixels.
        width: likewise.
        second_per_grid_t: of a video.
        backend: decoder of a video.
        max_pixels: bound that replaces the settings', where the medium was shrunk to fit its sample into a bin.
        span: first byte and size in the part's media file, for what came inside the record.
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
        """Length of the sample with all pads written out."""
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
        video_backend: decoders that served, joined by commas; None without videos.
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    position_ids: NDArray[np.int32]
    grids: list[Grid]
    media_types: list[int]
    frames: list[NDArray[np.uint8]]
    video_backend: str | None


@dataclass(frozen=True, slots=True)
class MediaPlace:
    """Where the media of a sample lie: below ``root``, or inside ``embedded`` (the media file of its part)."""

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
        return self.access.source(self.wanted(medium, max_bytes))

    def wanted(self, medium: Medium, max_bytes: int) -> Wanted:
        """What the access is asked for to get at a medium below the root."""
        return Wanted(self.root, medium.name, medium.media_type, max_bytes)


def wanted_media(
    annotation: Annotation, root: Location, settings: MediaSettings, embedded: Mapping[str, bytes]
) -> list[Wanted]:
    """All media of a record that did not come inside it: the images and then the videos, in its order."""
    images, videos = media_names(annotation)
    named = [(MEDIA_IMAGE, name) for name in images] + [(MEDIA_VIDEO, name) for name in videos]
    return [Wanted(root, name, kind, settings.max_source_bytes) for kind, name in named if name not in embedded]


def probe_media(
    annotation: Annotation,
    root: Location,
    settings: MediaSettings,
    embedded: Mapping[str, bytes],
    access: MediaAccess = LOCAL_MEDIA,
    probed: ProbeCache | None = None,
) -> tuple[list[Medium], list[Problem]]:
    """Look at the headers of all media of a record.

    Args:
        annotation: the record.
        root: folder or URL of the media that are files.
        settings: bounds.
        embedded: media that came inside the record, by name.
        access: to the media below ``root``.
        probed: media below ``root`` that records before this one had, with the same settings.

    Returns:
        The images and then the videos, each in the order of the record, and what is wrong with any of them.
    """
    images, videos = media_names(annotation)
    media: list[Medium] = []
    problems = Problems()
    for media_type, name in [(MEDIA_IMAGE, name) for name in images] + [(MEDIA_VIDEO, name) for name in videos]:
        try:
            if name in embedded:
                source = embedded_media(name, embedded[name], max_bytes=settings.max_source_bytes)
                facts = sandbox().probe(source, media_type, settings)
            else:
                wanted = Wanted(root, name, media_type, settings.max_source_bytes)
                look = partial(_probe, wanted, settings, access)
                facts = look() if probed is None else probed.get(wanted, look)
            media.append(
                Medium(
                    media_type=media_type,
                    name=name,
                    grid=facts.grid,
                    height=facts.height,
                    width=facts.width,
                    second_per_grid_t=facts.second_per_grid_t,
                    backend=facts.backend,
                )
            )
        except MediaError as error:
            problems.add(error.code, error.message)
    return media, problems.listed()


def _probe(wanted: Wanted, settings: MediaSettings, access: MediaAccess) -> MediaInfo:
    try:
        return sandbox().probe(access.source(wanted), wanted.media_type, settings)
    except HeadTooShortError:
        return sandbox().probe(access.whole(wanted), wanted.media_type, settings)


def check_media(
    media: Sequence[Medium],
    root: Location,
    settings: MediaSettings,
    embedded: Mapping[str, bytes],
    access: MediaAccess = LOCAL_MEDIA,
) -> list[Problem]:
    """Decode all media of a record; what is wrong with any of them."""
    problems = Problems()
    for medium in media:
        try:
            if medium.name in embedded:
                source = MediaSource(medium.name, data=embedded[medium.name])
            else:
                source = access.source(Wanted(root, medium.name, medium.media_type, settings.max_source_bytes))
            _checked(medium, sandbox().decode(source, medium.media_type, _settings_for(medium, settings)))
        except MediaError as error:
            problems.add(error.code, error.message)
    return problems.listed()


def shrink(template: Template, media: Sequence[Medium], max_length: int) -> list[Medium]:
    """Lower the pixels of all media by one common factor, the largest of :data:`_FACTORS` with which the sample fits.

    Returns:
        The media with lower bounds, or as they were if no factor suffices.
    """
    for factor in _FACTORS:
        smaller = [_reduced(medium, factor) for medium in media]
        if num_tokens(template, [medium.grid for medium in smaller]) <= max_length:
            return smaller
    return list(media)


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


def media_key(medium: Medium, place: MediaPlace, settings: MediaSettings) -> bytes:
    """What the frames of a medium depend on, as 16 bytes: where it lies, and the settings that it is decoded with."""
    inside = None if medium.span is None else (str(place.embedded), medium.span)
    key = (location_key(place.root), medium.name, inside, medium.media_type, _settings_for(medium, settings))
    return xxhash.xxh3_128_digest(msgspec.msgpack.encode(key))


def encode(sample: Measured, place: MediaPlace, settings: MediaSettings, decoded: FrameCache) -> EncodedSample:
    """Decode the media of a sample and write out its tokens.

    Args:
        sample: as it was measured.
        place: where its media lie.
        settings: of its dataset.
        decoded: media that samples before this one had.

    Raises:
        MediaError: a medium cannot be decoded, or is no longer what the scan saw.
    """
    found = [
        _checked(medium, decoded.get(media_key(medium, place, settings), partial(_decode, medium, place, settings)))
        for medium in sample.media
    ]
    input_ids, labels = expand(sample.template(), sample.grids)
    return EncodedSample(
        input_ids=input_ids,
        labels=labels,
        position_ids=position_ids(input_ids, sample.grids, [medium.second_per_grid_t for medium in sample.media]),
        grids=sample.grids,
        media_types=[medium.media_type for medium in sample.media],
        frames=[frame for _, frames in found for frame in frames],
        video_backend=_joined([facts.backend for facts, _ in found]),
    )


def _decode(medium: Medium, place: MediaPlace, settings: MediaSettings) -> tuple[MediaInfo, NDArray[np.uint8]]:
    source = place.source(medium, settings.max_source_bytes)
    return sandbox().decode(source, medium.media_type, _settings_for(medium, settings))


def _joined(backends: Iterable[str | None]) -> str | None:
    return ",".join(sorted({backend for backend in backends if backend is not None})) or None


def _checked(medium: Medium, found: tuple[MediaInfo, NDArray[np.uint8]]) -> tuple[MediaInfo, NDArray[np.uint8]]:
    """Return media info and stored frames (F, 3, H, W) of a medium if they match what the scan saw."""
    facts, _ = found
    if (facts.grid, facts.second_per_grid_t) != (medium.grid, medium.second_per_grid_t):
        raise MediaError(
            ReasonCode.MEDIA_UNREADABLE,
            f"{medium.name!r} decodes to a grid of {tuple(facts.grid)} at {facts.second_per_grid_t} s a step, its "
            f"header promised {tuple(medium.grid)} at {medium.second_per_grid_t} s; the file changed after it was "
            "scanned (--retry-media scans it again), or its header is wrong",
        )
    return found


def _settings_for(medium: Medium, settings: MediaSettings) -> MediaSettings:
    """The settings with the bounds of a medium that was shrunk."""
    if medium.max_pixels is None:
        return settings
    low, high = ("min_pixels", "max_pixels")
    if medium.media_type == MEDIA_VIDEO:
        low, high = ("video_min_frame_pixels", "video_max_frame_pixels")
    return msgspec.structs.replace(settings, **{low: FACTOR**2, high: medium.max_pixels})
