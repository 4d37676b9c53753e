"""Where a set of shards goes: a folder, or a URL that finished files are uploaded to.

Files are made in :attr:`Output.folder` and then :meth:`~Output.put` in their place. For a folder that is the same
place; for a URL it is a folder of the work folder, which a file leaves once the store has it whole. Whether something
is in its place, the place is asked.
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
    """What the build needs from the place of its shards. Pickles, so that workers put shards by themselves."""

    @property
    def folder(self) -> Path:
        """Where files are made."""
        ...

    def check(self) -> None:
        """Hold that the place is there.

        Raises:
            VlprepError: it is not, or cannot be looked at.
        """
        ...

    def put(self, name: str) -> Stored:
        """Bring a file from the folder to its place, whole or not at all; what the place knows of it then."""
        ...

    def placed(self, names: Iterable[str]) -> dict[str, Stored]:
        """Those of some files that are in their place."""
        ...

    def names(self) -> list[str]:
        """All files in the place."""
        ...

    def read(self, name: str) -> bytes | None:
        """Contents of a small file; None if it is not there."""
        ...

    def remove(self, names: Iterable[str]) -> None:
        """Remove files from the place; those that are not there are removed already."""
        ...


@dataclass(frozen=True, slots=True)
class FolderOutput:
    """A folder on a file system here."""

    folder: Path

    def __str__(self) -> str:
        return str(self.folder)

    def check(self) -> None:
        """See :class:`Output`; the folder is made with the work folder in it."""

    def put(self, name: str) -> Stored:
        """See :class:`Output`; the file is there already."""
        return Stored((self.folder / name).stat().st_size, "")

    def placed(self, names: Iterable[str]) -> dict[str, Stored]:
        """See :class:`Output`."""
        found = {name: self.folder / name for name in names}
        return {name: Stored(path.stat().st_size, "") for name, path in found.items() if path.is_file()}

    def names(self) -> list[str]:
        """See :class:`Output`."""
        return [path.name for path in self.folder.iterdir() if path.is_file()]

    def read(self, name: str) -> bytes | None:
        """See :class:`Output`."""
        path = self.folder / name
        return path.read_bytes() if path.exists() else None

    def remove(self, names: Iterable[str]) -> None:
        """See :class:`Output`."""
        for name in names:
            (self.folder / name).unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class UrlOutput:
    """A place on object storage.

    Attributes:
        url: the place.
        folder: where files are made.
    """

    url: Url
    folder: Path

    def __str__(self) -> str:
        return str(self.url)

    def check(self) -> None:
        """See :class:`Output`. The place need not hold anything, but its bucket must be there."""
        storage.listing(self.url)

    def put(self, name: str) -> Stored:
        """See :class:`Output`.

        A lost worker's task may run twice at the same time, and make the same file: each attempt uploads under a link
        of its own, and what the other one has put already is not put again.
        """
        path = self.folder / name
        held = temporary_path(path)
        held.mkdir()
        try:
            (held / name).hardlink_to(path)
            stored = storage.upload(held / name, self.url / name)
        except FileNotFoundError:
            return storage.stat(self.url / name)
        finally:
            shutil.rmtree(held)
        path.unlink(missing_ok=True)
        return stored

    def placed(self, names: Iterable[str]) -> dict[str, Stored]:
        """See :class:`Output`."""
        wanted = list(names)
        if len(wanted) > 1:
            found = storage.listing(self.url)
            return {name: found[name] for name in wanted if name in found}
        stats = {name: self._stat(name) for name in wanted}
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
    """The output that a path or a URL names; ``folder`` is where files for a URL are made."""
    return UrlOutput(out, folder) if isinstance(out, Url) else FolderOutput(out)
