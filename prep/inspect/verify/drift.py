"""Checks the manifest's drift of a lossy codec, as far as possible without the original pixels.

Input: the manifest, and the count of stored frames of every shard. Output: findings.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from prep.inspect.verify.findings import Finding, inconsistent
from schemas.manifest import MANIFEST_FILE, Drift, Manifest

_PEAK = 255**2
_ROUNDED_DB = 0.0005 + 1e-9
"""Decibels are written with 3 decimals."""


def check_drift(manifest: Manifest, num_frames: Sequence[int]) -> Iterator[Finding]:
    """Check that only ``jpeg`` has a drift, that the count of measured frames is right, and that its numbers agree.

    Args:
        manifest: manifest of the set.
        num_frames: stored frames of every shard.
    """
    drift, codec = manifest.drift, manifest.settings.pixels
    if not isinstance(drift, Drift):
        if codec == "jpeg":
            yield inconsistent(
                MANIFEST_FILE,
                "the pixels are JPEG, but it has no drift, which says how lossy they are",
            )
        return
    if codec != "jpeg":
        yield inconsistent(MANIFEST_FILE, f"it has a drift, but the pixels are {codec}, which is lossless")
    if drift.num_frames != (expected := sum(-(-count // drift.every) for count in num_frames)):
        yield inconsistent(
            MANIFEST_FILE,
            f"drift.num_frames is {drift.num_frames}; one frame in {drift.every} of each shard makes {expected}",
        )
    if not _agree(drift.psnr_db, drift.mean_squared_error):
        yield inconsistent(
            MANIFEST_FILE,
            f"drift.psnr_db is {drift.psnr_db}, which a mean_squared_error of {drift.mean_squared_error} does not give",
        )
    lowest, mean = (math.inf if value is None else value for value in (drift.lowest_psnr_db, drift.psnr_db))
    if lowest > mean or lowest < mean == math.inf:
        yield inconsistent(
            MANIFEST_FILE,
            f"drift.lowest_psnr_db is {drift.lowest_psnr_db}, which cannot be the worst frame if all frames together "
            f"have {drift.psnr_db}",
        )


def _agree(psnr_db: float | None, mean_squared_error: float) -> bool:
    if psnr_db is None or mean_squared_error <= 0:
        return psnr_db is None and mean_squared_error == 0
    return abs(10 * math.log10(_PEAK / mean_squared_error) - psnr_db) <= _ROUNDED_DB
