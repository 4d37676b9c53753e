"""Keeps media inside their root: only here does a name from an annotation become a path or a URL.

Names are literal (no URL or percent decoding, no ``~``). The real path of the file counts: an absolute path or a
symbolic link is allowed if it stays inside the root. A root that is a URL has no links; ``.``, ``..`` and double
slashes mean what they mean to a file system, and an absolute URL inside the root is allowed.
"""

from __future__ import annotations

import ast
import errno
import os
import posixpath
import re
import stat
from collections.abc import Callable
from pathlib import Path

from prep.media.source import MediaSource
from schemas.annotation import ReasonCode
from schemas.errors import MediaError
from storage.urls import Url, is_url, without_secrets

_MAX_KEY_BYTES = 1024
"""Longest key that object stores allow."""

IS_MISSING = "does not exist below the media root"
"""What a message says after the name of a missing medium."""

_MISSING = re.compile(rf"""('(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*") {IS_MISSING}""")


def real_folder(folder: str) -> str:
    """Real path of a folder."""
    return os.path.realpath(folder)


def resolve_media(root: Path, name: str, *, max_bytes: int, resolve: Callable[[str], str] = real_folder) -> MediaSource:
    """The medium ``name`` below ``root``.

    Args:
        root: folder that holds all media of the dataset.
        name: as the annotation spells it, relative to ``root``.
        max_bytes: a larger file is rejected before it is opened.
        resolve: :func:`real_folder`, or a cached version of it.

    Raises:
        MediaError: ``media_outside_root``, ``media_missing``, ``media_unreadable`` (no permission), ``media_empty``
            (0 bytes), ``unsupported_media`` (not a regular file) or ``media_too_large``.
    """
    _check_name(name)
    if "\0" in name or is_url(name):
        raise MediaError(
            ReasonCode.MEDIA_OUTSIDE_ROOT,
            f"{name!r} is not a path below the media root; download the medium and name its relative path",
        )
    path = root / name
    try:
        # A file that is not a link lies in the real folder.
        real = os.path.join(resolve(str(path.parent)), path.name)
        if path.name == ".." or os.path.islink(real):
            real = os.path.realpath(real)
        if not _is_inside(real, resolve(str(root))):
            raise MediaError(
                ReasonCode.MEDIA_OUTSIDE_ROOT, f"{name!r} leads outside the media root; move the file below the root"
            )
        status = os.stat(real)
    except OSError as error:
        raise _os_problem(name, error) from error
    if not stat.S_ISREG(status.st_mode):
        raise MediaError(ReasonCode.UNSUPPORTED_MEDIA, f"{name!r} is not a regular file")
    check_size(name, status.st_size, max_bytes)
    return MediaSource(name, Path(real))


def media_url(root: Url, name: str) -> Url:
    """The URL of the medium ``name`` below a root that is a URL.

    Args:
        root: URL that all media of the dataset lie below.
        name: as the annotation spells it, relative to ``root``, or an absolute URL below it.

    Raises:
        MediaError: ``media_outside_root``, or ``media_missing`` if no file can have such a name.
    """
    _check_name(name)
    below = root.below(name) if is_url(name) else name
    if below is None or "\0" in name:
        raise MediaError(
            ReasonCode.MEDIA_OUTSIDE_ROOT,
            f"{without_secrets(name)!r} does not lie below the media root; copy the medium there and name its relative "
            "path",
        )
    path = posixpath.normpath(below)
    if path.startswith(("/", "../")) or path == "..":
        raise MediaError(
            ReasonCode.MEDIA_OUTSIDE_ROOT, f"{name!r} leads outside the media root; move the file below the root"
        )
    if path == ".":
        raise MediaError(ReasonCode.UNSUPPORTED_MEDIA, f"{name!r} is not a regular file")
    if len(path.encode(errors="replace")) > _MAX_KEY_BYTES:
        raise MediaError(ReasonCode.MEDIA_MISSING, f"{name[:80]!r}… is longer than the name of a file can be")
    return root / path


def embedded_media(name: str, data: bytes, *, max_bytes: int) -> MediaSource:
    """The medium ``name`` that is embedded in a record.

    Raises:
        MediaError: ``media_empty`` or ``media_too_large``.
    """
    check_size(name, len(data), max_bytes)
    return MediaSource(name, data=data)


def check_size(name: str, num_bytes: int, max_bytes: int) -> None:
    """Check the size of a medium against the bounds.

    Raises:
        MediaError: ``media_empty`` or ``media_too_large``.
    """
    if num_bytes == 0:
        raise MediaError(ReasonCode.MEDIA_EMPTY, f"{name!r} has 0 bytes")
    if num_bytes > max_bytes:
        raise MediaError(
            ReasonCode.MEDIA_TOO_LARGE,
            f"{name!r} has {num_bytes:,} bytes; at most {max_bytes:,} are allowed (max_source_bytes)",
        )


def _check_name(name: str) -> None:
    if not name.strip():
        raise MediaError(
            ReasonCode.MEDIA_MISSING, "the name of a medium is empty; give a path relative to the media root"
        )


def _is_inside(path: str, folder: str) -> bool:
    """Whether a real path is a folder or lies inside it."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def missing_name(message: str) -> str | None:
    """The first name in a message that says that a medium does not exist."""
    match = _MISSING.search(message)
    return None if match is None else str(ast.literal_eval(match[1]))


def _os_problem(name: str, error: OSError) -> MediaError:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return MediaError(ReasonCode.MEDIA_MISSING, f"{name!r} {IS_MISSING}")
    if error.errno == errno.ENAMETOOLONG:
        return MediaError(ReasonCode.MEDIA_MISSING, f"{name[:80]!r}… is longer than a file name can be")
    return MediaError(ReasonCode.MEDIA_UNREADABLE, f"{name!r} cannot be read: {error.strerror}")
