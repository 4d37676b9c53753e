"""The tokenizer of a checkpoint, set up so that text never becomes a control token.

Only the tokenizer and processor files of the checkpoint are read, from a folder or by hub id. ``tokenizers`` does the
encoding, so a worker starts in a fraction of a second and needs no torch.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import msgspec
import tokenizers
from tokenizers import Encoding, Tokenizer
from tokenizers.models import BPE

from schemas.checkpoints import PROCESSOR_FILES, TOKENIZER_FILE, image_processor, processor_file
from schemas.errors import ConfigError
from schemas.manifest import Fingerprints
from schemas.qwen import (
    CONTROL_TOKENS,
    DEFAULT_MODEL,
    MERGE_SIZE,
    PATCH_SIZE,
    TEMPORAL_PATCH_SIZE,
    AddedToken,
    parse_tokenizer,
    tokenizer_fingerprint,
)

logger = logging.getLogger(__name__)

_EMPTY_MODEL: dict[str, Any] = {"type": "BPE", "vocab": {}, "merges": []}


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFiles:
    """The files of a checkpoint that a build reads, on this machine."""

    tokenizer: Path
    processor: Path


def find_model_files(model: str) -> ModelFiles:
    """Locate the tokenizer and processor files of a checkpoint folder or hub id (fetched into the hub's cache).

    Raises:
        ConfigError: the folder lacks one of them, or the hub cannot provide them.
    """
    folder = Path(model)
    if folder.is_dir():
        files = ModelFiles(tokenizer=folder / TOKENIZER_FILE, processor=processor_file(folder))
        for path in (files.tokenizer, files.processor):
            if not path.is_file():
                raise ConfigError(
                    f"--model {model} has no {path.name}; give the folder of a complete Qwen2.5-VL checkpoint or a hub "
                    "id."
                )
        return files
    if folder.is_absolute() or model.startswith((".", "~")) or model.count("/") != 1:
        raise ConfigError(f"--model {model} is neither a folder nor a hub id such as {DEFAULT_MODEL}.")
    return _fetch(model)


def _fetch(model: str) -> ModelFiles:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    from storage.hub import unreachable_reason

    processor_name, image_processor_name = PROCESSOR_FILES
    unreachable = unreachable_reason()
    download = partial(_cached if unreachable else hf_hub_download, model)
    try:
        tokenizer = Path(download(TOKENIZER_FILE))
        # The published checkpoints have only the second file.
        with suppress(EntryNotFoundError):
            download(processor_name)
        if processor_file(tokenizer.parent).name == image_processor_name:
            download(image_processor_name)
    # The hub client raises OSError for connections that fail.
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = unreachable or (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"the tokenizer of {model} cannot be fetched from the hub ({reason}). Give --model the folder of a "
            "checkpoint; `python -m train.tiny_model checkpoints/tiny` writes one with the real tokenizer, offline."
        ) from error
    return ModelFiles(tokenizer=tokenizer, processor=processor_file(tokenizer.parent))


def _cached(model: str, name: str) -> str:
    """A file in the hub's cache. The client's own look-up first asks the hub for other things.

    Raises:
        LocalEntryNotFoundError: the file is not there.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError

    path = try_to_load_from_cache(model, name)
    if not isinstance(path, str):
        raise LocalEntryNotFoundError(f"{name} is not in the hub's cache")
    return path


def read_fingerprints(files: ModelFiles) -> Fingerprints:
    """Check a checkpoint's files against :mod:`schemas.qwen` and fingerprint them for the manifest.

    Raises:
        ConfigError: they do not belong to a Qwen2.5-VL checkpoint.
    """
    where = str(files.processor)
    processor = image_processor(files.processor.read_bytes(), where=where)
    geometry = (processor.patch_size, processor.temporal_patch_size, processor.merge_size)
    expected = (PATCH_SIZE, TEMPORAL_PATCH_SIZE, MERGE_SIZE)
    if geometry != expected:
        raise ConfigError(
            f"{where} has patch, temporal patch and merge size {geometry}; Qwen2.5-VL has {expected}. "
            "Give a Qwen2.5-VL checkpoint."
        )
    return Fingerprints(
        tokenizer=tokenizer_fingerprint(files.tokenizer.read_bytes(), where=str(files.tokenizer)),
        image_mean=processor.image_mean,
        image_std=processor.image_std,
    )


class _BpeOptions(msgspec.Struct):
    """The settings of a ``model`` in ``tokenizer.json``, by the names that ``tokenizers`` gives them."""

    dropout: float | None = None
    unk_token: str | None = None
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None
    fuse_unk: bool | None = None
    byte_fallback: bool | None = None
    ignore_merges: bool | None = None


class TextTokenizer:
    """Encodes everything as ordinary text. It has no control tokens, so text that spells one stays text."""

    def __init__(self, tokenizer_json: bytes) -> None:
        parsed = parse_tokenizer(tokenizer_json)
        ordinary = [token for token in parsed.added_tokens if token.content not in CONTROL_TOKENS]
        content = msgspec.json.decode(tokenizer_json, type=dict[str, msgspec.Raw])
        options = msgspec.json.decode(content["model"], type=_BpeOptions)
        # The vocabulary enters as Python objects: writing it into JSON for `tokenizers` to parse takes twice as long.
        shell: dict[str, Any] = {**content, "added_tokens": [], "post_processor": None, "model": _EMPTY_MODEL}
        self._tokenizer = Tokenizer.from_str(msgspec.json.encode(shell).decode())
        self._tokenizer.model = BPE(
            # Added tokens that are not in the vocabulary would get new ids, from those of the control tokens on.
            vocab={**parsed.model.vocab, **{token.content: token.id for token in ordinary}},
            merges=[_pair(merge) for merge in parsed.model.merges],
            **{name: value for name, value in msgspec.structs.asdict(options).items() if value is not None},
        )
        self._tokenizer.add_tokens([_added(token) for token in ordinary])

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        """Encodings (ids and character offsets) of many texts at once."""
        return self._tokenizer.encode_batch(list(texts), add_special_tokens=False)


def _pair(merge: str | tuple[str, str]) -> tuple[str, str]:
    if isinstance(merge, tuple):
        return merge
    left, right = merge.split(" ")
    return left, right


def _added(token: AddedToken) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(
        **{name: value for name, value in msgspec.structs.asdict(token).items() if name != "id"}
    )


@lru_cache(maxsize=2)
def load_tokenizer(path: Path, fingerprint: str) -> TextTokenizer:
    """Load the tokenizer in ``path`` with this fingerprint. It is cached, since a worker uses it for all its tasks."""
    return TextTokenizer(path.read_bytes())
