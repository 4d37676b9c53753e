"""What a checkpoint says of its image processor, wherever the file is that says so.

transformers 5 saves a processor as ``processor_config.json``, with the image processor inside; the published
checkpoints, and image processors saved by themselves, have ``preprocessor_config.json``. Where both are there, the
first counts, as it does for transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from schemas.errors import ConfigError
from schemas.qwen import IMAGE_MEAN, IMAGE_STD, MERGE_SIZE, PATCH_SIZE, TEMPORAL_PATCH_SIZE

_T = TypeVar("_T")

TOKENIZER_FILE = "tokenizer.json"
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


def processor_file(folder: Path) -> Path:
    """The file in a folder that describes the image processor; ``preprocessor_config.json`` where there is none.

    Raises:
        ConfigError: ``processor_config.json`` is none.
    """
    whole, alone = (folder / name for name in PROCESSOR_FILES)
    if whole.is_file() and _decode(whole.read_bytes(), _ProcessorFile, str(whole)).image_processor is not None:
        return whole
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
