"""A reader that knows nothing of the generator: it names the shapes in an image by looking at pixels."""

from __future__ import annotations

import colorsys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

Indices = npt.NDArray[np.signedinteger[Any]]

_HUE_ENDS = ((20, "red"), (35, "orange"), (65, "yellow"), (170, "green"), (250, "blue"), (310, "purple"))
_MIN_PIXELS = 60


@dataclass(frozen=True)
class Seen:
    """A shape in an image. ``x`` and ``y`` are the centre of its pixels."""

    colour: str
    shape: str
    x: float
    y: float
    num_pixels: int


def see(path: Path) -> list[Seen]:
    """Returns the shapes in an image file, upright as a viewer shows it."""
    return see_image(ImageOps.exif_transpose(Image.open(path)))


def see_image(image: Image.Image) -> list[Seen]:
    """Returns the shapes in an image: the connected parts that differ from its corner."""
    pixels = np.asarray(image.convert("RGB")).astype(np.float64)
    mask = np.abs(pixels - pixels[0, 0]).max(axis=-1) > 25
    shapes = []
    for ys, xs in _connected_parts(mask):
        middle = (slice(int(ys.mean()) - 3, int(ys.mean()) + 4), slice(int(xs.mean()) - 3, int(xs.mean()) + 4))
        colour = _name_colour(np.median(pixels[middle].reshape(-1, 3), axis=0))
        shapes.append(Seen(colour, _name_shape(ys, xs), float(xs.mean()), float(ys.mean()), len(xs)))
    return shapes


def _name_colour(rgb: npt.NDArray[np.float64]) -> str:
    hue, saturation, _ = colorsys.rgb_to_hsv(*(rgb / 255))
    if saturation < 0.2:
        return "gray"
    return next((name for end, name in _HUE_ENDS if hue * 360 < end), "red")


def _name_shape(ys: Indices, xs: Indices) -> str:
    """The strongest harmonic of the outline, as distance from the centre by angle, is the number of corners."""
    dy, dx = ys - ys.mean(), xs - xs.mean()
    bins = ((np.arctan2(dy, dx) + np.pi) / (2 * np.pi) * 60).astype(int) % 60
    outline = np.zeros(60)
    np.maximum.at(outline, bins, np.hypot(dx, dy))
    harmonics = np.abs(np.fft.rfft(outline))[3:6] / outline.sum()
    corners = 3 + int(harmonics.argmax())
    return "circle" if harmonics.max() < 0.025 else {3: "triangle", 4: "square", 5: "star"}[corners]


def _connected_parts(mask: npt.NDArray[np.bool_]) -> list[tuple[Indices, Indices]]:
    """Coordinates of the parts of a mask, without specks: runs of pixels, joined with those that they touch above."""
    edges = np.diff(np.pad(mask, ((0, 0), (1, 1))).astype(np.int8))
    rows, starts = np.nonzero(edges == 1)
    _, ends = np.nonzero(edges == -1)
    first = np.searchsorted(rows, np.arange(mask.shape[0] + 1))
    joined = list(range(rows.size))

    def last_of(run: int) -> int:
        while joined[run] != run:
            run = joined[run]
        return run

    for run, row in enumerate(rows.tolist()):
        for above in range(first[row - 1], first[row]) if row else ():
            if starts[above] <= ends[run] and starts[run] <= ends[above]:
                joined[last_of(above)] = run
    part_of = np.array([last_of(run) for run in range(rows.size)], dtype=np.int64)
    names = np.zeros(mask.shape, dtype=np.int64)
    names[mask] = np.repeat(part_of + 1, ends - starts)
    numbers, sizes = np.unique(names[mask], return_counts=True)
    return [np.nonzero(names == number) for number in numbers[sizes > _MIN_PIXELS]]
