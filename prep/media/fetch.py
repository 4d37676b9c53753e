"""Media behind URLs, downloaded by threads ahead of their use.

In: requests, in the order of their use. Out: sources. Images are held in memory, videos and large
images in temporary files. For an image that is only probed, the first 128 KiB are fetched, or the complete file if its
format needs it. At most :data:`_MAX_BYTES_AHEAD` bytes, or one larger medium, are downloaded and not yet released. At
most :data:`~storage.request.MAX_REQUESTS` requests are in flight.

Cost: two requests per medium (its size, its bytes), one more for each further 16 MiB.
"""

from __future__ import annotations

import itertools
import queue
import re
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

import storage
from prep.media.access import MediaAccess, MediaRequest, local_media
from prep.media.paths import IS_MISSING, check_size, media_url
from prep.media.source import Beginning, MediaSource
from schemas.annotation import ReasonCode
from schemas.bins import MEDIA_IMAGE, MEDIA_VIDEO
from schemas.errors import ConfigError, MediaError
from storage.request import MAX_REQUESTS
from storage.urls import Location, Url

T = TypeVar("T")

_HEAD_BYTES = 128 << 10
_IN_MEMORY_BYTES = 32 << 20
_MAX_BYTES_AHEAD = 128 << 20
_MAX_MEDIA_AHEAD = 64
_MAX_ITEMS_AHEAD = 32

_KEPT_ELSEWHERE = re.compile(rb"\x89PNG|RIFF.{4}WEBP|.{4}ftyp|II[*+]\0|MM\0[*+]", re.DOTALL)
"""First bytes of formats that can be probed only from the complete file: PNG may store its orientation behind the
pixels, TIFF its header; Pillow's readers of WebP and AVIF need all bytes."""


class _Download:
    """The download of a medium, and its result.

    Attributes:
        request: the medium.
        source: the result.
        num_items: items that still need it.
        num_bytes: its share of the bytes held.
        path: its temporary file, if it has one.
        is_claimed: whether a thread downloads it.
        is_awaited: whether an item is blocked on it.
        is_dropped: whether no item needs it any more.
    """

    def __init__(self, request: MediaRequest) -> None:
        self.request = request
        self.source: Future[MediaSource] = Future()
        self.num_items = 0
        self.num_bytes = 0
        self.path: Path | None = None
        self.is_claimed = False
        self.is_awaited = False
        self.is_dropped = False


class _StoppedError(Exception):
    """No item needs the medium any more."""


class RemoteMedia:
    """Media below URLs (and below folders, where roots of both kinds are mixed).

    Args:
        beginnings: whether the first bytes of an image are enough.
        scratch: folder for temporary files; created when needed, removed at the end of the block.
    """

    def __init__(self, *, beginnings: bool, scratch: Path) -> None:
        self._beginnings = beginnings
        self._scratch = scratch
        self._local = local_media()
        self._downloads: dict[MediaRequest, _Download] = {}
        self._waiting: queue.SimpleQueue[_Download | None] = queue.SimpleQueue()
        self._num_threads = 0
        self._num_files = itertools.count()
        self._stop_event = threading.Event()
        self._changed = threading.Condition()
        self._held_bytes = 0

    def __enter__(self) -> RemoteMedia:
        return self

    def __exit__(self, *_error: object) -> None:
        """Stop the threads after their current requests, and remove the temporary files."""
        with self._changed:
            self._stop_event.set()
            self._changed.notify_all()
        for _ in range(self._num_threads):
            self._waiting.put(None)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def prefetch(self, items: Iterable[T], requests: Callable[[T], Iterable[MediaRequest]]) -> Iterator[T]:
        """See :class:`~prep.media.access.MediaAccess`."""
        ahead: deque[tuple[T, list[_Download]]] = deque()
        num_media = 0
        for item in items:
            media = [self._ahead(each) for each in dict.fromkeys(requests(item)) if isinstance(each.root, Url)]
            ahead.append((item, media))
            num_media += len(media)
            while num_media > _MAX_MEDIA_AHEAD or len(ahead) > _MAX_ITEMS_AHEAD:
                num_media -= len(ahead[0][1])
                yield from self._at_hand(*ahead.popleft())
        while ahead:
            yield from self._at_hand(*ahead.popleft())

    def source(self, request: MediaRequest) -> MediaSource:
        """See :class:`~prep.media.access.MediaAccess`."""
        if not isinstance(request.root, Url):
            return self._local.source(request)
        job = self._downloads.setdefault(request, _Download(request))
        with self._changed:
            job.is_awaited = True
            is_mine, job.is_claimed = not job.is_claimed, True
            self._changed.notify_all()
        if is_mine:
            # The threads may all be waiting for free memory.
            self._run(job)
        return job.source.result()

    def complete(self, request: MediaRequest) -> MediaSource:
        """See :class:`~prep.media.access.MediaAccess`."""
        source = self.source(request)
        if source.beginning is None or not isinstance(request.root, Url):
            return source
        url = media_url(request.root, request.name)
        start = source.beginning
        rest = storage.read_range(url, len(start.data), start.num_bytes, self._stop_event)
        return MediaSource(request.name, data=start.data + rest)

    def _ahead(self, request: MediaRequest) -> _Download:
        """Have a thread download a medium for one more item."""
        job = self._downloads.get(request)
        if job is None:
            job = self._downloads[request] = _Download(request)
            if self._num_threads < MAX_REQUESTS:
                self._num_threads += 1
                # Not a pool: the interpreter would wait at exit for its threads, and so for a stalled request.
                threading.Thread(target=self._work, name="media-fetch", daemon=True).start()
            self._waiting.put(job)
        job.num_items += 1
        return job

    def _at_hand(self, item: T, media: list[_Download]) -> Iterator[T]:
        """Yield an item; afterwards drop the media that no other item needs."""
        yield item
        for job in media:
            job.num_items -= 1
        for job in [job for job in self._downloads.values() if not job.num_items]:
            del self._downloads[job.request]
            with self._changed:
                job.is_dropped = True
                self._held_bytes -= job.num_bytes
                self._changed.notify_all()
            if job.path is not None:
                job.path.unlink(missing_ok=True)

    def _work(self) -> None:
        while (job := self._waiting.get()) is not None:
            with self._changed:
                is_mine, job.is_claimed = not job.is_claimed, True
            if is_mine:
                self._run(job)

    def _run(self, job: _Download) -> None:
        try:
            job.source.set_result(self._fetch(job))
        except Exception as error:  # noqa: BLE001 - raised again where the medium is used
            job.source.set_exception(error)

    def _fetch(self, job: _Download) -> MediaSource:
        request = job.request
        assert isinstance(request.root, Url)
        url = media_url(request.root, request.name)
        try:
            stored = storage.stat(url, self._stop_event)
            check_size(request.name, stored.num_bytes, request.max_bytes)
            size = stored.num_bytes
            if request.media_type == MEDIA_IMAGE and self._beginnings:
                size = min(size, _HEAD_BYTES)
            elif request.media_type != MEDIA_IMAGE or size > _IN_MEMORY_BYTES:
                return self._to_file(job, url, size)
            self._reserve(job, size)
            data = storage.read_range(url, 0, size, self._stop_event)
            if size < stored.num_bytes and _KEPT_ELSEWHERE.match(data) and stored.num_bytes <= _IN_MEMORY_BYTES:
                self._reserve(job, stored.num_bytes - size)
                data += storage.read_range(url, size, stored.num_bytes, self._stop_event)
        except ConfigError as error:
            raise _of_medium(request, error) from error
        if len(data) < stored.num_bytes:
            return MediaSource(request.name, beginning=Beginning(data, stored.num_bytes))
        return MediaSource(request.name, data=data)

    def _to_file(self, job: _Download, url: Url, num_bytes: int) -> MediaSource:
        self._reserve(job, num_bytes)
        self._scratch.mkdir(parents=True, exist_ok=True)
        # Video libraries look at the suffix.
        path = self._scratch / f"{next(self._num_files)}{url.suffix}"
        storage.download(url, path, self._stop_event)
        with self._changed:
            job.path = path
            if not job.is_dropped:
                return MediaSource(job.request.name, path)
        path.unlink(missing_ok=True)
        raise _StoppedError

    def _reserve(self, job: _Download, num_bytes: int) -> None:
        """Wait until the bytes fit into the budget. An awaited medium never waits."""

        def may_proceed() -> bool:
            has_room = self._held_bytes + num_bytes <= _MAX_BYTES_AHEAD
            return has_room or job.is_awaited or job.is_dropped or self._stop_event.is_set()

        with self._changed:
            self._changed.wait_for(may_proceed)
            if job.is_dropped or self._stop_event.is_set():
                raise _StoppedError
            job.num_bytes += num_bytes
            self._held_bytes += num_bytes


def _of_medium(request: MediaRequest, error: ConfigError) -> MediaError | ConfigError:
    """What a final answer of the store means for a medium.

    The root is checked once more: credentials that expire during a build are not the medium's fault.
    """
    assert isinstance(request.root, Url)
    if isinstance(error, storage.FolderError):
        if request.media_type == MEDIA_VIDEO:
            return MediaError(
                ReasonCode.UNSUPPORTED_MEDIA,
                f"{request.name!r} is a folder; of a video below a URL, name the images that are its frames in a list",
            )
        return MediaError(ReasonCode.UNSUPPORTED_MEDIA, f"{request.name!r} is not a regular file")
    if isinstance(error, storage.NotThereError):
        return MediaError(ReasonCode.MEDIA_MISSING, f"{request.name!r} {IS_MISSING}")
    storage.check_folder(request.root)
    return MediaError(ReasonCode.MEDIA_UNREADABLE, f"{request.name!r} cannot be read: the store refuses it")


def open_media(roots: Iterable[Location], *, beginnings: bool, scratch: Path) -> AbstractContextManager[MediaAccess]:
    """Access to the media below some roots, for the duration of a ``with`` block.

    Args:
        roots: folders and URLs.
        beginnings: whether the first bytes of an image are enough (to probe it).
        scratch: folder for temporary files; created when needed, and removed.
    """
    if all(isinstance(root, Path) for root in roots):
        return local_media()
    return RemoteMedia(beginnings=beginnings, scratch=scratch)
