"""Which annotation files and media a build reads, and how much of each dataset.

Input: a registry expression (``mp_doc%50,clevr_mc``) with ``datasets.toml``, or an annotation file (``a.jsonl%50``).
Output: a list of :class:`Source`.
"""

from __future__ import annotations

import glob
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec

import storage
from prep.annotations import DEFAULT_REGISTRY
from prep.annotations.file_kinds import folder_fault
from prep.annotations.shares import MAX_PERCENT, parse_expression, split_share
from schemas.annotation import ANNOTATION_SUFFIXES
from schemas.errors import ConfigError, VlprepError
from schemas.settings import MediaSettings
from storage.urls import Location, Url, is_url, names_below_common_folder, parse_location

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_WILDCARD = re.compile(r"[*?\[]")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One dataset of a build.

    Attributes:
        name: in the ledger.
        files: paths or URLs of the annotation files, in order.
        file_names: their names in the ledger, relative to their common folder.
        media_root: folder or URL that contains all media.
        rate: share that is drawn: 1 draws every annotation once, 2 twice.
        media: media settings of this dataset.
    """

    name: str
    files: tuple[Location, ...]
    file_names: tuple[str, ...]
    media_root: Location
    rate: Fraction
    media: MediaSettings


class _Entry(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """One table of ``datasets.toml``."""

    annotation_path: str | list[str] = ""
    media_root: str | None = None
    data_path: str | None = None
    sampling_rate: float = 1.0
    boxes: Any = msgspec.UNSET
    media: dict[str, Any] = {}


@dataclass(frozen=True, kw_only=True, slots=True)
class Listed:
    """One line of ``vlprep datasets``: a registered dataset and the state of its files."""

    name: str
    files: tuple[Location, ...]
    media_root: Location | None
    state: str

    def content(self) -> dict[str, Any]:
        """The line for JSON. A dataset that is not ready has no files."""
        return {
            "name": self.name,
            "ready": bool(self.files),
            "state": self.state,
            "files": [str(file) for file in self.files],
            "media_root": None if self.media_root is None else str(self.media_root),
        }


def find_all_sources(
    arguments: Iterable[str], *, registry: Path | None, media_root: Location | None, media: MediaSettings
) -> list[Source]:
    """Resolve all dataset arguments of the command line, each as by :func:`find_sources`.

    Raises:
        ConfigError: see there; or two datasets have the same name.
    """
    sources: dict[str, Source] = {}
    for argument in arguments:
        for source in find_sources(argument, registry=registry, media_root=media_root, media=media):
            if source.name in sources:
                raise ConfigError(
                    f"{source.files[0]} and {sources[source.name].files[0]} would both be the dataset "
                    f"{source.name!r}. Rename one of the files, or register both in {registry or DEFAULT_REGISTRY}."
                )
            sources[source.name] = source
    return list(sources.values())


def find_sources(
    expression: str, *, registry: Path | None, media_root: Location | None, media: MediaSettings
) -> list[Source]:
    """Resolve a dataset argument of the command line into datasets with existing files.

    Args:
        expression: a registry expression; or the path of an annotation file, or a URL of one or (by wildcards) several,
            each with an optional ``%percent``.
        registry: the registry, or None for ``datasets.toml`` in the working folder.
        media_root: for annotation files: folder or URL of their media (default: where the file lies).
        media: settings that a dataset's own table overrides.

    Raises:
        ConfigError: an unknown dataset, a path that is not set or does not exist; it names file and line to edit.
        StorageError: a store does not answer.
    """
    file, rate = split_share(expression)
    if is_url(file):
        return [_url_source(parse_location(file), media_root, media, rate)]
    path = Path(file)
    if path.is_file() or ("," not in file and path.name.endswith(ANNOTATION_SUFFIXES)):
        return [_file_source(path, media_root, media, rate)]
    if media_root is not None:
        raise ConfigError("--media-root applies to annotation files only; a registered dataset has its own media_root.")
    registry_file = registry or DEFAULT_REGISTRY
    # A folder may have the name of a dataset.
    if path.is_dir() and (len(path.parts) > 1 or not registry_file.is_file()):
        raise ConfigError(f"annotation file {path} {folder_fault(path)}.")
    names = parse_expression(expression)
    book = Registry.read(registry_file) if registry_file.is_file() else None
    for name, _ in names:
        if book is None or name not in book.tables:
            _refuse_path(name, is_alone=len(names) == 1)
    book = book or Registry.read(registry_file)
    return [book.source(name, rate, media) for name, rate in names]


def _refuse_path(name: str, *, is_alone: bool) -> None:
    """Refuse a path where the name of a dataset is expected: that of an existing file would have been read as one."""
    if is_alone and "/" in name:
        raise ConfigError(f"annotation file {name} does not exist. Check the path.")
    if "/" in name or name.endswith(ANNOTATION_SUFFIXES):
        raise ConfigError(
            f"{name} is a path, and paths are not joined by commas. Give each annotation file as an argument of its "
            "own: a.jsonl b.jsonl%50."
        )


def _file_source(path: Path, media_root: Location | None, media: MediaSettings, rate: Fraction) -> Source:
    if not path.is_file():
        raise ConfigError(f"annotation file {path} does not exist. Check the path.")
    root = media_root if media_root is not None else path.parent
    check_root(root)
    return Source(
        name=_without_suffix(path.name),
        files=(path,),
        file_names=(path.name,),
        media_root=root,
        rate=rate,
        media=media,
    )


def _url_source(location: Location, media_root: Location | None, media: MediaSettings, rate: Fraction) -> Source:
    if isinstance(location, Path):
        return _file_source(location, media_root, media, rate)
    files = find_files(location)
    folder = location.parent
    while _WILDCARD.search(folder.url.partition("://")[2]):
        folder = folder.parent
    root = media_root if media_root is not None else folder
    check_root(root)
    name = folder.name if location not in files else _without_suffix(location.name)
    return Source(
        name=name,
        files=files,
        file_names=names_below_common_folder(files),
        media_root=root,
        rate=rate,
        media=media,
    )


def _without_suffix(name: str) -> str:
    for suffix in sorted(ANNOTATION_SUFFIXES, key=len, reverse=True):
        name = name.removesuffix(suffix)
    return name


def find_files(pattern: Url) -> tuple[Url, ...]:
    """The annotation files that a URL names, which may hold wildcards.

    Raises:
        ConfigError: there are none.
        StorageError: the store does not answer.
    """
    files = storage.matches(pattern)
    if not files:
        raise ConfigError(f"{pattern} matches no file. Check the pattern, the bucket and the endpoint.")
    return tuple(files)


def check_root(root: Location) -> None:
    """Check that a media root exists.

    Raises:
        ConfigError: it is not a folder, is empty, or cannot be read.
        StorageError: the store does not answer.
    """
    if isinstance(root, Url):
        storage.check_folder(root)
    elif not root.is_dir():
        raise ConfigError(f"media root {root} is not a folder. Check the path.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Registry:
    """A read ``datasets.toml``."""

    path: Path
    text: str
    tables: dict[str, Any]

    @staticmethod
    def read(path: Path) -> Registry:
        """Read a registry.

        Raises:
            ConfigError: it does not exist or is not TOML.
        """
        try:
            text = path.read_text(encoding="utf-8")
            tables = tomllib.loads(text)
        except FileNotFoundError:
            raise ConfigError(
                f"registry {path} does not exist; name one with --registry, or give the path of an annotation file."
            ) from None
        except OSError as error:
            raise ConfigError(f"registry {path} cannot be read: {error.strerror}. Check its permissions.") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"registry {path} is not valid TOML: {error}. Correct that line.") from error
        return Registry(path=path, text=text, tables=tables)

    def source(self, name: str, rate: Fraction, media: MediaSettings) -> Source:
        """The dataset ``name`` with existing files, ``rate`` times its own sampling rate."""
        entry = self._entry(name)
        files = self._files(name, entry)
        root = self._root(name, entry, files)
        return Source(
            name=name,
            files=files,
            file_names=names_below_common_folder(files),
            media_root=root,
            rate=rate * Fraction(str(entry.sampling_rate)),
            media=self._media(name, entry, media),
        )

    def _media(self, name: str, entry: _Entry, media: MediaSettings) -> MediaSettings:
        """The media settings of a dataset: its own ones override ``media``."""
        own = dict(entry.media)
        self._check_keys(name, f"[{name}.media]", own, MediaSettings)
        if entry.boxes is not msgspec.UNSET:
            if "boxes" in own:
                where = self._line_of(name, "boxes")
                raise ConfigError(f"{where}: boxes is in the table and in its media; give it once.")
            own["boxes"] = entry.boxes
        try:
            return msgspec.convert({**msgspec.to_builtins(media), **own}, MediaSettings)
        except (msgspec.ValidationError, ConfigError) as error:
            key = "boxes" if "boxes" in str(error) else "media"
            raise ConfigError(f"{self._line_of(name, key)}: {str(error).rstrip('.')}.") from error

    def listed(self) -> list[Listed]:
        """Every registered dataset and whether its files exist."""
        rows = []
        for name in self.tables:
            try:
                source = self.source(name, Fraction(1), MediaSettings())
                rows.append(Listed(name=name, files=source.files, media_root=source.media_root, state="ready"))
            except VlprepError as error:
                rows.append(Listed(name=name, files=(), media_root=None, state=str(error)))
        return rows

    def _entry(self, name: str) -> _Entry:
        if name not in self.tables:
            known = ", ".join(self.tables) or "none"
            if Path(name).is_dir():
                raise ConfigError(
                    f"{name} is not a dataset registered in {self.path} (registered: {known}), and as an annotation "
                    f"file it {folder_fault(Path(name))}."
                )
            raise ConfigError(
                f"dataset {name!r} is not registered in {self.path}; registered: {known}. Add a table [{name}] with "
                "annotation_path and media_root, or give the path of an annotation file."
            )
        self._check_keys(name, f"[{name}]", self.tables[name], _Entry)
        try:
            entry = msgspec.convert(self.tables[name], _Entry)
        except msgspec.ValidationError as error:
            raise ConfigError(f"{self._line_of(name)}: {error}.") from error
        if entry.media_root is not None and entry.data_path is not None:
            raise ConfigError(f"{self._line_of(name, 'data_path')}: media_root and data_path mean the same; give one.")
        if not 0 < entry.sampling_rate <= MAX_PERCENT / 100:
            raise ConfigError(
                f"{self._line_of(name, 'sampling_rate')}: sampling_rate is {entry.sampling_rate}; allowed: above 0, at "
                f"most {MAX_PERCENT // 100}."
            )
        return entry

    def _check_keys(self, name: str, table: str, keys: Any, known: type[msgspec.Struct]) -> None:
        """Name a key that a table of the dataset cannot have, and what was meant by it."""
        allowed = known.__struct_fields__
        for key in keys if isinstance(keys, dict) else ():
            if key not in allowed:
                near = get_close_matches(key, allowed, n=1)
                advice = f"did you mean {near[0]}?" if near else f"allowed: {', '.join(allowed)}."
                raise ConfigError(
                    f"{self._line_of(name, re.escape(key))}: {table} has the unknown key {key!r}; {advice}"
                )

    def _files(self, name: str, entry: _Entry) -> tuple[Location, ...]:
        patterns = [entry.annotation_path] if isinstance(entry.annotation_path, str) else entry.annotation_path
        where = self._line_of(name, "annotation_path")
        if not patterns or not all(patterns):
            raise ConfigError(f'{where}: the path of dataset {name} is not set. Edit that line: annotation_path = "…".')
        files: list[Location] = []
        for pattern in patterns:
            target = self._below(pattern)
            matches = self._matches(pattern, target, where)
            if not matches:
                raise ConfigError(f"{where}: {target} does not exist. Edit that line, or put the file there.")
            files.extend(file for file in matches if file not in files)
        return tuple(files)

    def _matches(self, pattern: str, target: Location, where: str) -> list[Location]:
        """Files that a path, a URL or a glob matches, in order. Wildcards in the registry's own folder do not count."""
        if isinstance(target, Url):
            try:
                return list(find_files(target))
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}") from error
        if target.is_file():
            return [target]
        expanded = os.path.join(glob.escape(str(self.path.parent)), os.path.expanduser(pattern))
        return [Path(hit) for hit in sorted(glob.glob(expanded, recursive=True)) if Path(hit).is_file()]

    def _root(self, name: str, entry: _Entry, files: Sequence[Location]) -> Location:
        """The media root of a dataset: by default the folder of its files."""
        key = "data_path" if entry.data_path is not None else "media_root"
        value = entry.data_path if entry.data_path is not None else entry.media_root
        where = self._line_of(name, key)
        if value is None:
            folders = list(dict.fromkeys(file.parent for file in files))
            if len(folders) > 1:
                raise ConfigError(
                    f"{where}: the files of dataset {name} lie in {len(folders)} folders, so its media root must be "
                    f'set. Add a line: media_root = "…".'
                )
            return folders[0]
        if not value:
            raise ConfigError(f'{where}: the media root of dataset {name} is not set. Edit that line: {key} = "…".')
        root = self._below(value)
        if isinstance(root, Url):
            try:
                check_root(root)
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}") from error
        elif not root.is_dir():
            raise ConfigError(f"{where}: the media root {root} is not a folder. Edit that line, or make the folder.")
        return root

    def _below(self, path: str) -> Location:
        """A URL as it is, a path relative to the registry."""
        location = parse_location(path)
        return location if isinstance(location, Url) else self.path.parent / location.expanduser()

    def _line_of(self, name: str, key: str | None = None) -> str:
        """``file:line`` of a table, or of a key in it (the table's line where the key is missing)."""
        header = re.compile(rf"\s*\[\s*[\"']?{re.escape(name)}[\"']?\s*(\]|\.)")
        lines = self.text.splitlines()
        table = next((index for index, line in enumerate(lines) if header.match(line)), 0)
        if key is not None:
            for index, line in enumerate(lines[table + 1 :], start=table + 1):
                if re.match(rf"\s*(\[[^\]]*\.)?{key}\b", line):
                    return f"{self.path}:{index + 1}"
                if line.lstrip().startswith("[") and not header.match(line):
                    break
        return f"{self.path}:{table + 1}"
