"""Write: makes one shard of the plan. Decodes the media, assembles the bins, writes the tar.

Input: a :class:`WriteTask`. Output: the shard, and a :class:`ShardResult` that is kept in the work folder, so that a
finished shard is not made again. A medium that fails only now costs its sample: the bin gets shorter and the ledger
says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec

from prep.files import write_synced
from prep.metrics import Timings, timed
from prep.sample import EncodedSample, MediaPlace, encode
from prep.scan import media_path, read_sample
from prep.shards import BinRow, ShardWriter
from schemas.annotation import Problem, SampleRef
from schemas.bins import shard_name
from schemas.errors import MediaError
from schemas.settings import MediaSettings


@dataclass(frozen=True, slots=True)
class PlannedSample:
    """One sample to write: its number in the plan, its dataset (an index), its origin, and where its measured form
    lies.
    """

    number: int
    source: int
    reference: SampleRef
    part: Path
    offset: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class WriteTask:
    """One shard to write.

    Attributes:
        shard: number of the shard.
        out: folder of the shards.
        result: path of the file that keeps the result.
        first_bin: number of the first bin.
        bins: samples of every bin, in slot order.
        roots: media root of every dataset.
        media: media settings of every dataset.
        codec: ``zstd`` or ``raw``.
    """

    shard: int
    out: Path
    result: Path
    first_bin: int
    bins: tuple[tuple[PlannedSample, ...], ...]
    roots: tuple[Path, ...]
    media: tuple[MediaSettings, ...]
    codec: str


class ShardResult(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a shard.

    Attributes:
        shard: number of the shard.
        num_bytes: of the file; 0 where every sample failed and there is no file.
        sha256: of the file.
        rows: one a bin that was written.
        failed: problem of every sample that failed, by its number in the plan.
        backends: video decoders of the samples where another one served than the scan named.
        timings: how long the samples took.
    """

    shard: int
    num_bytes: int
    sha256: str
    rows: list[BinRow]
    failed: dict[int, Problem]
    backends: dict[int, str]
    timings: Timings


def write_shard(task: WriteTask) -> ShardResult:
    """Write one shard, unless its result is there and the file has the size that it says."""
    path = task.out / shard_name(task.shard)
    done = _finished(task.result, path)
    if done is not None:
        return done
    rows: list[BinRow] = []
    failed: dict[int, Problem] = {}
    backends: dict[int, str] = {}
    timings: Timings = {}
    with ShardWriter(path, task.codec) as writer:
        for number, planned in enumerate(task.bins, start=task.first_bin):
            samples: list[tuple[SampleRef, EncodedSample]] = []
            for item in planned:
                measured = read_sample(item.part, item.offset, item.num_bytes)
                place = MediaPlace(task.roots[item.source], media_path(item.part))
                try:
                    with timed(timings, "decode"):
                        encoded = encode(measured, place, task.media[item.source])
                except MediaError as error:
                    failed[item.number] = Problem(error.code, error.message)
                    continue
                samples.append((item.reference, encoded))
                if encoded.video_backend != measured.video_backend:
                    backends[item.number] = encoded.video_backend or ""
            if samples:
                with timed(timings, "store", len(samples)):
                    rows.append(writer.write_bin(number, samples))
        num_bytes, sha256 = writer.close() if rows else (0, "")
    result = ShardResult(
        shard=task.shard,
        num_bytes=num_bytes,
        sha256=sha256,
        rows=rows,
        failed=failed,
        backends=backends,
        timings=timings,
    )
    write_synced(task.result, msgspec.msgpack.encode(result))
    return result


def _finished(result: Path, shard: Path) -> ShardResult | None:
    if not result.exists():
        return None
    done = msgspec.msgpack.decode(result.read_bytes(), type=ShardResult)
    size = shard.stat().st_size if shard.exists() else 0
    return done if size == done.num_bytes else None
