"""Turns conversations into token ids and labels in one pass, with one pad token per medium.

A conversation is laid out in ChatML, as by the model's chat template. Each run of text between two control tokens is
tokenized in one piece, as by the reference, so that merges across the header's newline are the same. Labels come from
the layout, never from a search for role markers in the ids.

Input: validated annotations. Output: a :class:`Template` each; :func:`expand` repeats the pads once the sizes of the
media are known. Cost: tokenization, about 1 MB of text a second and core.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding

from prep.annotations.annotation import Annotation
from prep.annotations.boxes import split_grounding_tokens
from prep.annotations.validation import TAG
from prep.samples.tokenizer import TextTokenizer
from schemas.bins import MEDIA_IMAGE, MEDIA_VIDEO
from schemas.qwen import (
    CONTROL_TOKENS,
    DEFAULT_SYSTEM,
    ENDOFTEXT,
    IGNORE_INDEX,
    IM_END,
    IM_START,
    IMAGE_PAD,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    Grid,
)

_BATCH_CHARACTERS = 1 << 18

_HEADERS = {"system": "system\n", "human": "user\n", "gpt": "assistant\n"}


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


class _Ids(NamedTuple):
    """Token ids (n,) int32 and whether each is a target, (n,) bool, as bytes: these are joined faster than arrays."""

    ids: bytes
    trained: bytes


class _Text(NamedTuple):
    """A run of text between control tokens; characters from ``trained_from`` on are targets."""

    text: str
    trained_from: int


_NEVER = (1 << 31) - 1


def _control(*tokens: int, trained: bool = False) -> _Ids:
    return _Ids(np.asarray(tokens, dtype=np.int32).tobytes(), bytes([trained]) * len(tokens))


_START = _control(IM_START)
_END = _control(IM_END)
_TRAINED_END = _control(IM_END, trained=True)
_MEDIA = {kind: _control(VISION_START, pad, VISION_END) for kind, pad in (("image", IMAGE_PAD), ("video", VIDEO_PAD))}
_LINE_END = _Text("\n", _NEVER)
_TRAINED_LINE_END = _Text("\n", 0)


def _layout(annotation: Annotation) -> tuple[list[_Ids | _Text], tuple[int, ...]]:
    """ChatML of a conversation as runs of text and control tokens, and the kinds of its media."""
    if annotation.is_text:
        return _text_layout(annotation)
    turns = [(turn.role, turn.value) for turn in annotation.turns]
    untrained = annotation.untrained
    if turns[0][0] != "system":
        turns.insert(0, ("system", DEFAULT_SYSTEM))
        untrained = frozenset(index + 1 for index in untrained)
    layout: list[_Ids | _Text] = []
    kinds: list[int] = []
    for index, (role, value) in enumerate(turns):
        header = _HEADERS[role]
        is_trained = role == "gpt" and index not in untrained
        layout.append(_START)
        if annotation.grounding and "<|" in value:
            layout += _with_grounding(header, value, kinds, is_trained=is_trained)
        elif role == "human" and "<" in value:
            layout += _with_media(header + value, kinds)
        else:
            layout.append(_Text(header + value, len(header) if is_trained else _NEVER))
        layout += (_TRAINED_END, _TRAINED_LINE_END) if is_trained else (_END, _LINE_END)
    return layout, tuple(kinds)


def _with_media(text: str, kinds: list[int], trained_from: int = _NEVER) -> Iterator[_Ids | _Text]:
    """Runs of a text with media tags; the kinds of its media are added to ``kinds``."""
    pieces = TAG.split(text)
    if pieces[0]:
        yield _Text(pieces[0], trained_from)
    for kind, piece in zip(pieces[1::2], pieces[2::2]):
        kinds.append(MEDIA_IMAGE if kind == "image" else MEDIA_VIDEO)
        yield _MEDIA[kind]
        if piece:
            yield _Text(piece, trained_from)


def _with_grounding(header: str, value: str, kinds: list[int], *, is_trained: bool) -> Iterator[_Ids | _Text]:
    """Runs of a text in which the tokens of boxes and object names are control tokens."""
    text_at = _Text(header, _NEVER)
    for piece, is_token in split_grounding_tokens(value):
        if is_token:
            if text_at.text:
                yield text_at
            yield _control(CONTROL_TOKENS[piece], trained=is_trained)
            text_at = _Text("", _NEVER)
        elif is_trained:
            yield _Text(text_at.text + piece, len(text_at.text))
            text_at = _Text("", _NEVER)
        else:
            yield from _with_media(text_at.text + piece, kinds)
            text_at = _Text("", _NEVER)
    if text_at.text:
        yield text_at


def _text_layout(annotation: Annotation) -> tuple[list[_Ids | _Text], tuple[int, ...]]:
    """Text for continued pretraining: no template, all text trained, the end of text after it."""
    kinds: list[int] = []
    layout = list(_with_media(annotation.turns[0].value, kinds, trained_from=0))
    return [*layout, _control(ENDOFTEXT, trained=True)], tuple(kinds)


def build_templates(annotations: Sequence[Annotation], tokenizer: TextTokenizer) -> list[Template]:
    """Tokenize many validated conversations in few calls of the tokenizer."""
    layouts = [_layout(annotation) for annotation in annotations]
    encoded = _encode({piece for layout, _ in layouts for piece in layout if isinstance(piece, _Text)}, tokenizer)
    templates: list[Template] = []
    for layout, kinds in layouts:
        pieces = [encoded[piece] if isinstance(piece, _Text) else piece for piece in layout]
        ids, trained = b"".join([piece[0] for piece in pieces]), b"".join([piece[1] for piece in pieces])
        # The first token of a sample has nothing before it that could predict it.
        trained = b"\0" + trained[1:]
        templates.append(
            Template(
                ids=np.frombuffer(ids, dtype=np.int32),
                trained=np.frombuffer(trained, dtype=np.bool_),
                media_types=kinds,
            )
        )
    return templates


def _encode(texts: Iterable[_Text], tokenizer: TextTokenizer) -> dict[_Text | _Ids, _Ids]:
    """Tokenize in batches, since the tokenizer returns hundreds of bytes per token."""
    encoded: dict[_Text | _Ids, _Ids] = {}
    batch: list[_Text] = []
    num_characters = 0
    waiting = sorted(texts, key=_num_characters)
    for num_taken, run in enumerate(waiting, start=1):
        batch.append(run)
        num_characters += len(run.text)
        if num_characters >= _BATCH_CHARACTERS or num_taken == len(waiting):
            for key, encoding in zip(batch, tokenizer.encode_batch([run.text for run in batch])):
                ids = encoding.ids
                num_untrained = _num_untrained(encoding, len(ids), key.trained_from)
                trained = bytes(num_untrained) + b"\1" * (len(ids) - num_untrained)
                encoded[key] = _Ids(array("i", ids).tobytes(), trained)
            batch, num_characters = [], 0
    return encoded


def _num_characters(run: _Text) -> int:
    return len(run.text)


def _num_untrained(encoding: Encoding, num_tokens: int, trained_from: int) -> int:
    """Number of leading tokens that end at or before character ``trained_from``.

    A token that spans the header's newline and the start of the answer belongs to the answer.
    """
    if trained_from in (0, _NEVER):
        return num_tokens if trained_from else 0
    for index in range(num_tokens):
        span = encoding.token_to_chars(index)
        if span is not None and span[1] > trained_from:
            return index
    return num_tokens


def expand(template: Template, grids: Sequence[Grid]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Repeat the pad of every medium as often as its size asks for.

    Args:
        template: ids with one pad a medium.
        grids: size of every medium, in order.

    Returns:
        ``input_ids`` (L,) int32 and ``labels`` (L,) int32, not shifted, -100 where nothing is trained.
    """
    input_ids, trained = template.ids, template.trained
    if grids:
        repeats = np.ones(template.ids.size, dtype=np.int64)
        is_pad = (template.ids == IMAGE_PAD) | (template.ids == VIDEO_PAD)
        repeats[is_pad] = [grid.num_tokens for grid in grids]
        input_ids, trained = np.repeat(input_ids, repeats), np.repeat(trained, repeats)
    return input_ids, np.where(trained, input_ids, np.int32(IGNORE_INDEX))


def num_tokens(template: Template, grids: Sequence[Grid]) -> int:
    """Length of the sample that :func:`expand` gives."""
    return int(template.ids.size) - len(grids) + sum(grid.num_tokens for grid in grids)
