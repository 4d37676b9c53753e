"""Pixels stored as JPEG -> planes, in the threads that read.

A bin whose codec is ``jpeg`` -> planes of all its frames in a buffer. Streams are checked before Pillow sees them
(:mod:`schemas.jpeg`); Pillow is needed for such sets of shards alone, and imported here when there is one.

Cost: 0.3 GB/s of planes on one core (4 ms a picture of 576 tokens), nearly all of it outside the interpreter lock.
"""

from __future__ import annotations

import io
import math
import struct

import numpy as np
from numpy.typing import NDArray

from schemas.bins import Bin
from schemas.errors import MEND_SHARDS, ConfigError, ShardError
from schemas.jpeg import split_streams

_DECODER_ERRORS = (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, struct.error)
"""What Pillow raises for damaged streams, and nothing narrower."""


def require_pillow() -> None:
    """See that JPEG can be decoded.

    Raises:
        ConfigError: Pillow is not installed.
    """
    try:
        import PIL.JpegImagePlugin  # noqa: F401 - only to see that it is there
    except ImportError as error:
        raise ConfigError(
            "these shards hold pixels as JPEG, which needs Pillow: pip install 'pillow>=12.0', or build the shards "
            "with --pixels zstd."
        ) from error


def decode_jpegs(found: Bin, out: NDArray[np.uint8], where: str) -> None:
    """Decode all frames of a bin.

    Args:
        found: the bin; its codec is ``jpeg``.
        out: where the planes go, ``found.num_pixel_bytes`` uint8.
        where: how to name the place in messages.

    Raises:
        ShardError: the member does not hold a JPEG of the right shape for every frame.
    """
    from PIL.JpegImagePlugin import JpegImageFile

    at = 0
    for number, (shape, stream) in enumerate(split_streams(found, where=where)):
        end = at + math.prod(shape)
        try:
            bands = JpegImageFile(io.BytesIO(stream)).split()
            for plane, band in zip(out[at:end].reshape(shape), bands):
                plane[:] = np.asarray(band)
        except _DECODER_ERRORS as error:
            raise ShardError(
                f"{where}: frame {number} of its pixels does not decode: {error}. {MEND_SHARDS}"
            ) from error
        at = end
