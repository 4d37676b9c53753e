"""Columns over all measured samples: the sizes that the plan needs, and the bytes of a part that hold each sample.

Input: the parts of the scan. Output: :class:`SampleColumns`, one row for each time that a sample is drawn. Cost: one
pass over the parts, and 28 bytes per row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prep.build.parts import ScannedPart, read_rows, rejected_rows

_COLUMNS = {
    "num_tokens": np.int32,
    "num_patches": np.int32,
    "pixel_bytes": np.int64,
    "sample_offset": np.int64,
    "sample_bytes": np.int32,
}


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class SampleColumns:
    """Columns over all measured samples, each as often as it is drawn, in the order of the parts. A sample is
    identified by its index in them.

    Attributes:
        part_starts: (P+1,) int64: part ``p`` has samples ``part_starts[p]`` to ``part_starts[p+1] - 1``.
        num_tokens: (N,) int32, length.
        num_patches: (N,) int32, vision patches of all media.
        pixel_bytes: (N,) int64, bytes of all stored frames.
        sample_offset: (N,) int64, first byte of the measured sample in its part.
        sample_bytes: (N,) int32, size of the measured sample.
        num_drawn: drawn annotations, with repetitions. N of them have a sample, the others were rejected.
    """

    part_starts: NDArray[np.int64]
    num_tokens: NDArray[np.int32]
    num_patches: NDArray[np.int32]
    pixel_bytes: NDArray[np.int64]
    sample_offset: NDArray[np.int64]
    sample_bytes: NDArray[np.int32]
    num_drawn: int

    def parts_of(self, samples: NDArray[np.int64]) -> tuple[list[int], NDArray[np.int32]]:
        """The parts that hold these samples (K,), ascending, and for each sample the index of its part among them."""
        parts = np.searchsorted(self.part_starts, samples, side="right") - 1
        used, index = np.unique(parts, return_inverse=True)
        return used.tolist(), index.astype(np.int32)


def read_columns(parts: Sequence[ScannedPart]) -> SampleColumns:
    """Read the sizes and offsets of all samples."""
    pieces: dict[str, list[NDArray[Any]]] = {name: [np.empty(0, dtype)] for name, dtype in _COLUMNS.items()}
    part_starts = np.zeros(len(parts) + 1, dtype=np.int64)
    num_drawn = 0
    for index, part in enumerate(parts):
        table = read_rows(part.path, ["copies", *_COLUMNS])
        copies = table.column("copies").to_numpy()
        num_drawn += int(copies.sum(dtype=np.int64))
        has_sample = np.flatnonzero(table.column("sample_bytes").to_numpy())
        rows = np.repeat(has_sample, copies[has_sample])
        part_starts[index + 1] = part_starts[index] + rows.size
        for name, dtype in _COLUMNS.items():
            pieces[name].append(table.column(name).to_numpy()[rows].astype(dtype))
    # Free the pieces of a column once they are joined, so that only one column exists twice.
    columns = {name: np.concatenate(pieces.pop(name)) for name in _COLUMNS}
    return SampleColumns(part_starts=part_starts, num_drawn=num_drawn, **columns)


def count_rejects(parts: Sequence[ScannedPart]) -> Counter[str]:
    """How many drawn annotations the scan rejected, by reason code. An annotation counts once for each of its codes."""
    counts = Counter[str]()
    for part in parts:
        rejected = rejected_rows(read_rows(part.path, ["copies", "codes"]))
        for copies, codes in zip(rejected.column("copies").to_pylist(), rejected.column("codes").to_pylist()):
            for code in codes:
                counts[code] += copies
    return +counts
