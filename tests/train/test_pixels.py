"""Pixels rebuilt on the device equal those of the Pillow image processor exactly."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from schemas.bins import Bin
from tests.train.synthetic import Medium, as_bin, as_stored, make_sample, residuals_of
from train.batches.batch import VisionBatch, build_micro_batch
from train.model.pixels import pixel_values, undo_residuals

PROCESSOR = Qwen2VLImageProcessorPil()


def processed(frame: NDArray[np.uint8], *, do_resize: bool = False) -> torch.Tensor:
    """Run the processor on one image (3, H, W): (N, 1176) float32."""
    image = Image.fromarray(frame.transpose(1, 2, 0))
    values: torch.Tensor = PROCESSOR(images=[image], do_resize=do_resize, return_tensors="pt")["pixel_values"]
    assert values.dtype == torch.float32
    return values


def expected(media: Iterable[Medium]) -> torch.Tensor:
    """The processor's values. A pair of video frames is assembled from the processor's values of two images."""
    rows = []
    for medium in media:
        if not medium.is_video:
            rows.append(processed(medium.frames[0]))
            continue
        for first, second in zip(medium.frames[::2], medium.frames[1::2]):
            pair = torch.stack([processed(frame).view(-1, 3, 2, 196)[:, :, 0] for frame in (first, second)], dim=2)
            rows.append(pair.reshape(-1, 1176))
    return torch.cat(rows)


def noise(rng: np.random.Generator, rows: int, columns: int, steps: int = 0) -> Medium:
    shape = (2 * steps if steps else 1, 3, 14 * rows, 14 * columns)
    return Medium(rng.integers(0, 256, shape, dtype=np.uint8), is_video=bool(steps))


def vision_of(media: list[Medium], codec: str) -> VisionBatch:
    sample = make_sample(np.random.default_rng(0), media)
    bins: list[Bin] = [as_bin([sample], codec=codec)]
    return build_micro_batch(bins).vision


merged = st.integers(1, 4).map(lambda side: 2 * side)
media_shapes = st.lists(st.tuples(merged, merged, st.sampled_from([0, 0, 1, 2, 3])), min_size=1, max_size=5)


@pytest.mark.parametrize("codec", ["zstd", "raw", "jpeg"])
@given(shapes=media_shapes, seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_pixels_equal_the_processor_exactly(codec: str, shapes: list[tuple[int, int, int]], seed: int) -> None:
    """Images and videos of any size, in any order, with noise that takes every value.

    JPEG is lossy; there the processor gets the decoded frames.
    """
    rng = np.random.default_rng(seed)
    media = [noise(rng, *shape) for shape in shapes]
    values = pixel_values(vision_of(media, codec))
    reference = expected(as_stored(medium, codec) for medium in media)
    assert values.dtype == torch.float32
    assert values.shape == reference.shape
    assert (values - reference).abs().max().item() == 0.0


@pytest.mark.parametrize("codec", ["zstd", "raw", "jpeg"])
def test_consecutive_media_of_equal_size_keep_their_order(codec: str) -> None:
    """Media of one size are processed together, but images and videos of that size separately."""
    rng = np.random.default_rng(1)
    media = [noise(rng, 4, 2, steps) for steps in (0, 0, 2, 1, 0, 3, 3)]
    reference = expected(as_stored(medium, codec) for medium in media)
    assert torch.equal(pixel_values(vision_of(media, codec)), reference)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_values_are_the_rounded_float32_values(dtype: torch.dtype) -> None:
    rng = np.random.default_rng(6)
    vision = vision_of([noise(rng, 6, 8), noise(rng, 4, 4, 2)], "zstd")
    values = pixel_values(vision, dtype)
    assert values.dtype == dtype
    assert torch.equal(values, pixel_values(vision).to(dtype))


def test_every_value_of_every_channel_is_exact() -> None:
    planes = np.arange(28 * 28).reshape(28, 28) % 256
    frame = np.stack([planes, 255 - planes, planes[::-1]]).astype(np.uint8)
    values = pixel_values(vision_of([Medium(frame[None], is_video=False)], "raw"))
    assert torch.equal(values, processed(frame))
    assert values.unique().numel() == 3 * 256


def test_the_processor_does_not_resize_an_image_of_the_right_size() -> None:
    """Hence planes that were resized offline give the values of a processor that resizes itself."""
    medium = noise(np.random.default_rng(2), 10, 16)
    assert torch.equal(pixel_values(vision_of([medium], "zstd")), processed(medium.frames[0], do_resize=True))


def test_residuals_are_undone_modulo_256() -> None:
    frames = noise(np.random.default_rng(3), 4, 6, steps=2).frames
    coded = np.stack([residuals_of(frame) for frame in frames])
    assert not np.array_equal(coded, frames)
    assert torch.equal(undo_residuals(torch.from_numpy(coded)), torch.from_numpy(frames))


def test_stored_planes_are_not_modified() -> None:
    """Rebuilding twice gives the same values: nothing is undone in place."""
    vision = vision_of([noise(np.random.default_rng(4), 4, 4)], "zstd")
    before = vision.planes.clone()
    assert torch.equal(pixel_values(vision), pixel_values(vision))
    assert torch.equal(vision.planes, before)


def test_a_batch_without_media_has_the_pixels_of_a_black_dummy() -> None:
    values = pixel_values(build_micro_batch([]).vision)
    assert torch.equal(values, processed(np.zeros((3, 28, 28), dtype=np.uint8)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("codec", ["zstd", "raw"])
def test_a_cuda_device_gives_the_same_bits(codec: str) -> None:
    rng = np.random.default_rng(5)
    vision = vision_of([noise(rng, 20, 30), noise(rng, 6, 4, 3)], codec)
    on_device = vision.map(lambda tensor: tensor.to("cuda"))
    assert torch.equal(pixel_values(on_device).cpu(), pixel_values(vision))
