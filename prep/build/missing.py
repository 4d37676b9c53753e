"""Finds the datasets in which every record with media lacks some: most often, their media root is wrong.

Input: the parts of the scan. Output: a sentence for each such dataset. Cost: the tables of a dataset's parts up to the
first one with media that exist.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from prep.annotations.registry import Source
from prep.build.parts import MEDIA_CODES, ScannedPart, read_rows, rejected_rows
from prep.media.nearby import all_missing_message
from prep.media.paths import missing_name
from schemas.annotation import ReasonCode

_OTHER_MEDIA_CODES = MEDIA_CODES - {ReasonCode.MEDIA_MISSING.value}


def all_missing(sources: Sequence[Source], parts: Sequence[ScannedPart]) -> list[str]:
    """A sentence for each dataset in which every record with media lacks some."""
    messages = []
    for index, source in enumerate(sources):
        own = [part for part in parts if part.source == index]
        num_records, name = _missing(own)
        if name is not None:
            messages.append(
                all_missing_message(
                    subject=f"media of each record that names some ({num_records:,}) are",
                    name=name,
                    root=source.media_root,
                    annotation_file=source.files[source.file_names.index(own[0].file)],
                )
            )
    return messages


def _missing(parts: Iterable[ScannedPart]) -> tuple[int, str | None]:
    """Number of records that lack media, and one missing name. None if a record has all its media."""
    num_records, name = 0, None
    for part in parts:
        table = read_rows(part.path, ["codes", "message", "num_images", "num_videos"])
        # Without a sample, the counts are null, which becomes NaN.
        if any((table.column(column).to_numpy() > 0).any() for column in ("num_images", "num_videos")):
            return 0, None
        rejected = rejected_rows(table)
        for codes, message in zip(rejected.column("codes").to_pylist(), rejected.column("message").to_pylist()):
            if not _OTHER_MEDIA_CODES.isdisjoint(codes):
                return 0, None
            if ReasonCode.MEDIA_MISSING.value in codes:
                num_records += 1
                name = name or missing_name(message)
    return num_records, name
