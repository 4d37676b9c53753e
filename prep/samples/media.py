"""The media of a sample: probed in the scan, decoded in the write step with the same settings.

In: the media that a record names, where they lie, the settings of the build. Out: a :class:`Medium` each, which the
part keeps; from it, the frames. A video that is given as the images of its frames is one medium of several files.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
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
from prep.media.caches import ProbeCache
from prep.media.decode import MediaInfo
from prep.media.item import NO_ITEM_SETTINGS, ItemSettings
from prep.media.paths import check_frames, embedded_media, frame_list
from prep.media.sandbox import sandbox
from prep.media.source import HeadTooShortError, MediaSource
from schemas.annotation import Problem, ReasonCode
from schemas.bins import MEDIA_IMAGE, MEDIA_VIDEO
from schemas.errors import MediaError
from schemas.qwen import FACTOR, PATCH_SIZE, Grid
from schemas.settings import MediaSettings
from storage.urls import Location, location_key


class FrameFile(msgspec.Struct, frozen=True, array_like=True):
    """An image that is a frame of a video: its name, and its first byte and size in the part's media file if it came
    inside the record.
    """

    name: str
    span: tuple[int, int] | None = None


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
        max_pixels: replaces all other bounds if the medium was shrunk to fit its sample into a bin.
        span: first byte and size in the part's media file, for an embedded medium.
        frames: the images that make up a video given as a list of frames.
        settings: its own settings, or None.
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
    frames: tuple[FrameFile, ...] = ()
    settings: ItemSettings | None = None

    @property
    def kept_percent(self) -> int:
        """Pixels of an image, or of a frame, after resizing, in percent of those before."""
        return round(100 * self.grid.h * self.grid.w * PATCH_SIZE**2 / (self.height * self.width))

    def stored(self, store: Callable[[str], tuple[int, int] | None]) -> Medium:
        """The medium with the spans of what came inside its record.

        Args:
            store: from the name of a file to its span; None for one that lies below the media root.
        """
        if self.frames:
            frames = tuple(FrameFile(frame.name, store(frame.name)) for frame in self.frames)
            return msgspec.structs.replace(self, frames=frames)
        return msgspec.structs.replace(self, span=store(self.name))


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
        spans = {name: span for name, span, _ in _files(medium)}

        def open_file(name: str, media_type: int) -> MediaSource:
            span = spans[name]
            if span is not None:
                return MediaSource(name, self.embedded, span)
            return self.access.source(MediaRequest(self.root, name, media_type, max_bytes))

        return _source(medium, medium.media_type, open_file)

    def requests(self, medium: Medium, max_bytes: int) -> Iterator[MediaRequest]:
        """The requests for the files of a medium below the root."""
        for name, span, media_type in _files(medium):
            if span is None:
                yield MediaRequest(self.root, name, media_type, max_bytes)


@dataclass(frozen=True, slots=True)
class _RecordMedia:
    """The media of a record lie below ``root``, or came inside it.

    Attributes:
        root: folder or URL of the media that are files.
        max_bytes: bound of each.
        embedded: encoded media that came inside the record, by name.
        access: to the media below ``root``.
    """

    root: Location
    max_bytes: int
    embedded: Mapping[str, bytes]
    access: MediaAccess = LOCAL_MEDIA

    def source(self, item: MediaItem | Medium, media_type: int, *, is_complete: bool = False) -> MediaSource:
        """The encoded bytes of an item, or of images the first part unless ``is_complete``."""
        read = self.access.complete if is_complete else self.access.source

        def open_file(name: str, media_type: int) -> MediaSource:
            if name in self.embedded:
                return embedded_media(name, self.embedded[name], max_bytes=self.max_bytes)
            return read(MediaRequest(self.root, name, media_type, self.max_bytes))

        return _source(item, media_type, open_file)

    def requests(self, item: MediaItem, media_type: int) -> list[MediaRequest]:
        """The files of an item that lie below the root."""
        names, kind = (item.frames, MEDIA_IMAGE) if item.frames else ((item.name,), media_type)
        return [MediaRequest(self.root, name, kind, self.max_bytes) for name in names if name not in self.embedded]

    def key(self, item: MediaItem, media_type: int) -> Hashable:
        """Names the outcome of a probe; None if bytes of the record take part in it."""
        if any(name in self.embedded for name in item.frames or (item.name,)):
            return None
        return media_type, item, self.root, self.max_bytes

    def probe(self, item: MediaItem, media_type: int, settings: MediaSettings) -> MediaInfo:
        """Read the headers of an item; again with all bytes if the first ones were too few."""
        own = item.settings or NO_ITEM_SETTINGS
        try:
            return sandbox().probe(self.source(item, media_type), media_type, settings, own)
        except HeadTooShortError:
            return sandbox().probe(self.source(item, media_type, is_complete=True), media_type, settings, own)


def media_items(annotation: Annotation) -> list[tuple[int, MediaItem]]:
    """The media of an annotation with their kinds: the images and then the videos."""
    return [(MEDIA_IMAGE, item) for item in annotation.images] + [(MEDIA_VIDEO, item) for item in annotation.videos]


def media_requests(
    annotation: Annotation,
    root: Location,
    settings: MediaSettings,
    embedded: Mapping[str, bytes],
    probed: ProbeCache | None = None,
) -> list[MediaRequest]:
    """The files that probing a record needs: those of the images and then of the videos, in its order."""
    media = _RecordMedia(root, settings.max_source_bytes, embedded)
    return [
        request
        for media_type, item in media_items(annotation)
        if probed is None or not probed.has(media.key(item, media_type))
        for request in media.requests(item, media_type)
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
        settings: bounds of the build.
        embedded: encoded media that came inside the record, by name.
        access: to the media below ``root``.
        probed: cache of the media below ``root``, for records with the same settings.

    Returns:
        The images and then the videos, each in the order of the record, and the problems of all that failed.
    """
    media = _RecordMedia(root, settings.max_source_bytes, embedded, access)
    good: list[Medium] = []
    problems = Problems()
    for media_type, item in media_items(annotation):
        key = media.key(item, media_type)
        probe = partial(media.probe, item, media_type, settings)
        try:
            info = probe() if probed is None or key is None else probed.get(key, probe)
            good.append(_medium(media_type, item, info))
        except MediaError as error:
            problems.add(error.code, error.message)
    return good, problems.listed()


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
            require_as_scanned(medium, decode_of_record(medium, root, settings, embedded, access)[0])
        except MediaError as error:
            problems.add(error.code, error.message)
    return problems.listed()


def decode_of_record(
    medium: Medium,
    root: Location,
    settings: MediaSettings,
    embedded: Mapping[str, bytes],
    access: MediaAccess = LOCAL_MEDIA,
) -> tuple[MediaInfo, NDArray[np.uint8]]:
    """Decode a medium of a record: its info, and its stored frames (F, 3, H, W) uint8.

    Raises:
        MediaError: it cannot be decoded.
    """
    record = _RecordMedia(root, settings.max_source_bytes, embedded, access)
    source = record.source(medium, medium.media_type)
    return sandbox().decode(source, medium.media_type, *_settings_for(medium, settings))


def decode_medium(
    medium: Medium, location: MediaLocation, settings: MediaSettings
) -> tuple[MediaInfo, NDArray[np.uint8]]:
    """Decode a medium of a measured sample: its info, and its stored frames (F, 3, H, W) uint8."""
    source = location.source(medium, settings.max_source_bytes)
    return sandbox().decode(source, medium.media_type, *_settings_for(medium, settings))


def media_key(medium: Medium, location: MediaLocation, settings: MediaSettings) -> bytes:
    """A key of 16 bytes for the frames of a medium: its location, and the settings that it is decoded with."""
    is_inside = any(span is not None for _, span, _ in _files(medium))
    key = (
        location_key(location.root),
        str(location.embedded) if is_inside else None,
        (medium.media_type, medium.name, medium.span, medium.frames),
        _settings_for(medium, settings),
    )
    return xxhash.xxh3_128_digest(msgspec.msgpack.encode(key))


def require_as_scanned(medium: Medium, info: MediaInfo) -> None:
    """Check that a decoded medium is what the scan saw.

    Raises:
        MediaError: its grid or its rate differs.
    """
    if (info.grid, info.second_per_grid_t) != (medium.grid, medium.second_per_grid_t):
        raise MediaError(
            ReasonCode.MEDIA_UNREADABLE,
            f"{medium.name!r} decodes to a grid of {tuple(info.grid)} at {info.second_per_grid_t} s a step, but its "
            f"header promised {tuple(medium.grid)} at {medium.second_per_grid_t} s; the file changed after it was "
            "scanned (--retry-media scans it again), or its header is wrong",
        )


def _medium(media_type: int, item: MediaItem, info: MediaInfo) -> Medium:
    return Medium(
        media_type=media_type,
        name=item.name,
        grid=info.grid,
        height=info.height,
        width=info.width,
        second_per_grid_t=info.second_per_grid_t,
        backend=info.backend,
        frames=tuple(FrameFile(name) for name in item.frames),
        settings=item.settings,
    )


def _source(item: MediaItem | Medium, media_type: int, open_file: Callable[[str, int], MediaSource]) -> MediaSource:
    """The source of a medium, from a function that opens one file of a kind."""
    if not item.frames:
        return open_file(item.name, media_type)
    names = [frame if isinstance(frame, str) else frame.name for frame in item.frames]
    return frame_list(item.name, (open_file(name, MEDIA_IMAGE) for name in check_frames(item.name, names)))


def _files(medium: Medium) -> list[tuple[str, tuple[int, int] | None, int]]:
    """Name, span and kind of every file of a medium."""
    if medium.frames:
        return [(frame.name, frame.span, MEDIA_IMAGE) for frame in medium.frames]
    return [(medium.name, medium.span, medium.media_type)]


def _settings_for(medium: Medium, settings: MediaSettings) -> tuple[MediaSettings, ItemSettings]:
    """The settings of the build and of the medium, with the bound of one that was shrunk."""
    item = medium.settings or NO_ITEM_SETTINGS
    if medium.max_pixels is None:
        return settings, item
    low, high = ("min_pixels", "max_pixels")
    if medium.media_type == MEDIA_VIDEO:
        low, high = ("video_min_frame_pixels", "video_max_frame_pixels")
    shrunk = {low: FACTOR**2, high: medium.max_pixels, "video_total_pixels": None}
    return msgspec.structs.replace(settings, **shrunk), item.without_size()
