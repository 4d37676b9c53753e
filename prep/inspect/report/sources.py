"""What a set of shards no longer has: sizes of media before they were resized, and images of rejected records.

Input: the datasets that the set was built from, and the records of interest. Output: a :class:`SourceRecord` each.
Cost: one pass over the annotation files that hold these records, and the headers of their media. Without the datasets,
a report leaves both out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import Image

from prep.annotations.records import index_file, read_chunk
from prep.annotations.registry import Source
from prep.annotations.validation import Checked, check_record
from prep.media.fetch import open_media
from prep.samples.media import Medium, decode_of_record, media_requests, probe_media
from schemas.bins import MEDIA_IMAGE, MEDIA_VIDEO
from schemas.errors import ConfigError, MediaError
from schemas.manifest import InputDataset, InputFile, Manifest
from storage.urls import Location


@dataclass(frozen=True, kw_only=True, slots=True)
class OriginalSizes:
    """Width and height of the images and videos of a record before they were resized; empty where unknown."""

    images: tuple[tuple[int, int], ...] = ()
    videos: tuple[tuple[int, int], ...] = ()

    def of(self, media_type: int, index: int) -> tuple[int, int] | None:
        """The size of the medium with this index among those of its type."""
        sizes = self.videos if media_type == MEDIA_VIDEO else self.images
        return sizes[index] if index < len(sizes) else None


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRecord:
    """A record as its annotation file has it: sizes of its media, and its first image if that can be decoded."""

    sizes: OriginalSizes
    image: Image.Image | None


RecordKey = tuple[str, int]
"""A dataset, and the index of a record in it."""


def read_originals(
    sources: Sequence[Source],
    manifest: Manifest,
    packed: Collection[RecordKey],
    rejected: Collection[RecordKey],
) -> dict[RecordKey, SourceRecord]:
    """Look records up in their datasets.

    Args:
        sources: the datasets, or some of them.
        manifest: of the set that was built from them.
        packed: records whose sizes are needed.
        rejected: records whose first image is needed.

    Raises:
        ConfigError: a dataset or a file is not that of the build.
        StorageError: a store does not answer.
    """
    inputs = {dataset.dataset: dataset for dataset in manifest.inputs}
    reserved = manifest.settings.reserved
    records: dict[RecordKey, SourceRecord] = {}
    for source in sources:
        if source.name not in inputs:
            raise ConfigError(
                f"{source.name} is no dataset of these shards; they were built from {', '.join(inputs)}. Name the "
                "datasets as for the build."
            )
        own = inputs[source.name]
        needed = {record for dataset, record in {*packed, *rejected} if dataset == source.name}
        for file, stored, base in _files(source, own):
            inside = {record - base for record in needed if base <= record < base + stored.num_annotations}
            if inside:
                for index, checked in _read(file, stored, inside, reserved, own.media.boxes or None):
                    key = (source.name, base + index)
                    records[key] = _look(checked, source.media_root, own, with_image=key in rejected)
    return records


def _files(source: Source, inputs: InputDataset) -> Iterator[tuple[Location, InputFile, int]]:
    """Each file of a dataset with its entry in the manifest and the index of its first record."""
    if list(source.file_names) != [stored.file for stored in inputs.files]:
        raise ConfigError(
            f"{source.name} has the annotation files {', '.join(source.file_names)}; these shards were built from "
            f"{', '.join(stored.file for stored in inputs.files)}. Name the datasets as for the build."
        )
    base = 0
    for file, stored in zip(source.files, inputs.files):
        yield file, stored, base
        base += stored.num_annotations


def _read(
    file: Location, stored: InputFile, records: Collection[int], reserved: str, coordinates: str | None
) -> Iterator[tuple[int, Checked]]:
    """The records of a file with these indices, read and checked."""
    with TemporaryDirectory(prefix="vlprep-") as spool:
        index = index_file(file, Path(spool))
        if index.xxh3 != stored.xxh3:
            raise ConfigError(
                f"annotation file {file} is not the one that these shards were built from: it has changed. Leave "
                "--datasets out, or build the shards again."
            )
        for chunk in index.chunks:
            if any(chunk.first_record <= record < chunk.first_record + chunk.num_records for record in records):
                for record in read_chunk(index.data, chunk):
                    if record.index in records:
                        yield record.index, check_record(record, reserved, coordinates)


def _look(checked: Checked, root: Location, inputs: InputDataset, *, with_image: bool) -> SourceRecord:
    """Probe the media of a record, and decode its first image if that is needed."""
    annotation, settings, embedded = checked.annotation, inputs.media, checked.embedded
    if annotation is None:
        return SourceRecord(sizes=OriginalSizes(), image=None)
    image = None
    with (
        TemporaryDirectory(prefix="vlprep-") as scratch,
        open_media([root], beginnings=False, scratch=Path(scratch) / "media") as access,
    ):
        (_,) = access.prefetch([annotation], lambda item: media_requests(item, root, settings, embedded))
        media, problems = probe_media(annotation, root, settings, embedded, access)
        first = next((medium for medium in media if medium.media_type == MEDIA_IMAGE), None)
        if with_image and first is not None:
            with contextlib.suppress(MediaError):
                frame = decode_of_record(first, root, settings, embedded, access)[1][0]
                image = Image.fromarray(np.ascontiguousarray(frame.transpose(1, 2, 0)))
    # If a medium is unreadable, nothing says which of the others a size belongs to.
    return SourceRecord(sizes=OriginalSizes() if problems else _sizes(media), image=image)


def _sizes(media: Sequence[Medium]) -> OriginalSizes:
    images, videos = (
        tuple((medium.width, medium.height) for medium in media if medium.media_type == kind)
        for kind in (MEDIA_IMAGE, MEDIA_VIDEO)
    )
    return OriginalSizes(images=images, videos=videos)
