"""Turns the token ids of a sample back into text that a person can read: what is said, what steers, what is trained.

Input: ids and labels of a bin, and the tokenizer that made them. Output: :class:`Span` by :class:`Span`. Runs of pad
tokens are folded into one span with their number.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from prep.samples.tokenizer import ModelFiles, find_model_files, read_fingerprints
from schemas.checkpoints import TOKENIZER_FILE, processor_file
from schemas.errors import ConfigError
from schemas.manifest import Manifest
from schemas.qwen import CONTROL_TOKENS, IGNORE_INDEX, IMAGE_PAD, VIDEO_PAD

_CONTROL_TEXTS = {token: text for text, token in CONTROL_TOKENS.items()}
_LINE_BREAK = "↵"


class SpanKind(Enum):
    """What a span is: ordinary text, a control token, or a run of pad tokens of a medium."""

    TEXT = "text"
    CONTROL = "control"
    PADS = "pads"


@dataclass(frozen=True, slots=True)
class Span:
    """A run of tokens of one kind that are all trained or all not."""

    kind: SpanKind
    text: str
    trained: bool


def printable(text: str) -> str:
    """Text that cannot steer a terminal: control characters other than line breaks and tabs are spelled out."""
    return "".join(
        character if character in "\n\t" or unicodedata.category(character) != "Cc" else f"\\x{ord(character):02x}"
        for character in text
    )


def visible(span: Span) -> str:
    """Text of a span for the eye: :func:`printable`, and with a sign for every line break that is trained."""
    text = printable(span.text)
    # A line break is a token like any other, and easily overlooked.
    return text.replace("\n", f"{_LINE_BREAK}\n") if span.trained else text


class Transcriber:
    """Reads token ids.

    Args:
        tokenizer: the one that made them, with its control tokens; None to tell only how many tokens a text has.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    @property
    def reads_text(self) -> bool:
        """Whether there is a tokenizer."""
        return self._tokenizer is not None

    def spans(self, input_ids: NDArray[np.int32], labels: NDArray[np.int32]) -> Iterator[Span]:
        """Spans of a run of tokens.

        Args:
            input_ids: (n,) int32.
            labels: (n,) int32, not shifted.
        """
        trained = labels != IGNORE_INDEX
        control = np.isin(input_ids, list(_CONTROL_TEXTS))
        pad = np.isin(input_ids, (IMAGE_PAD, VIDEO_PAD))
        # A control token is a span of its own, pads of one kind share one, and so does text.
        group = np.where(pad, -input_ids, 0)
        starts = np.flatnonzero(
            np.concatenate([[True], (group[1:] != group[:-1]) | (trained[1:] != trained[:-1])])
            | (control & ~pad)
            | np.concatenate([[False], (control & ~pad)[:-1]])
        )
        for start, end in zip(starts.tolist(), [*starts[1:].tolist(), input_ids.size]):
            token = int(input_ids[start])
            if pad[start]:
                text, kind = f"{_CONTROL_TEXTS[token]}×{end - start}", SpanKind.PADS
            elif control[start]:
                text, kind = _CONTROL_TEXTS[token], SpanKind.CONTROL
            else:
                text, kind = self._text(input_ids[start:end].tolist()), SpanKind.TEXT
            yield Span(kind, text, bool(trained[start]))

    def _text(self, ids: list[int]) -> str:
        if self._tokenizer is None:
            return f"⟨{len(ids)} token{'' if len(ids) == 1 else 's'}⟩"
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text


def open_transcriber(model: str, manifest: Manifest) -> Transcriber:
    """The tokenizer of a checkpoint, which must be the one that a set of shards was made with.

    Args:
        model: checkpoint folder or hub id.
        manifest: of the set.

    Raises:
        ConfigError: no such checkpoint, or one with another tokenizer.
    """
    return _from_files(find_model_files(model), model, manifest)


def cached_transcriber(model: str, manifest: Manifest) -> Transcriber | None:
    """As :func:`open_transcriber`, from the hub's cache on this machine; None where the checkpoint is not there or has
    another tokenizer.
    """
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(model, TOKENIZER_FILE)
    if not isinstance(found, str):
        return None
    try:
        files = ModelFiles(tokenizer=Path(found), processor=processor_file(Path(found).parent))
        return _from_files(files, model, manifest) if files.processor.is_file() else None
    except ConfigError:
        return None


def _from_files(files: ModelFiles, model: str, manifest: Manifest) -> Transcriber:
    found, expected = read_fingerprints(files).tokenizer, manifest.fingerprints.tokenizer
    if found != expected:
        raise ConfigError(
            f"--model {model} has another tokenizer (fingerprint {found}) than the shards were made with ({expected}). "
            "Give --model the checkpoint that `vlprep build` was given."
        )
    return Transcriber(Tokenizer.from_file(str(files.tokenizer)))
