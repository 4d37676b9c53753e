"""A cache of remote bins on a local disk: a folder of bounded size with one file per bin.

In: key and bytes of a bin. Out: the same bytes later, in any process. The least recently used bins are evicted first.
Ranks of a node may share a folder: files appear atomically (temporary name, sync, rename), and a reader keeps a file
open while another process removes it. A killed process leaves at most a temporary file, which a later one removes.

The key identifies the contents (SHA-256 of the shard, offset, length), so bins of another build are never confused.
Other files in the folder are safe: only names that the cache itself assigns are counted and removed.

Cost: a hit is one read and one update of a time stamp; a new bin is one synced write and one short lock. A full folder
is listed once, and a tenth of the limit is freed.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from schemas.errors import ConfigError

logger = logging.getLogger(__name__)

_KEEP_SHARE = 0.9
_STALE_S = 3600.0
"""A temporary file of this age belongs to a killed process."""

_LOCK_FILE = ".lock"
_SIZE_FILE = ".size"
_TEMPORARY = ".tmp-"
_FOLDER_NAME = re.compile("[0-9a-f]{2}")
_FILE_NAME = re.compile(rf"[0-9a-f]{{32}}|{re.escape(_TEMPORARY)}\w+")


def cache_key(shard_sha256: str, offset: int, num_bytes: int) -> str:
    """Name of a bin: the same wherever the shard lies."""
    return hashlib.blake2b(f"{shard_sha256} {offset} {num_bytes}".encode(), digest_size=16).hexdigest()


class BinCache:
    """A folder of bins with a size limit. Threads and processes may share it."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Describe a cache. The folder is created with the first bin.

        Args:
            folder: preferably one that holds nothing else.
            max_bytes: size limit of all bins together.

        Raises:
            ConfigError: the limit is not positive.
        """
        if max_bytes < 1:
            raise ConfigError(f"a cache of {max_bytes} bytes; allowed: 1 or more.")
        self._folder = folder
        self._max_bytes = max_bytes
        self._gave_up = False

    def read(self, key: str, out: memoryview) -> bool:
        """Fill ``out`` with a bin; False if it is missing or incomplete."""
        path = self._path(key)
        try:
            with path.open("rb", buffering=0) as file:
                got = 0
                while got < len(out) and (count := file.readinto(out[got:])):
                    got += count
                is_complete = got == len(out) and not file.read(1)
        except FileNotFoundError:
            return False
        except OSError as error:
            logger.warning(
                "%s cannot be read (%s): reading its bin from the shard again", path, error.strerror or error
            )
            return False
        if not is_complete:
            self.remove(key)
            return False
        with suppress(OSError):  # another process removed it meanwhile, or the cache is read-only
            os.utime(path)
        return True

    def write(self, key: str, data: memoryview) -> None:
        """Store a bin, evicting the least recently used ones if needed.

        A bin larger than the limit is not stored. If the folder is not writable, this warns once and stores nothing.
        """
        if self._gave_up or len(data) > self._max_bytes:
            return
        path = self._path(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked():
                if path.exists() or not self._make_room(len(data)):
                    return
                handle, temporary = tempfile.mkstemp(prefix=_TEMPORARY, dir=path.parent)
                os.truncate(handle, len(data))  # counts in full from now on
            try:
                with os.fdopen(handle, "r+b", buffering=0) as file:
                    written = 0
                    while written < len(data):
                        written += file.write(data[written:])
                    os.fdatasync(file.fileno())
                with self._locked():  # a concurrent listing might see neither name
                    os.replace(temporary, path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        except OSError as error:
            self._gave_up = True
            logger.warning(
                "the cache %s is not writable (%s): training continues without storing bins there",
                self._folder,
                error.strerror or error,
            )

    def remove(self, key: str) -> None:
        """Remove a damaged bin. In a read-only cache it stays."""
        with suppress(OSError):
            self._path(key).unlink()

    def size(self) -> int:
        """Bytes of all bins, including those being written, from the size of every file."""
        return sum(size for _, size, _ in self._files())

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / key

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self._folder / _LOCK_FILE).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield  # closing the file releases the lock, however the process ends

    def _make_room(self, num_bytes: int) -> bool:
        """Reserve bytes; False if bins being written leave no space. The lock is held.

        The recorded size is never below the true one: bins are recorded before they are written. What a killed process
        recorded but did not write is corrected by the next listing.
        """
        noted = self._noted_size()
        if noted is None or noted + num_bytes > self._max_bytes:
            noted = self._evict(num_bytes)
        if noted + num_bytes > self._max_bytes:
            return False
        temporary = self._folder / f"{_TEMPORARY}{_SIZE_FILE}"
        temporary.write_text(str(noted + num_bytes))
        os.replace(temporary, self._folder / _SIZE_FILE)
        return True

    def _noted_size(self) -> int | None:
        try:
            noted = int((self._folder / _SIZE_FILE).read_text())
        except (FileNotFoundError, ValueError):
            return None
        return noted if noted >= 0 else None

    def _evict(self, num_bytes: int) -> int:
        """Remove bins, oldest first, until ``num_bytes`` fit; returns the size of what stays."""
        files = sorted(self._files())
        size = sum(size for _, size, _ in files)
        if size + num_bytes <= self._max_bytes:
            return size
        for _, of_file, path in files:
            if size + num_bytes <= _KEEP_SHARE * self._max_bytes:
                break
            if not path.name.startswith(_TEMPORARY):
                path.unlink(missing_ok=True)
                size -= of_file
        return size

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """Time of last use, size and path of every bin, unfinished ones included; removes stale temporary files."""
        now = time.time()
        folders = [entry.path for entry in _entries(self._folder) if _FOLDER_NAME.fullmatch(entry.name)]
        for entry in (entry for folder in folders for entry in _entries(folder) if _FILE_NAME.fullmatch(entry.name)):
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            if not stat.S_ISREG(status.st_mode):
                continue
            if entry.name.startswith(_TEMPORARY) and now - status.st_mtime > _STALE_S:
                Path(entry.path).unlink(missing_ok=True)
            else:
                yield status.st_mtime, status.st_size, Path(entry.path)


def _entries(folder: str | Path) -> list[os.DirEntry[str]]:
    """Entries of a folder; none if it does not exist."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []
