"""Names of the codecs of pixel planes. They stand apart from numpy, which the command line does not need."""

from __future__ import annotations

CODECS = ("zstd", "raw", "jpeg")
"""Values of ``--pixels``. The member that holds the pixels of a bin is named by ``PIXELS_MEMBER[codec]``."""

PIXELS_MEMBER = {"zstd": "pixels.zst", "raw": "pixels.raw", "jpeg": "pixels.jpeg"}

DEFAULT_JPEG_QUALITY = 95
JPEG_QUALITIES = (1, 100)
"""Lowest and highest quality, on libjpeg's scale."""
