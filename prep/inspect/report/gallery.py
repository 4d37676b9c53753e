"""The samples of a report: thumbnails with their boxes, and the text with what is trained.

Input: a set of shards, the chosen samples, a transcriber. Output: a :class:`Card` per sample, which the template
``gallery.html`` lays out. Cost: decoding the bins of the chosen samples.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prep.annotations.boxes import Shape
from prep.inspect.drawing import draw_shapes
from prep.inspect.report.choice import Choice
from prep.inspect.report.sources import OriginalSizes
from prep.inspect.show import ShownSample, as_image, sample_shapes, samples_of
from prep.inspect.transcript import Span, SpanKind, Transcriber, visible
from schemas.bins import MEDIA_VIDEO, Bin, frame_shape, stored_frames
from schemas.qwen import Grid
from schemas.wording import counted, printable
from storage.pixels import decode_frames
from storage.shard_set import ShardSet

_JPEG_QUALITY = 80


@dataclass(frozen=True, kw_only=True, slots=True)
class Detail:
    """How much of each sample is shown.

    Attributes:
        side: longest side of a thumbnail in pixels. Thumbnails of frames are half as large.
        max_media: media of a sample.
        max_frames: frames of a video.
        max_characters: characters of a text.
    """

    side: int
    max_media: int
    max_frames: int
    max_characters: int


DETAILS = (
    Detail(side=400, max_media=6, max_frames=6, max_characters=6000),
    Detail(side=320, max_media=4, max_frames=4, max_characters=3000),
    Detail(side=220, max_media=3, max_frames=3, max_characters=1500),
    Detail(side=140, max_media=2, max_frames=2, max_characters=800),
    Detail(side=72, max_media=1, max_frames=1, max_characters=300),
)
"""From the most to the least. A page takes the first that fits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Thumbnail:
    """An image in the page: a data URL, its size in pixels, and its description."""

    src: str
    width: int
    height: int
    alt: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Figure:
    """One image, or a few frames of one video, with a caption."""

    thumbnails: tuple[Thumbnail, ...]
    caption: str


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of text: whether it is a control token, and whether it is trained."""

    text: str
    is_control: bool
    is_trained: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """One sample, ready for its template."""

    choice: Choice
    origin: str
    id: str | None
    num_tokens: int
    num_targets: int
    figures: tuple[Figure, ...]
    num_hidden_media: int
    pieces: tuple[Piece, ...]


def make_cards(
    shards: ShardSet,
    choices: Sequence[Choice],
    transcriber: Transcriber,
    originals: Mapping[tuple[str, int], OriginalSizes],
    detail: Detail,
) -> list[Card]:
    """Render the chosen samples, in their order.

    Args:
        shards: the set.
        choices: the samples.
        transcriber: reads the token ids.
        originals: sizes of the media before they were resized, by dataset and record, as far as they are known.
        detail: how much of each sample is shown.

    Raises:
        ShardError: a shard is damaged.
    """
    ledger = shards.packed_in_bins({choice.bin for choice in choices})
    cards: dict[int, Card] = {}
    for bin_id, rows in ledger.items():
        bin_ = shards.read(bin_id)
        samples = samples_of(shards, bin_, rows)
        frames = decode_frames(bin_, where=shards.row(bin_id).where)
        for index, choice in enumerate(choices):
            if choice.bin == bin_id:
                sample = next(sample for sample in samples if sample.row.slot == choice.slot)
                shapes = sample_shapes(shards, sample, bin_, transcriber)
                sizes = originals.get((choice.dataset, choice.record), OriginalSizes())
                figures = tuple(_figures(sample, frames, shapes, sizes, detail))
                cards[index] = _card(choice, sample, bin_, figures, transcriber, detail)
    return [cards[index] for index in range(len(choices))]


def _card(
    choice: Choice,
    sample: ShownSample,
    bin_: Bin,
    figures: tuple[Figure, ...],
    transcriber: Transcriber,
    detail: Detail,
) -> Card:
    row = sample.row
    tokens = slice(sample.first, sample.last)
    spans = transcriber.spans(bin_.input_ids[tokens], bin_.labels[tokens])
    return Card(
        choice=choice,
        origin=f"{printable(row.file)}:{row.line}",
        id=row.id,
        num_tokens=row.num_tokens,
        num_targets=row.num_targets,
        figures=figures,
        num_hidden_media=len(sample.media) - len(figures),
        pieces=tuple(shortened(spans, detail.max_characters)),
    )


def shortened(spans: Iterable[Span], max_characters: int) -> Iterator[Piece]:
    """Printable text of spans. The middle of a long span is left out, and all spans after ``max_characters``."""
    left = max_characters
    num_hidden = 0
    for span in spans:
        if left <= 0:
            num_hidden += len(span.text)
            continue
        text = visible(span)
        keep = max(80, left // 2)
        if len(text) > keep + 40:
            text = f"{text[: keep // 2]} ⟨… {len(text) - keep:,} characters …⟩ {text[len(text) - keep // 2 :]}"
        left -= len(text)
        yield Piece(text, span.kind is not SpanKind.TEXT, span.trained)
    if num_hidden:
        yield Piece(f" ⟨… {num_hidden:,} more characters⟩", False, False)


def _figures(
    sample: ShownSample,
    frames: list[NDArray[np.uint8]],
    shapes: Mapping[int, Sequence[Shape]],
    originals: OriginalSizes,
    detail: Detail,
) -> Iterator[Figure]:
    for index, (medium, grid, kind) in enumerate(sample.media[: detail.max_media]):
        own, side = frames[medium], detail.side
        if kind == MEDIA_VIDEO:
            shown = np.linspace(0, len(own) - 1, min(len(own), detail.max_frames)).astype(int)
            side = max(64, side // 2)
        else:
            shown = np.arange(1)
        caption = caption_of(grid, kind, originals.of(kind, sum(other == kind for _, _, other in sample.media[:index])))
        yield Figure(
            caption=caption,
            thumbnails=tuple(
                thumbnail(
                    draw_shapes(as_image(own[frame]), shapes.get(medium, ())),
                    side,
                    f"{caption}, frame {frame}" if kind == MEDIA_VIDEO else caption,
                )
                for frame in shown.tolist()
            ),
        )


def caption_of(grid: Grid, kind: int, original: tuple[int, int] | None) -> str:
    """Size of a medium in words: before it was resized (width, height), as far as that is known, and after."""
    _, height, width = frame_shape(grid)
    size = f"{width}×{height} pixels"
    if original is not None:
        share = width * height / (original[0] * original[1])
        change = ""
        if not 0.9 < share < 1.1:
            change = f" ({share:.0%} of the pixels)" if share < 1 else f" ({share:.1f} times the pixels)"
        size = f"{original[0]}×{original[1]} → {size}{change}"
    frames = f"video, {counted(stored_frames(grid, kind), 'frame')} of " if kind == MEDIA_VIDEO else ""
    return f"{frames}{size}, {counted(grid.num_tokens, 'token')}"


def thumbnail(image: Image.Image, side: int, alt: str) -> Thumbnail:
    """A small JPEG of an image."""
    image = image.convert("RGB")
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=_JPEG_QUALITY)
    data = base64.b64encode(buffer.getvalue()).decode()
    return Thumbnail(src=f"data:image/jpeg;base64,{data}", width=image.width, height=image.height, alt=alt)
