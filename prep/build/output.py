"""The destination of a set of shards: a folder, or a URL that finished files are uploaded to.

Files are written in :attr:`Output.folder` and published with :meth:`~Output.put`. For a folder, this is the destination
itself. For a URL, it is inside the work folder, and a file is deleted there once the store has all of it. The
destination alone decides which files exist.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import storage
from storage import Stored
from storage.files import temporary_path
from storage.urls import Location, Url


class Output(Protocol):
    """What the build needs from the destination of its shards. It pickles, so that workers publish their own shards."""

    @property
    def folder(self) -> Path:
        """The local folder in which files are written."""
        ...

    def check(self) -> None:
        """Check that the destination exists and can be listed.

        Raises:
            VlprepError: it does not, or cannot.
        """
        ...

    def put(self, name: str) -> Stored:
        """Publish a file of the folder, atomically. Returns its size and tag at the destination."""
        ...

    def placed(self, names: Iterable[str]) -> dict[str, Stored]:
        """Size and tag of those files that exist at the destination."""
        ...

    def names(self) -> list[str]:
        """Names of all files at the destination."""
        ...

    def read(self, name: str) -> bytes | None:
        """Contents of a small file, or None if it does not exist."""
        ...

    def remove(self, names: Iterable[str]) -> None:
        """Remove files from the destination. Missing files are ignored."""
        ...


@dataclass(frozen=True, slots=True)
class FolderOutput:
    """A folder of a local file system."""

    folder: Path

    def __str__(self) -> str:
        return str(self.folder)

    def check(self) -> None:
        """See :class:`Output`. Nothing to check: creating the work folder inside creates the folder."""

    def put(self, name: str) -> Stored:
        """See :class:`Output`. The file is already where it belongs."""
        return Stored((self.folder / name).stat().st_size, "")

    def placed(self, names: Iterable[str]) -> dict[str, Stored]:
        """See :class:`Output`."""
        paths = {name: self.folder / name for name in names}
        return {name: Stored(path.stat().st_size, "") for name, path in paths.items() if path.is_file()}

    def names(self) -> list[str]:
        """See :class:`Output`."""
        return [path.name for path in self.folder.iterdir() if path.is_file()]

    def read(self, name: str) -> bytes | None:
        """See :class:`Output`."""
        path = self.folder / name
        return path.read_bytes() if path.is_file() else None

    def remove(self, names: Iterable[str]) -> None:
        """See :class:`Output`."""
        for name in names:
            (self.folder / name).unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class UrlOutput:
    """A folder of an object store.

    Attributes:
        url: the folder.
        folder: local folder in which files are written.
    """

    url: Url
    folder: Path

    def __str__(self) -> str:
        return str(self.url)

    def check(self) -> None:
        """See :class:`Output`. The folder may be empty, but its bucket must exist."""
        storage.listing(self.url)

    def put(self, name: str) -> Stored:
        """See :class:`Output`.

        If a worker is lost, its task may run twice at the same time and write the same file twice. So each attempt
        uploads its own hard link, and skips a file that the other attempt has published.
        """
        path = self.folder / name
        link = temporary_path(path)
        link.mkdir()
        try:
            (link / name).hardlink_to(path)
            stored = storage.upload(link / name, self.url / name)
        except FileNotFoundError:
            return storage.stat(self.url / name)
        finally:
            shutil.rmtree(link)
        path.unlink(missing_ok=True)
        return stored

    def placed(self, names: Iterable[str]) -> dict[str, Stored]:
        """See :class:`Output`."""
        requested = list(names)
        if len(requested) > 1:
            listing = storage.listing(self.url)
            return {name: listing[name] for name in requested if name in listing}
        stats = {name: self._stat(name) for name in requested}
        return {name: stored for name, stored in stats.items() if stored is not None}

    def names(self) -> list[str]:
        """See :class:`Output`."""
        return list(storage.listing(self.url))

    def read(self, name: str) -> bytes | None:
        """See :class:`Output`."""
        try:
            return storage.read(self.url / name)
        except storage.NotThereError:
            return None

    def remove(self, names: Iterable[str]) -> None:
        """See :class:`Output`."""
        storage.in_parallel(storage.remove, [self.url / name for name in names])

    def _stat(self, name: str) -> Stored | None:
        try:
            return storage.stat(self.url / name)
        except storage.NotThereError:
            return None


def open_output(out: Location, folder: Path) -> FolderOutput | UrlOutput:
    """The output for a path or URL. Files for a URL are written in ``folder`` first."""
    return UrlOutput(out, folder) if isinstance(out, Url) else FolderOutput(out)
