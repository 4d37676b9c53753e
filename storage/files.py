"""Local files: sizes, the user's cache folder, and atomic writes, so that a file with its final name is complete."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

NO_ROOM = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS))
"""Errors of the operating system for lack of space, or of permission to write."""

NO_LOCKS = frozenset((errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP))
"""Errors of ``flock`` on file systems without locks (Lustre without ``-o flock``, FUSE)."""

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def regular_size(path: Path) -> int:
    """Size of a regular file, or of one that a link leads to, as in the cache of the hub.

    Raises:
        OSError: it does not exist, or it is a folder, a pipe, a device or a socket. Reading these may never end.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "a special file")
        link = " (through a link)" if path.is_symlink() else ""
        raise OSError(errno.EINVAL, f"it is {kind}{link}, not a regular file", str(path))
    return status.st_size


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make an error for lack of space name the file being written. The system names it only when opening fails."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM and error.filename is None:
            error.filename = str(path)
        raise


def user_cache() -> Path:
    """The folder of what vlprep keeps for the user between commands. It may not exist.

    Raises:
        RuntimeError: the user has no home folder.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vlprep"


def temporary_path(path: Path) -> Path:
    """A name next to ``path`` for a file that will be renamed to it: ``.{name}.{16 hexadecimal digits}.tmp``.

    It is unique: two attempts of one task may run at the same time, in two processes or on two machines.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def write_synced(path: Path, data: bytes | memoryview, *, mode: int = 0o666) -> None:
    """Write a file completely or not at all: temporary name, sync, rename, sync of the folder.

    The folder is opened first, because another process may rename it as soon as it sees the file.

    Args:
        path: the file.
        data: its contents.
        mode: its permissions, before the umask.
    """
    temporary = temporary_path(path)
    with naming(path), _opened(path.parent) as folder:
        with open(temporary, "wb", opener=partial(os.open, mode=mode)) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        os.fsync(folder)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    with _opened(path) as descriptor:
        os.fsync(descriptor)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """A descriptor of a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Flush a folder, and all files and folders in it, to the disk."""
    for path in (*folder.rglob("*"), folder):
        sync(path)
