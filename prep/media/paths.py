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
from collections.abc import Callable, Iterable, Sequence
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

# fmt: off
_IMAGE_SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".avif", ".jp2", ".j2k", ".ppm", ".pgm", ".qoi",
)
# fmt: on
"""Suffixes of the images in a folder that are the frames of a video. Other files in it are ignored."""

MAX_FRAMES = 1 << 14
"""Frames that a video given as images may have."""


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
    return _regular_file(name, *_resolved(root, name, resolve), max_bytes)


def _regular_file(name: str, real: str, status: os.stat_result, max_bytes: int) -> MediaSource:
    if not stat.S_ISREG(status.st_mode):
        raise MediaError(ReasonCode.UNSUPPORTED_MEDIA, f"{name!r} is not a regular file")
    check_size(name, status.st_size, max_bytes)
    return MediaSource(name, Path(real))


def resolve_frames(
    root: Path, name: str, *, max_bytes: int, resolve: Callable[[str], str] = real_folder
) -> MediaSource:
    """As :func:`resolve_media`, for a video, which can also be a folder: its images, in natural order, are the frames.

    Raises:
        MediaError: as :func:`resolve_media` of the file or of a frame; ``media_empty`` for a folder without images,
            ``media_too_large`` for one with more than :data:`MAX_FRAMES`.
    """
    real, status = _resolved(root, name, resolve)
    if not stat.S_ISDIR(status.st_mode):
        return _regular_file(name, real, status, max_bytes)
    try:
        entries = sorted(filter(_is_frame, os.listdir(real)), key=_natural_order)
    except OSError as error:
        raise _os_problem(name, error) from error
    if not entries:
        raise MediaError(
            ReasonCode.MEDIA_EMPTY,
            f"{name!r} is a folder without images; a video is a file, or a folder of the images that are its frames",
        )
    names = [f"{name.rstrip('/')}/{entry}" for entry in entries]
    return frame_list(
        name, (resolve_media(root, frame, max_bytes=max_bytes, resolve=resolve) for frame in check_frames(name, names))
    )


def frame_list(name: str, frames: Iterable[MediaSource]) -> MediaSource:
    """The source of a video that is given as the images of its frames."""
    return MediaSource(name, frames=tuple(frames))


def check_frames(name: str, frames: Sequence[str]) -> Sequence[str]:
    """The names of the frames of a video, if it has not too many.

    Raises:
        MediaError: ``media_too_large``.
    """
    if len(frames) > MAX_FRAMES:
        raise MediaError(
            ReasonCode.MEDIA_TOO_LARGE,
            f"{name!r} has {len(frames):,} frames; at most {MAX_FRAMES:,} are allowed. Leave some out",
        )
    return frames


def _is_frame(entry: str) -> bool:
    return not entry.startswith(".") and entry.lower().endswith(_IMAGE_SUFFIXES)


def _natural_order(name: str) -> tuple[list[tuple[int, str]], str]:
    """Sorts ``frame2`` before ``frame10``: runs of digits compare as numbers."""
    pieces = re.split(r"([0-9]+)", name)
    return [(int(piece), "") if index % 2 else (0, piece) for index, piece in enumerate(pieces)], name


def _resolved(root: Path, name: str, resolve: Callable[[str], str]) -> tuple[str, os.stat_result]:
    """The real path of what a name stands for, inside the root, and its status."""
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
        return real, os.stat(real)
    except OSError as error:
        raise _os_problem(name, error) from error


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
