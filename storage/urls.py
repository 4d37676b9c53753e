"""URLs used like paths: an annotation file, a media root or a set of shards that is not on a file system here.

A :class:`Url` is text. It opens nothing, and its ``str`` and ``repr`` never show a password or a signature. Names are
joined to it literally, in front of a query.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Union
from urllib.parse import quote, unquote

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*(?:::[A-Za-z][A-Za-z0-9+.-]*)*://")
_LOCAL = re.compile(r"(?:file|local)://")
_USER = re.compile(r"(?<=://)[^/\s]+@")  # a password may hold "@" itself
_QUERY = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\")]*")
_HIDDEN = "***"


@dataclass(frozen=True, slots=True, order=True, repr=False)
class Url:
    """A file or folder that fsspec knows: ``s3://bucket/images``, ``gs://…``, ``hf://datasets/…``, ``https://…``."""

    url: str

    def __truediv__(self, name: str) -> Url:
        """The URL of ``name`` inside this one. Over HTTP the name is quoted, and a query stays at the end."""
        base, mark, query = self._parted()
        return Url(f"{base.rstrip('/')}/{quote(name) if self.is_http else name}{mark}{query}")

    def __str__(self) -> str:
        return without_secrets(self.url)

    def __repr__(self) -> str:
        return f"Url({str(self)!r})"

    @property
    def protocol(self) -> str:
        """What precedes ``://``, of the last URL in a chain."""
        return self.url.partition("://")[0].rpartition("::")[2]

    @property
    def root(self) -> str:
        """Protocol and bucket or host."""
        protocol, _, rest = self.url.partition("://")
        return f"{protocol}://{rest.partition('/')[0]}"

    @property
    def name(self) -> str:
        """Last part of the path."""
        last = self._parted()[0].rstrip("/").rpartition("/")[2]
        return unquote(last) if self.is_http else last

    @property
    def suffix(self) -> str:
        """Ending of the name, with its dot."""
        return Path(self.name).suffix

    @property
    def parent(self) -> Url:
        """The folder that holds this one."""
        base, mark, query = self._parted()
        return Url(base.rstrip("/").rpartition("/")[0] + mark + query)

    def below(self, other: str) -> str | None:
        """The path of the URL ``other`` relative to this one, or None if it lies outside."""
        start = self._parted()[0].rstrip("/") + "/"
        if not other.startswith(start):
            return None
        rest = other[len(start) :]
        return unquote(rest.partition("?")[0]) if self.is_http else rest

    @property
    def is_http(self) -> bool:
        """Whether it follows the rules of web addresses: names are quoted, a query may follow, there are no folders."""
        return self.protocol in ("http", "https")

    def _parted(self) -> tuple[str, str, str]:
        """URL, question mark and query. Only over HTTP does a question mark begin a query."""
        return self.url.partition("?") if self.is_http else (self.url, "", "")


# Not `Path | Url`: Python 3.10 does not accept such a union everywhere.
Location = Union[Path, Url]  # noqa: UP007
"""A file or folder: a path on a file system here, or a URL."""


def parse_location(text: str) -> Location:
    """A path, or a URL if the text starts like one. ``file://`` is a path."""
    if _LOCAL.match(text):
        return Path(_LOCAL.sub("", text, count=1))
    return Url(text.rstrip("/")) if is_url(text) else Path(text)


def is_url(text: str) -> bool:
    """Whether a text starts like a URL."""
    return _URL.match(text) is not None


def without_secrets(text: str) -> str:
    """The text with the passwords and queries (which hold signatures) of all URLs in it hidden."""
    return _QUERY.sub(rf"\1?{_HIDDEN}", _USER.sub(f"{_HIDDEN}@", text))


def location_key(location: Location) -> str:
    """Identifies a location: the real path, or the URL without what may change from run to run."""
    return os.path.realpath(location) if isinstance(location, Path) else str(location)


def names_below_common_folder(files: Sequence[Location]) -> tuple[str, ...]:
    """Names of files in the ledger: paths below their common folder, without folders of this machine or buckets.

    If some files are local and others are not, the others are named by their URLs.
    """
    local = [file for file in files if isinstance(file, Path)]
    alike = local if local else files
    folders = [_posix(file).rpartition("/")[0] or "/" for file in alike]
    common = os.path.commonpath(folders)
    alike_kind: type[Path] | type[Url] = Path if local else Url
    return tuple(os.path.relpath(_posix(file), common) if isinstance(file, alike_kind) else str(file) for file in files)


def _posix(file: Location) -> str:
    return (
        str(file.absolute()) if isinstance(file, Path) else "/" + without_secrets(file._parted()[0]).replace("://", "/")
    )
