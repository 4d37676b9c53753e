"""Remembers the fingerprints of tokenizer files in the user's cache folder.

Input: the bytes of a ``tokenizer.json``. Output: its fingerprint, as :func:`schemas.qwen.tokenizer_fingerprint` gives
it. Cost: a SHA-256 of the file, 3 ms, instead of a fifth of a second for parsing and sorting. An entry is named after
that SHA-256, so it cannot be outdated. Without a folder to write to, every command computes the fingerprint.
"""

from __future__ import annotations

import hashlib
import re
from contextlib import suppress
from pathlib import Path

from schemas.qwen import tokenizer_fingerprint
from storage.files import temporary_path, user_cache

_VERSION = 1
"""Part of every name. Increase it when the same file gets another fingerprint, or is refused."""

_FINGERPRINT = re.compile(r"[0-9a-f]{32}")


def remembered_fingerprint(tokenizer_json: bytes, *, where: str) -> str:
    """The fingerprint of a tokenizer, from the cache or computed and added to it.

    Args:
        tokenizer_json: contents of ``tokenizer.json``.
        where: what to call the file in messages.

    Raises:
        ConfigError: the file is not a tokenizer of Qwen2.5-VL.
    """
    name = f"{hashlib.sha256(tokenizer_json).hexdigest()}-{_VERSION}"
    # RuntimeError: there is no home folder.
    with suppress(OSError, RuntimeError, UnicodeDecodeError):
        known = (user_cache() / "tokenizers" / name).read_text()
        if _FINGERPRINT.fullmatch(known):
            return known
    fingerprint = tokenizer_fingerprint(tokenizer_json, where=where)
    with suppress(OSError, RuntimeError):
        _remember(user_cache() / "tokenizers" / name, fingerprint)
    return fingerprint


def _remember(path: Path, fingerprint: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        temporary.write_text(fingerprint)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
