"""Counts what the packing does not need but a reader of the report does: shrunken images, frames, duplicates.

Input: the rows of the packed samples of a dataset, part by part. Output: its
:class:`~schemas.manifest.MediaStatistics`. Memory: 24 bytes for each packed annotation at the end, 16 before.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from msgspec import UNSET, UnsetType
from numpy.typing import NDArray

from prep.build.distribution import ValueCounts
from prep.build.parts import list_entries
from schemas.manifest import CHANGED_PERCENT, MediaStatistics


class MediaTally:
    """Totals of one dataset."""

    def __init__(self) -> None:
        self._shrunk, self._frames = ValueCounts(), ValueCounts()
        self._num_images = self._num_shrunk = self._num_enlarged = 0
        self._text: list[NDArray[np.uint64]] = []
        self._media: list[NDArray[np.uint64]] = []

    def add(self, packed: pa.Table) -> None:
        """Count the rows of a part (:data:`~prep.build.parts.PART_SCHEMA`) that are packed."""
        kept, frames = (_entries(packed.column(name)) for name in ("kept_percents", "frames"))
        is_shrunk = kept < 100 - CHANGED_PERCENT
        self._num_images += kept.size
        self._num_shrunk += int(np.count_nonzero(is_shrunk))
        self._num_enlarged += int(np.count_nonzero(kept > 100 + CHANGED_PERCENT))
        self._shrunk.add(kept[is_shrunk])
        self._frames.add(frames)
        # Copies of an annotation that is drawn several times follow one another, and are no duplicates.
        records = packed.column("record").to_numpy()
        is_first = np.diff(records, prepend=-1) != 0
        self._text.append(packed.column("text_hash").to_numpy()[is_first])
        self._media.append(packed.column("media_hash").to_numpy()[is_first])

    def statistics(self) -> MediaStatistics | UnsetType:
        """The totals; UNSET if there is nothing to tell."""
        text, media = _joined(self._text), _joined(self._media)
        both = text * np.uint64(0x9E3779B97F4A7C15)
        both ^= media
        result = MediaStatistics(
            num_images=self._num_images,
            num_shrunk=self._num_shrunk,
            num_enlarged=self._num_enlarged,
            kept_percent=self._shrunk.distribution(),
            frames=self._frames.distribution(),
            num_same_text=_num_repeated(text),
            num_same_media=_num_repeated(media),
            num_same_sample=_num_repeated(both),
        )
        return UNSET if result == MediaStatistics() else result


def _entries(column: pa.ChunkedArray) -> NDArray[np.int32]:
    """The entries of all lists of a column."""
    return np.concatenate([np.empty(0, np.int32), *(entries.to_numpy() for entries in list_entries(column))])


def _joined(pieces: list[NDArray[np.uint64]]) -> NDArray[np.uint64]:
    """All pieces as one array. The list is emptied, so that they exist once."""
    joined = np.concatenate([np.empty(0, np.uint64), *pieces])
    pieces.clear()
    return joined


def _num_repeated(hashes: NDArray[np.uint64]) -> int:
    """How many of the values occur earlier, too. Sorts them in place, and leaves out 0."""
    hashes.sort()
    hashes = hashes[np.searchsorted(hashes, np.uint64(1)) :]
    return int(np.count_nonzero(hashes[1:] == hashes[:-1]))
