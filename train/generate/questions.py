"""Questions in a bin: packed samples -> prompts with the answers that training wants.

Every trained span of a sample is an answer. Its prompt is all that precedes it in the sample, earlier answers included.

Cost: decoding text and, for the media, pixels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from schemas.bins import Bin
from schemas.qwen import (
    CONTROL_TOKENS,
    IGNORE_INDEX,
    IM_END,
    IM_START,
    IMAGE_PAD,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
)
from train.order.explain import SourceSample

_MEDIA = {IMAGE_PAD: "<image>", VIDEO_PAD: "<video>"}
_UNSEEN = {VISION_START, VISION_END, IM_END}
_CONTROL_TEXTS = {token: text for text, token in CONTROL_TOKENS.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A prompt inside a bin, and the answer to it.

    Attributes:
        sample: where the sample comes from.
        text: the last turn before the answer, with ``<image>`` and ``<video>`` for media.
        expected: the answer of the sample.
        start: position of the sample in the bin.
        end: position of the first token of the answer.
        media: positions in the bin of the media that the prompt shows.
    """

    sample: SourceSample
    text: str
    expected: str
    start: int
    end: int
    media: range


def questions_of(bin_: Bin, samples: Sequence[SourceSample], tokenizer: Tokenizer) -> Iterator[Question]:
    """The questions of a bin, in order.

    Args:
        bin_: the bin.
        samples: where its samples come from, in order.
        tokenizer: the one of its tokens.
    """
    is_trained = bin_.labels != IGNORE_INDEX
    # (L + 1,): how many media begin before each position
    num_media = np.concatenate([[0], np.cumsum(bin_.input_ids == VISION_START)])
    boundaries = bin_.cu_seqlens.tolist()
    for sample, (first, last) in zip(samples, itertools.pairwise(boundaries), strict=True):
        # The first label of a sample is never trained, so each span has a position before it.
        changes = np.flatnonzero(np.diff(is_trained[first:last], append=False)) + 1
        for start, end in (first + changes.reshape(-1, 2)).tolist():
            yield Question(
                sample=sample,
                text=readable(_last_turn(bin_.input_ids[first:start]), tokenizer),
                expected=readable(bin_.input_ids[start:end], tokenizer),
                start=first,
                end=start,
                media=range(int(num_media[first]), int(num_media[start])),
            )


def readable(ids: NDArray[np.int32], tokenizer: Tokenizer) -> str:
    """Text of tokens, without the ends of turns, and with one word for each image or video."""
    pieces: list[str] = []
    for is_control, run in itertools.groupby(ids.tolist(), key=_CONTROL_TEXTS.__contains__):
        if not is_control:
            pieces.append(tokenizer.decode(list(run), skip_special_tokens=False))
            continue
        for token, _ in itertools.groupby(run):
            pieces.append("" if token in _UNSEEN else _MEDIA.get(token, _CONTROL_TEXTS[token]))
    return "".join(pieces).strip()


def _last_turn(prompt: NDArray[np.int32]) -> NDArray[np.int32]:
    """Tokens of the last turn before an answer, without its role; of the whole prompt if there are no turns."""
    starts = np.flatnonzero(prompt == IM_START)
    if starts.size < 2:
        return prompt
    # Role and line break follow the start of a turn. The last start is that of the answer.
    return prompt[starts[-2] + 3 : starts[-1]]
