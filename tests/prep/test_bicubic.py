"""The resizing kernel equals the installed Pillow to the bit, and Pillow takes over where it is missing or differs."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from prep.build import pipeline
from prep.media import bicubic
from prep.media.decode import decode
from prep.media.source import MediaSource
from schemas.bins import MEDIA_IMAGE, MEDIA_VIDEO
from schemas.settings import MediaSettings
from tests.prep.finished import build_set
from tests.prep.test_images import random_image
from tests.prep.test_videos import write_video

Rng = np.random.Generator
Pixels = NDArray[np.uint8]

needs_kernel = pytest.mark.skipif(
    bicubic._bicubic is None and "CI" not in os.environ, reason="compile it: python setup.py build_ext --inplace"
)

CONTENTS: dict[str, Callable[[Rng, int, int], NDArray[np.generic]]] = {
    "noise": lambda rng, height, width: rng.integers(0, 256, (height, width, 3)),
    "extremes": lambda rng, height, width: rng.choice([0, 255], (height, width, 3)),
    "gradient": lambda rng, height, width: np.add.outer(np.arange(height), np.arange(width))[..., None] + [0, 5, 99],
    "steps": lambda rng, height, width: (
        255 * (np.add.outer(np.arange(height), np.arange(width))[..., None] // [3, 4, 5] % 2)
    ),
    "one colour": lambda rng, height, width: np.broadcast_to(rng.integers(0, 256, 3), (height, width, 3)),
}

EDGES = [
    # (width, height) before and after
    ((1, 1), (1, 1)),
    ((1, 1), (28, 56)),
    ((28, 28), (28, 28)),
    ((6000, 1), (28, 28)),
    ((1, 6000), (28, 28)),
    ((2, 401), (28, 308)),
    ((6000, 9), (5999, 11)),
    ((9, 6000), (13, 5999)),
    ((5, 7), (6000, 28)),
    ((31, 33), (32, 16)),
    ((15, 17), (15, 56)),
    ((17, 15), (56, 15)),
]


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    """Let a test change Pillow or the kernel before the two are compared."""
    bicubic._pass_order.cache_clear()
    yield
    bicubic._pass_order.cache_clear()


def pixels(rng: Rng, content: str, size: tuple[int, int]) -> Pixels:
    return CONTENTS[content](rng, size[1], size[0]).astype(np.uint8)


def by_kernel(source: Image.Image | Pixels, size: tuple[int, int]) -> Pixels:
    planes = np.zeros((3, size[1], size[0]), dtype=np.uint8)
    assert bicubic._pass_order() is not None
    bicubic.resize_into(planes, source)
    return planes


def by_pillow(source: Pixels, size: tuple[int, int]) -> Pixels:
    resized = Image.fromarray(source).resize(size, Image.Resampling.BICUBIC)
    return np.asarray(resized).transpose(2, 0, 1)


def log_uniform(rng: Rng, largest: float) -> int:
    return int(np.exp(rng.uniform(0, np.log(largest))))


def random_sizes(rng: Rng) -> tuple[tuple[int, int], tuple[int, int]]:
    """Two sides of 1 to 6,000 pixels, before and after, with at most 60,000 pixels each."""
    sizes = []
    for _ in range(2):
        side = log_uniform(rng, 6001)
        other = log_uniform(rng, min(6001, 60_000 / side) + 1)
        sizes.append((side, other) if rng.random() < 0.5 else (other, side))
    return sizes[0], sizes[1]


@needs_kernel
def test_the_kernel_is_compiled_and_agrees_with_the_installed_pillow() -> None:
    assert bicubic.fallback_reason() is None


@needs_kernel
@pytest.mark.parametrize("content", CONTENTS)
def test_planes_of_images_and_frames_equal_pillows(content: str) -> None:
    """Up and down, both orders of passes, odd widths, thin and wide."""
    rng = np.random.default_rng(len(content))
    for size, new_size in [*EDGES, *(random_sizes(rng) for _ in range(60))]:
        source = pixels(rng, content, size)
        expected = by_pillow(source, new_size)
        assert np.array_equal(by_kernel(Image.fromarray(source), new_size), expected), (size, new_size)
        assert np.array_equal(by_kernel(source, new_size), expected), (size, new_size)


@needs_kernel
def test_sizes_around_the_change_of_order_equal_pillows() -> None:
    """Pillow 13 resizes down first if the height loses over twice as many pixels as the width."""
    rng = np.random.default_rng(0)
    orders = set()
    for lost in range(27, 34):
        size, new_size = (60, 90), (45, 90 - lost)
        order = bicubic._pass_order()
        assert order is not None
        orders.add(order(size[1], size[0], new_size[1], new_size[0]))
        source = pixels(rng, "noise", size)
        assert np.array_equal(by_kernel(source, new_size), by_pillow(source, new_size)), lost
    changes = bicubic._pass_order() is bicubic._order_of_pillow_13
    assert orders == ({False, True} if changes else {False})


@needs_kernel
def test_a_frame_that_is_not_contiguous_is_resized_as_its_copy() -> None:
    source = pixels(np.random.default_rng(0), "noise", (50, 40))
    turned = np.rot90(source)
    assert np.array_equal(by_kernel(turned, (56, 28)), by_pillow(np.ascontiguousarray(turned), (56, 28)))


@needs_kernel
def test_an_image_in_several_blocks_of_memory_equals_pillows() -> None:
    source = pixels(np.random.default_rng(0), "noise", (301, 200))
    block_bytes = Image.core.get_block_size()  # type: ignore[attr-defined]
    by_kernel(source, (28, 28))
    try:
        Image.core.set_block_size(1 << 16)  # type: ignore[attr-defined]
        image = Image.fromarray(source).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    finally:
        Image.core.set_block_size(block_bytes)  # type: ignore[attr-defined]
    with pytest.raises(ValueError):
        image.__arrow_c_array__()
    assert np.array_equal(by_kernel(image, (140, 84)), by_pillow(np.ascontiguousarray(source[:, ::-1]), (140, 84)))


@needs_kernel
def test_sizes_that_do_not_match_the_memory_are_refused() -> None:
    source, planes = np.zeros((5, 7, 3), dtype=np.uint8), np.zeros((3, 28, 56), dtype=np.uint8)
    kernel = bicubic._bicubic
    kernel.resize(source, (5, 7, 3), planes, (28, 56), False)
    for shape in ((5, 8, 3), (5, 7, 4), (0, 7, 3), (-5, -7, 3), (1 << 62, 4, 3)):
        with pytest.raises(ValueError, match="sizes do not match"):
            kernel.resize(source, shape, planes, (28, 56), False)
    with pytest.raises(ValueError, match="sizes do not match"):
        kernel.resize(source, (5, 7, 3), planes, (28, 57), False)
    with pytest.raises(ValueError, match="several channels"):
        grey = Image.new("L", (7, 5)).__arrow_c_array__()[1]
        kernel.resize(grey, (5, 7, 4), planes, (28, 56), False)
    planes.flags.writeable = False
    with pytest.raises((BufferError, TypeError, ValueError)):
        kernel.resize(source, (5, 7, 3), planes, (28, 56), False)


def in_order_of_pillow_12(self: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    """Each step resizes along one axis alone, so that the order is this one in any version."""
    down_first = self.height > 100 * self.width and size[1] < self.height
    between = (self.width, size[1]) if down_first else (size[0], self.height)
    return RESIZE(RESIZE(self, between, resample), size, resample)


def one_level_darker(self: Image.Image, size: tuple[int, int], resample: Image.Resampling) -> Image.Image:
    return RESIZE(self, size, resample).point(lambda level: max(level - 1, 0))


RESIZE = Image.Image.resize


@needs_kernel
def test_the_order_of_passes_follows_the_installed_pillow(fresh_choice: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "resize", in_order_of_pillow_12)
    rng = np.random.default_rng(1)
    for size, new_size in (((40, 90), (56, 28)), ((3, 400), (28, 84)), ((3, 400), (2, 401))):
        source = pixels(rng, "noise", size)
        assert np.array_equal(by_kernel(source, new_size), by_pillow(source, new_size)), (size, new_size)
    assert bicubic._pass_order() is bicubic._order_of_pillow_12


@needs_kernel
def test_pillow_resizes_if_it_computes_otherwise(fresh_choice: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "resize", one_level_darker)
    source = pixels(np.random.default_rng(2), "noise", (40, 30))
    planes = np.zeros((3, 28, 56), dtype=np.uint8)
    bicubic.resize_into(planes, source)
    assert np.array_equal(planes, by_pillow(source, (56, 28)))
    assert "kernel disagree" in str(bicubic.fallback_reason())


def test_media_have_the_same_planes_without_the_kernel(
    fresh_choice: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    random_image(333, 207).save(tmp_path / "x.png")
    random_image(333, 207).save(tmp_path / "y.png")
    write_video(tmp_path / "x.mp4", 8, 2)
    frames = tuple(MediaSource(name, tmp_path / name) for name in ("x.png", "y.png"))
    media = [
        (MediaSource("x.png", tmp_path / "x.png"), MEDIA_IMAGE),
        (MediaSource("x.mp4", tmp_path / "x.mp4"), MEDIA_VIDEO),
        (MediaSource("frames", frames=frames), MEDIA_VIDEO),
    ]
    with_kernel = [decode(source, media_type, MediaSettings()) for source, media_type in media]
    monkeypatch.setattr(bicubic, "_bicubic", None)
    bicubic._pass_order.cache_clear()
    without = [decode(source, media_type, MediaSettings()) for source, media_type in media]
    assert "without its compiled kernel" in str(bicubic.fallback_reason())
    for (info, planes), (other_info, other_planes) in zip(with_kernel, without):
        assert info == other_info
        assert np.array_equal(planes, other_planes)


def test_a_build_says_once_that_pillow_resizes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    turns = [{"from": "human", "value": "<image>What is it?"}, {"from": "gpt", "value": "Noise."}]
    records = [{"image": f"{index}.png", "conversations": turns} for index in range(2)]
    for record in records:
        random_image(40, 30).save(tmp_path / str(record["image"]))
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.setattr(pipeline, "fallback_reason", lambda: "Pillow resizes the images.")
    with caplog.at_level("INFO"):
        build_set(tmp_path / "x.jsonl", tmp_path / "shards", tiny_checkpoint)
    assert caplog.messages.count("Pillow resizes the images.") == 1
