"""Drift: how far the pixels of a lossy codec lie from those that were encoded.

Input: frames before and after. Output: sums that add up over bins and shards, the manifest's :class:`Drift`, and the
same in words.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np
from numpy.typing import NDArray

from schemas.manifest import Drift, Manifest
from schemas.pixels import psnr
from schemas.wording import counted

DRIFT_EVERY = 31
"""Every 31st stored frame of a shard is decoded again. A prime, so that videos with a fixed number of frames are not
always measured at the same frame. Measuring a frame takes twice as long as encoding it."""


class DriftSums(msgspec.Struct, kw_only=True):
    """Sums over the measured frames of one or more shards. ``squared_error`` is exact."""

    num_frames: int = 0
    num_values: int = 0
    squared_error: int = 0
    highest_mean: float = 0.0

    def measure(self, original: NDArray[np.uint8], decoded: NDArray[np.uint8]) -> None:
        """Add one frame (3, H, W) uint8, before encoding and after decoding."""
        error = 0
        for before, after in zip(original, decoded):
            difference = np.subtract(before, after, dtype=np.int16)
            error += int(np.square(difference, dtype=np.int32).sum(dtype=np.int64))
        self.num_frames += 1
        self.num_values += original.size
        self.squared_error += error
        self.highest_mean = max(self.highest_mean, error / original.size)

    def add(self, other: DriftSums) -> None:
        """Add the sums of other frames."""
        self.num_frames += other.num_frames
        self.num_values += other.num_values
        self.squared_error += other.squared_error
        self.highest_mean = max(self.highest_mean, other.highest_mean)

    def drift(self) -> Drift:
        """The drift that the manifest states."""
        mean = self.squared_error / max(1, self.num_values)
        return Drift(
            every=DRIFT_EVERY,
            num_frames=self.num_frames,
            mean_squared_error=mean,
            psnr_db=psnr(mean),
            lowest_psnr_db=psnr(self.highest_mean),
        )


def drift_lines(manifest: Manifest) -> Iterator[str]:
    """One line about what a lossy codec did to the pixels; nothing with a lossless one."""
    if isinstance(drift := manifest.drift, Drift):
        yield (
            f"pixels are JPEG of quality {manifest.settings.jpeg_quality}: PSNR {decibels(drift.psnr_db)}, at least "
            f"{decibels(drift.lowest_psnr_db)} in a frame ({counted(drift.num_frames, 'frame')} measured, one in "
            f"{drift.every} of each shard)"
        )


def decibels(psnr_db: float | None) -> str:
    """A signal-to-noise ratio in words; None means that no value differs."""
    return "infinite" if psnr_db is None else f"{psnr_db:.1f} dB"
