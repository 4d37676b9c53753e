"""Picture files in the formats and modes that real datasets mix, as pure functions from a drawing to bytes.

RGB drawing + ``Encoding`` -> file bytes: PNG, JPEG or WebP, in colour, grey, with a palette, with transparency, or
stored turned with an EXIF orientation. Cost: 1-3 ms a picture.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

_EXIF_ORIENTATION = 0x0112
_STORED_TURNED_LEFT = 6
"""EXIF orientation of a picture that has to be turned right by 90 degrees to be seen upright."""
_PALETTE_COLOURS = 128
_QUALITY = 92


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoding:
    """How a picture is stored. ``turned`` is for JPEG: the pixels lie on their side and EXIF says so."""

    format: Literal["PNG", "JPEG", "WEBP"]
    mode: Literal["RGB", "L", "P", "RGBA"] = "RGB"
    turned: bool = False

    @property
    def suffix(self) -> str:
        """The file name's extension."""
        return {"PNG": ".png", "JPEG": ".jpg", "WEBP": ".webp"}[self.format]


PNG = Encoding(format="PNG")
JPEG = Encoding(format="JPEG")
WEBP = Encoding(format="WEBP")
GREY_PNG = Encoding(format="PNG", mode="L")
GREY_JPEG = Encoding(format="JPEG", mode="L")
PALETTE_PNG = Encoding(format="PNG", mode="P")
TRANSPARENT_PNG = Encoding(format="PNG", mode="RGBA")
TURNED_JPEG = Encoding(format="JPEG", turned=True)


def encode_picture(image: Image.Image, encoding: Encoding) -> bytes:
    """Returns the bytes of an RGB drawing's file.

    A grey copy keeps brightness only; a palette keeps 128 colours; a transparent copy has the plain background (the
    colour of the corner) see-through, with its colour kept underneath.
    """
    options: dict[str, int | bytes] = {} if encoding.format == "PNG" else {"quality": _QUALITY}
    if encoding.mode == "L":
        image = image.convert("L")
    elif encoding.mode == "P":
        image = image.quantize(_PALETTE_COLOURS, dither=Image.Dither.NONE)
    elif encoding.mode == "RGBA":
        image = _with_clear_background(image)
    if encoding.turned:
        image = image.transpose(Image.Transpose.ROTATE_90)
        exif = Image.Exif()
        exif[_EXIF_ORIENTATION] = _STORED_TURNED_LEFT
        options["exif"] = exif.tobytes()
    buffer = io.BytesIO()
    image.save(buffer, encoding.format, **options)
    return buffer.getvalue()


def _with_clear_background(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image)
    background = (pixels == pixels[0, 0]).all(axis=-1)
    alpha = np.where(background, 0, 255).astype(np.uint8)
    return Image.fromarray(np.dstack([pixels, alpha]))
