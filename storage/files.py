"""Writing files so that a name that is there can be trusted."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NO_ROOM = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS))
"""Errors of the system for want of room, or of leave, to write."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error for want of room name the file that is being written: the system names it when it is opened only."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM and error.filename is None:
            error.filename = str(path)
        raise


def temporary_path(path: Path) -> Path:
    """A name beside ``path`` for what will be renamed to it: ``.{name}.{16 hexadecimal digits}.tmp``.

    Two attempts of one task may run at the same time, in two processes or on two machines, so each has its own.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def write_synced(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all: temporary name, sync, rename, sync of the folder."""
    temporary = temporary_path(path)
    with naming(path), temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
