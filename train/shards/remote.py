"""Files of a set of shards, on a file system or behind a URL (S3, GCS, HTTP and what else fsspec knows).

A path and a range of bytes -> a buffer filled. Local files are read by position, not mapped: a map of a file that is
cut short kills the process, and a disk that hangs would stop every thread. Remote files are read by range requests,
tried again with growing pauses when they fail or stall.

Cost: one system call, or one request and one copy, a range; where a checksum is taken too, one system call for each
half MiB, which makes the checksum cheap.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol, TypeVar, Union

from schemas.errors import ConfigError

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_ASKED_AT_ONCE = 16

_PIECE_BYTES = 1 << 19
"""What is read at once where the bytes are looked at too: they are then still in the processor's cache."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """How long a remote file is asked for.

    Attributes:
        attempts: requests before giving up.
        timeout_s: after which a request without a complete answer counts as failed.
        first_delay_s: pause after the first failure; each further one is twice as long, up to ``max_delay_s``, less a
            random part of up to a half, so that ranks do not come back all at once.
        max_delay_s: longest pause.
    """

    attempts: int = 6
    timeout_s: float = 60.0
    first_delay_s: float = 0.5
    max_delay_s: float = 15.0

    def __post_init__(self) -> None:
        if self.attempts < 1 or not self.timeout_s > 0 or self.first_delay_s < 0 or self.max_delay_s < 0:
            raise ConfigError(
                f"remote reads with {self.attempts} attempts of {self.timeout_s} s, pauses of {self.first_delay_s} to "
                f"{self.max_delay_s} s; allowed: 1 or more attempts, a positive time, pauses of 0 or more."
            )

    def delay_s(self, failures: int) -> float:
        """Pause after so many failures."""
        longest = min(self.max_delay_s, self.first_delay_s * 2.0 ** (failures - 1))
        return longest * (1 - secrets.randbelow(1000) / 2000)


@dataclass(frozen=True, slots=True, order=True)
class RemotePath:
    """A URL that fsspec understands, used like a path."""

    url: str

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self.url.rstrip('/')}/{name}")

    def __str__(self) -> str:
        """The URL without a password."""
        return _without_password(self.url)

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.url.rstrip("/").rpartition("/")[2]


# A union with `|` is no type to ``isinstance`` and aliases under Python 3.10 in all places; this one is.
ShardPath = Union[Path, RemotePath]  # noqa: UP007
"""Where a file or folder of a set of shards lies."""


class Digest(Protocol):
    """A checksum that takes bytes as they come."""

    def update(self, data: memoryview, /) -> None:
        """Take the next bytes."""


class StorageError(OSError):
    """A remote file that could not be had; the message says why."""


class RefusedError(StorageError):
    """A storage that cannot do what is asked."""


_FINAL = (
    RefusedError,
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    NotImplementedError,
    ConfigError,
)
"""Answers that another attempt would not change."""

_FINAL_STATUS = frozenset({401, 403, 405, 410, 451, 501})
"""Such answers over HTTP; 404 is a FileNotFoundError."""

_NO_CREDENTIALS = frozenset({"NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError"})
"""Names of the errors by which botocore and google-auth say that they have nothing to ask with."""


def parse_path(text: str) -> ShardPath:
    """A folder, or a URL where there is a ``://``.

    Raises:
        ConfigError: there is nothing, or nothing after the ``://``.
    """
    _, mark, place = text.partition("://")
    if not (place.strip("/") if mark else text.strip()):
        raise ConfigError(f"{text!r} names no folder. Give one that `vlprep build --out` wrote, or its URL.")
    return RemotePath(text.rstrip("/")) if mark else Path(text)


def read_file(path: ShardPath, patience: Patience | None = None) -> bytes:
    """Contents of a file.

    Raises:
        OSError: it does not exist (FileNotFoundError), or cannot be read.
        ConfigError: the URL is of a kind that fsspec cannot read here.
    """
    if isinstance(path, Path):
        return path.read_bytes()
    return _persist(lambda patience: _cat(path, patience), patience or Patience())


def read_range(
    path: ShardPath,
    offset: int,
    out: memoryview,
    *,
    digest: Digest | None = None,
    patience: Patience | None = None,
    stopped: threading.Event | None = None,
) -> int:
    """Fill ``out`` with the bytes from ``offset`` on.

    Args:
        path: the file.
        offset: first byte.
        out: where the bytes go.
        digest: is given all bytes read, once and in order.
        patience: with a remote file.
        stopped: once set, no further attempt is made.

    Returns:
        Bytes read; fewer than asked for where the file ends.

    Raises:
        OSError: the file does not exist, or cannot be read.
    """
    if isinstance(path, Path):
        return _read_local(path, offset, out, digest)
    got = _persist(lambda patience: _read_remote(path, offset, out, patience), patience or Patience(), stopped)
    if digest is not None:
        digest.update(out[:got])
    return got


def file_sizes(folder: ShardPath, names: Iterable[str], patience: Patience | None = None) -> dict[str, int]:
    """Sizes of files of a folder, in bytes; a file that does not exist is left out.

    Raises:
        OSError: a size cannot be had.
    """
    if isinstance(folder, Path):
        return {name: size for name in names if (size := _local_size(folder / name)) is not None}
    patience = patience or Patience()
    # One listing tells all sizes where the storage has listings; other files are asked for one by one.
    sizes: dict[str, int] = {}
    try:
        sizes = {name: size for name, kind, size in _list(folder, patience) if kind == "file" and size is not None}
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001 - every system behind fsspec raises errors of its own
        logger.debug("%s cannot be listed: %s", folder, _describe(error))
    missing = [name for name in names if name not in sizes]
    with ThreadPoolExecutor(_MAX_ASKED_AT_ONCE, thread_name_prefix="shard-sizes") as pool:
        asked = pool.map(lambda name: _remote_size(folder / name, patience), missing)
        sizes.update((name, size) for name, size in zip(missing, asked) if size is not None)
    return sizes


def sub_folders(folder: ShardPath) -> list[ShardPath]:
    """Folders inside a folder, sorted by name, without hidden ones; none where the storage has no listings.

    Raises:
        OSError: the folder cannot be read, or a link in it leads nowhere, so that what it stands for would be left out.
    """
    if isinstance(folder, Path):
        found = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
        for entry in found:
            if entry.is_symlink() and not os.path.exists(entry):
                raise StorageError(f"{entry} is a link to {os.readlink(entry)}, which is not there")
        entries: list[ShardPath] = [entry for entry in found if entry.is_dir()]
    else:
        entries = []
        with suppress(FileNotFoundError, NotADirectoryError, NotImplementedError):
            listed = _persist(lambda patience: _list(folder, patience), Patience())
            entries = [folder / name for name, kind, _ in listed if kind == "directory"]
    return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)


def open_file(path: RemotePath) -> Any:
    """A readable, seekable binary file behind a URL: for tables of which a part is wanted."""
    system, place = _file_system(path.url)
    return system.open(place, "rb")


def _read_local(path: Path, offset: int, out: memoryview, digest: Digest | None) -> int:
    got, at_once = 0, len(out) if digest is None else _PIECE_BYTES
    descriptor = os.open(path, os.O_RDONLY)
    try:
        while got < len(out) and (count := os.preadv(descriptor, [out[got : got + at_once]], offset + got)):
            if digest is not None:
                digest.update(out[got : got + count])
            got += count
    finally:
        os.close(descriptor)
    return got


def _local_size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return None


def _read_remote(path: RemotePath, offset: int, out: memoryview, patience: Patience) -> int:
    data = _cat(path, patience, start=offset, end=offset + len(out))
    if len(data) > len(out):
        raise RefusedError(f"{len(data)} bytes came for a range of {len(out)}: the server has no range requests")
    if len(data) < len(out):
        size = _remote_size(path, patience)
        if size is not None and size >= offset + len(out):
            raise StorageError(f"the answer ended after {len(data)} of {len(out)} bytes")
    out[: len(data)] = data
    return len(data)


def _cat(path: RemotePath, patience: Patience, **limits: int) -> bytes:
    system, place = _file_system(path.url)
    data: bytes = system.cat_file(place, **limits, **_time_limit(system, patience))
    return data


def _time_limit(system: Any, patience: Patience) -> dict[str, float]:
    """With an asynchronous system, fsspec gives up on a request; others have the limit of the stream alone."""
    return {"timeout": patience.timeout_s} if system.async_impl else {}


def _remote_size(path: RemotePath, patience: Patience) -> int | None:
    def ask(patience: Patience) -> int:
        system, place = _file_system(path.url)
        try:
            size = system.info(place, **_time_limit(system, patience)).get("size")
        except FileNotFoundError:
            _cat(path, patience, start=0, end=1)  # over HTTP, every failure of `info` looks like a missing file
            raise StorageError("its size was not to be had") from None
        if size is None:
            raise RefusedError(f"the server does not tell the size of {path}")
        return int(size)

    try:
        return _persist(ask, patience)
    except FileNotFoundError:
        return None


def _list(folder: RemotePath, patience: Patience) -> list[tuple[str, str, int | None]]:
    """Name, kind (``file`` or ``directory``) and size of what a folder holds."""
    system, place = _file_system(folder.url)
    entries = system.ls(place, detail=True, **_time_limit(system, patience))
    return [(entry["name"].rstrip("/").rpartition("/")[2], entry["type"], entry.get("size")) for entry in entries]


@lru_cache(maxsize=4096)
def _file_system(url: str) -> tuple[Any, str]:
    import fsspec.core

    try:
        system, place = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ConfigError(f"{RemotePath(url)} cannot be read here: {error}. Install what it names with pip.") from error
    return system, place


def _persist(call: Callable[[Patience], T], patience: Patience, stopped: threading.Event | None = None) -> T:
    """Call until it succeeds, a final answer comes, or patience is at its end."""
    stopped = stopped or threading.Event()
    began = time.monotonic()
    failures = 0
    while True:
        try:
            return call(patience)
        except _FINAL:
            raise
        except Exception as error:  # every system behind fsspec raises errors of its own
            if getattr(error, "status", None) in _FINAL_STATUS or type(error).__name__ in _NO_CREDENTIALS:
                raise RefusedError(f"the server refuses: {_describe(error)}") from error
            failures += 1
            logger.info("attempt %d of %d failed: %s", failures, patience.attempts, _describe(error))
            if failures == patience.attempts or stopped.wait(patience.delay_s(failures)):
                raise StorageError(
                    f"no answer in {failures} attempts over {time.monotonic() - began:.1f} s, the last: "
                    f"{_describe(error)}"
                ) from error


def _describe(error: Exception) -> str:
    """Kind and message in one line, without a password."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return _without_password(text).rstrip(": ")


def _without_password(text: str) -> str:
    """A text with users and passwords of the URLs in it hidden."""
    return re.sub(r"//[^/\s]*@", "//***@", text)
