"""A reader of shards, written from docs/format.md alone, as for another program.

It checks every statement of the page about the bytes. It imports nothing of this project and cuts pixels into patches
with loops, so it is slow.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import xxhash
import zstandard
from numpy.typing import NDArray
from PIL import Image

VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD = 151652, 151653, 151655, 151656
PIXELS = {"zstd": "pixels.zst", "raw": "pixels.raw", "jpeg": "pixels.jpeg"}

Shape = tuple[int, int, int, int]


class PageBin(NamedTuple):
    """A bin: its index, arrays by name, what ``samples.json`` says, and the rows for the model, (N, 1176) float32."""

    bin_index: int
    arrays: dict[str, NDArray[Any]]
    samples: list[dict[str, Any]]
    pixel_values: NDArray[np.float32]


def read_set(folder: Path) -> Iterator[PageBin]:
    """All bins of a set in order.

    Raises:
        AssertionError: the set is not what the page says.
    """
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest["version"] == 1
    for stored in [*manifest["shards"], *manifest["tables"]]:
        data = (folder / stored["file"]).read_bytes()
        assert len(data) == stored["num_bytes"]
        assert hashlib.sha256(data).hexdigest() == stored["sha256"]
    counts = manifest["counts"]
    assert counts["num_annotations"] == counts["num_packed"] + counts["num_rejected"] + counts["num_not_sampled"]
    rows = pq.read_table(folder / "bins.parquet").to_pylist()
    unlisted = iter(rows)
    for shard in manifest["shards"]:
        of_shard = [next(unlisted) for _ in range(shard["num_bins"])]
        assert all(f"bins-{row['shard']:05d}.tar" == shard["file"] for row in of_shard)
        assert of_shard[0]["bin"] == shard["first_bin"]
    assert next(unlisted, None) is None
    indices = [row["bin"] for row in rows]
    assert indices == sorted(set(indices))
    prints = manifest["fingerprints"]
    for row in rows:
        yield read_bin(folder, row, manifest["settings"], prints["image_mean"], prints["image_std"])


def read_bin(folder: Path, row: dict[str, Any], build: dict[str, Any], mean: list[float], std: list[float]) -> PageBin:
    with open(folder / f"bins-{row['shard']:05d}.tar", "rb") as file:
        file.seek(row["offset"])
        data = file.read(row["num_bytes"])
    assert len(data) == row["num_bytes"]
    assert len(data) % 512 == 0
    assert xxhash.xxh3_64_intdigest(data, seed=0) == row["xxh3"]
    key = f"{row['bin']:08d}."
    contents_of = walk(data)
    assert all(name.startswith(key) for name in contents_of)
    members = {name[len(key) :]: contents for name, contents in contents_of.items()}
    arrays = {name[:-4]: parse_npy(contents) for name, contents in members.items() if name.endswith(".npy")}
    samples = json.loads(members["samples.json"])
    check_arrays(row, build["max_length"], arrays, len(samples))
    media = [(*grid, kind) for grid, kind in zip(arrays["grid_thw"].tolist(), arrays["media_type"].tolist())]
    check_pads(arrays["input_ids"], media)
    shapes = [(2 * t if kind else 1, 3, 14 * h, 14 * w) for t, h, w, kind in media]
    (name,) = (name for name in members if name.startswith("pixels."))
    assert name == PIXELS[build["pixels"]]
    frames = decode_jpegs(members[name], shapes) if name == "pixels.jpeg" else decode(members[name], name, shapes)
    patched = [patches(medium, kind, mean, std) for medium, (*_, kind) in zip(frames, media)]
    return PageBin(row["bin"], arrays, samples, np.concatenate([np.zeros((0, 1176), np.float32), *patched]))


def walk(data: bytes) -> dict[str, bytes]:
    members, at = {}, 0
    while at < len(data):
        header = data[at : at + 512]
        size = int(header[124:136].strip(b" \0"), 8)
        checksum = int(header[148:156].strip(b" \0"), 8)
        assert checksum == sum(header[:148]) + 8 * ord(" ") + sum(header[156:])
        members[header[:100].split(b"\0")[0].decode("ascii")] = data[at + 512 : at + 512 + size]
        at += 512 + (size + 511) // 512 * 512
    return members


def parse_npy(data: bytes) -> NDArray[Any]:
    assert data[:8] == bytes.fromhex("93 4E 55 4D 50 59 01 00")
    length = int.from_bytes(data[8:10], "little")
    header = data[10 : 10 + length].decode("ascii")
    assert header.endswith("\n")
    assert "'fortran_order': False" in header
    dtype = {"<i4": "<i4", "|u1": "u1"}[header.split("'descr': '")[1].split("'")[0]]
    shape = tuple(int(side) for side in header.split("'shape': (")[1].split(")")[0].split(",") if side.strip())
    return np.frombuffer(data[10 + length :], dtype).reshape(shape)


def check_arrays(row: dict[str, Any], max_length: int, arrays: dict[str, NDArray[Any]], num_samples: int) -> None:
    ids, labels, boundaries = arrays["input_ids"], arrays["labels"], arrays["cu_seqlens"]
    grids, kinds, length = arrays["grid_thw"], arrays["media_type"], row["num_tokens"]
    assert 0 < length <= max_length
    assert ids.shape == labels.shape == (length,)
    assert arrays["position_ids"].shape == (3, length)
    assert boundaries.shape == (row["num_samples"] + 1,)
    assert num_samples == row["num_samples"]
    assert (int(boundaries[0]), int(boundaries[-1])) == (0, length)
    assert (np.diff(boundaries) > 0).all()
    trained = labels != -100
    assert trained.sum() == row["num_targets"]
    assert np.array_equal(ids[trained], labels[trained])
    assert not trained[boundaries[:-1]].any()
    assert (arrays["position_ids"][:, boundaries[:-1]] == 0).all()
    assert (np.diff(boundaries).astype(np.int64) ** 2).sum() == row["sum_squared_lengths"]
    assert grids.shape == (len(kinds), 3)
    assert (grids[:, 1:] % 2 == 0).all()
    assert (grids[kinds == 0, 0] == 1).all()
    assert grids.astype(np.int64).prod(axis=1).sum() == row["num_patches"]
    assert ((kinds == 0).sum(), (kinds == 1).sum()) == (row["num_images"], row["num_videos"])


def check_pads(ids: NDArray[Any], media: list[tuple[int, int, int, int]]) -> None:
    at = 0
    for t, h, w, kind in media:
        end = int(np.flatnonzero(ids[at:] == VISION_START)[0]) + at + 1 + t * h * w // 4
        pads = ids[end - t * h * w // 4 : end]
        assert (pads == (VIDEO_PAD if kind else IMAGE_PAD)).all()
        assert ids[end] == VISION_END
        at = end
    assert np.isin(ids, (IMAGE_PAD, VIDEO_PAD)).sum() == sum(t * h * w // 4 for t, h, w, _ in media)


def decode(member: bytes, name: str, shapes: list[Shape]) -> list[NDArray[np.uint8]]:
    planes = member if name == "pixels.raw" else zstandard.ZstdDecompressor().decompress(member)
    assert len(planes) == sum(int(np.prod(shape)) for shape in shapes)
    media, at = [], 0
    for shape in shapes:
        frames = np.frombuffer(planes, np.uint8, int(np.prod(shape)), at).reshape(shape).astype(np.int64)
        at += frames.size
        if name == "pixels.zst":
            frames = frames.cumsum(axis=3).cumsum(axis=2)
            frames[:, [0, 2]] += frames[:, [1]]
        media.append((frames % 256).astype(np.uint8))
    return media


def decode_jpegs(member: bytes, shapes: list[Shape]) -> list[NDArray[np.uint8]]:
    num_frames = sum(shape[0] for shape in shapes)
    sizes = [int.from_bytes(member[4 * frame : 4 * frame + 4], "little") for frame in range(num_frames)]
    assert 4 * num_frames + sum(sizes) == len(member)
    at, media = 4 * num_frames, []
    streams = iter(sizes)
    for shape in shapes:
        frames = []
        for size in (next(streams) for _ in range(shape[0])):
            frames.append(np.asarray(Image.open(io.BytesIO(member[at : at + size]))).transpose(2, 0, 1))
            at += size
        media.append(np.stack(frames))
        assert media[-1].shape == shape
    return media


def patches(frames: NDArray[np.uint8], kind: int, mean: list[float], std: list[float]) -> NDArray[np.float32]:
    """Frames of a medium -> its rows for the model."""
    of_channel = (np.array(values, np.float32)[:, None, None] for values in (mean, std))
    scaled = (frames.astype(np.float64) * (1 / 255)).astype(np.float32)
    values = (scaled - next(of_channel)) / next(of_channel)
    rows = []
    for first, second in zip(values[::2], values[1::2]) if kind else ((frame, frame) for frame in values):
        _, height, width = first.shape
        corners = [
            (y, x)
            for block_y in range(0, height, 28)
            for block_x in range(0, width, 28)
            for y in (block_y, block_y + 14)
            for x in (block_x, block_x + 14)
        ]
        for y, x in corners:
            patch = [
                frame[channel, y : y + 14, x : x + 14].ravel() for channel in range(3) for frame in (first, second)
            ]
            rows.append(np.concatenate(patch))
    return np.stack(rows)
