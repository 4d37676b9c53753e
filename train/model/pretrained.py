"""Checkpoints in the Hugging Face layout: found, compared with the shards, loaded, and written after training.

A folder or hub id -> configuration and model; a trained model -> a folder that ``from_pretrained`` loads, with
tokenizer and processor files beside the weights.

Cost: that of reading and writing the weights; ``tokenizer.json`` (7 MB) is parsed once, 0.3 s.
"""

from __future__ import annotations

import logging
import shutil
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
from storage.disk import writing

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
"""Of a file of weights that is written, as the official checkpoints have it."""

SAMPLED_BLOCKS, BLOCK_BYTES = 16, 1 << 16
"""What of a file of weights goes into its fingerprint."""

HUB_FILES = (*COMPANION_FILES, "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")


def find_checkpoint(name_or_path: str) -> Path:
    """Folder of a checkpoint; a hub id is downloaded into the cache of ``huggingface_hub`` first.

    Raises:
        ConfigError: it is neither a folder nor a model that can be downloaded.
    """
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(name_or_path, allow_patterns=list(HUB_FILES)))
    except (HfHubHTTPError, HFValidationError, EntryNotFoundError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"--model_name_or_path {name_or_path} is not a folder, and no model of that name can be had from the hub "
            f"({reason}). Give the folder of a checkpoint."
        ) from error


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelShape:
    """What the trainer needs to know of a configuration.

    Attributes:
        hidden_size: width of the language model.
        window_size: side of a window of the vision tower's attention, in pixels.
        sliding_window: tokens that a layer of the language model looks back, where one has such a limit.
    """

    hidden_size: int
    window_size: int
    sliding_window: int | None


def read_shape(folder: Path) -> ModelShape:
    """Read ``config.json`` and compare it with what the shards rely on.

    Raises:
        ConfigError: there is none, or the model is not Qwen2.5-VL with the usual geometry and control tokens.
    """
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{folder} is not the folder of a checkpoint: {reason[:300]}") from error
    if not isinstance(config, Qwen2_5_VLConfig):
        raise ConfigError(
            f"{folder} holds a model of type {config.model_type}; give a Qwen2.5-VL checkpoint (qwen2_5_vl)."
        )
    vision: Any = config.vision_config
    text: Any = config.text_config
    facts = {
        "image_token_id": (config.image_token_id, qwen.IMAGE_PAD),
        "video_token_id": (config.video_token_id, qwen.VIDEO_PAD),
        "vision_config.patch_size": (vision.patch_size, qwen.PATCH_SIZE),
        "vision_config.spatial_merge_size": (vision.spatial_merge_size, qwen.MERGE_SIZE),
        "vision_config.temporal_patch_size": (vision.temporal_patch_size, qwen.TEMPORAL_PATCH_SIZE),
        "vision_config.tokens_per_second": (vision.tokens_per_second, qwen.TOKENS_PER_SECOND),
    }
    for name, (found, expected) in facts.items():
        if found != expected:
            raise ConfigError(f"{folder / 'config.json'}: {name} is {found}, but shards are made for {expected}.")
    for part, width, heads in (
        ("text_config", text.hidden_size, text.num_attention_heads),
        ("vision_config", vision.hidden_size, vision.num_heads),
    ):
        if heads < 1 or width % heads:
            raise ConfigError(
                f"{folder / 'config.json'}: {part} has a width of {width} for {heads} heads, which does not divide. "
                "Download or export the checkpoint again."
            )
    return ModelShape(
        hidden_size=text.hidden_size,
        window_size=vision.window_size,
        sliding_window=text.sliding_window if "sliding_attention" in text.layer_types else None,
    )


def check_fingerprints(folder: Path, fingerprints: Fingerprints, *, shards: str) -> None:
    """Compare tokenizer and normalisation of a checkpoint with those that shards were made with.

    Args:
        folder: the checkpoint.
        fingerprints: of the manifest.
        shards: what to call the shards in messages.

    Raises:
        ConfigError: they differ, or the checkpoint has no tokenizer or no file that describes its processor.
    """
    remedy = f"Build the shards again with --model {folder}, or train the checkpoint that they were made for."
    path = folder / TOKENIZER_FILE
    tokenizer = qwen.tokenizer_fingerprint(_read(path), where=str(path))
    if tokenizer != fingerprints.tokenizer:
        raise ConfigError(
            f"the tokenizer of {folder} is not the one that {shards} was made with (fingerprint {tokenizer}, in the "
            f"manifest {fingerprints.tokenizer}): token ids would mean other text. {remedy}"
        )
    path = processor_file(folder)
    processor = image_processor(_read(path), where=str(path))
    for name, found, expected in (
        ("image_mean", processor.image_mean, fingerprints.image_mean),
        ("image_std", processor.image_std, fingerprints.image_std),
    ):
        if found != tuple(expected):
            raise ConfigError(
                f"{name} of {path} is {list(found)}, but {shards} was made with {list(expected)}. {remedy}"
            )


def load_model(
    folder: Path, *, dtype: torch.dtype | Literal["auto"], attn_implementation: str
) -> Qwen2_5_VLForConditionalGeneration:
    """Load the weights; under ZeRO-3 (a living ``HfDeepSpeedConfig``) each rank keeps its partition only.

    Args:
        folder: the checkpoint.
        dtype: of the weights in memory; ``auto`` is that of the checkpoint.
        attn_implementation: attention implementation.

    Raises:
        ConfigError: the weights are not exactly those of the configuration, or cannot be read.
    """
    try:
        loaded: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=dtype, attn_implementation=attn_implementation, output_loading_info=True
        )
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"the weights of {folder} cannot be loaded: {error}") from error
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ConfigError(
            f"the weights of {folder} have not the shapes that its config.json says (the report above lists them). "
            "Download or export it again."
        ) from error
    model: Qwen2_5_VLForConditionalGeneration
    model, info = loaded
    for kind, keys in info.items():
        if keys:
            shown = ", ".join(sorted(map(str, keys))[:3])
            raise ConfigError(
                f"{folder} is not a complete Qwen2.5-VL checkpoint: {len(keys)} {kind.replace('_', ' ')} ({shown}). "
                "Training would start from random weights. Download or export it again."
            )
    return model


def write_checkpoint(
    out: Path, model: Qwen2_5_VLForConditionalGeneration, state_dict: dict[str, Any], *, source: Path
) -> None:
    """Write a checkpoint that ``from_pretrained`` loads: sharded safetensors, configuration, companion files.

    It is written beside ``out`` and renamed when complete; what was at ``out`` before is replaced.

    Args:
        out: the folder to write.
        model: the model, for its configuration and the names of its weights.
        state_dict: the weights on the CPU, by their names in ``model``.
        source: checkpoint whose tokenizer and processor files are copied.

    Raises:
        VlprepError: it cannot be written.
    """
    part = out.with_name(f"{out.name}.tmp")
    # Loading under ZeRO-3 notes down renamings that it did not need; undoing them would give names that nobody knows.
    # Without the note, transformers uses the names of the official checkpoints.
    model.__dict__.pop("_weight_conversions", None)
    with writing(part):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        model.save_pretrained(part, state_dict=state_dict, max_shard_size=MAX_SHARD_SIZE)
        copy_companions(source, part)
        if out.exists():
            shutil.rmtree(out)
        part.rename(out)
    logger.info("model written to %s", out)


def copy_companions(source: Path, out: Path) -> None:
    """Copy the files of a checkpoint that training does not change."""
    for pattern in COMPANION_FILES:
        for path in sorted(source.glob(pattern)):
            shutil.copyfile(path, out / path.name)


def weights_fingerprint(folder: Path) -> str:
    """XXH3-128 over names, sizes and samples of the weights of a checkpoint.

    It tells whether frozen weights are those that a run began with. Sixteen blocks of each file are read, not all of
    it: training, however short, changes most numbers.
    """
    digest = xxhash.xxh3_128()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        with path.open("rb") as file:
            for number in range(SAMPLED_BLOCKS):
                file.seek(number * max(0, size - BLOCK_BYTES) // (SAMPLED_BLOCKS - 1))
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror}), but shards and checkpoint are compared by it. Give a complete "
            "checkpoint."
        ) from error
