"""Images: probe the header, or decode, orient, convert to RGB and resize.

Input: a source. Output: a grid (probe), or planes (3, H, W) uint8 (decode). Cost: a probe reads only the header, in a
fraction of a millisecond. Decoding and resizing a 1-megapixel JPEG takes about 10 ms, most of it in Pillow's decoder.

The steps are those of the Pillow implementation of the Qwen2-VL image processor (transformers 5.23): EXIF orientation,
transparency composited onto white, RGB, Pillow bicubic to the size of :func:`smart_resize`.
"""

from __future__ import annotations

import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError
from PIL.ExifTags import Base as ExifTag

from prep.media.bicubic import resize_into
from prep.media.item import NO_ITEM_SETTINGS, ItemSettings, image_bounds
from prep.media.resize import smart_resize
from prep.media.source import MediaSource
from schemas.annotation import ReasonCode
from schemas.errors import MediaError
from schemas.qwen import FACTOR, PATCH_SIZE, Grid
from schemas.settings import MediaSettings

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "AVIF", "JPEG2000", "PPM", "QOI")
"""Formats that Pillow may open, by Pillow's names. Its other readers serve formats that datasets do not use. The EPS
reader runs Ghostscript."""

RESIZED_BOUNDS = (4 * FACTOR**2, 16384 * FACTOR**2)
"""Bounds of ``resized_height`` times ``resized_width``: those of an image in ``qwen_vl_utils``."""

_SIDEWAYS_ORIENTATIONS = (5, 6, 7, 8)
_MAX_16_BITS = 65535
_LATE_TEXT_CHUNKS = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")

# fmt: off
_DAMAGE_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, OverflowError, struct.error,
)
# fmt: on
"""What Pillow's decoders raise for damaged files. They raise nothing narrower."""

Allocate = Callable[[tuple[int, int, int, int]], NDArray[np.uint8]]
"""Returns an array of shape (F, 3, H, W) that decoded frames are written to."""


def new_frames(shape: tuple[int, int, int, int]) -> NDArray[np.uint8]:
    """Allocate ordinary memory for decoded frames."""
    return np.empty(shape, dtype=np.uint8)


def probe_image(
    source: MediaSource, settings: MediaSettings, item: ItemSettings = NO_ITEM_SETTINGS
) -> tuple[Grid, int, int]:
    """Read the size of an image from its header.

    Returns:
        The grid after resizing, and the upright image's own height and width in pixels.

    Raises:
        MediaError: not an image, too many pixels, or an extreme aspect ratio.
    """
    height, width = image_size(source, settings)
    return _grid(height, width, settings, item), height, width


def image_size(source: MediaSource, settings: MediaSettings) -> tuple[int, int]:
    """Height and width of an upright image, from its header.

    Raises:
        MediaError: not an image, or too many pixels.
    """
    with _opened(source, settings) as image:
        width, height = image.size
        is_sideways = _orientation(image, source) in _SIDEWAYS_ORIENTATIONS
        return (width, height) if is_sideways else (height, width)


def decode_image(
    source: MediaSource,
    settings: MediaSettings,
    item: ItemSettings = NO_ITEM_SETTINGS,
    allocate: Allocate = new_frames,
) -> tuple[NDArray[np.uint8], Grid, int, int]:
    """Decode, orient and resize an image.

    Returns:
        Planes (3, H, W) uint8, R G B; their grid; and the upright image's own height and width in pixels.

    Raises:
        MediaError: as :func:`probe_image`, or the pixels are truncated or damaged.
    """
    with opened_rgb(source, settings) as rgb:
        grid = _grid(rgb.height, rgb.width, settings, item)
        planes = allocate(frames_shape(1, grid))[0]
        resize_into(planes, rgb)
        return planes, grid, rgb.height, rgb.width


@contextmanager
def opened_rgb(source: MediaSource, settings: MediaSettings) -> Iterator[Image.Image]:
    """An image, decoded, upright, in RGB, at its own size, for the duration of a ``with`` block.

    Raises:
        MediaError: not an image, too many pixels, or truncated or damaged ones.
    """
    with _opened(source, settings) as image:
        image.load()
        # In place, because otherwise Pillow copies an image that is upright already.
        ImageOps.exif_transpose(image, in_place=True)
        yield to_rgb(image)


def frames_shape(num_frames: int, grid: Grid) -> tuple[int, int, int, int]:
    """Shape (F, 3, 14·h, 14·w) of the stored frames of a medium."""
    return num_frames, 3, grid.h * PATCH_SIZE, grid.w * PATCH_SIZE


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB, compositing transparent pixels onto white.

    Opaque RGB images are returned unchanged. 16-bit grey is scaled to 8 bits. Pillow's own conversion, which the
    reference relies on, clips everything above 255 and turns such an image white.

    Raises:
        MediaError: ``unsupported_media`` for 32-bit or floating-point grey, whose range is unknown.
    """
    if image.mode in ("F", "I") or image.mode.startswith("I;"):
        return _scale_16_bit_grey(image).convert("RGB")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, (255, 255, 255, 255)), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _scale_16_bit_grey(image: Image.Image) -> Image.Image:
    levels = np.asarray(image)
    if image.mode == "F" or levels.min() < 0 or levels.max() > _MAX_16_BITS:
        raise MediaError(
            ReasonCode.UNSUPPORTED_MEDIA,
            f"grey levels of mode {image.mode!r} from {levels.min()} to {levels.max()} have no defined white; "
            "store the image with 8 or 16 bits",
        )
    return Image.fromarray(np.rint(levels / (_MAX_16_BITS / 255)).astype(np.uint8))


def image_grid(
    height: int, width: int, *, min_pixels: int, max_pixels: float, item: ItemSettings = NO_ITEM_SETTINGS
) -> Grid:
    """Patch grid of an image or frame of ``height`` by ``width`` pixels after resizing.

    Args:
        height: of the upright image, in pixels.
        width: likewise.
        min_pixels: bound, which an item that sets its size exactly does without.
        max_pixels: likewise.
        item: settings of its own.
    """
    if item.resized is not None:
        height, width = item.resized
        min_pixels, max_pixels = RESIZED_BOUNDS
    rows, columns = smart_resize(height, width, min_pixels=min_pixels, max_pixels=max_pixels, keeps_thin=item.sets_size)
    return Grid(1, rows // PATCH_SIZE, columns // PATCH_SIZE)


def _grid(height: int, width: int, settings: MediaSettings, item: ItemSettings) -> Grid:
    min_pixels, max_pixels = image_bounds(settings, item)
    return image_grid(height, width, min_pixels=min_pixels, max_pixels=max_pixels, item=item)


@contextmanager
def _opened(source: MediaSource, settings: MediaSettings) -> Iterator[Image.Image]:
    """Open an image, and turn every way in which Pillow can fail into a reason code."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Pillow checks images inside a file (frames of an animation, say) against twice this value.
            Image.MAX_IMAGE_PIXELS = (settings.max_source_pixels + 1) // 2
            with source.open() as file, Image.open(file, formats=FORMATS) as image:
                width, height = image.size
                if width * height > settings.max_source_pixels:
                    raise MediaError(
                        ReasonCode.MEDIA_TOO_LARGE,
                        f"{source.name!r} has {width}x{height} pixels; at most {settings.max_source_pixels:,} "
                        "pixels are decoded (max_source_pixels)",
                    )
                yield image
    except UnidentifiedImageError as error:
        if _has_image_signature(source):
            raise MediaError(
                ReasonCode.MEDIA_UNREADABLE, f"{source.name!r} begins like an image, but its header is damaged"
            ) from error
        raise MediaError(
            ReasonCode.UNSUPPORTED_MEDIA,
            f"{source.name!r} is not an image in a supported format: {', '.join(FORMATS)}",
        ) from error
    except Image.DecompressionBombError as error:
        raise MediaError(ReasonCode.MEDIA_TOO_LARGE, f"{source.name!r}: {error}") from error
    except _DAMAGE_ERRORS as error:
        raise MediaError(
            ReasonCode.MEDIA_UNREADABLE, f"{source.name!r} cannot be decoded: {source.explain(error)}"
        ) from error
    except MemoryError as error:
        raise MediaError(ReasonCode.MEDIA_TOO_LARGE, f"{source.name!r} needs more memory than is available") from error


def _has_image_signature(source: MediaSource) -> bool:
    """Whether one of Pillow's readers accepts the first bytes."""
    with source.open() as file:
        head = file.read(16)
    accepts = [Image.OPEN[name][1] for name in FORMATS if name in Image.OPEN]
    return any(accept is not None and accept(head) is True for accept in accepts)


def _orientation(image: Image.Image, source: MediaSource) -> int:
    """Read the EXIF orientation (1 to 8) that is still to be applied, without decoding pixels.

    Pillow itself applies the orientation of a TIFF and reports its upright size. A PNG may have EXIF after its pixels.
    ``PngImageFile.getexif`` decodes the pixels to look there, so it is called only if the chunk list shows such EXIF.
    """
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return 1
    if isinstance(image, PngImagePlugin.PngImageFile) and "exif" not in image.info and not _has_late_text(source):
        exif = Image.Image.getexif(image)
    else:
        exif = image.getexif()
    return int(exif.get(ExifTag.Orientation, 1) or 1)


def _has_late_text(source: MediaSource) -> bool:
    """Whether a PNG has text or EXIF chunks after its pixel data."""
    has_pixels = False
    with source.open() as file:
        file.seek(8)
        kind = b""
        # Pillow ignores what follows the end, which may be gigabytes of zeros.
        while kind != b"IEND" and len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            has_pixels = has_pixels or kind == b"IDAT"
            if has_pixels and kind in _LATE_TEXT_CHUNKS:
                return True
            file.seek(length + 4, 1)
    return False
