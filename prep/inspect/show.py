"""``vlprep show``: the text of one bin, what is trained, its media, and their pixels.

Input: a set of shards and the number of a bin. Output: text for a terminal, and optionally the frames as PNG files,
exactly as the model sees them before normalisation. Cost: reading one bin.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import msgspec
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prep.annotations.boxes import Shape
from prep.inspect.drawing import draw_shapes, shapes_by_image
from prep.inspect.transcript import ESCAPED_NOTE, Span, SpanKind, Transcriber, spells_token, visible
from schemas.annotation import SampleBox, SampleRef
from schemas.bins import MEDIA_IMAGE, MEDIA_VIDEO, Bin, frame_shape, shard_name, stored_frames
from schemas.errors import ConfigError, ShardError
from schemas.qwen import IGNORE_INDEX, IMAGE_PAD, VIDEO_PAD, Grid
from schemas.tables import LedgerRow
from schemas.wording import counted, printable, source_name
from storage.pixels import decode_frames
from storage.shard_set import ShardSet, locate

_OPEN, _CLOSE = "[[", "]]"


@dataclass(frozen=True, kw_only=True, slots=True)
class ShownSample:
    """One sample of a bin.

    Attributes:
        row: its row of the ledger.
        first, last: its tokens in the bin, ``last`` excluded.
        media: index in the bin, grid and media type of its media.
        boxes: those that its text does not show.
    """

    row: LedgerRow
    first: int
    last: int
    media: tuple[tuple[int, Grid, int], ...]
    boxes: Sequence[SampleBox]


def samples_of(shards: ShardSet, bin_: Bin, rows: Sequence[LedgerRow] | None = None) -> list[ShownSample]:
    """Split a bin into its samples.

    Args:
        shards: the set that holds it.
        bin_: the bin.
        rows: of the ledger for the bin, by slot; None to read them.

    Raises:
        ShardError: the bin and the ledger disagree.
    """
    rows = shards.packed_in(bin_.index) if rows is None else rows
    references = _references(shards, bin_)
    boundaries = bin_.cu_seqlens.tolist()
    is_pad = np.isin(bin_.input_ids, (IMAGE_PAD, VIDEO_PAD))
    # (M,): first pad token of every medium.
    starts = np.flatnonzero(is_pad & ~np.concatenate([[False], is_pad[:-1]]))
    grids = bin_.grids()
    if not len(rows) == len(references) == len(boundaries) - 1 or len(starts) != len(grids):
        raise ShardError(
            f"bin {bin_.index} of {shards.folder} has {len(boundaries) - 1} samples and {len(grids)} media, but the "
            f"ledger has {len(rows)} samples, samples.json {len(references)}, and input_ids {len(starts)} media. Run "
            "`vlprep verify` for details."
        )
    sample_of = np.searchsorted(bin_.cu_seqlens, starts, side="right") - 1
    return [
        ShownSample(
            row=row,
            first=first,
            last=last,
            media=tuple((int(index), *grids[index]) for index in np.flatnonzero(sample_of == slot)),
            boxes=reference.boxes,
        )
        for slot, (row, reference, first, last) in enumerate(zip(rows, references, boundaries, boundaries[1:]))
    ]


def _references(shards: ShardSet, bin_: Bin) -> list[SampleRef]:
    """Contents of the bin's ``samples.json``."""
    try:
        return bin_.samples()
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ShardError(
            f"bin {bin_.index} of {shards.folder}: samples.json cannot be read ({error}). Run `vlprep verify` for "
            "details."
        ) from error


def show(
    shards: ShardSet, bin_id: int, transcriber: Transcriber, *, colour: bool = False, token_level: bool = False
) -> str:
    """Render a bin as text.

    Args:
        shards: the set.
        bin_id: number of the bin.
        transcriber: reads the token ids.
        colour: mark trained text by colour instead of ``[[`` and ``]]``.
        token_level: list the tokens with their ids, labels and positions instead of the text.

    Raises:
        ConfigError: the set has no such bin.
        ShardError: the shard is damaged.
    """
    bin_ = shards.read(bin_id)
    lines = head_lines(shards, bin_id, mark=_styled("trained") if colour else f"{_OPEN}trained{_CLOSE}")
    for slot, sample in enumerate(samples_of(shards, bin_)):
        lines += ["", f"── sample {slot} ── {origin(sample.row)}"]
        lines += [f"   {describe_medium(index, grid, kind)}" for index, grid, kind in sample.media]
        if token_level:
            lines += token_lines(bin_, sample, transcriber)
            continue
        tokens = slice(sample.first, sample.last)
        spans = list(transcriber.spans(bin_.input_ids[tokens], bin_.labels[tokens]))
        lines += [f"   {ESCAPED_NOTE}"] if any(map(spells_token, spans)) else []
        lines.append(render(spans, colour=colour).rstrip("\n"))
    return "\n".join(lines)


def head_lines(shards: ShardSet, bin_id: int, *, mark: str) -> list[str]:
    """Where a bin lies and what it holds. ``mark`` is how the word "trained" looks."""
    row = shards.row(bin_id)
    return [
        f"{locate(shards.folder / shard_name(row.shard), row)}, {row.num_bytes:,} bytes",
        f"{row.num_tokens:,} of {shards.manifest.settings.max_length:,} tokens, {row.num_targets:,} of them {mark}; "
        f"{counted(row.num_samples, 'sample')}, {counted(row.num_images, 'image')}, "
        f"{counted(row.num_videos, 'video')}, {row.num_patches:,} patches",
    ]


def token_lines(bin_: Bin, sample: ShownSample, transcriber: Transcriber) -> list[str]:
    """A table of the tokens of a sample: index in the bin, id, label (``·`` where none is trained), position, text.

    Of a run of pads, only the first and the last are listed.
    """
    lines = [_token_line(("index", "id", "label", "t", "h", "w"), "token")]
    ids, labels = bin_.input_ids.tolist(), bin_.labels.tolist()
    index = sample.first
    while index < sample.last:
        label = "·" if labels[index] == IGNORE_INDEX else labels[index]
        text = printable(transcriber.token(ids[index])).replace("\n", r"\n").replace("\t", r"\t")
        lines.append(_token_line((index, ids[index], label, *bin_.position_ids[:, index].tolist()), text))
        index += 1
        end = index
        while ids[index - 1] in (IMAGE_PAD, VIDEO_PAD) and end < sample.last and ids[end] == ids[index - 1]:
            end += 1
        if end - index > 1:
            lines.append(f"{'…':>7} {counted(end - index - 1, 'more pad')}")
            index = end - 1
    return lines


def _token_line(values: Sequence[object], text: str) -> str:
    index, token, label, *position = values
    return f"{index:>7} {token:>7} {label:>7} " + "".join(f"{axis:>6}" for axis in position) + f"  {text}"


def render(spans: Iterable[Span], *, colour: bool) -> str:
    """Render spans as text for a terminal."""
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
    """The closing mark. If the marked text ends with a line break, the mark goes before it."""
    if parts[-1].endswith("\n"):
        parts[-1] = parts[-1][:-1]
        return f"{_CLOSE}\n"
    return _CLOSE


def save_frames(shards: ShardSet, bin_id: int, folder: Path, transcriber: Transcriber) -> list[Path]:
    """Write the stored frames of a bin as PNG files: one per image, and one per frame of a video.

    An image with boxes or points in the text is written twice, once with these drawn on it.

    Raises:
        ConfigError: the set has no such bin, or the folder cannot be written.
        ShardError: the shard is damaged.
    """
    bin_ = shards.read(bin_id)
    frames = decode_frames(bin_, where=shards.row(bin_id).where)
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for slot, sample in enumerate(samples_of(shards, bin_)):
            shapes = sample_shapes(shards, sample, bin_, transcriber)
            for medium, _, kind in sample.media:
                name = f"bin-{bin_id:08d}-sample-{slot:03d}-{'video' if kind == MEDIA_VIDEO else 'image'}-{medium:03d}"
                for index, frame in enumerate(frames[medium]):
                    path = folder / (f"{name}-frame-{index:03d}.png" if kind == MEDIA_VIDEO else f"{name}.png")
                    as_image(frame).save(path)
                    written.append(path)
                if medium in shapes:
                    path = folder / f"{name}-boxes.png"
                    draw_shapes(as_image(frames[medium][0]), shapes[medium]).save(path)
                    written.append(path)
    except OSError as error:
        raise ConfigError(f"--save {folder} cannot be written: {error.strerror}. Give another folder.") from error
    return written


def sample_shapes(
    shards: ShardSet, sample: ShownSample, bin_: Bin, transcriber: Transcriber
) -> Mapping[int, list[Shape]]:
    """The boxes and points of a sample by the index of their image in the bin.

    Those in its text need a tokenizer, and are left out if the dataset's ``boxes`` are ``off``.
    """
    images = [medium for medium, _, kind in sample.media if kind == MEDIA_IMAGE]
    if not images:
        return {}
    dataset, tokens = sample.row.dataset, slice(sample.first, sample.last)
    is_off = any(source.dataset == dataset and source.media.boxes == "off" for source in shards.manifest.inputs)
    reads_text = transcriber.reads_text and not is_off
    spans = transcriber.spans(bin_.input_ids[tokens], bin_.labels[tokens]) if reads_text else ()
    return shapes_by_image(spans, images, sample.boxes)


def as_image(frame: NDArray[np.uint8]) -> Image.Image:
    """Convert a stored frame (3, H, W) uint8 to a Pillow image."""
    return Image.fromarray(np.ascontiguousarray(frame.transpose(1, 2, 0)))


def _styled(text: str) -> str:
    # Line by line, because a terminal would colour the rest of the line.
    return "\n".join(click.style(line, fg="green", reverse=True) if line else line for line in text.split("\n"))


def _dimmed(text: str) -> str:
    return click.style(text, dim=True)


def origin(row: LedgerRow) -> str:
    """Where a sample comes from, and how long it is."""
    name = source_name(dataset=row.dataset, file=row.file, line=row.line, record=row.record, id=row.id)
    return f"{name}: {row.num_tokens:,} tokens, {row.num_targets:,} trained"


def describe_medium(index: int, grid: Grid, kind: int) -> str:
    """Describe a medium: its index in the bin, its size and its tokens."""
    _, height, width = frame_shape(grid)
    if kind == MEDIA_VIDEO:
        return (
            f"video {index}: {stored_frames(grid, kind)} frames of {width}×{height} pixels, "
            f"grid {grid.t}×{grid.h}×{grid.w}, {grid.num_tokens:,} tokens"
        )
    return f"image {index}: {width}×{height} pixels, grid {grid.t}×{grid.h}×{grid.w}, {grid.num_tokens:,} tokens"
