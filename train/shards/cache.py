"""Remote bins on a local disk: a folder of files, one a bin, that holds no more than a limit.

Key and bytes of a bin -> the bytes again, later, in any process. The least recently used bins go first. Ranks of a
node may share a folder: files appear whole (written beside, synced, renamed), and who reads one keeps it open while
another process removes it. A process that is killed leaves at most a temporary file, which a later one removes.

The key is that of the contents (SHA-256 of the shard, offset, length), so bins of another build are never mistaken.
A folder that holds other files too is no danger to them: only names that a cache gives are counted and removed.

Cost: a hit is one read and one change of a time stamp; a new bin is one synced write and one short lock. When the
folder is full it is listed once, and a tenth of the limit is freed.
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
"""A temporary file this old belongs to a process that was killed."""

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
        """Describe a cache; the folder is made with the first bin.

        Args:
            folder: best one that holds nothing else.
            max_bytes: of all bins together.

        Raises:
            ConfigError: the limit is not positive.
        """
        if max_bytes < 1:
            raise ConfigError(f"a cache of {max_bytes} bytes; allowed: 1 or more.")
        self._folder = folder
        self._max_bytes = max_bytes
        self._gave_up = False

    def read(self, key: str, out: memoryview) -> bool:
        """Fill ``out`` with a bin; False where it is not here, or not whole."""
        path = self._path(key)
        try:
            with path.open("rb", buffering=0) as file:
                got = 0
                while got < len(out) and (count := file.readinto(out[got:])):
                    got += count
                whole = got == len(out) and not file.read(1)
        except FileNotFoundError:
            return False
        except OSError as error:
            logger.warning("%s cannot be read (%s): its bin is fetched again", path, error.strerror or error)
            return False
        if not whole:
            self.remove(key)
            return False
        with suppress(OSError):  # removed by another process since it was opened, or of a cache that is only read
            os.utime(path)
        return True

    def write(self, key: str, data: memoryview) -> None:
        """Keep a bin, at the expense of those not used for longest.

        Bins larger than the limit are not kept; a folder that cannot be written to is said once and then left alone.
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
                with self._locked():  # who lists the folder meanwhile might see neither name
                    os.replace(temporary, path)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        except OSError as error:
            self._gave_up = True
            logger.warning(
                "the cache %s cannot be written to (%s): bins are no longer kept there",
                self._folder,
                error.strerror or error,
            )

    def remove(self, key: str) -> None:
        """Forget a bin that turned out to be damaged; in a cache that is only read it stays."""
        with suppress(OSError):
            self._path(key).unlink()

    def size(self) -> int:
        """Bytes of all bins, those being written included, by a look at every file."""
        return sum(size for _, size, _ in self._files())

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / key

    @contextmanager
    def _locked(self) -> Iterator[None]:
        with (self._folder / _LOCK_FILE).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield  # closing the file unlocks it, however the process ends

    def _make_room(self, num_bytes: int) -> bool:
        """Reserve bytes, or find that bins being written leave no room; the lock is held.

        The noted size is never below the true one: bins are noted before they are written, and what a killed process
        or a second copy of a bin notes in vain is put right by the next look at the files.
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
        """Time of last use, size and path of every bin, those being written included; stale temporary files go."""
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
    """What a folder holds; nothing where there is no folder."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []
