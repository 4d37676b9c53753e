"""Counts what the packing does not need but a reader of the report does: shrunken images, frames, duplicates.

Input: the rows of the packed samples of a dataset, part by part. Output: its
:class:`~schemas.manifest.MediaStatistics`. Memory: 24 bytes for each annotation.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from msgspec import UNSET, UnsetType
from numpy.typing import NDArray

from prep.build.distribution import ValueCounts
from schemas.manifest import CHANGED_PERCENT, MediaStatistics

_COLUMNS = ("text_hash", "media_hash")


class MediaTally:
    """Totals of one dataset."""

    def __init__(self) -> None:
        self._shrunk, self._frames = ValueCounts(), ValueCounts()
        self._num_images = self._num_shrunk = self._num_enlarged = 0
        self._hashes: list[NDArray[np.uint64]] = []

    def add(self, packed: pa.Table) -> None:
        """Count the rows of a part (:data:`~prep.build.parts.PART_SCHEMA`) that are packed."""
        kept, frames = (pc.list_flatten(packed.column(name)).to_numpy() for name in ("kept_percents", "frames"))
        is_shrunk = kept < 100 - CHANGED_PERCENT
        self._num_images += kept.size
        self._num_shrunk += int(np.count_nonzero(is_shrunk))
        self._num_enlarged += int(np.count_nonzero(kept > 100 + CHANGED_PERCENT))
        self._shrunk.add(kept[is_shrunk])
        self._frames.add(frames)
        # Copies of an annotation that is drawn several times follow one another, and are no duplicates.
        records = packed.column("record").to_numpy()
        is_first = np.diff(records, prepend=-1) != 0
        hashes = [packed.column(name).to_numpy()[is_first] for name in _COLUMNS]
        # (n, 2): hashes of text and media. Those of media are 0 without media.
        self._hashes.append(np.stack(hashes, axis=1))

    def statistics(self) -> MediaStatistics | UnsetType:
        """The totals; UNSET if there is nothing to tell."""
        text, media = np.concatenate([np.empty((0, 2), np.uint64), *self._hashes]).T
        self._hashes.clear()
        both = text * np.uint64(0x9E3779B97F4A7C15) ^ media
        result = MediaStatistics(
            num_images=self._num_images,
            num_shrunk=self._num_shrunk,
            num_enlarged=self._num_enlarged,
            kept_percent=self._shrunk.distribution(),
            frames=self._frames.distribution(),
            num_same_text=_num_repeated(text),
            num_same_media=_num_repeated(media[media != 0]),
            num_same_sample=_num_repeated(both),
        )
        return UNSET if result == MediaStatistics() else result


def _num_repeated(hashes: NDArray[np.uint64]) -> int:
    """How many of the values occur earlier, too."""
    return int(hashes.size - np.unique(hashes).size)
