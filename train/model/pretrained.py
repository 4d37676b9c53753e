"""Checkpoints in the Hugging Face layout: finding, comparing with the shards, loading, and writing them.

A folder or hub id -> configuration and model; a trained model -> a folder that ``from_pretrained`` loads, with
tokenizer and processor files beside the weights.

Cost: reading and writing the weights; ``tokenizer.json`` (7 MB) is parsed once, 0.3 s.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import xxhash
from huggingface_hub import snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from schemas import qwen
from schemas.checkpoints import TOKENIZER_FILE, image_processor, processor_file
from schemas.errors import ConfigError
from schemas.manifest import Fingerprints
from storage.hub import unreachable_reason
from train.model.disk import writing
from train.model.processors import ShardMedia, write_processors

logger = logging.getLogger(__name__)

COMPANION_FILES = (
    "tokenizer*.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.*",
    "*processor_config.json",
)
"""Files of a checkpoint that training does not change: tokenizer, chat template, processor."""

MAX_SHARD_SIZE = "5GB"
"""Largest weights file written, as in the official checkpoints."""

SAMPLED_BLOCKS, BLOCK_BYTES = 16, 1 << 16
"""How much of a weights file its fingerprint covers."""

HUB_FILES = (*COMPANION_FILES, "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")


def find_checkpoint(name_or_path: str, *, flag: str = "--model_name_or_path") -> Path:
    """Return the folder of a checkpoint, downloading a hub id into the cache of ``huggingface_hub`` first.

    Args:
        name_or_path: the folder or hub id.
        flag: how messages name the option that gives it.

    Raises:
        ConfigError: the name is neither a folder nor a model that can be downloaded.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder
    unreachable = unreachable_reason()
    try:
        return Path(
            snapshot_download(name_or_path, allow_patterns=list(HUB_FILES), local_files_only=unreachable is not None)
        )
    except (HfHubHTTPError, HFValidationError, EntryNotFoundError, OSError) as error:
        reason = unreachable or str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"{flag} {name_or_path} is not a folder, and could not be downloaded from the hub "
            f"({reason}). Pass the folder of a checkpoint; `python -m train.tiny_model checkpoints/tiny` writes a tiny "
            "one for trials, offline."
        ) from error


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """What the trainer needs to know of a model configuration.

    Attributes:
        hidden_size: width of the language model.
        window_size: side of an attention window of the vision tower, in pixels.
        sliding_window: tokens of the sliding attention window of the language model; None if it has none.
    """

    hidden_size: int
    window_size: int
    sliding_window: int | None


def read_shape(folder: Path) -> ModelShape:
    """Read ``config.json`` and compare it with the assumptions of the shards.

    Raises:
        ConfigError: the file is missing, or the model is not Qwen2.5-VL with the expected geometry and control tokens.
    """
    if not (folder / "config.json").is_file():
        raise ConfigError(
            f"{folder} is not a checkpoint folder: it has no config.json. Pass the folder of a checkpoint."
        )
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{folder} is not a checkpoint folder: {reason[:300]}") from error
    if not isinstance(config, Qwen2_5_VLConfig):
        raise ConfigError(
            f"{folder} holds a model of type {config.model_type}; use a Qwen2.5-VL checkpoint (qwen2_5_vl)."
        )
    _check_geometry(folder / "config.json", config)
    text: Any = config.text_config
    vision: Any = config.vision_config
    return ModelShape(
        hidden_size=text.hidden_size,
        window_size=vision.window_size,
        sliding_window=text.sliding_window if "sliding_attention" in text.layer_types else None,
    )


def _check_geometry(path: Path, config: Qwen2_5_VLConfig) -> None:
    vision: Any = config.vision_config
    text: Any = config.text_config
    required = {
        "image_token_id": (config.image_token_id, qwen.IMAGE_PAD),
        "video_token_id": (config.video_token_id, qwen.VIDEO_PAD),
        "vision_config.patch_size": (vision.patch_size, qwen.PATCH_SIZE),
        "vision_config.spatial_merge_size": (vision.spatial_merge_size, qwen.MERGE_SIZE),
        "vision_config.temporal_patch_size": (vision.temporal_patch_size, qwen.TEMPORAL_PATCH_SIZE),
        "vision_config.tokens_per_second": (vision.tokens_per_second, qwen.TOKENS_PER_SECOND),
    }
    for name, (value, expected) in required.items():
        if value != expected:
            raise ConfigError(f"{path}: {name} is {value}, but shards require {expected}. Use a Qwen2.5-VL checkpoint.")
    for part, width, heads in (
        ("text_config", text.hidden_size, text.num_attention_heads),
        ("vision_config", vision.hidden_size, vision.num_heads),
    ):
        if heads < 1 or width % heads:
            raise ConfigError(
                f"{path}: {part} has a width of {width}, which is not divisible by its {heads} heads. "
                "Download or export the checkpoint again."
            )


def check_fingerprints(folder: Path, fingerprints: Fingerprints, *, shards: str) -> None:
    """Compare the tokenizer and image normalisation of a checkpoint with those of the shards.

    Args:
        folder: the checkpoint.
        fingerprints: fingerprints in the manifest.
        shards: name of the shards in messages.

    Raises:
        ConfigError: they differ, or the checkpoint has no tokenizer or no processor configuration.
    """
    remedy = f"Build the shards again with --model {folder}, or train the checkpoint that they were built for."
    path = folder / TOKENIZER_FILE
    tokenizer = qwen.tokenizer_fingerprint(_read(path), where=str(path))
    if tokenizer != fingerprints.tokenizer:
        raise ConfigError(
            f"the tokenizer of {folder} differs from the one that {shards} was built with (fingerprint {tokenizer}, "
            f"manifest {fingerprints.tokenizer}), so token ids would mean other text. {remedy}"
        )
    path = processor_file(folder)
    processor = image_processor(_read(path), where=str(path))
    for name, value, expected in (
        ("image_mean", processor.image_mean, fingerprints.image_mean),
        ("image_std", processor.image_std, fingerprints.image_std),
    ):
        if value != tuple(expected):
            raise ConfigError(
                f"{name} of {path} is {list(value)}, but {shards} was built with {list(expected)}. {remedy}"
            )


def load_model(
    folder: Path, *, dtype: torch.dtype | Literal["auto"], attn_implementation: str
) -> Qwen2_5_VLForConditionalGeneration:
    """Load the weights; under ZeRO-3 (while an ``HfDeepSpeedConfig`` is alive) each rank keeps its partition only.

    Args:
        folder: the checkpoint.
        dtype: dtype of the weights in memory; ``auto`` keeps that of the checkpoint.
        attn_implementation: attention implementation.

    Raises:
        ConfigError: the weights cannot be read, or do not match the configuration exactly.
    """
    try:
        loaded: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, attn_implementation=attn_implementation, output_loading_info=True
        )
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"cannot load the weights of {folder}: {error}") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ConfigError(
            f"{folder}: weight shapes do not match config.json (the report above lists them). Download or export the "
            "checkpoint again."
        ) from error
    model: Qwen2_5_VLForConditionalGeneration
    model, info = loaded
    for kind, keys in info.items():
        if keys:
            shown = ", ".join(sorted(map(str, keys))[:3])
            raise ConfigError(
                f"{folder} is not a complete Qwen2.5-VL checkpoint: {len(keys)} {kind.replace('_', ' ')} ({shown}). "
                "Training would start from random weights. Download or export the checkpoint again."
            )
    return model


def write_checkpoint(
    out: Path,
    model: Qwen2_5_VLForConditionalGeneration,
    state_dict: dict[str, Any],
    *,
    source: Path,
    media: ShardMedia | None = None,
) -> None:
    """Write a checkpoint that ``from_pretrained`` loads: sharded safetensors, configuration, companion files.

    Args:
        out: the folder to write. Its previous contents are replaced once the new ones are complete.
        model: the model, for its configuration and the names of its weights.
        state_dict: the weights on the CPU, by their names in ``model``.
        source: checkpoint whose tokenizer and processor files are copied.
        media: settings to write into the processor files; None keeps those of ``source``.

    Raises:
        VlprepError: the folder cannot be written.
    """
    # Loading under ZeRO-3 records renamings that it did not perform, and saving would undo them into unknown names.
    # Without the record, transformers writes the names of the official checkpoints.
    model.__dict__.pop("_weight_conversions", None)
    with replacing(out) as folder:
        model.save_pretrained(folder, state_dict=state_dict, max_shard_size=MAX_SHARD_SIZE)
        copy_companions(source, folder, media)
    logger.info("model written to %s", out)


@contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``out`` that replaces it once the block completes.

    Raises:
        VlprepError: the folder cannot be written.
    """
    folder = out.with_name(f"{out.name}.tmp")
    with writing(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        yield folder
        if out.exists():
            shutil.rmtree(out)
        folder.rename(out)


def copy_companions(source: Path, out: Path, media: ShardMedia | None = None) -> None:
    """Copy the files of a checkpoint that training does not change, and set what its processors do.

    Args:
        source: the checkpoint.
        out: folder to copy to.
        media: settings to write into the processor files; None keeps those of ``source``.
    """
    for pattern in COMPANION_FILES:
        for path in sorted(source.glob(pattern)):
            shutil.copyfile(path, out / path.name)
    if media is not None:
        write_processors(out, media)


def weights_fingerprint(folder: Path) -> str:
    """Hash the names, sizes and some blocks of the weights files of a checkpoint with XXH3-128.

    The fingerprint shows whether frozen weights are those that a run started with. Sixteen blocks per file suffice,
    because even short training changes most weights.
    """
    digest = xxhash.xxh3_128()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            for block in range(SAMPLED_BLOCKS):
                file.seek(block * max(0, size - BLOCK_BYTES) // (SAMPLED_BLOCKS - 1))
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"cannot read {path} ({error.strerror}), which is needed to compare the checkpoint with the shards. Use a "
            "complete checkpoint."
        ) from error
