"""Write: decodes the media of one planned shard, assembles its bins, writes the tar file and publishes it.

Input: a :class:`WriteTask`. Output: the shard, and a :class:`ShardResult` in the work folder, so that a rerun skips
finished shards. If a medium fails to decode, only its sample is dropped: the bin gets shorter and the ledger says why.
A medium that several samples of the shard use is decoded once. Memory: one bin, 17 bytes per sample of the shard, and a
few hundred bytes per medium.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from prep.build.metrics import Timings, timed
from prep.build.output import Output
from prep.build.parts import ScannedPart, StoredSample, mark_stale, media_path, read_sample
from prep.media.access import LOCAL_MEDIA, MediaAccess, MediaRequest
from prep.media.caches import FrameCache
from prep.media.fetch import open_media
from prep.samples.media import MediaLocation, media_key
from prep.samples.sample import EncodedSample, encode
from prep.shards.codecs import require_storable
from prep.shards.drift import DriftSums
from prep.shards.writer import ShardWriter
from schemas.annotation import Problem, SampleRef
from schemas.bins import shard_name
from schemas.errors import MediaError
from schemas.settings import MediaSettings
from schemas.tables import BinRow
from storage.files import temporary_path, write_synced
from storage.urls import Location

SHARD_VERSION = 2
"""Increase it when the same bins give other bytes, so that shards of an older version are not reused."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class WriteTask:
    """One shard to write. Its K samples are columns, 17 bytes per sample, in the order in which they are written.

    Attributes:
        shard: index of the shard.
        output: destination of the shards.
        result: file that keeps the result.
        first_bin: index of the first bin.
        first_position: position of the first sample in the plan's order.
        bin_starts: (B+1,) int64: bin ``first_bin + b`` holds samples ``bin_starts[b]`` to ``bin_starts[b+1] - 1``.
        part: (K,) int32, index into ``parts``.
        offset: (K,) int64, first byte in the part.
        num_bytes: (K,) int32.
        has_media: (K,) bool.
        parts: parts with the samples.
        names: of every dataset.
        roots: media root of every dataset.
        media: media settings of every dataset.
        codec: of the pixels, one of :data:`schemas.codecs.CODECS`.
        jpeg_quality: for the codec ``jpeg``.
    """

    shard: int
    output: Output
    result: Path
    first_bin: int
    first_position: int
    bin_starts: NDArray[np.int64]
    part: NDArray[np.int32]
    offset: NDArray[np.int64]
    num_bytes: NDArray[np.int32]
    has_media: NDArray[np.bool_]
    parts: tuple[ScannedPart, ...]
    names: tuple[str, ...]
    roots: tuple[Location, ...]
    media: tuple[MediaSettings, ...]
    codec: str
    jpeg_quality: int | None = None


class ShardResult(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a shard.

    Attributes:
        shard: index of the shard.
        num_bytes: size of the file; 0 if every sample failed and there is no file.
        sha256: of the file.
        rows: one for each bin that was written.
        failed: position in the plan's order -> problem, for every sample that failed.
        backends: position -> video decoders, for samples that used others than the scan.
        timings: how long the samples took.
        drift: of a lossy codec; None with a lossless one.
        tag: how the store identifies the contents (an ETag, say); empty for a folder.
    """

    shard: int
    num_bytes: int
    sha256: str
    rows: list[BinRow]
    failed: dict[int, Problem]
    backends: dict[int, str]
    timings: Timings
    drift: DriftSums | None = None
    tag: str = ""


def write_shard(task: WriteTask) -> ShardResult:
    """Write one shard, unless an earlier run wrote it and it is still unchanged in its place."""
    name = shard_name(task.shard)
    finished = _finished(task, name)
    if finished is not None:
        return finished
    rows: list[BinRow] = []
    outcome = _Outcome()
    with (
        FrameCache(_media_keys(task), task.result.parent) as frames,
        open_media(task.roots, beginnings=False, scratch=temporary_path(task.result)) as access,
        ShardWriter(task.output.folder / name, task.codec, task.jpeg_quality) as writer,
    ):
        bins = access.prefetch(_bins(task, access), partial(_requests, task, frames))
        for index, planned in enumerate(bins, start=task.first_bin):
            samples = _encode_bin(task, planned, frames, outcome)
            if samples:
                with timed(outcome.timings, "store", len(samples)):
                    rows.append(writer.write_bin(index, samples))
        num_bytes, sha256 = writer.close() if rows else (0, "")
    tag = task.output.put(name).tag if rows else ""
    result = ShardResult(
        shard=task.shard,
        num_bytes=num_bytes,
        sha256=sha256,
        rows=rows,
        failed=outcome.failed,
        backends=outcome.backends,
        timings=outcome.timings,
        drift=writer.drift,
        tag=tag,
    )
    write_synced(task.result, msgspec.msgpack.encode(result))
    return result


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What the samples of a shard came to, see :class:`ShardResult`."""

    failed: dict[int, Problem] = field(default_factory=dict)
    backends: dict[int, str] = field(default_factory=dict)
    timings: Timings = field(default_factory=dict)


class _Planned(NamedTuple):
    """A sample of the shard: its column in the task, its part, its measured form, and the location of its media."""

    column: int
    part: ScannedPart
    stored: StoredSample
    location: MediaLocation


def _encode_bin(
    task: WriteTask, planned: Sequence[_Planned], frames: FrameCache, outcome: _Outcome
) -> list[tuple[SampleRef, EncodedSample]]:
    """Encode the samples of a bin. A sample whose media fail is left out and goes to ``outcome.failed``."""
    samples: list[tuple[SampleRef, EncodedSample]] = []
    for column, part, stored, location in planned:
        position = task.first_position + column
        try:
            require_storable(stored.measured.media, task.codec)
            with timed(outcome.timings, "decode"):
                encoded = encode(stored.measured, location, task.media[part.source], frames)
        except MediaError as error:
            outcome.failed[position] = Problem(error.code, error.message)
            mark_stale(part.path)
            continue
        record = part.record_base + stored.record
        samples.append((SampleRef(task.names[part.source], record, stored.id, stored.boxes), encoded))
        if encoded.video_backend != stored.measured.video_backend:
            outcome.backends[position] = encoded.video_backend or ""
    return samples


def _planned(task: WriteTask, column: int, access: MediaAccess) -> _Planned:
    part = task.parts[task.part[column]]
    stored = read_sample(part.path, int(task.offset[column]), int(task.num_bytes[column]))
    # Absolute, because decoders stay in the folder in which they were started.
    embedded = media_path(part.path).absolute() if stored.measured.media else None
    return _Planned(column, part, stored, MediaLocation(task.roots[part.source], embedded, access))


def _bins(task: WriteTask, access: MediaAccess) -> Iterator[list[_Planned]]:
    """The samples of every bin."""
    for start, stop in itertools.pairwise(task.bin_starts.tolist()):
        yield [_planned(task, column, access) for column in range(start, stop)]


def _requests(task: WriteTask, frames: FrameCache, samples: list[_Planned]) -> Iterator[MediaRequest]:
    """The media of a bin that are not decoded yet."""
    for _, part, stored, location in samples:
        settings = task.media[part.source]
        for medium in stored.measured.media:
            if not frames.has(media_key(medium, location, settings)):
                yield from location.requests(medium, settings.max_source_bytes)


def _media_keys(task: WriteTask) -> Iterator[bytes]:
    """Keys of all media of the shard, each as often as it is used."""
    for column in np.flatnonzero(task.has_media).tolist():
        _, part, stored, location = _planned(task, column, LOCAL_MEDIA)
        for medium in stored.measured.media:
            yield media_key(medium, location, task.media[part.source])


def _finished(task: WriteTask, name: str) -> ShardResult | None:
    if not task.result.exists():
        return None
    result = msgspec.msgpack.decode(task.result.read_bytes(), type=ShardResult)
    stored = task.output.placed([name]).get(name)
    expected = (result.num_bytes, result.tag)
    return result if expected == ((0, "") if stored is None else (stored.num_bytes, stored.tag)) else None
