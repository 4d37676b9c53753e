"""Constants of Qwen2.5-VL that both programs rely on: control tokens, patch geometry, normalisation.

Sources: ``config.json``, ``preprocessor_config.json`` and ``tokenizer_config.json`` of the Qwen2.5-VL checkpoints. Each
program compares its checkpoint with these constants at start. A difference stops it.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec

from schemas.errors import ConfigError

DEFAULT_MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"
"""Hub id of the checkpoint whose tokenizer is used if none is given."""

PATCH_SIZE = 14
MERGE_SIZE = 2
TEMPORAL_PATCH_SIZE = 2
FACTOR = PATCH_SIZE * MERGE_SIZE
"""Sides of a resized image are multiples of this many pixels (28): one token is a square of 28 by 28 pixels."""

MERGED_PATCHES = MERGE_SIZE * MERGE_SIZE
"""Patches that the merger turns into one token."""

PATCH_DIM = 3 * TEMPORAL_PATCH_SIZE * PATCH_SIZE * PATCH_SIZE
"""Width of a row of ``pixel_values``: 1176."""

TOKENS_PER_SECOND = 2
MAX_ASPECT_RATIO = 200

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)

IGNORE_INDEX = -100
DEFAULT_SYSTEM = "You are a helpful assistant."

NUM_TOKENS = 152_064
"""Rows of the embeddings of the largest checkpoints: token ids are below."""

ENDOFTEXT = 151643
IM_START = 151644
IM_END = 151645
VISION_START = 151652
VISION_END = 151653
IMAGE_PAD = 151655
VIDEO_PAD = 151656

CONTROL_TOKENS: dict[str, int] = {
    "<|endoftext|>": ENDOFTEXT,
    "<|im_start|>": IM_START,
    "<|im_end|>": IM_END,
    "<|object_ref_start|>": 151646,
    "<|object_ref_end|>": 151647,
    "<|box_start|>": 151648,
    "<|box_end|>": 151649,
    "<|quad_start|>": 151650,
    "<|quad_end|>": 151651,
    "<|vision_start|>": VISION_START,
    "<|vision_end|>": VISION_END,
    "<|vision_pad|>": 151654,
    "<|image_pad|>": IMAGE_PAD,
    "<|video_pad|>": VIDEO_PAD,
}
"""Tokens that steer the model. Text of a user must never produce one of these ids."""


class Grid(NamedTuple):
    """Size of a medium in patches of 14 pixels: temporal steps (of two frames), rows, columns."""

    t: int
    h: int
    w: int

    @property
    def num_patches(self) -> int:
        """Rows of ``pixel_values``."""
        return self.t * self.h * self.w

    @property
    def num_tokens(self) -> int:
        """Pad tokens that stand for the medium in ``input_ids``."""
        return self.num_patches // MERGED_PATCHES


class AddedToken(msgspec.Struct):
    """A token beside the vocabulary, as ``tokenizer.json`` has it."""

    id: int
    content: str
    special: bool = False
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class _BpeModel(msgspec.Struct):
    vocab: dict[str, int]
    merges: list[str | tuple[str, str]]


class TokenizerFile(msgspec.Struct):
    """The parts of ``tokenizer.json`` that decide which ids a text gets."""

    model: _BpeModel
    added_tokens: list[AddedToken]
    normalizer: Any = None
    pre_tokenizer: Any = None


@lru_cache(maxsize=1)
def parse_tokenizer(tokenizer_json: bytes) -> TokenizerFile:
    """Parse a ``tokenizer.json``. Cached, because the fingerprint and the tokenizer both need its vocabulary.

    Raises:
        msgspec.MsgspecError: it is not a byte-level BPE tokenizer.
    """
    return msgspec.json.decode(tokenizer_json, type=TokenizerFile)


@lru_cache(maxsize=2)
def tokenizer_fingerprint(tokenizer_json: bytes, *, where: str) -> str:
    """Fingerprint of a tokenizer by what it does, not by how its file is laid out.

    Two checkpoints whose ``tokenizer.json`` differ only in formatting (merges as ``"a b"`` or ``["a", "b"]``, key
    order, unused fields, how offsets are reported) have the same fingerprint. The control tokens are checked on the
    way. Cost: a fifth of a second the first time.

    Args:
        tokenizer_json: contents of ``tokenizer.json``.
        where: what to call the file in messages.

    Returns:
        32 hexadecimal digits (of a SHA-256).

    Raises:
        ConfigError: the file is not a tokenizer, or its control tokens are not those of Qwen2.5-VL.
    """
    try:
        tokenizer = parse_tokenizer(tokenizer_json)
    except msgspec.MsgspecError as error:
        raise ConfigError(
            f"{where} is not a byte-level BPE tokenizer as Qwen2.5-VL has it: {error}. Give a complete checkpoint."
        ) from error
    ids = {token.content: token.id for token in tokenizer.added_tokens}
    wrong = [
        f"{text} is {ids.get(text)}, not {token_id}"
        for text, token_id in CONTROL_TOKENS.items()
        if ids.get(text) != token_id
    ]
    if wrong:
        raise ConfigError(
            f"{where} is not the tokenizer of Qwen2.5-VL: {'; '.join(wrong[:3])}. Give a Qwen2.5-VL checkpoint."
        )
    vocabulary = tokenizer.model.vocab
    tokens = sorted(vocabulary)
    canonical = [
        list(zip(tokens, map(vocabulary.__getitem__, tokens))),
        [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer.model.merges],
        sorted((token.id, token.content, token.special) for token in tokenizer.added_tokens),
        tokenizer.normalizer,
        _without_offsets(tokenizer.pre_tokenizer),
    ]
    return hashlib.sha256(msgspec.json.encode(canonical, order="sorted")).hexdigest()[:32]


def _without_offsets(value: Any) -> Any:
    """A pre-tokenizer without ``trim_offsets``, which changes no id and differs after a save by transformers 5."""
    if isinstance(value, dict):
        return {key: _without_offsets(item) for key, item in value.items() if key != "trim_offsets"}
    return [_without_offsets(item) for item in value] if isinstance(value, list) else value
