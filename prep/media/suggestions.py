"""Finds the file below a media root that a misspelled name may mean.

Input: a root and a name that does not exist below it. Output: a similar name that does: with slashes for
backslashes, in another case, or of almost the same letters. Cost: bounded listings of the
folders on the way, each made once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from functools import lru_cache
from itertools import islice
from pathlib import Path

_MAX_ENTRIES = 20_000
"""A larger folder is not listed."""

_MAX_FOLDERS = 16
_MAX_COMPARED = 1_000
"""Names are compared by their letters in smaller folders only."""

_MAX_COMPARISONS = 50
"""Names that are compared by their letters, each with a whole folder."""


class Suggester:
    """Suggests names below media roots. Use it for one task only: folders may change later.

    Args:
        resolve: real path of a folder.
    """

    def __init__(self, resolve: Callable[[str], str]) -> None:
        self._resolve = resolve
        self._listing = lru_cache(maxsize=_MAX_FOLDERS)(_listing)
        self._comparisons_left = _MAX_COMPARISONS

    def suggest(self, root: Path, name: str) -> str | None:
        """The name of a file below ``root`` that ``name`` may mean; None if there is none, or several parts differ."""
        parts = name.replace("\\", "/").split("/")
        if "\0" in name or not all(parts) or {".", ".."} & set(parts):
            return None
        real_root = self._resolve(str(root))
        folder, corrected = real_root, list[str]()
        for part in parts:
            # A link may lead out of the root, where nothing is listed.
            if self._resolve(folder) != folder:
                return None
            near = part if os.path.lexists(os.path.join(folder, part)) else self._near(folder, part)
            if near is None:
                return None
            corrected.append(near)
            folder = os.path.join(folder, near)
        is_file = os.path.isfile(folder) and not os.path.islink(folder)
        return "/".join(corrected) if is_file and corrected != name.split("/") else None

    def _near(self, folder: str, part: str) -> str | None:
        names = self._listing(folder)
        if part.casefold() in names:
            return names[part.casefold()]
        if len(names) > _MAX_COMPARED or not self._comparisons_left:
            return None
        self._comparisons_left -= 1
        close = get_close_matches(part.casefold(), names, n=1, cutoff=0.8)
        return names[close[0]] if close else None


def _listing(folder: str) -> Mapping[str, str]:
    """The names in a folder by their spelling without case; none if there are too many or it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in islice(entries, _MAX_ENTRIES + 1)]
    except OSError:
        return {}
    return {} if len(names) > _MAX_ENTRIES else {name.casefold(): name for name in sorted(names, reverse=True)}
