"""What a worker machine needs for the tasks of a build: the same files at the same paths, and the same software.

The process that runs the build states its requirements (:meth:`WorkerRequirements.share`). Each worker machine checks
them (:func:`unmet`). Cost: a few file system calls per path.
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
"""Entries of a folder that a worker must see too. An empty mount point exists, but has none of them."""


@lru_cache(maxsize=1)
def software() -> dict[str, str]:
    """Versions of all relevant packages, and a hash of vlprep's own code, since checkouts of one version can differ."""
    digest = xxhash.xxh3_64()
    for package in (prep, schemas, storage):
        root = Path(package.__path__[0])
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{package.__name__}/{path.relative_to(root).as_posix()}\0".encode())
            digest.update(path.read_bytes())
    return {**environment(), "vlprep's code": digest.hexdigest()}


@dataclass(kw_only=True, slots=True)
class WorkerRequirements:
    """What the tasks of a build need, as the process that runs the build sees it.

    Attributes:
        files: absolute path -> size of every file that tasks read.
        folders: absolute path -> a few entries of every folder that tasks read.
        marks: path -> content of the marker file that :meth:`share` creates in every folder that tasks write into.
        software: result of :func:`software`.
    """

    files: dict[str, int] = field(default_factory=dict)
    folders: dict[str, tuple[str, ...]] = field(default_factory=dict)
    marks: dict[str, str] = field(default_factory=dict)
    software: dict[str, str] = field(default_factory=software)

    def share(self, reads: Iterable[Path], writes: Iterable[Path]) -> bool:
        """Add paths, and create a marker file in each folder of ``writes``. :meth:`clear` removes the markers.

        Returns:
            Whether any path is new.

        Raises:
            ConfigError: a path does not exist, or cannot be read or written.
        """
        try:
            return self._share(reads, writes)
        except OSError as error:
            raise ConfigError(
                f"{error.filename} cannot be used: {error.strerror}. Make it readable, or give another."
            ) from error

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
        """Remove the marker files."""
        for mark in self.marks:
            Path(mark).unlink(missing_ok=True)
        self.marks.clear()


def unmet(required: WorkerRequirements) -> list[str]:
    """Requirements that this machine does not meet, each a clause such as ``it does not see the folder /data``."""
    reasons = [*_unmet_software(required.software)]
    for path, num_bytes in required.files.items():
        reasons += _unmet_file(path, num_bytes)
    for path, names in required.folders.items():
        reasons += _unmet_folder(path, names)
    for path, token in required.marks.items():
        reasons += _unmet_output(path, token)
    return reasons


def _unmet_software(required: dict[str, str]) -> Iterable[str]:
    # The message is read on the machine of the build: "there" is the worker, "here" is the build.
    worker = software()
    for name in sorted({*required, *worker}):
        there, here = worker.get(name, "not installed"), required.get(name, "not installed")
        if there != here:
            yield f"{name} is {there} there, {here} here"


def _unmet_file(path: str, num_bytes: int) -> Iterable[str]:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
    except OSError as error:
        yield f"it does not see the file {path} ({error.strerror})"
        return
    if size != num_bytes:
        yield f"the file {path} has {size} bytes there, not {num_bytes}"


def _unmet_folder(path: str, names: Iterable[str]) -> Iterable[str]:
    try:
        with os.scandir(path):
            pass
    except OSError as error:
        yield f"it does not see the folder {path} ({error.strerror})"
        return
    missing = [name for name in names if not os.path.lexists(os.path.join(path, name))]
    if missing:
        yield f"the folder {path} is a different one there: it has no {missing[0]}"


def _unmet_output(mark: str, token: str) -> Iterable[str]:
    folder = os.path.dirname(mark)
    try:
        same = Path(mark).read_text() == token
    except OSError as error:
        yield f"it does not see the folder {folder}, which tasks write into, or sees a different one ({error.strerror})"
        return
    if not same:
        yield f"the folder {folder}, which tasks write into, is a different one there"
        return
    trial = temporary_path(Path(mark).with_name("mark"))
    try:
        trial.touch()
        trial.unlink()
    except OSError as error:
        yield f"it cannot write to {folder} ({error.strerror})"
