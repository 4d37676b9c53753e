"""``vlprep show``: one bin for a person: its text with what is trained, its media with their sizes, and the pictures.

Input: a set of shards and the number of a bin. Output: text for a terminal; with a folder given, the pictures as PNG
files, exactly as the model sees them before normalisation.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prep.inspect.transcript import Span, SpanKind, Transcriber, printable, visible
from schemas.bins import MEDIA_VIDEO, Bin, frame_shape, stored_frames
from schemas.errors import ConfigError, ShardError
from schemas.qwen import IMAGE_PAD, VIDEO_PAD, Grid
from schemas.tables import LedgerRow
from storage.pixels import decode_frames
from storage.shard_set import ShardSet

_OPEN, _CLOSE = "[[", "]]"


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownSample:
    """One sample of a bin.

    Attributes:
        row: what the ledger says of it.
        first, last: its tokens in the bin, ``last`` not included.
        media: numbers of its media in the bin, with grid and type.
    """

    row: LedgerRow
    first: int
    last: int
    media: tuple[tuple[int, Grid, int], ...]


def samples_of(shards: ShardSet, found: Bin) -> list[ShownSample]:
    """The samples of a bin with their places, and where they come from.

    Raises:
        ShardError: bin and ledger do not agree.
    """
    rows = shards.packed_in(found.index)
    borders = found.cu_seqlens.tolist()
    is_pad = np.isin(found.input_ids, (IMAGE_PAD, VIDEO_PAD))
    starts = np.flatnonzero(is_pad & ~np.concatenate([[False], is_pad[:-1]]))
    grids = found.grids()
    if len(rows) != len(borders) - 1 or len(starts) != len(grids):
        raise ShardError(
            f"bin {found.index} of {shards.folder} has {len(borders) - 1} samples and {len(grids)} media; the ledger "
            f"has {len(rows)} samples, the ids {len(starts)} media. `vlprep verify` says what is wrong."
        )
    sample_of = np.searchsorted(found.cu_seqlens, starts, side="right") - 1
    return [
        ShownSample(
            row=row,
            first=first,
            last=last,
            media=tuple((int(number), *grids[number]) for number in np.flatnonzero(sample_of == slot)),
        )
        for slot, (row, first, last) in enumerate(zip(rows, borders, borders[1:]))
    ]


def show(shards: ShardSet, number: int, transcriber: Transcriber, *, colour: bool) -> str:
    """A bin as text.

    Args:
        shards: the set.
        number: of the bin.
        transcriber: reads the token ids.
        colour: mark what is trained by colour; else by ``[[`` and ``]]``.

    Raises:
        ConfigError: there is no such bin.
        ShardError: the shard is damaged.
    """
    row, found = shards.row(number), shards.read(number)
    mark = _styled("trained") if colour else f"{_OPEN}trained{_CLOSE}"
    lines = [
        f"{shards.folder / row.where}, {row.num_bytes:,} bytes",
        f"{row.num_tokens:,} of {shards.manifest.settings.max_length:,} tokens, {row.num_targets:,} of them {mark}; "
        f"{_count(row.num_samples, 'sample')}, {_count(row.num_images, 'image')}, {_count(row.num_videos, 'video')}, "
        f"{row.num_patches:,} patches",
    ]
    for slot, sample in enumerate(samples_of(shards, found)):
        lines += ["", f"── sample {slot} ── {_origin(sample.row)}"]
        lines += [f"   {describe_medium(number, grid, kind)}" for number, grid, kind in sample.media]
        part = slice(sample.first, sample.last)
        lines.append(render(transcriber.spans(found.input_ids[part], found.labels[part]), colour=colour).rstrip("\n"))
    return "\n".join(lines)


def render(spans: Iterable[Span], *, colour: bool) -> str:
    """Spans as one text for a terminal."""
    parts: list[str] = []
    marked = False
    for span in spans:
        text = visible(span)
        if colour:
            parts.append(_styled(text) if span.trained else _dimmed(text) if span.kind is not SpanKind.TEXT else text)
            continue
        if span.trained != marked:
            parts.append(_OPEN if span.trained else _close(parts))
            marked = span.trained
        parts.append(text)
    if marked:
        parts.append(_close(parts))
    return "".join(parts)


def _close(parts: list[str]) -> str:
    """The closing mark, before the line break that the marked text ends with, if it does."""
    if parts[-1].endswith("\n"):
        parts[-1] = parts[-1][:-1]
        return f"{_CLOSE}\n"
    return _CLOSE


def save_pictures(shards: ShardSet, number: int, folder: Path) -> list[Path]:
    """Write the pictures of a bin as PNG files: one an image, one a stored frame of a video.

    Raises:
        ConfigError: there is no such bin, or the folder cannot be written.
        ShardError: the shard is damaged.
    """
    found = shards.read(number)
    frames = decode_frames(found, where=shards.row(number).where)
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for slot, sample in enumerate(samples_of(shards, found)):
            for medium, _, kind in sample.media:
                name = f"bin-{number:08d}-sample-{slot:03d}-{'video' if kind == MEDIA_VIDEO else 'image'}-{medium:03d}"
                for place, frame in enumerate(frames[medium]):
                    path = folder / (f"{name}-frame-{place:03d}.png" if kind == MEDIA_VIDEO else f"{name}.png")
                    as_picture(frame).save(path)
                    written.append(path)
    except OSError as error:
        raise ConfigError(f"--save {folder} cannot be written: {error.strerror}.") from error
    return written


def as_picture(frame: NDArray[np.uint8]) -> Image.Image:
    """A frame (3, H, W) uint8 as a picture."""
    return Image.fromarray(np.ascontiguousarray(frame.transpose(1, 2, 0)))


def _styled(text: str) -> str:
    # Line by line: a terminal would paint the rest of the line.
    return "\n".join(click.style(line, fg="green", reverse=True) if line else line for line in text.split("\n"))


def _dimmed(text: str) -> str:
    return click.style(text, dim=True)


def _origin(row: LedgerRow) -> str:
    name = f", id {printable(row.id)}" if row.id is not None else ""
    return (
        f"{printable(row.dataset)}, {printable(row.file)}:{row.line} (record {row.record}{name}): "
        f"{row.num_tokens:,} tokens, {row.num_targets:,} trained"
    )


def describe_medium(number: int, grid: Grid, kind: int) -> str:
    """A medium in words: its number in the bin, its size, its tokens."""
    _, height, width = frame_shape(grid)
    if kind == MEDIA_VIDEO:
        return (
            f"video {number}: {stored_frames(grid, kind)} frames of {width}×{height} pixels, "
            f"grid {grid.t}×{grid.h}×{grid.w}, {grid.num_tokens:,} tokens"
        )
    return f"image {number}: {width}×{height} pixels, grid {grid.t}×{grid.h}×{grid.w}, {grid.num_tokens:,} tokens"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
