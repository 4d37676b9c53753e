"""Files behind URLs: what they are, their bytes, what a folder holds.

Every answer is held against the size that the store tells. Large files travel in pieces, so that a fault costs one
piece. Cost: one request for what a file is (:func:`stat`), one for a range, one for each :data:`PIECE_BYTES` of a
download.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from storage import request
from storage.errors import (
    FolderError,
    RefusedError,
    ShortReadError,
    StorageError,
    Verdict,
    says_no_bucket,
    verdict,
)
from storage.files import naming, temporary_path
from storage.request import REQUESTS_AT_ONCE, opened, persist, time_limit
from storage.urls import Location, Url

T = TypeVar("T")
U = TypeVar("U")

PIECE_BYTES = 16 << 20
"""Most bytes that are asked for at once."""

_MAX_FETCHES = 3
"""So often a file that changes while it is being read is fetched."""

_LISTING_TIMES = 10
"""A listing may take so many times the limit of a request: it is many requests."""

_TAGS = ("ETag", "etag", "generation", "md5Hash", "blob_id", "Content-MD5", "Digest", "checksum")
_TIMES = ("LastModified", "last_modified", "Last-Modified", "updated", "modified", "mtime", "created")
"""What systems behind fsspec tell of the contents of a file, and of its time; the first that is told is used."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A file as its store knows it: size in bytes, and what changes with its contents (an ETag, a generation, a hash,
    or its time of change; empty where the store tells nothing).
    """

    num_bytes: int
    tag: str


def stat(url: Url, stopped: threading.Event | None = None) -> Stored:
    """Size and identity of a file.

    Args:
        url: of the file.
        stopped: once set, no further attempt is made.

    Raises:
        NotThereError: it does not exist; :class:`FolderError` if it is a folder.
        RefusedError: the credentials are wrong or missing, or the store does not tell sizes.
        StorageError: no answer.
    """
    return persist(lambda: ask(url)[0], url, stopped)


def read(url: Url) -> bytes:
    """Contents of a small file.

    Raises:
        VlprepError: as :func:`stat`.
    """
    return read_range(url, 0, stat(url).num_bytes)


def read_range(url: Url, start: int, stop: int, stopped: threading.Event | None = None) -> bytes:
    """The bytes from ``start`` up to ``stop``, which must exist.

    Args:
        url: of the file.
        start: first byte.
        stop: byte behind the last one.
        stopped: once set, no further attempt is made.

    Raises:
        VlprepError: as :func:`stat`.
    """
    parts = [
        persist(partial(cat, url, at, min(at + PIECE_BYTES, stop)), url, stopped)
        for at in range(start, stop, PIECE_BYTES)
    ]
    return parts[0] if len(parts) == 1 else b"".join(parts)


def download(url: Url, path: Path, stopped: threading.Event | None = None) -> Stored:
    """Fetch a file to ``path``, whole or not at all. A file that changes meanwhile is fetched again.

    Raises:
        VlprepError: as :func:`stat`.
        OSError: ``path`` cannot be written.
    """
    temporary = temporary_path(path)
    try:
        for _ in range(_MAX_FETCHES):
            found = stat(url, stopped)
            with naming(path), temporary.open("wb") as file:
                for at in range(0, found.num_bytes, PIECE_BYTES):
                    file.write(read_range(url, at, min(at + PIECE_BYTES, found.num_bytes), stopped))
            if found.num_bytes <= PIECE_BYTES or stat(url, stopped) == found:
                temporary.replace(path)
                return found
    finally:
        temporary.unlink(missing_ok=True)
    raise StorageError(f"{url} changes while it is being read. Run the command again when it is complete.")


@contextmanager
def local_copy(location: Location, folder: Path) -> Iterator[Path]:
    """A path to read a file from: the file itself, or a copy in ``folder`` that is removed afterwards.

    Raises:
        VlprepError: as :func:`stat`.
    """
    if isinstance(location, Path):
        yield location
        return
    path = folder / location.name
    download(location, path)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def listing(folder: Url) -> dict[str, Stored]:
    """The files directly in a folder, by name; none where the folder does not exist.

    Raises:
        NotThereError: the bucket does not exist.
        VlprepError: as :func:`stat`.
    """

    def entries() -> dict[str, Stored]:
        system, place = opened(folder)
        try:
            found = system.ls(place, detail=True, **_long_limit(system))
        except FileNotFoundError as error:
            # A folder of an object store is there as soon as it holds something; a bucket is there or not.
            if verdict(error) is not Verdict.MISSING or says_no_bucket(error):
                raise
            found = []
        return {_name(info["name"]): _as_stored(info, folder) for info in found if info["type"] == "file"}

    return persist(entries, folder)


def matches(pattern: Url) -> list[Url]:
    """The files that a pattern names (``*``, ``?``, ``[…]``, ``**``), in order; a plain URL names its file.

    Raises:
        VlprepError: as :func:`stat`; a pattern that names nothing gives an empty list.
    """
    system, place = opened(pattern)
    if not any(sign in place for sign in "*?[") or pattern.protocol in ("http", "https"):
        stat(pattern)
        return [pattern]

    def named() -> list[Url]:
        found = system.glob(place, detail=True, **_long_limit(system))
        return sorted(Url(system.unstrip_protocol(name)) for name, info in found.items() if info["type"] == "file")

    return persist(named, pattern)


def check_folder(folder: Url) -> None:
    """Look whether a folder can be seen and holds anything. Over HTTP there are no folders to look at.

    Raises:
        NotThereError: it holds nothing, or does not exist.
        RefusedError, StorageError: as :func:`stat`.
    """
    system, place = opened(folder)
    if folder.protocol not in ("http", "https"):
        persist(lambda: system.info(place, **time_limit(system)), folder)


def open_file(url: Url) -> BinaryIO:
    """A readable file of which a part is wanted: what is read is asked for.

    Raises:
        VlprepError: as :func:`stat`.
    """
    return io.BufferedReader(_RangeFile(url, stat(url).num_bytes), buffer_size=1 << 20)


def in_parallel(function: Callable[[T], U], items: Iterable[T]) -> list[U]:
    """Results of a function that waits for a store, in order; :data:`REQUESTS_AT_ONCE` of them at the same time."""
    with ThreadPoolExecutor(REQUESTS_AT_ONCE, thread_name_prefix="store") as pool:
        return list(pool.map(function, items))


def ask(url: Url) -> tuple[Stored, dict[str, Any]]:
    """What the store tells of a file, as it says it too; one attempt."""
    system, place = opened(url)
    info: dict[str, Any] = system.info(place, **time_limit(system))
    if info.get("type") == "directory":
        raise FolderError(f"{url} is a folder, not a file.")
    return _as_stored(info, url), info


def cat(url: Url, start: int, stop: int) -> bytes:
    """A range of a file; one attempt."""
    system, place = opened(url)
    data: bytes = system.cat_file(place, start=start, end=stop, **time_limit(system))
    if len(data) > stop - start:
        raise RefusedError(f"{url}: {len(data)} bytes came for a range of {stop - start}; the server has no ranges.")
    if len(data) < stop - start:
        raise ShortReadError(f"the answer ended after {len(data)} of {stop - start} bytes")
    return data


class _RangeFile(io.RawIOBase):
    """A file whose reads are range requests."""

    def __init__(self, url: Url, size: int) -> None:
        self._url = url
        self._size = size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        stop = max(min(self._at + len(view), self._size), self._at)
        view[: stop - self._at] = read_range(self._url, self._at, stop)
        got, self._at = stop - self._at, stop
        return got


def _as_stored(info: dict[str, Any], url: Url) -> Stored:
    if info.get("size") is None:
        raise RefusedError(f"{url}: the store does not tell how large it is; copy it to a store that does.")
    told = (f"{name}={info[name]}" for name in (*_TAGS, *_TIMES) if info.get(name) not in (None, ""))
    return Stored(int(info["size"]), next(told, ""))


def _name(place: str) -> str:
    return place.rstrip("/").rpartition("/")[2]


def _long_limit(system: Any) -> dict[str, float]:
    return time_limit(system, request.PATIENCE.timeout_s * _LISTING_TIMES)
