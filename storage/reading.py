"""Files on this machine and behind URLs: their size and identity, and their bytes.

Every answer is checked against the size that the store reports. Large files are downloaded in pieces, so that a fault
repeats one piece. Local files are read by position, not mapped: a map of a file that is then truncated kills the
process.

Cost: one request for size and identity (:func:`stat`), one for a range, one for each :data:`PIECE_BYTES` of a download.
A local range is one system call, or with a digest one for each half MiB, while its bytes are in the processor's cache.
"""

from __future__ import annotations

import io
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, Protocol, TypeVar

from storage.errors import (
    FolderError,
    RefusedError,
    ShortReadError,
    StorageError,
)
from storage.files import naming, temporary_path
from storage.request import MAX_REQUESTS, RetryPolicy, file_system, retry, time_limit
from storage.urls import Location, Url

logger = logging.getLogger(__name__)

T = TypeVar("T")
U = TypeVar("U")

PIECE_BYTES = 16 << 20
"""Most bytes of a download that are requested at once."""

_DIGEST_BYTES = 1 << 19
"""Bytes of a local file read at once where a digest follows: they are then still in the processor's cache."""

_MAX_DOWNLOADS = 3
"""Attempts to download a file that changes meanwhile."""

_TAGS = ("ETag", "etag", "generation", "md5Hash", "blob_id", "Content-MD5", "Digest", "checksum")
_TIMES = ("LastModified", "last_modified", "Last-Modified", "updated", "modified", "mtime", "created")
"""Fields in which fsspec reports the identity of a file's contents, or its time; the first one present counts."""


class Digest(Protocol):
    """A checksum that is updated piece by piece."""

    def update(self, data: memoryview, /) -> None:
        """Add the next bytes."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A file as its store knows it.

    Attributes:
        num_bytes: size.
        tag: changes with the contents: an ETag, a generation, a hash, or the time of the last change. Empty where the
            store reports none.
    """

    num_bytes: int
    tag: str


def stat(url: Url, stop_event: threading.Event | None = None) -> Stored:
    """Size and identity of a file.

    Args:
        url: of the file.
        stop_event: once set, no further attempt is made.

    Raises:
        NotThereError: it does not exist; :class:`FolderError` if it is a folder.
        RefusedError: the credentials are wrong or missing, or the store does not report sizes.
        StorageError: the store does not answer.
    """
    return retry(lambda: ask(url)[0], url, stop_event=stop_event)


def read(url: Url) -> bytes:
    """Contents of a small file.

    Raises:
        VlprepError: as :func:`stat`.
    """
    return read_range(url, 0, stat(url).num_bytes)


def read_range(url: Url, start: int, stop: int, stop_event: threading.Event | None = None) -> bytes:
    """The bytes from ``start`` up to ``stop``, which must exist.

    Args:
        url: of the file.
        start: first byte.
        stop: byte behind the last one.
        stop_event: once set, no further attempt is made.

    Raises:
        VlprepError: as :func:`stat`.
    """
    parts = [
        retry(partial(cat, url, at, min(at + PIECE_BYTES, stop)), url, stop_event=stop_event)
        for at in range(start, stop, PIECE_BYTES)
    ]
    return parts[0] if len(parts) == 1 else b"".join(parts)


def read_into(
    location: Location,
    offset: int,
    out: memoryview,
    *,
    digest: Digest | None = None,
    where: object = None,
    policy: RetryPolicy | None = None,
    stop_event: threading.Event | None = None,
) -> int:
    """Fill ``out`` with the bytes from ``offset`` on.

    Args:
        location: of the file.
        offset: first byte.
        out: where the bytes go.
        digest: updated with all bytes read, once and in order.
        where: what messages name instead of the URL.
        policy: of retries, behind a URL.
        stop_event: once set, no further attempt is made.

    Returns:
        Bytes read; fewer than ``out`` holds if the file ends.

    Raises:
        OSError: a local file does not exist, or cannot be read.
        VlprepError: as :func:`stat`.
    """
    if isinstance(location, Path):
        return _read_local(location, offset, out, digest)

    read = partial(_cat_to_end, location, offset, offset + len(out), policy)
    data = retry(read, where or location, policy=policy, stop_event=stop_event)
    out[: len(data)] = data
    if digest is not None:
        digest.update(out[: len(data)])
    return len(data)


def _read_local(path: Path, offset: int, out: memoryview, digest: Digest | None) -> int:
    got, at_once = 0, len(out) if digest is None else _DIGEST_BYTES
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for its writer
    try:
        while got < len(out) and (count := os.preadv(descriptor, [piece := out[got : got + at_once]], offset + got)):
            if digest is not None:
                digest.update(piece if count == at_once else piece[:count])
            got += count
    finally:
        os.close(descriptor)
    return got


def download(url: Url, path: Path, stop_event: threading.Event | None = None) -> Stored:
    """Download a file to ``path``, completely or not at all. A file that changes meanwhile is downloaded again.

    Raises:
        VlprepError: as :func:`stat`.
        OSError: ``path`` cannot be written.
    """
    temporary = temporary_path(path)
    try:
        for _ in range(_MAX_DOWNLOADS):
            stored = stat(url, stop_event)
            with naming(path), temporary.open("wb") as file:
                for at in range(0, stored.num_bytes, PIECE_BYTES):
                    file.write(read_range(url, at, min(at + PIECE_BYTES, stored.num_bytes), stop_event))
            if stored.num_bytes <= PIECE_BYTES or stat(url, stop_event) == stored:
                temporary.replace(path)
                return stored
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


def open_file(url: Url) -> BinaryIO:
    """A readable file whose parts are requested as they are read.

    Raises:
        VlprepError: as :func:`stat`.
    """
    return io.BufferedReader(_RangeFile(url, stat(url).num_bytes), buffer_size=1 << 20)


def in_parallel(function: Callable[[T], U], items: Iterable[T]) -> list[U]:
    """Results of a function that waits for a store, in order; :data:`MAX_REQUESTS` of them run at the same time."""
    with ThreadPoolExecutor(MAX_REQUESTS, thread_name_prefix="store") as pool:
        return list(pool.map(function, items))


def ask(url: Url, policy: RetryPolicy | None = None) -> tuple[Stored, dict[str, Any]]:
    """Size and identity of a file, and all that the store reports of it; one attempt."""
    system, path = file_system(url, policy)
    info: dict[str, Any] = system.info(path, **time_limit(system, policy))
    if info.get("type") == "directory":
        raise FolderError(f"{url} is a folder, not a file.")
    return stored_of(info) or no_size(url), info


def cat(url: Url, start: int, stop: int, policy: RetryPolicy | None = None) -> bytes:
    """A range of a file; one attempt."""
    system, path = file_system(url, policy)
    data: bytes = system.cat_file(path, start=start, end=stop, **time_limit(system, policy))
    if len(data) > stop - start:
        raise NotImplementedError(
            f"{len(data)} bytes came for a range of {stop - start}; the server does not support range requests"
        )
    if len(data) < stop - start:
        raise ShortReadError(f"the answer ended after {len(data)} of {stop - start} bytes")
    return data


def _cat_to_end(url: Url, start: int, stop: int, policy: RetryPolicy | None) -> bytes:
    """A range of a file, or what there is of it if the file ends within; one attempt."""
    try:
        return cat(url, start, stop, policy)
    except ShortReadError:
        end = ask(url, policy)[0].num_bytes
        if end >= stop:
            raise
        return cat(url, start, end, policy) if end > start else b""


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


def stored_of(info: dict[str, Any]) -> Stored | None:
    """Size and identity as fsspec reports them; None without a size."""
    if info.get("size") is None:
        return None
    tags = (f"{name}={info[name]}" for name in (*_TAGS, *_TIMES) if info.get(name) not in (None, ""))
    return Stored(int(info["size"]), next(tags, ""))


def no_size(url: Url) -> NoReturn:
    """Refuse a file whose size the store does not report."""
    raise RefusedError(f"{url}: the store does not report its size; copy it to a store that does.")
