"""The processor files of a trained model resize and sample media as its shards were made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from transformers import Qwen2VLImageProcessorPil

from schemas.errors import ConfigError
from schemas.manifest import DatasetStatistics, Manifest
from schemas.settings import MediaSettings
from storage.shard_set import read_manifest
from tests.train.synthetic import make_bins, write_shards
from train.model.processors import ShardMedia, compare_processors, shard_media, video_values, write_processors

BASE = {
    "min_pixels": 3136,
    "max_pixels": 12845056,
    "patch_size": 14,
    "image_mean": [0.48, 0.45, 0.4],
    "image_processor_type": "Qwen2VLImageProcessor",
}
MEDIA = MediaSettings(min_pixels=784, max_pixels=7840, video_min_frame_pixels=1568, video_max_frame_pixels=15680)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A folder with the processor file of the published checkpoints."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(BASE))
    return tmp_path


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Of one dataset with images and videos."""
    return read_manifest(write_shards(tmp_path_factory.mktemp("processors"), make_bins(num_bins=4)))


def read(folder: Path, name: str) -> dict[str, Any]:
    contents: dict[str, Any] = json.loads((folder / f"{name}.json").read_bytes())
    return contents


def test_bounds_and_rates_are_those_of_the_shards_and_the_rest_is_kept(base: Path) -> None:
    write_processors(base, ShardMedia(image=MEDIA, video=MEDIA))
    assert read(base, "preprocessor_config") == {**BASE, "min_pixels": 784, "max_pixels": 7840}
    assert read(base, "video_preprocessor_config") == {
        "min_pixels": 1568,
        "max_pixels": 15680,
        "patch_size": 14,
        "image_mean": [0.48, 0.45, 0.4],
        "video_processor_type": "Qwen2VLVideoProcessor",
        "fps": 0.25,
        "min_frames": 4,
        "max_frames": 8,
        "cap_pixels_per_frame": False,
    }
    assert not (base / "processor_config.json").exists()


def test_transformers_resizes_with_the_bounds_of_the_file(base: Path) -> None:
    write_processors(base, ShardMedia(image=MEDIA, video=None))
    processor = Qwen2VLImageProcessorPil.from_pretrained(base)
    assert (processor.size["shortest_edge"], processor.size["longest_edge"]) == (784, 7840)
    assert not (base / "video_preprocessor_config.json").exists(), "no video was trained"


def test_frames_at_a_rate_and_a_bound_on_a_video_as_a_whole() -> None:
    media = MediaSettings(video_sampling="fps", fps=1.5, fps_max_frames=32, video_total_pixels=90 * 784)
    values = video_values(media)
    assert (values["fps"], values["min_frames"], values["max_frames"]) == (1.5, 4, 32)
    assert (values["cap_pixels_per_frame"], values["max_video_tokens"]) == (True, 100), "90 % of 100 tokens"


def test_a_processor_file_of_transformers_5_is_edited_inside(base: Path) -> None:
    size = {"shortest_edge": 3136, "longest_edge": 12845056}
    nested = {"image_processor": {"size": size, "merge_size": 2}, "video_processor": {"size": size, "num_frames": 16}}
    (base / "preprocessor_config.json").unlink()
    (base / "processor_config.json").write_text(json.dumps({**nested, "processor_class": "Qwen2_5_VLProcessor"}))
    write_processors(base, ShardMedia(image=MEDIA, video=MEDIA))
    processor = read(base, "processor_config")
    bounds = {"shortest_edge": 784, "longest_edge": 7840}
    assert processor["image_processor"] == {"size": bounds, "merge_size": 2, "min_pixels": 784, "max_pixels": 7840}
    assert processor["video_processor"]["size"] == {"shortest_edge": 1568, "longest_edge": 15680}
    assert processor["video_processor"]["fps"] == 0.25
    assert "num_frames" not in processor["video_processor"], "a number of frames excludes a rate"
    assert processor["processor_class"] == "Qwen2_5_VLProcessor"


def test_differences_from_the_base_checkpoint_are_named(base: Path) -> None:
    (note,) = compare_processors(base, ShardMedia(image=MEDIA, video=None))
    expected = "min_pixels 784 (base: 3136), max_pixels 7840 (base: 12845056)"
    assert note == f"images are processed as for the shards: {expected}"
    (note,) = compare_processors(base, ShardMedia(image=None, video=MEDIA))
    assert note.startswith("videos are ") and "max_frames 8 (base: not set)" in note and "None" not in note
    write_processors(base, ShardMedia(image=MEDIA, video=MEDIA))
    assert compare_processors(base, ShardMedia(image=MEDIA, video=MEDIA)) == []


def test_a_damaged_file_is_named_before_anything_is_trained(base: Path) -> None:
    (base / "video_preprocessor_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"video_preprocessor_config\.json is not valid JSON"):
        compare_processors(base, ShardMedia(image=MEDIA, video=MEDIA))


def test_the_media_settings_of_shards_are_read_from_their_manifest(manifest: Manifest) -> None:
    media = shard_media([manifest])
    assert media == ShardMedia(image=MediaSettings(), video=MediaSettings())
    without_videos = msgspec.structs.replace(manifest, counts=msgspec.structs.replace(manifest.counts, num_videos=0))
    assert shard_media([without_videos]).video is None


def test_of_datasets_that_differ_the_one_with_the_most_samples_of_a_kind_counts(manifest: Manifest) -> None:
    (dataset,) = manifest.inputs
    inputs = [
        msgspec.structs.replace(dataset, dataset=name, media=media)
        for name, media in (("few", MediaSettings()), ("many", MEDIA))
    ]
    statistics = [
        DatasetStatistics(
            dataset=name,
            num_annotations=count,
            num_packed=count,
            num_rejected=0,
            num_not_sampled=0,
            rejects_by_code={},
            modalities=modalities,
            tokens=None,
            targets=None,
            patches=None,
        )
        for name, count, modalities in (
            ("few", 50, {"image": 3, "text": 40, "video": 7}),
            ("many", 8, {"image": 2, "image+video": 6}),
        )
    ]
    media = shard_media([msgspec.structs.replace(manifest, inputs=inputs, statistics=statistics)])
    assert media.image == MEDIA
    assert media.video == MediaSettings()
    assert media.mixed == (
        "images of few (min_pixels 12544, not 784, max_pixels 451584, not 7840) were made with other settings than "
        "those of many, which has the most",
        "videos of many (min_pixels 1568, not 200704, max_pixels 15680, not 1304576) were made with other settings "
        "than those of few, which has the most",
    )
