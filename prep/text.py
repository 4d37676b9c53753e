"""Conversations to token ids and labels, in one pass, with one pad token a medium.

A conversation is laid out in ChatML as the model's chat template does; between two control tokens stands one run of
text, which is tokenized as a whole (as the reference does), so that merges across the header's newline come out the
same. Labels come from the layout, never from a search for role markers in the ids.

Input: validated annotations. Output: a :class:`Template` each; :func:`expand` writes out the pads once the sizes of the
media are known. Cost: tokenization, about 1 MB of text a second and core.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prep.tokenizer import TextTokenizer
from schemas.annotation import Annotation
from schemas.bins import MEDIA_IMAGE, MEDIA_VIDEO
from schemas.qwen import (
    CONTROL_TOKENS,
    DEFAULT_SYSTEM,
    IGNORE_INDEX,
    IM_END,
    IM_START,
    IMAGE_PAD,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    Grid,
)

MAX_TEXT_CHARACTERS = 1 << 20
"""A conversation with more text is rejected as ``too_long`` before it is tokenized (which takes 100 times its memory):
it would be four times what the model's context of 128k tokens holds."""

TAG = re.compile(r"<(image|video)>")
RESERVED = re.compile("|".join(re.escape(token) for token in CONTROL_TOKENS))

_BATCH_CHARACTERS = 1 << 18

_ROLE_NAMES = {"system": "system", "human": "user", "gpt": "assistant"}
_PADS = {MEDIA_IMAGE: IMAGE_PAD, MEDIA_VIDEO: VIDEO_PAD}


@dataclass(frozen=True, kw_only=True, slots=True)
class Template:
    """Token ids of a conversation with one pad token for every medium.

    Attributes:
        ids: (n,) int32.
        trained: (n,) bool, True where the token is a target.
        media_types: kind of every medium in the order of its pad.
    """

    ids: NDArray[np.int32]
    trained: NDArray[np.bool_]
    media_types: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Text:
    """A run of text between control tokens; characters from ``trained_from`` on are targets."""

    text: str
    trained_from: int


@dataclass(frozen=True, slots=True)
class _Control:
    token: int
    trained: bool


_NEVER = (1 << 31) - 1


def _layout(annotation: Annotation) -> Iterator[_Text | _Control]:
    """ChatML of a conversation as runs of text and control tokens."""
    turns = [(turn.role, turn.value) for turn in annotation.conversations]
    if turns[0][0] != "system":
        turns.insert(0, ("system", DEFAULT_SYSTEM))
    for role, value in turns:
        header = _ROLE_NAMES[role] + "\n"
        answers = role == "gpt"
        yield _Control(IM_START, False)
        pieces = TAG.split(header + value) if role == "human" else [header + value]
        yield _Text(pieces[0], len(header) if answers else _NEVER)
        for kind, text in zip(pieces[1::2], pieces[2::2]):
            yield _Control(VISION_START, False)
            yield _Control(_PADS[MEDIA_IMAGE if kind == "image" else MEDIA_VIDEO], False)
            yield _Control(VISION_END, False)
            if text:
                yield _Text(text, _NEVER)
        yield _Control(IM_END, answers)
        yield _Text("\n", 0 if answers else _NEVER)


def build_templates(annotations: Sequence[Annotation], tokenizer: TextTokenizer) -> list[Template]:
    """Tokenize many validated conversations, with few calls of the tokenizer."""
    layouts = [list(_layout(annotation)) for annotation in annotations]
    encoded = _encode({piece.text for layout in layouts for piece in layout if isinstance(piece, _Text)}, tokenizer)
    return [_template(layout, encoded) for layout in layouts]


@dataclass(frozen=True, slots=True)
class _Encoded:
    """Token ids (n,) int32 of a text, and where in the text each token ends, (n,) int32."""

    ids: NDArray[np.int32]
    ends: NDArray[np.int32]


def _encode(texts: Iterable[str], tokenizer: TextTokenizer) -> dict[str, _Encoded]:
    """Tokenize in batches that bound the memory of what the tokenizer returns: hundreds of bytes a token."""
    encoded: dict[str, _Encoded] = {}
    batch: list[str] = []
    num_characters = 0
    waiting = sorted(texts, key=len)
    for number, text in enumerate(waiting, start=1):
        batch.append(text)
        num_characters += len(text)
        if num_characters >= _BATCH_CHARACTERS or number == len(waiting):
            for key, encoding in zip(batch, tokenizer.encode_batch(batch)):
                ends = np.asarray([end for _, end in encoding.offsets], dtype=np.int32)
                encoded[key] = _Encoded(np.asarray(encoding.ids, dtype=np.int32), ends)
            batch, num_characters = [], 0
    return encoded


def _template(layout: Sequence[_Text | _Control], encoded: Mapping[str, _Encoded]) -> Template:
    ids: list[NDArray[np.int32]] = []
    trained: list[NDArray[np.bool_]] = []
    media_types: list[int] = []
    for piece in layout:
        if isinstance(piece, _Text):
            found = encoded[piece.text]
            ids.append(found.ids)
            # A token that also holds the header's newline is part of the answer as soon as it holds some of it.
            trained.append(found.ends > piece.trained_from)
        else:
            ids.append(np.asarray([piece.token], dtype=np.int32))
            trained.append(np.asarray([piece.trained], dtype=np.bool_))
            media_types.extend(kind for kind, pad in _PADS.items() if pad == piece.token)
    return Template(ids=np.concatenate(ids), trained=np.concatenate(trained), media_types=tuple(media_types))


def expand(template: Template, grids: Sequence[Grid]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Write out the pads of all media.

    Args:
        template: ids with one pad a medium.
        grids: size of every medium, in order.

    Returns:
        ``input_ids`` (L,) int32 and ``labels`` (L,) int32, not shifted, -100 where nothing is trained.
    """
    is_pad = (template.ids == IMAGE_PAD) | (template.ids == VIDEO_PAD)
    repeats = np.ones(template.ids.size, dtype=np.int64)
    repeats[is_pad] = [grid.num_tokens for grid in grids]
    input_ids = np.repeat(template.ids, repeats)
    labels = np.where(np.repeat(template.trained, repeats), input_ids, np.int32(IGNORE_INDEX)).astype(np.int32)
    return input_ids, labels


def num_tokens(template: Template, grids: Sequence[Grid]) -> int:
    """Length of the sample that :func:`expand` gives."""
    return int(template.ids.size) - len(grids) + sum(grid.num_tokens for grid in grids)
