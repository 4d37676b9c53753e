"""The tokenizer of a checkpoint, set up so that text never becomes a control token.

Only the tokenizer and processor files of the checkpoint are read, from a folder or by hub id. ``tokenizers`` does the
encoding, so a worker starts in a fraction of a second and needs no torch.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache, partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import msgspec
import tokenizers
from tokenizers import Encoding, Tokenizer
from tokenizers.models import BPE

from prep.samples.excerpt import Vocabulary
from prep.samples.known_tokenizers import remembered_fingerprint
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
)

logger = logging.getLogger(__name__)

_NULL = msgspec.Raw(b"null")
_MAX_SHORT_BATCHES = 3
_MAX_SHORT_CHARACTERS = 1 << 15


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
        tokenizer=remembered_fingerprint(files.tokenizer.read_bytes(), where=str(files.tokenizer)),
        image_mean=processor.image_mean,
        image_std=processor.image_std,
    )


class _Model(msgspec.Struct):
    """The ``model`` of a ``tokenizer.json``: what :mod:`prep.samples.excerpt` reads, and settings."""

    vocab: msgspec.Raw
    merges: msgspec.Raw
    dropout: float | None = None
    unk_token: str | None = None
    continuing_subword_prefix: str | None = None
    end_of_word_suffix: str | None = None
    fuse_unk: bool | None = None
    byte_fallback: bool | None = None
    ignore_merges: bool | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that are given, by the names that ``tokenizers`` has for them."""
        named = {name: getattr(self, name) for name in self.__struct_fields__ if name not in ("vocab", "merges")}
        return {name: value for name, value in named.items() if value is not None}

    @property
    def has_special_rules(self) -> bool:
        """Whether a word may become other tokens than pieces of it that merges have joined."""
        return any(value for name, value in self.settings.items() if name != "ignore_merges")


class _TokenizerFile(msgspec.Struct):
    """A ``tokenizer.json`` of which only the added tokens and the settings of the model are decoded."""

    model: _Model
    added_tokens: list[AddedToken]
    truncation: msgspec.Raw = _NULL
    padding: msgspec.Raw = _NULL
    normalizer: msgspec.Raw = _NULL
    pre_tokenizer: msgspec.Raw = _NULL
    decoder: msgspec.Raw = _NULL

    def shell(self) -> str:
        """The file without tokens, and without the post-processor, which adds control tokens."""
        parts = {name: getattr(self, name) for name in self.__struct_fields__}
        empty: dict[str, Any] = {"type": "BPE", "vocab": {}, "merges": []}
        replaced: dict[str, Any] = {"version": "1.0", "added_tokens": [], "post_processor": None, "model": empty}
        return msgspec.json.encode({**parts, **replaced}).decode()


class TextTokenizer:
    """Encodes everything as ordinary text. It has no control tokens, so text that spells one stays text.

    ``tokenizers`` takes a tenth of a second to take over all tokens and merges. The first few short batches are encoded
    with those alone that are pieces of their words, which gives the same ids.
    """

    def __init__(self, tokenizer_json: bytes) -> None:
        self._json = tokenizer_json
        self._file = msgspec.json.decode(tokenizer_json, type=_TokenizerFile)
        ordinary = [token for token in self._file.added_tokens if token.content not in CONTROL_TOKENS]
        # Added tokens that are not in the vocabulary would get new ids, from those of the control tokens on.
        self._added_ids = {token.content: token.id for token in ordinary}
        # The vocabulary enters as Python objects: writing it into JSON for `tokenizers` to parse takes twice as long.
        self._tokenizer = Tokenizer.from_str(self._file.shell())
        self._set_model({}, [])
        self._tokenizer.add_tokens([_added(token) for token in ordinary])
        self._is_complete = False
        self._short_batches_left = _MAX_SHORT_BATCHES

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        """Encodings (ids and character offsets) of many texts at once."""
        if not self._is_complete and not self._prepare_for(texts):
            self.complete()
        return self._encode(texts)

    def complete(self) -> None:
        """Take over all tokens and merges, which makes it fit for any amount of text."""
        if not self._is_complete:
            model = parse_tokenizer(self._json).model
            self._set_model(model.vocab, [_pair(merge) for merge in model.merges])
            self._is_complete = True

    def _prepare_for(self, texts: Sequence[str]) -> bool:
        """Take over what these texts need; returns False if another batch, or so long a one, is worth all of it."""
        self._short_batches_left -= 1
        is_short = self._short_batches_left >= 0 and sum(map(len, texts)) <= _MAX_SHORT_CHARACTERS
        if not is_short or self._file.model.has_special_rules:
            return False
        vocabulary = Vocabulary(bytes(self._file.model.vocab), bytes(self._file.model.merges))
        if not vocabulary.is_canonical:
            return False
        characters = vocabulary.characters()
        self._set_model(characters, [])
        excerpt = vocabulary.excerpt({word for encoding in self._encode(texts) for word in _words(encoding)})
        if excerpt is None:
            return False
        tokens, merges = excerpt
        self._set_model({**characters, **tokens}, merges)
        return True

    def _set_model(self, vocab: Mapping[str, int], merges: list[tuple[str, str]]) -> None:
        self._tokenizer.model = BPE(vocab={**vocab, **self._added_ids}, merges=merges, **self._file.model.settings)

    def _encode(self, texts: Sequence[str]) -> list[Encoding]:
        return self._tokenizer.encode_batch(list(texts), add_special_tokens=False)


def _words(encoding: Encoding) -> Iterator[str]:
    """What a text is split into before merging, from an encoding into characters."""
    for _, tokens in itertools.groupby(zip(encoding.word_ids, encoding.tokens), key=itemgetter(0)):
        yield "".join(token for _, token in tokens)


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
