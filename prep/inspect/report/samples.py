"""The part of a report that lets a person look inside: a few bins with small pictures and what is said.

Input: a set of shards, bins to show, a transcriber. Output: HTML. Cost: the decoding of those bins.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator
from html import escape

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from prep.inspect.show import ShownSample, as_picture, describe_medium, samples_of
from prep.inspect.transcript import Span, SpanKind, Transcriber, printable, visible
from schemas.bins import MEDIA_VIDEO, Bin
from storage.pixels import decode_frames
from storage.shard_set import ShardSet

_MAX_SAMPLES = 6
_MAX_MEDIA = 6
_MAX_FRAMES = 4
_THUMBNAIL_SIDE = 200
_JPEG_QUALITY = 82


def bin_section(shards: ShardSet, number: int, reason: str, transcriber: Transcriber) -> str:
    """One bin as HTML.

    Raises:
        ShardError: the shard is damaged.
    """
    row, found = shards.row(number), shards.read(number)
    samples = samples_of(shards, found)
    frames = decode_frames(found, where=row.where)
    shown = samples[:_MAX_SAMPLES]
    parts = [
        '<div class="card">',
        f"<h3>Bin {number} <span class='soft'>({escape(reason)})</span></h3>",
        f'<p class="soft">{row.num_tokens:,} of {shards.manifest.settings.max_length:,} tokens, {row.num_targets:,} '
        f"trained; {row.num_samples:,} samples, {row.num_images:,} images, {row.num_videos:,} videos</p>",
        *(_sample(slot, sample, found, frames, transcriber) for slot, sample in enumerate(shown)),
    ]
    if len(samples) > len(shown):
        parts.append(
            f'<p class="soft">And {len(samples) - len(shown):,} more samples; '
            f"<code>vlprep show DIR --bin {number}</code> prints all.</p>"
        )
    parts.append("</div>")
    return "\n".join(parts)


def _sample(
    slot: int, sample: ShownSample, found: Bin, frames: list[NDArray[np.uint8]], transcriber: Transcriber
) -> str:
    row = sample.row
    part = slice(sample.first, sample.last)
    name = f", id <bdi>{escape(printable(row.id))}</bdi>" if row.id is not None else ""
    parts = [
        '<div class="sample">',
        f"<div>Sample {slot} · {escape(printable(row.dataset))} · "
        f"<code>{escape(printable(row.file))}:{row.line}</code>{name} "
        f'<span class="soft">· {row.num_tokens:,} tokens, {row.num_targets:,} trained</span></div>',
    ]
    if sample.media:
        pictures = [
            _picture(medium, describe_medium(medium, grid, kind), kind, frames[medium])
            for medium, grid, kind in sample.media[:_MAX_MEDIA]
        ]
        more = len(sample.media) - len(pictures)
        pictures += [f'<p class="soft">and {more} more</p>'] if more else []
        parts.append(f'<div class="media">{"".join(pictures)}</div>')
    spans = transcriber.spans(found.input_ids[part], found.labels[part])
    parts.append(f'<div class="talk mono" dir="auto">{"".join(transcript_html(spans))}</div></div>')
    return "\n".join(parts)


def transcript_html(spans: Iterable[Span]) -> Iterator[str]:
    """Spans as HTML: what is trained is marked, what steers is coloured."""
    for span in spans:
        text = escape(visible(span))
        if span.kind is not SpanKind.TEXT:
            text = f'<span class="steer">{text}</span>'
        elif not span.trained:
            text = f"<span>{text}</span>"
        yield f"<mark>{text}</mark>" if span.trained else text


def _picture(number: int, caption: str, kind: int, frames: NDArray[np.uint8]) -> str:
    if kind == MEDIA_VIDEO and len(frames) > _MAX_FRAMES:
        frames = frames[np.linspace(0, len(frames) - 1, _MAX_FRAMES).astype(int)]
    images = "".join(_thumbnail(frame, f"{caption}, frame {place}") for place, frame in enumerate(frames))
    return f'<figure><div class="media">{images}</div><figcaption>{escape(caption)}</figcaption></figure>'


def _thumbnail(frame: NDArray[np.uint8], alternative: str) -> str:
    picture = as_picture(frame)
    picture.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=_JPEG_QUALITY)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<img src="data:image/jpeg;base64,{data}" alt="{escape(alternative)}" '
        f'width="{picture.width}" height="{picture.height}">'
    )
