"""JSON files of a checkpoint: its ``config.json``, and its image processor, in either of its files.

transformers 5 saves a processor as ``processor_config.json``, with the image processor inside; the published
checkpoints, and image processors saved by themselves, have ``preprocessor_config.json``. If both exist, the first
one counts, as in transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from schemas.errors import ConfigError
from schemas.qwen import IMAGE_MEAN, IMAGE_STD, MERGE_SIZE, PATCH_SIZE, TEMPORAL_PATCH_SIZE

_T = TypeVar("_T")

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "config.json"
PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


class ImageProcessor(msgspec.Struct, kw_only=True, frozen=True):
    """The parts of an image processor's configuration that shards depend on; what is left out is Qwen2.5-VL's."""

    image_mean: tuple[float, float, float] = IMAGE_MEAN
    image_std: tuple[float, float, float] = IMAGE_STD
    patch_size: int = PATCH_SIZE
    temporal_patch_size: int = TEMPORAL_PATCH_SIZE
    merge_size: int = MERGE_SIZE


class _ProcessorFile(msgspec.Struct):
    image_processor: ImageProcessor | None = None


def read_config(folder: Path) -> dict[str, Any]:
    """Contents of the ``config.json`` of a checkpoint.

    Raises:
        ConfigError: the file is missing, unreadable or not a JSON object.
    """
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}. Give the folder of a complete checkpoint.") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} is not a JSON object. Give the folder of a complete checkpoint.")
    return config


def processor_file(folder: Path) -> Path:
    """The file in a folder that describes the image processor; ``preprocessor_config.json`` where there is none.

    Raises:
        ConfigError: ``processor_config.json`` is none.
    """
    processor, alone = (folder / name for name in PROCESSOR_FILES)
    if (
        processor.is_file()
        and _decode(processor.read_bytes(), _ProcessorFile, str(processor)).image_processor is not None
    ):
        return processor
    return alone


def image_processor(data: bytes, *, where: str) -> ImageProcessor:
    """Decode the contents of one of :data:`PROCESSOR_FILES`.

    Args:
        data: contents of the file.
        where: what to call it in messages.

    Raises:
        ConfigError: it is not a processor's configuration.
    """
    inside = _decode(data, _ProcessorFile, where).image_processor
    return inside or _decode(data, ImageProcessor, where)


def _decode(data: bytes, kind: type[_T], where: str) -> _T:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{where} is not a processor configuration: {error}. Give a complete checkpoint.") from error
