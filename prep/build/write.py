"""Write: makes one shard of the plan. Decodes the media, assembles the bins, writes the tar, brings it to its place.

Input: a :class:`WriteTask`. Output: the shard, and a :class:`ShardResult` that is kept in the work folder, so that a
finished shard is not made again. A medium that fails only now costs its sample: the bin gets shorter and the ledger
says why. A medium that several samples of the shard use is decoded once. Memory: one bin, 17 bytes for each sample of
the shard, and some hundred bytes for each of its media.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from prep.build.metrics import Timings, timed
from prep.build.output import Output
from prep.build.parts import ScannedPart, StoredSample, mark_stale, media_path, read_sample
from prep.media.access import LOCAL_MEDIA, MediaAccess, Wanted, open_media
from prep.media.caches import FrameCache
from prep.samples.sample import EncodedSample, MediaPlace, encode, media_key
from prep.shards.codecs import require_storable
from prep.shards.drift import DriftSums
from prep.shards.writer import BinRow, ShardWriter
from schemas.annotation import Problem, SampleRef
from schemas.bins import shard_name
from schemas.errors import MediaError
from schemas.settings import MediaSettings
from storage.files import temporary_path, write_synced
from storage.urls import Location

SHARD_VERSION = 2
"""Changes when shards made by an older version must not be used again: the same bins come to other bytes."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class WriteTask:
    """One shard to write. Its K samples are columns, 17 bytes each, in the order in which they are written.

    Attributes:
        shard: number of the shard.
        output: where the shards go.
        result: path of the file that keeps the result.
        first_bin: number of the first bin.
        first_place: place of the first sample in the plan's order.
        bin_starts: (B+1,) int64: bin ``first_bin + b`` holds samples ``bin_starts[b]`` to ``bin_starts[b+1] - 1``.
        part: (K,) int32, index into ``parts``.
        offset: (K,) int64, first byte in the part.
        num_bytes: (K,) int32.
        has_media: (K,) bool.
        parts: parts that the samples lie in.
        names: of every dataset.
        roots: media root of every dataset.
        media: media settings of every dataset.
        codec: of the pixels, one of :data:`schemas.pixels.CODECS`.
        jpeg_quality: for the codec ``jpeg``.
    """

    shard: int
    output: Output
    result: Path
    first_bin: int
    first_place: int
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
        shard: number of the shard.
        num_bytes: of the file; 0 where every sample failed and there is no file.
        sha256: of the file.
        rows: one a bin that was written.
        failed: problem of every sample that failed, by its place in the plan's order.
        backends: video decoders of the samples where another one served than the scan named, likewise.
        timings: how long the samples took.
        drift: what a lossy codec did to the measured frames; None with a lossless one.
        tag: what the place of the shards knows the contents by (an ETag, say); empty for a folder.
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
    """Write one shard, unless its result is there and the shard in its place is the one that it tells of."""
    name = shard_name(task.shard)
    done = _finished(task, name)
    if done is not None:
        return done
    rows: list[BinRow] = []
    failed: dict[int, Problem] = {}
    backends: dict[int, str] = {}
    timings: Timings = {}
    with (
        FrameCache(_media_keys(task), task.result.parent) as decoded,
        open_media(task.roots, beginnings=False, scratch=_scratch(task)) as access,
        ShardWriter(task.output.folder / name, task.codec, task.jpeg_quality) as writer,
    ):
        bins = access.along(_bins(task, access), partial(_wanted, task, decoded))
        for number, planned in enumerate(bins, start=task.first_bin):
            samples: list[tuple[SampleRef, EncodedSample]] = []
            for place, part, stored, media_place in planned:
                try:
                    require_storable(stored.measured.media, task.codec)
                    with timed(timings, "decode"):
                        encoded = encode(stored.measured, media_place, task.media[part.source], decoded)
                except MediaError as error:
                    failed[task.first_place + place] = Problem(error.code, error.message)
                    mark_stale(part.path)
                    continue
                reference = SampleRef(task.names[part.source], part.record_base + stored.record, stored.id)
                samples.append((reference, encoded))
                if encoded.video_backend != stored.measured.video_backend:
                    backends[task.first_place + place] = encoded.video_backend or ""
            if samples:
                with timed(timings, "store", len(samples)):
                    rows.append(writer.write_bin(number, samples))
        num_bytes, sha256 = writer.close() if rows else (0, "")
    tag = task.output.put(name).tag if rows else ""
    result = ShardResult(
        shard=task.shard,
        num_bytes=num_bytes,
        sha256=sha256,
        rows=rows,
        failed=failed,
        backends=backends,
        timings=timings,
        drift=writer.drift,
        tag=tag,
    )
    write_synced(task.result, msgspec.msgpack.encode(result))
    return result


class _Planned(NamedTuple):
    """A sample of the shard: its place in it, its part, its measured form, and where its media lie."""

    place: int
    part: ScannedPart
    stored: StoredSample
    media_place: MediaPlace


def _planned(task: WriteTask, place: int, access: MediaAccess) -> _Planned:
    part = task.parts[task.part[place]]
    stored = read_sample(part.path, int(task.offset[place]), int(task.num_bytes[place]))
    embedded = media_path(part.path) if stored.measured.media else None
    return _Planned(place, part, stored, MediaPlace(task.roots[part.source], embedded, access))


def _bins(task: WriteTask, access: MediaAccess) -> Iterator[list[_Planned]]:
    """The samples of every bin."""
    for start, stop in itertools.pairwise(task.bin_starts.tolist()):
        yield [_planned(task, place, access) for place in range(start, stop)]


def _wanted(task: WriteTask, decoded: FrameCache, samples: list[_Planned]) -> Iterator[Wanted]:
    """The media of a bin that are still to be decoded."""
    for _, part, stored, media_place in samples:
        settings = task.media[part.source]
        for medium in stored.measured.media:
            if medium.span is None and not decoded.has(media_key(medium, media_place, settings)):
                yield media_place.wanted(medium, settings.max_source_bytes)


def _scratch(task: WriteTask) -> Path:
    return temporary_path(task.result)


def _media_keys(task: WriteTask) -> Iterator[bytes]:
    """Keys of all media of the shard, each as often as it is used."""
    for place in np.flatnonzero(task.has_media).tolist():
        _, part, stored, media_place = _planned(task, place, LOCAL_MEDIA)
        for medium in stored.measured.media:
            yield media_key(medium, media_place, task.media[part.source])


def _finished(task: WriteTask, name: str) -> ShardResult | None:
    if not task.result.exists():
        return None
    done = msgspec.msgpack.decode(task.result.read_bytes(), type=ShardResult)
    placed = task.output.placed([name]).get(name)
    found = (0, "") if placed is None else (placed.num_bytes, placed.tag)
    return done if found == (done.num_bytes, done.tag) else None
