"""A bin inside a shard: its members and their arrays.

A shard is an uncompressed POSIX (ustar) tar file. The members of a bin are consecutive and named
``{bin:08d}.<member>``, so that plain ``webdataset`` sees one sample per bin. ``bins.parquet`` holds offset and length
of that run of members: one positional read returns a bin. :func:`storage.bins.parse_bin` turns its bytes into a
:class:`Bin`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from schemas.annotation import SampleRef
from schemas.errors import MEND_SHARDS, ShardError
from schemas.qwen import PATCH_SIZE, TEMPORAL_PATCH_SIZE, Grid

TAR_BLOCK = 512

ARRAY_MEMBERS: dict[str, np.dtype[Any]] = {
    "input_ids.npy": np.dtype("<i4"),
    "labels.npy": np.dtype("<i4"),
    "position_ids.npy": np.dtype("<i4"),
    "cu_seqlens.npy": np.dtype("<i4"),
    "grid_thw.npy": np.dtype("<i4"),
    "media_type.npy": np.dtype("u1"),
}
"""Array members in the order they are written, with their dtypes."""

SAMPLES_MEMBER = "samples.json"

MEDIA_IMAGE = 0
MEDIA_VIDEO = 1


def bin_key(index: int) -> str:
    """Key of bin ``index`` inside its shard, as ``webdataset`` sees it."""
    return f"{index:08d}"


def shard_name(index: int) -> str:
    """File name of shard ``index``."""
    return f"bins-{index:05d}.tar"


def stored_frames(grid: Grid, media_type: int) -> int:
    """Frames of a medium in the pixels member: one for an image, two for each temporal step of a video."""
    return 1 if media_type == MEDIA_IMAGE else TEMPORAL_PATCH_SIZE * grid.t


def frame_shape(grid: Grid) -> tuple[int, int, int]:
    """Shape (3, H, W) of one stored frame."""
    return 3, PATCH_SIZE * grid.h, PATCH_SIZE * grid.w


def stored_bytes(grid: Grid, media_type: int) -> int:
    """Bytes of a medium in the decoded pixels member."""
    return stored_frames(grid, media_type) * 3 * PATCH_SIZE * PATCH_SIZE * grid.h * grid.w


@dataclass(frozen=True, kw_only=True, slots=True)
class Bin:
    """One training sequence: several samples one after the other.

    Attributes:
        index: number of the bin in its set of shards.
        input_ids: (L,) int32, no padding.
        labels: (L,) int32, not shifted, -100 where nothing is trained.
        position_ids: (3, L) int32, mRoPE t, h, w; restarts with every sample.
        cu_seqlens: (S+1,) int32, boundaries of the samples.
        grid_thw: (M, 3) int32, media in sequence order, in patches of 14 pixels.
        media_type: (M,) uint8, 0 image, 1 video.
        pixels: encoded planes of all media in sequence order, uint8.
        codec: how ``pixels`` is encoded, one of :data:`schemas.codecs.CODECS`.
        samples_json: contents of ``samples.json``; decoded by :meth:`samples`.
    """

    index: int
    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    position_ids: NDArray[np.int32]
    cu_seqlens: NDArray[np.int32]
    grid_thw: NDArray[np.int32]
    media_type: NDArray[np.uint8]
    pixels: NDArray[np.uint8]
    codec: str
    samples_json: bytes

    def samples(self) -> list[SampleRef]:
        """Where the samples come from, in order.

        Raises:
            ShardError: the member is not such a list.
        """
        try:
            return msgspec.json.decode(self.samples_json, type=list[SampleRef])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ShardError(
                f"bin {self.index}: {SAMPLES_MEMBER} cannot be read as a list of dataset, record and id: {error}. "
                f"{MEND_SHARDS}"
            ) from error

    def grids(self) -> list[tuple[Grid, int]]:
        """Grid and media type of every medium, in sequence order."""
        return [(Grid(*row), kind) for row, kind in zip(self.grid_thw.tolist(), self.media_type.tolist())]

    @property
    def num_frames(self) -> int:
        """Stored frames of all media."""
        return sum(stored_frames(grid, kind) for grid, kind in self.grids())

    @property
    def num_pixel_bytes(self) -> int:
        """Bytes of the decoded pixels member."""
        return sum(stored_bytes(grid, kind) for grid, kind in self.grids())
