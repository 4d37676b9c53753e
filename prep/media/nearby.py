"""Tells where media lie if none of them lies below the media root.

Input: the name of a missing medium, the root that was searched, and its annotation file. Output: one sentence with the
fix. Cost: looking for a few paths in at most a few hundred folders.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from storage.urls import Location

_MAX_SUB_FOLDERS = 200
_NUM_PARENTS = 2


def all_missing_message(*, subject: str, name: str, root: Location, annotation_file: Location) -> str:
    """A sentence about an annotation file of which every medium is missing.

    Args:
        subject: of the sentence, such as "all 3 media are".
        name: one of the missing media.
        root: the media root.
        annotation_file: the file that names the media.
    """
    searched = root.absolute() if isinstance(root, Path) else root
    message = f"{annotation_file}: {subject} missing below the media root {searched}"
    match = None if not isinstance(annotation_file, Path) else _find(name, annotation_file.parent)
    if match is None:
        return f"{message}, for example {name}. Give the folder that names like this are relative to: --media-root DIR."
    folder, rest = match
    if rest == name:
        return (
            f"{message}, but {name} lies in {folder}. Give --media-root {folder} (or set media_root in the registry)."
        )
    return (
        f"{message}. {rest} lies in {folder}, but the annotations name {name}. Change the names, or arrange the media "
        "as the names say."
    )


def _find(name: str, folder: Path) -> tuple[Path, str] | None:
    """A folder near ``folder`` that contains ``name``, or else the longest end of it; and what it contains."""
    parts = Path(name.replace("\\", "/")).parts
    candidates = list(_folders_near(folder))
    for first in range(len(parts)):
        end = os.path.join(*parts[first:])
        for candidate in candidates:
            if not os.path.isabs(end) and ".." not in parts and (candidate / end).is_file():
                return candidate, end
    return None


def _folders_near(folder: Path) -> Iterator[Path]:
    """The folder of an annotation file, its parents, and the folders in it and in its parent."""
    folder = folder.resolve()
    near = [folder, *folder.parents[:_NUM_PARENTS]]
    yield from near
    for inside in near[:2]:
        try:
            with os.scandir(inside) as entries:
                names = sorted(entry.name for entry in islice(entries, _MAX_SUB_FOLDERS) if entry.is_dir())
        except OSError:
            continue
        yield from (inside / name for name in names)
