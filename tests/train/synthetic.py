"""A small writer of shards for tests of the trainer, written from the format description and independent of ``prep``.

``write_shards(folder, make_bins(...))`` writes a complete folder: tar files, both tables, manifest. Samples are random
but obey the contract: an untrained first label, pad tokens that match the media, plausible mRoPE positions.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
import zstandard
from numpy.typing import NDArray
from PIL import Image

from schemas.bins import Bin
from schemas.manifest import (
    Counts,
    Fingerprints,
    InputDataset,
    InputFile,
    Manifest,
    StoredFile,
    StoredShard,
    encode_manifest,
)
from schemas.qwen import (
    IM_END,
    IM_START,
    IMAGE_MEAN,
    IMAGE_PAD,
    IMAGE_STD,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    Grid,
)
from schemas.settings import BuildSettings, MediaSettings
from storage.bins import parse_bin

BINS_SCHEMA = pa.schema(
    [
        ("bin", pa.int64()),
        ("shard", pa.int32()),
        ("offset", pa.int64()),
        ("num_bytes", pa.int64()),
        ("xxh3", pa.uint64()),
        ("num_tokens", pa.int32()),
        ("num_targets", pa.int32()),
        ("num_samples", pa.int32()),
        ("num_patches", pa.int32()),
        ("num_images", pa.int32()),
        ("num_videos", pa.int32()),
        ("sum_squared_lengths", pa.int64()),
    ]
)

SAMPLES_SCHEMA = pa.schema(
    [
        ("dataset", pa.string()),
        ("file", pa.string()),
        ("line", pa.int64()),
        ("record", pa.int64()),
        ("id", pa.string()),
        ("status", pa.string()),
        ("codes", pa.list_(pa.string())),
        ("message", pa.string()),
        ("bin", pa.int64()),
        ("slot", pa.int32()),
        ("num_tokens", pa.int32()),
        ("num_targets", pa.int32()),
        ("num_patches", pa.int32()),
        ("video_backend", pa.string()),
    ]
)


@dataclass(frozen=True)
class Medium:
    """Frames as stored: (1, 3, H, W) uint8 for an image, (2 t, 3, H, W) for a video."""

    frames: NDArray[np.uint8]
    is_video: bool

    @property
    def grid(self) -> Grid:
        num_frames, _, height, width = self.frames.shape
        return Grid(num_frames // 2 if self.is_video else 1, height // 14, width // 14)


@dataclass(frozen=True)
class Sample:
    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    position_ids: NDArray[np.int32]
    media: list[Medium] = field(default_factory=list)


def make_medium(rng: np.random.Generator, rows: int = 2, columns: int = 4, steps: int = 0) -> Medium:
    """Create a smooth random image of ``rows`` x ``columns`` patches, or a video of ``steps`` temporal steps."""
    shape = (2 * steps if steps else 1, 3, 14 * rows, 14 * columns)
    slopes = rng.integers(-3, 4, shape).cumsum(axis=2).cumsum(axis=3) // 8
    return Medium((slopes + rng.integers(0, 256)).astype(np.uint8), is_video=bool(steps))


def make_sample(
    rng: np.random.Generator, media: list[Medium] | None = None, num_text: int = 12, num_targets: int = 5
) -> Sample:
    """Create a sample: media first, then text, of which the last ``num_targets`` tokens are trained."""
    media = media or []
    ids: list[int] = [IM_START]
    positions: list[tuple[int, int, int]] = [(0, 0, 0)]
    for medium in media:
        t, h, w = medium.grid
        pads = [
            (step, row, column) for step in range(t) for row in range(h // 2) for column in range(w // 2)
        ]  # merged patches in sequence order
        start = max(positions[-1]) + 2
        ids += [VISION_START, *[VIDEO_PAD if medium.is_video else IMAGE_PAD] * len(pads), VISION_END]
        positions.append((start - 1,) * 3)
        positions += [(start + 2 * step, start + row, start + column) for step, row, column in pads]
        end = max(max(position) for position in positions) + 1
        positions.append((end,) * 3)
    start = max(max(position) for position in positions) + 1
    ids += [*rng.integers(10, 2000, num_text).tolist(), IM_END]
    positions += [(start + offset,) * 3 for offset in range(num_text + 1)]
    input_ids = np.array(ids, dtype=np.int32)
    labels = np.full_like(input_ids, -100)
    if num_targets:
        labels[-num_targets:] = input_ids[-num_targets:]
    return Sample(input_ids, labels, np.array(positions, dtype=np.int32).T.copy(), media)


def make_bins(seed: int = 0, num_bins: int = 8) -> list[list[Sample]]:
    """Create bins of four kinds in turn: text only, images, a video, and all of these together."""
    rng = np.random.default_rng(seed)
    kinds = [
        lambda: [make_sample(rng, num_text=int(rng.integers(8, 30))) for _ in range(3)],
        lambda: [
            make_sample(rng, [make_medium(rng, 4, 2)]),
            make_sample(rng, [make_medium(rng, 2, 6), make_medium(rng, 2, 6), make_medium(rng, 4, 4)]),
        ],
        lambda: [make_sample(rng, [make_medium(rng, 4, 6, steps=3)])],
        lambda: [
            make_sample(rng, [make_medium(rng, 10, 12)]),
            make_sample(rng),
            make_sample(rng, [make_medium(rng, 2, 2, steps=2), make_medium(rng, 2, 2)]),
        ],
    ]
    return [kinds[bin_id % len(kinds)]() for bin_id in range(num_bins)]


def residuals_of(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(3, H, W): subtract green from red and blue, then take differences down rows and along columns, modulo 256."""
    red, green, blue = frame.astype(np.int64)
    planes = np.stack([red - green, green, blue - green])
    planes = np.diff(planes, axis=1, prepend=0)
    planes = np.diff(planes, axis=2, prepend=0)
    return (planes % 256).astype(np.uint8)


def jpeg_of(frame: NDArray[np.uint8], **settings: object) -> bytes:
    """Encode (3, H, W) as JPEG; ``settings`` override those of the format."""
    buffer = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(frame.transpose(1, 2, 0)))
    image.save(buffer, "JPEG", **{"quality": 95, "subsampling": 0, **settings})
    return buffer.getvalue()


def jpeg_member(streams: list[bytes]) -> bytes:
    """Sizes as little-endian 32-bit integers, then the streams."""
    return np.array([len(stream) for stream in streams], dtype="<u4").tobytes() + b"".join(streams)


def as_stored(medium: Medium, codec: str) -> Medium:
    """Return the medium as a reader gets it back: for JPEG, as Pillow decodes it."""
    if codec != "jpeg":
        return medium
    images = [np.asarray(Image.open(io.BytesIO(jpeg_of(frame)))) for frame in medium.frames]
    return Medium(np.stack([image.transpose(2, 0, 1) for image in images]), medium.is_video)


def bin_members(samples: list[Sample], codec: str, records: list[int], dataset: str = "synthetic") -> dict[str, bytes]:
    """Return the members of a bin in stored order."""
    media = [medium for sample in samples for medium in sample.media]
    lengths = [len(sample.input_ids) for sample in samples]
    arrays = {
        "input_ids.npy": np.concatenate([sample.input_ids for sample in samples]).astype("<i4"),
        "labels.npy": np.concatenate([sample.labels for sample in samples]).astype("<i4"),
        "position_ids.npy": np.concatenate([sample.position_ids for sample in samples], axis=1).astype("<i4"),
        "cu_seqlens.npy": np.cumsum([0, *lengths]).astype("<i4"),
        "grid_thw.npy": np.array([medium.grid for medium in media], dtype="<i4").reshape(-1, 3),
        "media_type.npy": np.array([medium.is_video for medium in media], dtype="u1"),
    }
    members = {name: _npy(array) for name, array in arrays.items()}
    frames = [frame for medium in media for frame in medium.frames]
    if codec == "zstd":
        coded = b"".join(residuals_of(frame).tobytes() for frame in frames)
        parameters = zstandard.ZstdCompressionParameters.from_level(1, min_match=7, hash_log=6, strategy=1)
        members["pixels.zst"] = zstandard.ZstdCompressor(compression_params=parameters).compress(coded)
    elif codec == "jpeg":
        members["pixels.jpeg"] = jpeg_member([jpeg_of(frame) for frame in frames])
    else:
        members["pixels.raw"] = b"".join(frame.tobytes() for frame in frames)
    members["samples.json"] = json.dumps(
        [{"dataset": dataset, "record": record, "id": f"s{record}"} for record in records]
    ).encode()
    return members


def write_shards(
    folder: Path,
    bins: list[list[Sample]],
    *,
    codec: str = "zstd",
    bins_per_shard: int = 3,
    tokenizer: str = "0" * 32,
    max_length: int = 4096,
    dataset: str = "synthetic",
) -> Path:
    """Write a complete set of shards; return ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    ledger: list[dict[str, object]] = []
    shards: list[StoredShard] = []
    for shard, first in enumerate(range(0, len(bins), bins_per_shard)):
        buffer = io.BytesIO()
        shard_bins = bins[first : first + bins_per_shard]
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for bin_id, samples in enumerate(shard_bins, start=first):
                offset = tar.offset
                records = list(range(len(ledger), len(ledger) + len(samples)))
                _add_bin(tar, bin_id, bin_members(samples, codec, records, dataset))
                stored = buffer.getvalue()[offset : tar.offset]
                rows.append(_bins_row(bin_id, shard, offset, stored, samples))
                ledger += [
                    _ledger_row(dataset, record, bin_id, slot, samples[slot]) for slot, record in enumerate(records)
                ]
        path = folder / f"bins-{shard:05d}.tar"
        path.write_bytes(buffer.getvalue())
        shards.append(
            StoredShard(**msgspec.structs.asdict(stored_file(path)), first_bin=first, num_bins=len(shard_bins))
        )
    tables = [
        write_table(folder / "bins.parquet", rows, BINS_SCHEMA),
        write_table(folder / "samples.parquet", ledger, SAMPLES_SCHEMA),
    ]
    manifest = _manifest(
        rows, ledger, shards, tables, codec=codec, tokenizer=tokenizer, max_length=max_length, dataset=dataset
    )
    (folder / "manifest.json").write_bytes(encode_manifest(manifest))
    return folder


def _manifest(
    rows: list[dict[str, object]],
    ledger: list[dict[str, object]],
    shards: list[StoredShard],
    tables: list[StoredFile],
    *,
    codec: str,
    tokenizer: str,
    max_length: int,
    dataset: str,
) -> Manifest:
    return Manifest(
        version=1,
        settings=BuildSettings(max_length=max_length, pixels=codec),
        fingerprints=Fingerprints(tokenizer=tokenizer, image_mean=IMAGE_MEAN, image_std=IMAGE_STD),
        software={"vlprep": "synthetic"},
        inputs=[
            InputDataset(
                dataset=dataset,
                rate=1.0,
                num_drawn=len(ledger),
                media=MediaSettings(),
                files=[InputFile(file="s.jsonl", num_bytes=0, xxh3="0" * 32, num_annotations=len(ledger))],
            )
        ],
        counts=_counts(rows, ledger),
        statistics=[],
        shards=shards,
        tables=tables,
    )


def as_bin(samples: list[Sample], *, index: int = 0, codec: str = "zstd", writable: bool = True) -> Bin:
    """Write a bin to memory and read it back like the stream."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        _add_bin(tar, index, bin_members(samples, codec, list(range(len(samples)))))
        size = tar.offset
    data = buffer.getvalue()[:size]
    return parse_bin(memoryview(bytearray(data)) if writable else data, index, where=f"bin {index}")


def _add_bin(tar: tarfile.TarFile, bin_id: int, members: dict[str, bytes]) -> None:
    for name, data in members.items():
        info = tarfile.TarInfo(f"{bin_id:08d}.{name}")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))


def _npy(array: NDArray[np.generic]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0))
    return buffer.getvalue()


def _bins_row(bin_id: int, shard: int, offset: int, stored: bytes, samples: list[Sample]) -> dict[str, object]:
    media = [medium for sample in samples for medium in sample.media]
    return {
        "bin": bin_id,
        "shard": shard,
        "offset": offset,
        "num_bytes": len(stored),
        "xxh3": xxhash.xxh3_64_intdigest(stored),
        "num_tokens": sum(len(sample.input_ids) for sample in samples),
        "num_targets": sum(int((sample.labels != -100).sum()) for sample in samples),
        "num_samples": len(samples),
        "num_patches": sum(medium.grid.num_patches for medium in media),
        "num_images": sum(not medium.is_video for medium in media),
        "num_videos": sum(medium.is_video for medium in media),
        "sum_squared_lengths": sum(len(sample.input_ids) ** 2 for sample in samples),
    }


def _ledger_row(dataset: str, record: int, bin_id: int, slot: int, sample: Sample) -> dict[str, object]:
    return {
        "dataset": dataset,
        "file": "s.jsonl",
        "line": record + 1,
        "record": record,
        "id": f"s{record}",
        "status": "packed",
        "codes": [],
        "message": None,
        "bin": bin_id,
        "slot": slot,
        "num_tokens": len(sample.input_ids),
        "num_targets": int((sample.labels != -100).sum()),
        "num_patches": sum(medium.grid.num_patches for medium in sample.media),
        "video_backend": "synthetic" if any(medium.is_video for medium in sample.media) else None,
    }


def write_table(path: Path, rows: list[dict[str, object]], schema: pa.Schema) -> StoredFile:
    """Write a table and return its manifest entry."""
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return stored_file(path)


def stored_file(path: Path) -> StoredFile:
    """Return the manifest entry of a file."""
    data = path.read_bytes()
    return StoredFile(file=path.name, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def _counts(rows: list[dict[str, object]], ledger: list[dict[str, object]]) -> Counts:
    totals = {
        name: sum(row[name] for row in rows)  # type: ignore[misc]
        for name in ("num_tokens", "num_targets", "num_patches", "num_images", "num_videos")
    }
    return Counts(
        num_annotations=len(ledger),
        num_packed=len(ledger),
        num_rejected=0,
        num_not_sampled=0,
        rejects_by_code={},
        num_bins=len(rows),
        **totals,
    )
