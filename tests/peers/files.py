"""What the peers' scripts and the test share: the images of the corpora, and the file of a peer's token ids.

The scripts run in environments of their own, so this module needs NumPy and Pillow only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image

DATA = Path(__file__).resolve().parents[1] / "data"
MIN_PIXELS = 16 * 28 * 28
MAX_PIXELS = 576 * 28 * 28
MIN_VIDEO_PIXELS = 256 * 28 * 28
MAX_VIDEO_PIXELS = 1664 * 28 * 28


class Encoding(NamedTuple):
    """One record as a peer encodes it.

    Attributes:
        input_ids: (L,) int32.
        labels: (L,) int32, not shifted, -100 where nothing is trained.
        grid_thw: (M, 3) int32, images first, then videos.
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    grid_thw: NDArray[np.int32]


def read_corpus(peer: str) -> dict[str, dict[str, Any]]:
    """The records of a peer's dialect by name."""
    corpus: dict[str, dict[str, Any]] = json.loads((DATA / f"peers_{peer}.json").read_text(encoding="utf-8"))
    return corpus


def write_images(record: object, folder: Path) -> None:
    """Draw every image that a record names: a gradient with the size that the name gives, as ``600x400.png``.

    ``600x400-rotated.png`` has an EXIF orientation of 6, so it is displayed with 400×600 pixels.
    """
    for name in _strings(record):
        if name.endswith(".png") and name.isascii():
            size, _, variant = name.removesuffix(".png").partition("-")
            width, height = map(int, size.split("x"))
            rows, columns = np.mgrid[:height, :width]
            pixels = np.stack([columns * 255 // width, rows * 255 // height, (rows + columns) % 256], axis=-1)
            exif = Image.Exif()
            if variant == "rotated":
                exif[ExifTags.Base.Orientation] = 6
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name, exif=exif)


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def write_encodings(peer: str, encodings: Mapping[str, Encoding], versions: Sequence[str]) -> None:
    """Write a peer's encodings and the versions that made them as ``tests/data/peers_<peer>.npz``."""
    columns = list(zip(*encodings.values()))
    arrays = {name: np.concatenate(column) for name, column in zip(Encoding._fields, columns)}
    np.savez_compressed(
        DATA / f"peers_{peer}.npz",
        names=np.array(list(encodings)),
        num_tokens=np.array([len(ids) for ids in columns[0]], dtype=np.int32),
        num_media=np.array([len(grids) for grids in columns[2]], dtype=np.int32),
        versions=np.array(versions),
        **arrays,
    )


def read_encodings(peer: str) -> dict[str, Encoding]:
    """What :func:`write_encodings` wrote, by the name of the record."""
    with np.load(DATA / f"peers_{peer}.npz", allow_pickle=False) as file:
        tokens, media = np.cumsum(file["num_tokens"])[:-1], np.cumsum(file["num_media"])[:-1]
        columns = (
            np.split(file["input_ids"], tokens),
            np.split(file["labels"], tokens),
            np.split(file["grid_thw"], media),
        )
        return {str(name): Encoding(*row) for name, *row in zip(file["names"], *columns)}


def read_versions(peer: str) -> dict[str, str]:
    """The packages that made a peer's encodings, and their versions."""
    with np.load(DATA / f"peers_{peer}.npz", allow_pickle=False) as file:
        return dict(str(package).split(" ") for package in file["versions"])
