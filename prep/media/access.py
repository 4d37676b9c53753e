"""Access to media for the scan and the write step, and media below folders.

In: a :class:`MediaRequest`. Out: its :class:`~prep.media.source.MediaSource`. A step iterates over its records or bins
through :meth:`~MediaAccess.prefetch`, which tells the access what comes next. Below folders this only resolves names;
:mod:`prep.media.fetch` downloads media behind URLs ahead of their use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol, TypeVar

from prep.media.paths import real_folder, resolve_frames, resolve_media
from prep.media.source import MediaSource
from prep.media.suggestions import Suggester
from schemas.annotation import ReasonCode
from schemas.bins import MEDIA_VIDEO
from schemas.errors import MediaError
from storage.urls import Location

T = TypeVar("T")

_MAX_FOLDERS = 65536


@dataclass(frozen=True, slots=True)
class MediaRequest:
    """A medium as an annotation names it.

    Attributes:
        root: folder or URL that holds it.
        name: in the annotation.
        media_type: 0 image, 1 video.
        max_bytes: a larger file is rejected before it is opened or downloaded.
    """

    root: Location
    name: str
    media_type: int
    max_bytes: int


class MediaAccess(Protocol):
    """What a step of the build needs to read its media."""

    def prefetch(self, items: Iterable[T], requests: Callable[[T], Iterable[MediaRequest]]) -> Iterator[T]:
        """Yield the items; while one is being processed, the media of the next ones are downloaded.

        Args:
            items: records, bins or other units of work.
            requests: the media of an item.
        """
        ...

    def source(self, request: MediaRequest) -> MediaSource:
        """The encoded bytes of a medium, or its first part; valid until the item is done.

        Raises:
            MediaError: it is missing, empty, too large, unreadable, or outside the root.
            StorageError: the store does not answer. The medium is not at fault.
        """
        ...

    def complete(self, request: MediaRequest) -> MediaSource:
        """All bytes of a medium whose first part was not enough."""
        ...


class LocalMedia:
    """Media below folders.

    Args:
        resolve: real path of a folder.
    """

    def __init__(self, resolve: Callable[[str], str] = real_folder) -> None:
        self._resolve = resolve
        self._suggester = Suggester(resolve)

    def prefetch(self, items: Iterable[T], requests: Callable[[T], Iterable[MediaRequest]]) -> Iterator[T]:
        """See :class:`MediaAccess`."""
        return iter(items)

    def source(self, request: MediaRequest) -> MediaSource:
        """See :class:`MediaAccess`."""
        if not isinstance(request.root, Path):
            raise TypeError(f"{request.root} is not a folder")
        resolve = resolve_frames if request.media_type == MEDIA_VIDEO else resolve_media
        try:
            return resolve(request.root, request.name, max_bytes=request.max_bytes, resolve=self._resolve)
        except MediaError as error:
            if error.code is not ReasonCode.MEDIA_MISSING:
                raise
            near = self._suggester.suggest(request.root, request.name)
            if near is None:
                raise
            raise MediaError(error.code, f"{error.message}; did you mean {near}?") from error

    def complete(self, request: MediaRequest) -> MediaSource:
        """See :class:`MediaAccess`."""
        return self.source(request)

    def __enter__(self) -> LocalMedia:
        return self

    def __exit__(self, *_: object) -> None:
        return


LOCAL_MEDIA = LocalMedia()


def local_media() -> LocalMedia:
    """Access that resolves each folder once. Use it for one task only: links may change later."""
    return LocalMedia(lru_cache(maxsize=_MAX_FOLDERS)(real_folder))
