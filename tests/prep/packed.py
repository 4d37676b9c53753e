"""Reads the samples of a finished set as the format's description defines it: tar, ``.npy``, zstd, JPEG.

It uses no product code, so a comparison with these samples is a comparison with the files on disk.
"""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

MEAN, STD = (
    np.asarray(values, dtype=np.float32).reshape(3, 1, 1)
    for values in (Qwen2VLImageProcessorPil.image_mean, Qwen2VLImageProcessorPil.image_std)
)


@dataclass(frozen=True)
class Packed:
    """One sample as its bin stores it.

    Attributes:
        bin, slot: index of the bin, and of the sample in the bin.
        input_ids, labels: (L,) int32. position_ids: (3, L) int32.
        media: kind (0 image, 1 video), grid (t, h, w) and stored frames (F, 3, H, W) uint8 of every medium.
    """

    bin: int
    slot: int
    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    position_ids: NDArray[np.int32]
    media: tuple[tuple[int, tuple[int, int, int], NDArray[np.uint8]], ...]

    @property
    def num_patches(self) -> int:
        return sum(t * h * w for _, (t, h, w), _ in self.media)

    def pixel_values(self) -> NDArray[np.float32]:
        """(N, 1176) float32 of all media in sequence order."""
        return np.concatenate([patchify(frames, grid) for _, grid, frames in self.media])


def patchify(frames: NDArray[np.uint8], grid: tuple[int, int, int]) -> NDArray[np.float32]:
    """Normalise and cut into rows of the processor's merge-block order; an image is its own second frame."""
    t, h, w = grid
    pairs = np.broadcast_to(frames, (2 * t, *frames.shape[1:]))
    values = ((pairs * (1 / 255)).astype(np.float32) - MEAN) / STD
    blocks = values.reshape(t, 2, 3, h // 2, 2, 14, w // 2, 2, 14)
    return blocks.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, 1176)


def packed_samples(folder: Path) -> dict[str, list[Packed]]:
    """All samples of a set by ``dataset/record`` and, where the annotation has one, by id; copies in bin order."""
    samples_of: dict[str, list[Packed]] = defaultdict(list)
    for shard in sorted(folder.glob("bins-*.tar")):
        bins: dict[int, dict[str, bytes]] = defaultdict(dict)
        with tarfile.open(shard) as tar:
            for info in tar:
                key, _, member = info.name.partition(".")
                bins[int(key)][member] = tar.extractfile(info).read()  # type: ignore[union-attr]
        for bin_id, members in bins.items():
            for reference, sample in zip(json.loads(members["samples.json"]), _samples(bin_id, members), strict=True):
                samples_of[f"{reference['dataset']}/{reference['record']}"].append(sample)
                if reference["id"] is not None:
                    samples_of[reference["id"]].append(sample)
    return dict(samples_of)


def _samples(bin_id: int, members: dict[str, bytes]) -> list[Packed]:
    arrays: dict[str, NDArray[Any]] = {
        name.removesuffix(".npy"): np.load(io.BytesIO(data)) for name, data in members.items() if name.endswith(".npy")
    }
    media = _media(arrays, members)
    boundaries = arrays["cu_seqlens"].tolist()
    samples = []
    for slot, (start, stop) in enumerate(itertools.pairwise(boundaries)):
        ids = arrays["input_ids"][start:stop]
        num_media = int((ids == 151652).sum())  # <|vision_start|>
        samples.append(
            Packed(
                bin=bin_id,
                slot=slot,
                input_ids=ids,
                labels=arrays["labels"][start:stop],
                position_ids=arrays["position_ids"][:, start:stop],
                media=tuple(media[:num_media]),
            )
        )
        del media[:num_media]
    assert not media
    return samples


def _media(
    arrays: dict[str, NDArray[Any]], members: dict[str, bytes]
) -> list[tuple[int, tuple[int, int, int], NDArray[np.uint8]]]:
    is_coded = "pixels.zst" in members
    if "pixels.jpeg" in members:
        data = _jpegs(arrays, members["pixels.jpeg"])
    else:
        data = zstandard.decompress(members["pixels.zst"]) if is_coded else members["pixels.raw"]
    pixels = np.frombuffer(data, dtype=np.uint8)
    media = []
    for kind, (t, h, w) in zip(arrays["media_type"].tolist(), arrays["grid_thw"].tolist(), strict=True):
        shape = (2 * t if kind else 1, 3, 14 * h, 14 * w)
        size = int(np.prod(shape))
        frames, pixels = pixels[:size].reshape(shape), pixels[size:]
        if is_coded:
            frames = np.cumsum(np.cumsum(frames, axis=3, dtype=np.uint8), axis=2, dtype=np.uint8)
            frames[:, 0] += frames[:, 1]
            frames[:, 2] += frames[:, 1]
        media.append((kind, (t, h, w), frames))
    assert pixels.size == 0
    return media


def _jpegs(arrays: dict[str, NDArray[Any]], member: bytes) -> bytes:
    kinds, steps = arrays["media_type"].tolist(), arrays["grid_thw"][:, 0].tolist()
    num_frames = sum(2 * t if kind else 1 for kind, t in zip(kinds, steps, strict=True))
    sizes = np.frombuffer(member, dtype="<u4", count=num_frames).tolist()
    boundaries = list(itertools.accumulate(sizes, initial=4 * num_frames))
    assert boundaries[-1] == len(member)
    images = [np.asarray(Image.open(io.BytesIO(member[at:end]))) for at, end in itertools.pairwise(boundaries)]
    return b"".join(image.transpose(2, 0, 1).tobytes() for image in images)


def assert_same(actual: Packed, expected: Packed) -> None:
    """The same tokens, labels, positions, media and pixels."""
    for name in ("input_ids", "labels", "position_ids"):
        assert np.array_equal(getattr(actual, name), getattr(expected, name)), name
    assert [(kind, grid) for kind, grid, _ in actual.media] == [(kind, grid) for kind, grid, _ in expected.media]
    for (_, _, frames), (_, _, others) in zip(actual.media, expected.media):
        assert np.array_equal(frames, others)
