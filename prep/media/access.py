"""How the scan and the write step get at media: files are opened where they lie, what lies behind URLs is fetched.

Input: :class:`Wanted` media. Output: a :class:`~prep.media.source.MediaSource` for each. A step walks its records or
bins :meth:`~MediaAccess.along` the access, which learns from that what will be wanted next. Below folders it does
nothing but resolve names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol, TypeVar

from prep.media.paths import real_folder, resolve_media
from prep.media.source import MediaSource
from storage.urls import Location

T = TypeVar("T")

_MAX_FOLDERS = 65536


@dataclass(frozen=True, slots=True)
class Wanted:
    """A medium as an annotation names it.

    Attributes:
        root: folder or URL that it lies below.
        name: in the annotation.
        media_type: 0 image, 1 video.
        max_bytes: a larger one is refused before it is opened or fetched.
    """

    root: Location
    name: str
    media_type: int
    max_bytes: int


class MediaAccess(Protocol):
    """What a step of the build needs from whoever gets its media."""

    def along(self, items: Iterable[T], wanted: Callable[[T], Iterable[Wanted]]) -> Iterator[T]:
        """The items, one after the other; while one is being worked on, the media of the next are being fetched.

        Args:
            items: records, bins or what else is worked on.
            wanted: media of an item.
        """
        ...

    def source(self, wanted: Wanted) -> MediaSource:
        """The encoded bytes of a medium, or its beginning; good until the item is done.

        Raises:
            MediaError: it is missing, empty, too large, not to be read, or outside the root.
            StorageError: the store does not answer; no fault of the medium.
        """
        ...

    def whole(self, wanted: Wanted) -> MediaSource:
        """All of a medium of which the beginning was not enough."""
        ...


class LocalMedia:
    """Media below folders.

    Args:
        where: where a folder really lies.
    """

    def __init__(self, where: Callable[[str], str] = real_folder) -> None:
        self._where = where

    def along(self, items: Iterable[T], wanted: Callable[[T], Iterable[Wanted]]) -> Iterator[T]:
        """See :class:`MediaAccess`."""
        return iter(items)

    def source(self, wanted: Wanted) -> MediaSource:
        """See :class:`MediaAccess`."""
        if not isinstance(wanted.root, Path):
            raise TypeError(f"{wanted.root} is no folder")
        return resolve_media(wanted.root, wanted.name, max_bytes=wanted.max_bytes, where=self._where)

    def whole(self, wanted: Wanted) -> MediaSource:
        """See :class:`MediaAccess`."""
        return self.source(wanted)

    def __enter__(self) -> LocalMedia:
        return self

    def __exit__(self, *_: object) -> None:
        return


LOCAL_MEDIA = LocalMedia()


def local_media() -> LocalMedia:
    """Access that looks once where a folder lies; for one task, since links may lead elsewhere later."""
    return LocalMedia(lru_cache(maxsize=_MAX_FOLDERS)(real_folder))


def open_media(roots: Iterable[Location], *, beginnings: bool, scratch: Path) -> AbstractContextManager[MediaAccess]:
    """Access to the media below some roots, for the length of a ``with`` block.

    Args:
        roots: folders and URLs.
        beginnings: whether the first bytes of a picture are enough (to probe it).
        scratch: folder for what does not fit into memory; made when it is needed, and removed.
    """
    if all(isinstance(root, Path) for root in roots):
        return local_media()
    from prep.media.fetch import RemoteMedia

    return RemoteMedia(beginnings=beginnings, scratch=scratch)
