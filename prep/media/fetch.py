"""Media behind URLs, fetched ahead of their use by threads.

Input: media that will be wanted, in order. Output: sources: pictures in memory, clips and large pictures as temporary
files, of a picture that is only probed its first 128 KiB (all of it where its format keeps what is needed elsewhere).
Fetched and not yet done with are at most :data:`_MAX_BYTES_AHEAD` bytes, or one larger medium; at most
:data:`~storage.request.MAX_REQUESTS` requests are under way.

Cost: two requests a medium (what it is, its bytes), one more for each further 16 MiB.
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
from pathlib import Path
from typing import TypeVar

import storage
from prep.media.access import Wanted, local_media
from prep.media.paths import check_size, media_url
from prep.media.source import Beginning, MediaSource
from schemas.annotation import ReasonCode
from schemas.bins import MEDIA_IMAGE
from schemas.errors import ConfigError, MediaError
from storage.request import MAX_REQUESTS
from storage.urls import Url

T = TypeVar("T")

_HEAD_BYTES = 128 << 10
_IN_MEMORY_BYTES = 32 << 20
_MAX_BYTES_AHEAD = 128 << 20
_MAX_MEDIA_AHEAD = 64
_MAX_ITEMS_AHEAD = 32

_KEPT_ELSEWHERE = re.compile(rb"\x89PNG|RIFF.{4}WEBP|.{4}ftyp|II[*+]\0|MM\0[*+]", re.DOTALL)
"""How formats begin that can be probed from the whole file only: PNG may hold its orientation behind its pixels, TIFF
its header; Pillow's readers of WebP and AVIF take all."""


class _Fetched:
    """A medium that is being fetched, or was.

    Attributes:
        wanted: the medium.
        source: what comes of it.
        num_items: items ahead, or at hand, that want it.
        num_bytes: what it holds of the bytes that may be held.
        path: its temporary file, if it has one.
        is_claimed: whether somebody fetches it.
        is_awaited: whether an item cannot go on without it.
        is_dropped: whether nobody wants it any more.
    """

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.source: Future[MediaSource] = Future()
        self.num_items = 0
        self.num_bytes = 0
        self.path: Path | None = None
        self.is_claimed = False
        self.is_awaited = False
        self.is_dropped = False


class _StoppedError(Exception):
    """Nobody waits for the medium any more."""


class RemoteMedia:
    """Media below URLs (and below folders, where roots of both kinds are mixed).

    Args:
        beginnings: whether the first bytes of a picture are enough.
        scratch: folder for temporary files; made when it is needed, removed at the end of the block.
    """

    def __init__(self, *, beginnings: bool, scratch: Path) -> None:
        self._beginnings = beginnings
        self._scratch = scratch
        self._local = local_media()
        self._fetched: dict[Wanted, _Fetched] = {}
        self._waiting: queue.SimpleQueue[_Fetched | None] = queue.SimpleQueue()
        self._num_threads = 0
        self._num_files = itertools.count()
        self._stop_event = threading.Event()
        self._changed = threading.Condition()
        self._held_bytes = 0

    def __enter__(self) -> RemoteMedia:
        return self

    def __exit__(self, *_error: object) -> None:
        """Stop the threads after their present requests, and remove the temporary files."""
        with self._changed:
            self._stop_event.set()
            self._changed.notify_all()
        for _ in range(self._num_threads):
            self._waiting.put(None)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def along(self, items: Iterable[T], wanted: Callable[[T], Iterable[Wanted]]) -> Iterator[T]:
        """See :class:`~prep.media.access.MediaAccess`."""
        ahead: deque[tuple[T, list[_Fetched]]] = deque()
        num_media = 0
        for item in items:
            media = [self._ahead(each) for each in dict.fromkeys(wanted(item)) if isinstance(each.root, Url)]
            ahead.append((item, media))
            num_media += len(media)
            while num_media > _MAX_MEDIA_AHEAD or len(ahead) > _MAX_ITEMS_AHEAD:
                num_media -= len(ahead[0][1])
                yield from self._at_hand(*ahead.popleft())
        while ahead:
            yield from self._at_hand(*ahead.popleft())

    def source(self, wanted: Wanted) -> MediaSource:
        """See :class:`~prep.media.access.MediaAccess`."""
        if not isinstance(wanted.root, Url):
            return self._local.source(wanted)
        job = self._fetched.setdefault(wanted, _Fetched(wanted))
        with self._changed:
            job.is_awaited = True
            is_mine, job.is_claimed = not job.is_claimed, True
            self._changed.notify_all()
        if is_mine:
            # Not left to the threads: all of them may be waiting for room.
            self._run(job)
        return job.source.result()

    def whole(self, wanted: Wanted) -> MediaSource:
        """See :class:`~prep.media.access.MediaAccess`."""
        source = self.source(wanted)
        if source.beginning is None or not isinstance(wanted.root, Url):
            return source
        url = media_url(wanted.root, wanted.name)
        start = source.beginning
        rest = storage.read_range(url, len(start.data), start.num_bytes, self._stop_event)
        return MediaSource(wanted.name, data=start.data + rest)

    def _ahead(self, wanted: Wanted) -> _Fetched:
        """Let a thread fetch a medium for one item more."""
        job = self._fetched.get(wanted)
        if job is None:
            job = self._fetched[wanted] = _Fetched(wanted)
            if self._num_threads < MAX_REQUESTS:
                self._num_threads += 1
                # Not a pool: its threads would be waited for at exit, a stalled request to its end.
                threading.Thread(target=self._work, name="media-fetch", daemon=True).start()
            self._waiting.put(job)
        job.num_items += 1
        return job

    def _at_hand(self, item: T, media: list[_Fetched]) -> Iterator[T]:
        """Hand out an item; afterwards, drop what no other one wants."""
        yield item
        for job in media:
            job.num_items -= 1
        for job in [job for job in self._fetched.values() if not job.num_items]:
            del self._fetched[job.wanted]
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

    def _run(self, job: _Fetched) -> None:
        try:
            job.source.set_result(self._fetch(job))
        except Exception as error:  # noqa: BLE001 - handed to whoever asks for the medium
            job.source.set_exception(error)

    def _fetch(self, job: _Fetched) -> MediaSource:
        wanted = job.wanted
        assert isinstance(wanted.root, Url)
        url = media_url(wanted.root, wanted.name)
        try:
            stored = storage.stat(url, self._stop_event)
            check_size(wanted.name, stored.num_bytes, wanted.max_bytes)
            size = stored.num_bytes
            if wanted.media_type == MEDIA_IMAGE and self._beginnings:
                size = min(size, _HEAD_BYTES)
            elif wanted.media_type != MEDIA_IMAGE or size > _IN_MEMORY_BYTES:
                return self._to_file(job, url, size)
            self._hold(job, size)
            data = storage.read_range(url, 0, size, self._stop_event)
            if size < stored.num_bytes and _KEPT_ELSEWHERE.match(data) and stored.num_bytes <= _IN_MEMORY_BYTES:
                self._hold(job, stored.num_bytes - size)
                data += storage.read_range(url, size, stored.num_bytes, self._stop_event)
        except ConfigError as error:
            raise _of_medium(wanted, error) from error
        if len(data) < stored.num_bytes:
            return MediaSource(wanted.name, beginning=Beginning(data, stored.num_bytes))
        return MediaSource(wanted.name, data=data)

    def _to_file(self, job: _Fetched, url: Url, num_bytes: int) -> MediaSource:
        self._hold(job, num_bytes)
        self._scratch.mkdir(parents=True, exist_ok=True)
        # Video libraries look at the ending.
        path = self._scratch / f"{next(self._num_files)}{url.suffix}"
        storage.download(url, path, self._stop_event)
        with self._changed:
            job.path = path
            if not job.is_dropped:
                return MediaSource(job.wanted.name, path)
        path.unlink(missing_ok=True)
        raise _StoppedError

    def _hold(self, job: _Fetched, num_bytes: int) -> None:
        """Wait until there is room for so many bytes; for a medium that is awaited, there always is."""

        def may_go_on() -> bool:
            has_room = self._held_bytes + num_bytes <= _MAX_BYTES_AHEAD
            return has_room or job.is_awaited or job.is_dropped or self._stop_event.is_set()

        with self._changed:
            self._changed.wait_for(may_go_on)
            if job.is_dropped or self._stop_event.is_set():
                raise _StoppedError
            job.num_bytes += num_bytes
            self._held_bytes += num_bytes


def _of_medium(wanted: Wanted, error: ConfigError) -> MediaError | ConfigError:
    """What a final answer of the store says of a medium. Whether the store as such refuses is asked once more:
    credentials that expire during a build are no fault of the medium.
    """
    assert isinstance(wanted.root, Url)
    if isinstance(error, storage.FolderError):
        return MediaError(ReasonCode.UNSUPPORTED_MEDIA, f"{wanted.name!r} is not a regular file")
    if isinstance(error, storage.NotThereError):
        return MediaError(ReasonCode.MEDIA_MISSING, f"{wanted.name!r} does not exist below the media root")
    storage.check_folder(wanted.root)
    return MediaError(ReasonCode.MEDIA_UNREADABLE, f"{wanted.name!r} cannot be read: the store refuses it")
