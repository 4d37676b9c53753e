"""A page of answers: :class:`Answer` -> one self-contained HTML file with the images beside each answer.

Cost: a JPEG of a small image for each image and for at most four frames of each video.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from schemas.wording import printable
from train.generate.answers import Answer

_SIDE = 320
_JPEG_QUALITY = 85
_MAX_FRAMES = 4

_VIEWPORT = '<meta name="viewport" content="width=device-width, initial-scale=1">'
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #23937f; --bad: #c3483a; }
body { max-width: 1200px; margin: 0 auto; padding: 24px; font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 22px; overflow-wrap: anywhere; }
article { border-top: 1px solid var(--line); padding: 16px 0; display: flex; gap: 20px; flex-wrap: wrap; }
.media { display: flex; gap: 8px; flex-wrap: wrap; align-items: flex-start; flex: 0 1 340px; }
.media img { box-sizing: border-box; border: 1px solid var(--line); max-width: 100%; height: auto; }
.media.several img { max-width: calc(50% - 4px); }
.text { flex: 1 1 480px; }
.answers { display: grid; grid-template-columns: 1fr 1fr; gap: 12px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 4px 0 12px; font: inherit; }
.soft { opacity: 0.7; font-size: 13px; }
.exact pre { border-left: 3px solid var(--good); padding-left: 10px; }
.different pre { border-left: 3px solid var(--bad); padding-left: 10px; }
"""


def render_page(answers: Sequence[Answer], *, title: str, summary: str) -> str:
    """Render answers as a page.

    Args:
        answers: the answers.
        title: heading of the page.
        summary: the line below it.
    """
    articles = "\n".join(_article(answer, count) for count, answer in enumerate(answers, start=1))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">{_VIEWPORT}<title>{_text(title)}</title>'
        f"<style>{_STYLE}</style></head><body>\n<h1>{_text(title)}</h1>\n<p>{_text(summary)}</p>\n"
        f"{articles}\n</body></html>\n"
    )


def _article(answer: Answer, count: int) -> str:
    question = answer.question
    images = [_image(frame) for frames in answer.frames for frame in _some(frames)]
    media = f'<div class="media{" several" if len(images) > 1 else ""}">{"".join(images)}</div>'
    cut = "" if answer.is_complete else " (cut off)"
    return (
        f'<article class="{"exact" if answer.is_exact else "different"}">{media}'
        f'<div class="text"><div class="soft">{count}. {_text(question.sample.name)}</div>'
        f'<p dir="auto">{_text(question.text)}</p><div class="answers">'
        f'<div><span class="soft">wanted</span><pre dir="auto">{_text(question.expected)}</pre></div>'
        f'<div><span class="soft">generated{cut}</span><pre dir="auto">{_text(answer.generated)}</pre></div>'
        "</div></div></article>"
    )


def _some(frames: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """At most four frames of a medium, (F, 3, H, W), spread over it."""
    some: NDArray[np.uint8] = frames[np.unique(np.linspace(0, len(frames) - 1, _MAX_FRAMES).astype(int))]
    return some


def _image(frame: NDArray[np.uint8]) -> str:
    from PIL import Image

    # (3, H, W) -> (H, W, 3)
    image = Image.fromarray(np.ascontiguousarray(frame.transpose(1, 2, 0)))
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=_JPEG_QUALITY)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img src="data:image/jpeg;base64,{data}" width="{image.width}" height="{image.height}" alt="">'


def _text(text: str) -> str:
    return escape(printable(text))
