"""Resizes RGB images and frames to planes by Pillow's bicubic filter: with the project's own kernel, or with Pillow.

Input: an image, or a frame (H, W, 3) uint8. Output: planes (3, H', W') uint8. Cost for 0.8 megapixels reduced to 0.46,
on one core: 1.4 ms, or 7 ms with Pillow.

The kernel (``_bicubic.c``) computes the integers that Pillow computes, 32 at a time, and reads an image in Pillow's own
memory. It is compiled when vlprep is installed, if there is a compiler. Before it is used, it must agree with the
installed Pillow on a few images; otherwise Pillow resizes. The planes are the same in either case, so the choice is
neither a setting nor a part of a fingerprint.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image

try:
    from prep.media import _bicubic
except ImportError:
    _bicubic = None  # type: ignore[assignment]

_BLOCK_BYTES = 1 << 30
"""Pillow splits larger images into several blocks of memory, which cannot be read as one. Its default is 16 MiB."""

_PassOrder = Callable[[int, int, int, int], bool]
"""Whether Pillow resizes down an image before it resizes across. Takes height and width, before and after."""


def _order_of_pillow_13(height: int, width: int, new_height: int, new_width: int) -> bool:
    return height - new_height > max(0, 2 * (width - new_width))


def _order_of_pillow_12(height: int, width: int, new_height: int, new_width: int) -> bool:
    return height > 100 * width and new_height < height


_ORDERS = (_order_of_pillow_13, _order_of_pillow_12)

_TRIALS = (((90, 70), (28, 56)), ((40, 60), (56, 28)), ((2, 230), (28, 84)), ((33, 17), (28, 33)), ((19, 23), (56, 61)))
"""Sizes (width, height) before and after, of the images that the kernel is tested with. The second tells the orders
apart."""


def resize_into(planes: NDArray[np.uint8], rgb: Image.Image | NDArray[np.uint8]) -> None:
    """Resize an RGB image, or a frame (H, W, 3) uint8, into ``planes`` (3, H', W') uint8, which are contiguous."""
    order = _pass_order()
    if order is None:
        _resize_with_pillow(planes, rgb)
    else:
        _resize_with_kernel(planes, rgb, order)


def fallback_reason() -> str | None:
    """Why Pillow resizes, as a sentence. None if the kernel does."""
    if _pass_order() is not None:
        return None
    if _bicubic is None:
        return (
            "Pillow resizes the images, which takes longer: vlprep was installed without its compiled kernel. Install "
            "a C compiler and the headers of Python, then install vlprep again."
        )
    return f"Pillow resizes the images, which takes longer: Pillow {PIL.__version__} and vlprep's kernel disagree."


@lru_cache(maxsize=1)
def _pass_order() -> _PassOrder | None:
    """The order of passes with which the kernel agrees with the installed Pillow. None without such a kernel."""
    if _bicubic is None:
        return None
    agreeing = next((order for order in _ORDERS if all(_agrees(order, *sizes) for sizes in _TRIALS)), None)
    if agreeing is not None:
        Image.core.set_block_size(_BLOCK_BYTES)  # type: ignore[attr-defined]
    return agreeing


def _agrees(order: _PassOrder, size: tuple[int, int], new_size: tuple[int, int]) -> bool:
    width, height = size
    noise = np.arange(height * width * 3, dtype=np.uint32) * np.uint32(2654435761) >> np.uint32(24)
    image = Image.fromarray(noise.astype(np.uint8).reshape(height, width, 3))
    kernel, pillow = np.empty((2, 3, new_size[1], new_size[0]), dtype=np.uint8)
    _resize_with_kernel(kernel, image, order)
    _resize_with_pillow(pillow, image)
    return np.array_equal(kernel, pillow)


def _resize_with_kernel(planes: NDArray[np.uint8], rgb: Image.Image | NDArray[np.uint8], order: _PassOrder) -> None:
    source, (height, width, pixel_bytes) = _memory(rgb)
    new_height, new_width = planes.shape[1:]
    down_first = order(height, width, new_height, new_width)
    _bicubic.resize(source, (height, width, pixel_bytes), planes, (new_height, new_width), down_first)


def _memory(rgb: Image.Image | NDArray[np.uint8]) -> tuple[object, tuple[int, int, int]]:
    """The memory of an image or a frame, and its height, width and bytes per pixel."""
    if isinstance(rgb, Image.Image):
        try:
            _, memory = rgb.__arrow_c_array__()
            return memory, (rgb.height, rgb.width, 4)
        except ValueError:  # several blocks
            rgb = np.asarray(rgb)
    height, width, channels = rgb.shape
    return np.ascontiguousarray(rgb), (height, width, channels)


def _resize_with_pillow(planes: NDArray[np.uint8], rgb: Image.Image | NDArray[np.uint8]) -> None:
    image = rgb if isinstance(rgb, Image.Image) else Image.fromarray(rgb)
    _, height, width = planes.shape
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    for plane, band in zip(planes, resized.split()):
        plane[:] = np.asarray(band)
