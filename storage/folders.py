"""What folders hold, here and behind URLs: names, sizes, patterns.

Cost: one listing per folder, which may be many requests; one request per file where the store has no listings.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from schemas.errors import VlprepError
from storage.errors import NotThereError, Verdict, says_no_bucket, verdict
from storage.files import regular_size
from storage.reading import Stored, in_parallel, no_size, stat, stored_of
from storage.request import file_system, retry, time_limit
from storage.urls import Location, Url

logger = logging.getLogger(__name__)

_LISTING_FACTOR = 10
"""A listing is many requests and may take this many times the timeout of one."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What a listing says of a file or folder; ``stored`` is None for folders, and where the store reports no size."""

    name: str
    is_folder: bool
    stored: Stored | None


def entries(folder: Url) -> list[Entry]:
    """The files and folders directly in a folder; none where the folder does not exist.

    Raises:
        NotThereError: the bucket does not exist.
        VlprepError: as :func:`stat`.
    """

    def attempt() -> list[dict[str, Any]]:
        system, path = file_system(folder)
        try:
            infos: list[dict[str, Any]] = system.ls(path, detail=True, **time_limit(system, factor=_LISTING_FACTOR))
        except FileNotFoundError as error:
            # A folder of an object store exists as soon as it holds something; a bucket exists or not.
            if verdict(error) is not Verdict.MISSING or says_no_bucket(error):
                raise
            return []
        return infos

    return [_entry(info, folder) for info in retry(attempt, folder)]


def listing(folder: Url) -> dict[str, Stored]:
    """The files directly in a folder, by name; none where the folder does not exist.

    Raises:
        NotThereError: the bucket does not exist.
        VlprepError: as :func:`stat`.
    """
    files = [entry for entry in entries(folder) if not entry.is_folder]
    return {entry.name: entry.stored or no_size(folder / entry.name) for entry in files}


def file_names(folder: Url) -> list[str]:
    """Names of the files directly in a folder; none where the store has no listings.

    Raises:
        VlprepError: as :func:`listing`.
    """
    return [entry.name for entry in entries(folder) if not entry.is_folder]


def file_sizes(folder: Location, names: Iterable[str]) -> dict[str, int]:
    """Sizes of files of a folder in bytes; files that do not exist are left out.

    One listing reports all sizes where the store has listings. The sizes of other files are requested one by one.

    Raises:
        OSError: a local size cannot be read, or a file is not a regular one.
        VlprepError: as :func:`stat`.
    """
    if isinstance(folder, Path):
        return {name: size for name in names if (size := _local_size(folder / name)) is not None}
    names = list(names)
    sizes: dict[str, int] = {}
    if len(names) > 1:
        try:
            sizes = {entry.name: entry.stored.num_bytes for entry in entries(folder) if entry.stored is not None}
        except VlprepError as error:
            logger.debug("%s cannot be listed: %s", folder, error)
    missing = [name for name in names if name not in sizes]
    answers = in_parallel(lambda name: _size_or_none(folder / name), missing)
    return sizes | {name: size for name, size in zip(missing, answers) if size is not None}


def sub_folders(folder: Location) -> list[Location]:
    """Folders inside a folder, sorted by name, without hidden ones; none where the store has no listings.

    Raises:
        OSError: a local folder cannot be read, or a link in it is broken, so that its target would be left out.
        VlprepError: as :func:`stat`.
    """
    folders: list[Location]
    if isinstance(folder, Path):
        paths = [path for path in folder.iterdir() if not path.name.startswith(".")]
        for path in paths:
            if path.is_symlink() and not os.path.exists(path):
                raise OSError(f"{path} is a link to {os.readlink(path)}, which does not exist")
        folders = [path for path in paths if path.is_dir()]
    else:
        try:
            names = [entry.name for entry in entries(folder) if entry.is_folder]
        except NotThereError:
            names = []
        folders = [folder / name for name in names if not name.startswith(".")]
    return sorted(folders, key=lambda child: child.name)


def matches(pattern: Url) -> list[Url]:
    """The files that a pattern names (``*``, ``?``, ``[…]``, ``**``), in order; a plain URL names its file.

    Raises:
        VlprepError: as :func:`stat`; a pattern that names nothing gives an empty list.
    """
    system, path = file_system(pattern)
    if not any(sign in path for sign in "*?[") or pattern.is_http:
        stat(pattern)
        return [pattern]

    def attempt() -> list[Url]:
        infos = system.glob(path, detail=True, **time_limit(system, factor=_LISTING_FACTOR))
        return sorted(Url(system.unstrip_protocol(name)) for name, info in infos.items() if info["type"] == "file")

    return retry(attempt, pattern)


def check_folder(folder: Url) -> None:
    """Check that a folder is visible and holds anything. HTTP has no folders to look at.

    Raises:
        NotThereError: it holds nothing, or does not exist.
        RefusedError, StorageError: as :func:`stat`.
    """
    system, path = file_system(folder)
    if not folder.is_http:
        retry(lambda: system.info(path, **time_limit(system)), folder)


def _entry(info: dict[str, Any], folder: Url) -> Entry:
    is_folder = info["type"] == "directory"
    name = info["name"].rstrip("/").rpartition("/")[2]
    return Entry(unquote(name) if folder.is_http else name, is_folder, None if is_folder else stored_of(info))


def _size_or_none(url: Url) -> int | None:
    try:
        return stat(url).num_bytes
    except NotThereError:
        return None


def _local_size(path: Path) -> int | None:
    try:
        return regular_size(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
