"""The tokenizer of Qwen2.5-VL, rebuilt offline: a ``qwen.tiktoken`` file -> the tokenizer files of a checkpoint.

A ``tiktoken`` vocabulary lists 151,643 byte strings with their ranks. It determines the merges of a byte-level BPE
tokenizer: BPE with only the lower ranks reduces the bytes of a token to two parts, and these are its last merge. The
file comes with the ``dashscope`` wheel, which is located but never imported.

Cost: about 3 s on one core, almost all of it to recover the merges.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from schemas.errors import ConfigError
from schemas.qwen import CONTROL_TOKENS, DEFAULT_SYSTEM, ENDOFTEXT

logger = logging.getLogger(__name__)

TIKTOKEN_FILE = "qwen.tiktoken"

PLAIN_ADDED_TOKENS = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)
"""Added after the control tokens, 151657 to 151664. A tokenizer matches them as units but not as special tokens."""

SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Pattern that splits text before BPE. Source: ``tokenizer.json`` of the Qwen2.5 checkpoints."""

CHAT_TEMPLATE = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}"
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    f"<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "{% set image_count.value = image_count.value + 1 %}"
    "{% if add_vision_id %}Picture {{ image_count.value }}: {% endif %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}"
    "{% set video_count.value = video_count.value + 1 %}"
    "{% if add_vision_id %}Video {{ video_count.value }}: {% endif %}"
    "<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Source: ``chat_template.json`` of the Qwen2.5-VL-Instruct checkpoints, the same for all sizes."""


def find_tiktoken_file(source: Path | None = None) -> Path:
    """Locate the vocabulary.

    Args:
        source: A ``qwen.tiktoken`` file, its folder, or None for the one in the ``dashscope`` package.

    Returns:
        Path of an existing file.

    Raises:
        ConfigError: If there is no such file.
    """
    if source is not None:
        path = source / TIKTOKEN_FILE if source.is_dir() else source
        if not path.is_file():
            raise ConfigError(f"no tokenizer vocabulary at {path}: give a {TIKTOKEN_FILE} file or its folder.")
        return path
    spec = find_spec("dashscope")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder) / "resources" / TIKTOKEN_FILE
        if path.is_file():
            return path
    raise ConfigError(
        f"the tokenizer vocabulary {TIKTOKEN_FILE} comes with the dashscope package, which is not installed or lacks "
        f"it: pip install --no-deps dashscope (or give the path of a {TIKTOKEN_FILE} file)."
    )


def read_ranks(path: Path) -> dict[bytes, int]:
    """Read a ``tiktoken`` vocabulary: one token per line, its bytes in base64, a space, its rank.

    Returns:
        The rank of every token, in the order of ranks 0, 1, 2, ….

    Raises:
        ConfigError: If the file is not such a vocabulary, or not that of Qwen2.5 (151,643 tokens).
    """
    ranks: dict[bytes, int] = {}
    for line_number, line in enumerate(path.read_bytes().splitlines(), start=1):
        fields = line.split()
        try:
            encoded, rank = fields
            token, expected = base64.b64decode(encoded, validate=True), len(ranks)
            if int(rank) != expected or token in ranks:
                raise ConfigError(
                    f"{path}:{line_number}: expected a new token of rank {expected}, found rank {int(rank)}."
                )
        except (ValueError, binascii.Error) as error:
            raise ConfigError(
                f"{path}:{line_number}: not a line of a tiktoken vocabulary (base64, space, rank)."
            ) from error
        ranks[token] = expected
    if len(ranks) != ENDOFTEXT:
        raise ConfigError(f"{path}: {len(ranks)} tokens, the vocabulary of Qwen2.5 has {ENDOFTEXT}. Use that file.")
    return ranks


def last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """Return the two parts that BPE joins last to form a token of two or more bytes.

    Args:
        token: A key of ``ranks``.
        ranks: The rank of every token. Single bytes are tokens.

    Returns:
        The parts, both tokens of lower rank.

    Raises:
        ValueError: If merges of lower rank do not lead to the token.
    """
    no_token = len(ranks)
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(left + right, no_token) for left, right in pairwise(parts)]
        rank = min(pairs)
        if rank >= ranks[token]:
            raise ValueError(f"token {token!r} cannot be formed by merges of lower rank")
        first = pairs.index(rank)
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts[0], parts[1]


def build_tokenizer(source: Path | None = None) -> Tokenizer:
    """Build the Qwen2.5 tokenizer: NFC, the split pattern, byte-level BPE, control tokens from 151643.

    Args:
        source: The vocabulary, see :func:`find_tiktoken_file`.

    Returns:
        A tokenizer with the ids of the official checkpoints.

    Raises:
        ConfigError: If there is no vocabulary, or it is not that of Qwen2.5.
    """
    path = find_tiktoken_file(source)
    ranks = read_ranks(path)
    alphabet = _byte_alphabet()
    spelling = {token: "".join(alphabet[byte] for byte in token) for token in ranks}
    try:
        pairs = [last_merge(token, ranks) for token in ranks if len(token) > 1]
    except ValueError as error:
        raise ConfigError(f"{path} is not a byte-pair vocabulary: {error}.") from error
    tokenizer = Tokenizer(
        BPE(
            vocab={spelling[token]: rank for token, rank in ranks.items()},
            merges=[(spelling[left], spelling[right]) for left, right in pairs],
        )
    )
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in CONTROL_TOKENS])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in PLAIN_ADDED_TOKENS])
    logger.info("tokenizer: %d tokens, %d merges, from %s", tokenizer.get_vocab_size(), len(pairs), path)
    return tokenizer


def write_tokenizer_files(out: Path, source: Path | None = None) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.json`` of the official checkpoints.

    Args:
        out: An existing folder.
        source: The vocabulary, see :func:`find_tiktoken_file`.

    Raises:
        ConfigError: If there is no vocabulary, or it is not that of Qwen2.5.
    """
    tokenizer = build_tokenizer(source)
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    write_json(out / "tokenizer_config.json", _tokenizer_config(tokenizer))
    write_json(out / "chat_template.json", {"chat_template": CHAT_TEMPLATE})


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file in the style of checkpoints: UTF-8, indented by two, keys in their own order."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    added = {
        str(token_id): {
            "content": token.content,
            "lstrip": token.lstrip,
            "normalized": token.normalized,
            "rstrip": token.rstrip,
            "single_word": token.single_word,
            "special": token.special,
        }
        for token_id, token in sorted(tokenizer.get_added_tokens_decoder().items())
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": [text for text in CONTROL_TOKENS if text != "<|endoftext|>"],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def _byte_alphabet() -> list[str]:
    """Return the character for each byte in byte-level BPE.

    Printable bytes of Latin-1 map to themselves, the others to U+0100 and up in order. Source: GPT-2
    (``encoder.py``, ``bytes_to_unicode``).
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    code_points = {byte: 0x100 + i for i, byte in enumerate(others)}
    return [chr(code_points.get(byte, byte)) for byte in range(256)]
