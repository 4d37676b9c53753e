"""Turns the token ids of a sample back into readable text, with its control tokens and what is trained.

Input: ids and labels, and the tokenizer that made them. Output: a sequence of :class:`Span`. A run of pad tokens is one
span with its length.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from prep.samples.tokenizer import ModelFiles, find_model_files, read_fingerprints
from schemas.checkpoints import TOKENIZER_FILE, processor_file
from schemas.errors import ConfigError
from schemas.manifest import Manifest
from schemas.qwen import CONTROL_TOKENS, DEFAULT_MODEL, IGNORE_INDEX, IMAGE_PAD, VIDEO_PAD
from schemas.wording import counted, printable

logger = logging.getLogger(__name__)

_CONTROL_TEXTS = {token: text for text, token in CONTROL_TOKENS.items()}
_LINE_BREAK = "↵"
_SPELLED_TOKEN = re.compile("|".join(map(re.escape, CONTROL_TOKENS)))
ESCAPED_NOTE = r"Text that only spells a control token is written <\|im_end\|>."
"""Explains what :func:`visible` writes."""


class SpanKind(Enum):
    """Kind of a span: ordinary text, a control token, or the pad tokens of a medium."""

    TEXT = "text"
    CONTROL = "control"
    PADS = "pads"


@dataclass(frozen=True, slots=True)
class Span:
    """A run of tokens of one kind that are either all trained or all untrained."""

    kind: SpanKind
    text: str
    trained: bool


def visible(span: Span) -> str:
    """Printable text of a span, with a sign at every trained line break.

    Bars of ordinary text that spells a control token get a backslash, so that it never looks like one.
    """
    text = printable(span.text)
    if span.kind is SpanKind.TEXT:
        text = _SPELLED_TOKEN.sub(lambda match: match[0].replace("|", "\\|"), text)
    # A trained line break is easily overlooked.
    return text.replace("\n", f"{_LINE_BREAK}\n") if span.trained else text


def spells_token(span: Span) -> bool:
    """Whether a span is ordinary text that spells a control token."""
    return span.kind is SpanKind.TEXT and _SPELLED_TOKEN.search(span.text) is not None


class Transcriber:
    """Decodes token ids to spans.

    Args:
        tokenizer: the tokenizer that made the ids, with its control tokens. None to give only the counts of tokens.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    @property
    def reads_text(self) -> bool:
        """Whether it has a tokenizer."""
        return self._tokenizer is not None

    def spans(self, input_ids: NDArray[np.int32], labels: NDArray[np.int32]) -> Iterator[Span]:
        """Split tokens into spans.

        Args:
            input_ids: (n,) int32.
            labels: (n,) int32, not shifted.
        """
        trained = labels != IGNORE_INDEX
        control = np.isin(input_ids, list(_CONTROL_TEXTS))
        pad = np.isin(input_ids, (IMAGE_PAD, VIDEO_PAD))
        # (n,): the negated id of a pad token, otherwise 0. A span starts where the group or `trained` changes, and
        # before and after every control token that is not a pad.
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

    def token(self, token: int) -> str:
        """Text of one token: a replacement character for a part of a character, or without a tokenizer."""
        if token in _CONTROL_TEXTS or self._tokenizer is None:
            return _CONTROL_TEXTS.get(token, "\N{REPLACEMENT CHARACTER}")
        return self._text([token])

    def _text(self, ids: list[int]) -> str:
        if self._tokenizer is None:
            return f"⟨{counted(len(ids), 'token')}⟩"
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text


def find_transcriber(model: str | None, manifest: Manifest) -> Transcriber:
    """Open the tokenizer of a set of shards, which holds only its fingerprint.

    Args:
        model: checkpoint folder or hub id. None for the default model, if the local hub cache has its tokenizer and
            this made the shards. Otherwise there are no texts, see :func:`warn_without_texts`.
        manifest: manifest of the set.

    Raises:
        ConfigError: ``model`` does not exist or has a different tokenizer.
    """
    if model is not None:
        return open_transcriber(model, manifest)
    return cached_transcriber(DEFAULT_MODEL, manifest) or Transcriber(None)


def warn_without_texts(*transcribers: Transcriber) -> None:
    """Say why texts are missing, if :func:`find_transcriber` found no tokenizer."""
    if not all(transcriber.reads_text for transcriber in transcribers):
        logger.warning(
            "the texts are missing: the shards do not name their model, and the default one, %s, is not in the hub's "
            "cache or did not make them. Pass the --model of the build.",
            DEFAULT_MODEL,
        )


def open_transcriber(model: str, manifest: Manifest) -> Transcriber:
    """Open the tokenizer of a checkpoint, which must be the one that made a set of shards.

    Args:
        model: checkpoint folder or hub id.
        manifest: manifest of the set.

    Raises:
        ConfigError: the checkpoint does not exist or has a different tokenizer.
    """
    return _from_files(find_model_files(model), model, manifest)


def cached_transcriber(model: str, manifest: Manifest) -> Transcriber | None:
    """Open the tokenizer from the local hub cache. None if it is not in the cache, or is a different tokenizer."""
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(model, TOKENIZER_FILE)
    if not isinstance(path, str):
        return None
    try:
        files = ModelFiles(tokenizer=Path(path), processor=processor_file(Path(path).parent))
        return _from_files(files, model, manifest) if files.processor.is_file() else None
    except ConfigError:
        return None


def _from_files(files: ModelFiles, model: str, manifest: Manifest) -> Transcriber:
    fingerprint, expected = read_fingerprints(files).tokenizer, manifest.fingerprints.tokenizer
    if fingerprint != expected:
        raise ConfigError(
            f"--model {model} has a different tokenizer (fingerprint {fingerprint}) than the one that made the shards "
            f"({expected}). Pass the --model that `vlprep build` used."
        )
    return Transcriber(_decoder(files.tokenizer, fingerprint))


@lru_cache(maxsize=1)
def _decoder(path: Path, fingerprint: str) -> Tokenizer:
    """Load the tokenizer in ``path`` with this fingerprint."""
    return Tokenizer.from_file(str(path))
