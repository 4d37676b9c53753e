"""What a machine must have to do the work of a build: the same files in the same places, and the same software.

The process that runs the build describes what it sees (:meth:`Surroundings.share`); another machine compares
(:func:`differences`). Cost: a few looks at the file system for each path.
"""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import xxhash

import prep
import schemas
import storage
from prep.engines.software import environment
from schemas.errors import ConfigError
from storage.files import temporary_path

_ENTRIES = 8
"""Entries of a folder that another machine must see there too. An empty mount point exists, but holds none of them."""


@lru_cache(maxsize=1)
def software() -> dict[str, str]:
    """What machines that share a build must agree on: versions, and a hash of the code of vlprep itself. Two checkouts
    with the same version need not be the same.
    """
    digest = xxhash.xxh3_64()
    for package in (prep, schemas, storage):
        root = Path(package.__path__[0])
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{package.__name__}/{path.relative_to(root).as_posix()}\0".encode())
            digest.update(path.read_bytes())
    return {**environment(), "vlprep's code": digest.hexdigest()}


@dataclass(kw_only=True, slots=True)
class Surroundings:
    """What the tasks of a build need, as the process that runs it sees it.

    Attributes:
        files: size of every file that is read, by its absolute path.
        folders: some names in every folder that is read.
        marks: content of the file that :meth:`share` put into every folder that is written to, by the path of the file.
        software: what :func:`software` gives.
    """

    files: dict[str, int] = field(default_factory=dict)
    folders: dict[str, tuple[str, ...]] = field(default_factory=dict)
    marks: dict[str, str] = field(default_factory=dict)
    software: dict[str, str] = field(default_factory=software)

    def share(self, reads: Iterable[Path], writes: Iterable[Path]) -> bool:
        """Add paths, and mark the folders to write into; :meth:`clear` removes the marks. Returns whether any is new.

        Raises:
            ConfigError: a path is not there, or cannot be looked at or written.
        """
        try:
            return self._share(reads, writes)
        except OSError as error:
            raise ConfigError(f"{error.filename} cannot be used: {error.strerror}.") from error

    def _share(self, reads: Iterable[Path], writes: Iterable[Path]) -> bool:
        before = len(self.files) + len(self.folders) + len(self.marks)
        for path in map(Path.absolute, reads):
            if not path.is_dir():
                self.files[str(path)] = path.stat().st_size
            elif str(path) not in self.folders:
                with os.scandir(path) as entries:
                    self.folders[str(path)] = tuple(entry.name for entry in itertools.islice(entries, _ENTRIES))
        marked = {os.path.dirname(mark) for mark in self.marks}
        for folder in map(Path.absolute, writes):
            if str(folder) not in marked:
                mark, token = temporary_path(folder / "mark"), secrets.token_hex(16)
                mark.write_text(token)
                self.marks[str(mark)] = token
        return len(self.files) + len(self.folders) + len(self.marks) > before

    def clear(self) -> None:
        """Remove the marks."""
        for mark in self.marks:
            Path(mark).unlink(missing_ok=True)
        self.marks.clear()


def differences(wanted: Surroundings) -> list[str]:
    """What this machine lacks or has otherwise, a sentence's end each: ``it does not see the folder /data``."""
    found = list(_other_software(wanted.software))
    for path, num_bytes in wanted.files.items():
        found += _as_file(path, num_bytes)
    for path, names in wanted.folders.items():
        found += _as_folder(path, names)
    for path, token in wanted.marks.items():
        found += _as_output(path, token)
    return found


def _other_software(wanted: dict[str, str]) -> Iterable[str]:
    here = software()
    for name in sorted({*wanted, *here}):
        theirs, ours = here.get(name, "not installed"), wanted.get(name, "not installed")
        if theirs != ours:
            yield f"{name} is {theirs} there, {ours} here"


def _as_file(path: str, num_bytes: int) -> Iterable[str]:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        yield f"it does not see the file {path} ({error.strerror})"
        return
    if size != num_bytes:
        yield f"the file {path} has {size} bytes there, not {num_bytes}"


def _as_folder(path: str, names: Iterable[str]) -> Iterable[str]:
    try:
        with os.scandir(path):
            pass
    except OSError as error:
        yield f"it does not see the folder {path} ({error.strerror})"
        return
    missing = [name for name in names if not os.path.lexists(os.path.join(path, name))]
    if missing:
        yield f"the folder {path} is another one there: it holds no {missing[0]}"


def _as_output(mark: str, token: str) -> Iterable[str]:
    folder = os.path.dirname(mark)
    try:
        same = Path(mark).read_text() == token
    except OSError as error:
        yield f"it does not see the folder {folder}, which tasks write into, or not the same one ({error.strerror})"
        return
    if not same:
        yield f"the folder {folder}, which tasks write into, is another one there"
        return
    own = temporary_path(Path(mark).with_name("mark"))
    try:
        own.touch()
        own.unlink()
    except OSError as error:
        yield f"it cannot write into {folder} ({error.strerror})"
