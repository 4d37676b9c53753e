"""Where a checkpoint describes its image processor: the same as what transformers reads from the folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2VLImageProcessorPil

from schemas.checkpoints import PROCESSOR_FILES, ImageProcessor, image_processor, processor_file
from schemas.errors import ConfigError
from schemas.qwen import IMAGE_MEAN

WHOLE, ALONE = PROCESSOR_FILES
ONE, OTHER = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]


def configuration(mean: list[float]) -> dict[str, Any]:
    config: dict[str, Any] = Qwen2VLImageProcessorPil(image_mean=mean).to_dict()
    return config


def read(folder: Path) -> ImageProcessor:
    path = processor_file(folder)
    return image_processor(path.read_bytes(), where=str(path))


@pytest.mark.parametrize(
    ("files", "mean"),
    [
        ({ALONE: configuration(ONE)}, ONE),
        ({WHOLE: {"processor_class": "Qwen2_5_VLProcessor", "image_processor": configuration(ONE)}}, ONE),
        ({WHOLE: {"image_processor": configuration(ONE)}, ALONE: configuration(OTHER)}, ONE),
        ({WHOLE: {"processor_class": "Qwen2_5_VLProcessor"}, ALONE: configuration(OTHER)}, OTHER),
    ],
)
def test_the_image_processor_is_that_of_transformers(
    tmp_path: Path, files: dict[str, dict[str, Any]], mean: list[float]
) -> None:
    """Saved by itself, inside a whole processor as transformers 5 saves it, and both."""
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    reference = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    processor = read(tmp_path)
    assert list(processor.image_mean) == list(reference.image_mean) == mean
    assert list(processor.image_std) == list(reference.image_std)
    geometry = (processor.patch_size, processor.temporal_patch_size, processor.merge_size)
    assert geometry == (reference.patch_size, reference.temporal_patch_size, reference.merge_size)


def test_omitted_settings_are_those_of_qwen(tmp_path: Path) -> None:
    (tmp_path / ALONE).write_text("{}")
    assert read(tmp_path) == ImageProcessor()
    assert read(tmp_path).image_mean == IMAGE_MEAN


def test_without_any_processor_file_the_published_name_is_expected(tmp_path: Path) -> None:
    assert processor_file(tmp_path) == tmp_path / "preprocessor_config.json"


@pytest.mark.parametrize(
    ("name", "content"),
    [(WHOLE, "{"), (WHOLE, "[]"), (ALONE, "[]"), (ALONE, '{"image_mean": [1]}'), (WHOLE, '{"image_processor": [1]}')],
)
def test_a_file_of_another_kind_is_named(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=rf"{name} is not a processor configuration: .*Give a complete checkpoint"):
        read(tmp_path)
