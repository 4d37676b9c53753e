"""Example bins of a report, with thumbnails and transcripts.

Input: a set of shards, a bin, a transcriber. Output: HTML. Cost: decoding the bin.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prep.annotations.boxes import Shape
from prep.inspect.drawing import draw_shapes
from prep.inspect.show import ShownSample, as_image, describe_medium, sample_shapes, samples_of
from prep.inspect.transcript import Span, SpanKind, Transcriber, visible
from schemas.bins import MEDIA_VIDEO, Bin
from schemas.wording import counted, printable
from storage.pixels import decode_frames
from storage.shard_set import ShardSet

_MAX_SAMPLES = 6
_MAX_MEDIA = 6
_MAX_FRAMES = 4
_THUMBNAIL_SIDE = 200
_JPEG_QUALITY = 82


def bin_section(shards: ShardSet, bin_id: int, reason: str, transcriber: Transcriber) -> str:
    """Render one bin as HTML.

    Raises:
        ShardError: the shard is damaged.
    """
    row, bin_ = shards.row(bin_id), shards.read(bin_id)
    samples = samples_of(shards, bin_)
    frames = decode_frames(bin_, where=row.where)
    shown = samples[:_MAX_SAMPLES]
    parts = [
        '<div class="card">',
        f"<h3>Bin {bin_id} <span class='soft'>({escape(reason)})</span></h3>",
        f'<p class="soft">{row.num_tokens:,} of {shards.manifest.settings.max_length:,} tokens, {row.num_targets:,} '
        f"trained; {counted(row.num_samples, 'sample')}, {counted(row.num_images, 'image')}, "
        f"{counted(row.num_videos, 'video')}</p>",
        *(
            _sample(slot, sample, bin_, frames, transcriber, sample_shapes(shards, sample, bin_, transcriber))
            for slot, sample in enumerate(shown)
        ),
    ]
    if len(samples) > len(shown):
        parts.append(
            f'<p class="soft">And {counted(len(samples) - len(shown), "more sample")}; '
            f"<code>vlprep show DIR --bin {bin_id}</code> prints all.</p>"
        )
    parts.append("</div>")
    return "\n".join(parts)


def _sample(
    slot: int,
    sample: ShownSample,
    bin_: Bin,
    frames: list[NDArray[np.uint8]],
    transcriber: Transcriber,
    shapes: Mapping[int, Sequence[Shape]],
) -> str:
    row = sample.row
    tokens = slice(sample.first, sample.last)
    name = f", id <bdi>{escape(printable(row.id))}</bdi>" if row.id is not None else ""
    parts = [
        '<div class="sample">',
        f"<div>Sample {slot} · {escape(printable(row.dataset))} · "
        f"<code>{escape(printable(row.file))}:{row.line}</code>{name} "
        f'<span class="soft">· {row.num_tokens:,} tokens, {row.num_targets:,} trained</span></div>',
    ]
    if sample.media:
        figures = [
            _figure(describe_medium(medium, grid, kind), kind, frames[medium], shapes.get(medium, ()))
            for medium, grid, kind in sample.media[:_MAX_MEDIA]
        ]
        more = len(sample.media) - len(figures)
        figures += [f'<p class="soft">and {more} more</p>'] if more else []
        parts.append(f'<div class="media">{"".join(figures)}</div>')
    spans = transcriber.spans(bin_.input_ids[tokens], bin_.labels[tokens])
    parts.append(f'<div class="transcript mono" dir="auto">{"".join(transcript_html(spans))}</div></div>')
    return "\n".join(parts)


def transcript_html(spans: Iterable[Span]) -> Iterator[str]:
    """Render spans as HTML: trained spans are marked, control tokens are coloured."""
    for span in spans:
        text = escape(visible(span))
        if span.kind is not SpanKind.TEXT:
            text = f'<span class="control">{text}</span>'
        elif not span.trained:
            text = f"<span>{text}</span>"
        yield f"<mark>{text}</mark>" if span.trained else text


def _figure(caption: str, kind: int, frames: NDArray[np.uint8], shapes: Sequence[Shape]) -> str:
    if kind == MEDIA_VIDEO and len(frames) > _MAX_FRAMES:
        frames = frames[np.linspace(0, len(frames) - 1, _MAX_FRAMES).astype(int)]
    images = "".join(_thumbnail(frame, f"{caption}, frame {index}", shapes) for index, frame in enumerate(frames))
    return f'<figure><div class="media">{images}</div><figcaption>{escape(caption)}</figcaption></figure>'


def _thumbnail(frame: NDArray[np.uint8], alternative: str, shapes: Sequence[Shape]) -> str:
    image = draw_shapes(as_image(frame), shapes)
    image.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=_JPEG_QUALITY)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img src="data:image/jpeg;base64,{data}" alt="{escape(alternative)}" '
        f'width="{image.width}" height="{image.height}">'
    )
