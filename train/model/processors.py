"""Processor files of a trained model: inference then resizes and samples media as the shards were made.

Manifests of the shards -> :class:`ShardMedia`; with it, the processor files of the base checkpoint -> those of the
trained one. transformers, and what reads its files, takes bounds of pixels and frame rates from them.

Whether the processor samples frames at all (``do_sample_frames``) stays as it is: callers that pass sampled frames rely
on it. The one of transformers samples at equal steps from the start of a video. Builds spread frames from the first one
to the last one. So their number is that of training, and their times differ by less than a step.

Cost: a few JSON files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from schemas.checkpoints import PROCESSOR_FILES
from schemas.errors import ConfigError
from schemas.manifest import DatasetStatistics, Manifest
from schemas.settings import TOKEN_PIXELS, MediaSettings

PROCESSOR_FILE, IMAGE_FILE = PROCESSOR_FILES
VIDEO_FILE = "video_preprocessor_config.json"

BUDGET_SHARE = 0.9
"""Share of ``max_video_tokens`` that the video processor of transformers spends on a video."""

VIDEO_PROCESSOR = "Qwen2VLVideoProcessor"

Values = dict[str, Any]
"""Values of a processor's configuration by key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardMedia:
    """Settings that the images and videos of shards were made with.

    Attributes:
        image: of the images; None if there are none.
        video: of the videos; None if there are none.
        mixed: what differs between datasets, a sentence for each kind of medium.
    """

    image: MediaSettings | None
    video: MediaSettings | None
    mixed: tuple[str, ...] = ()


def shard_media(manifests: Sequence[Manifest]) -> ShardMedia:
    """Collect the media settings of shards. If datasets differ, the one with the most samples of a kind counts."""
    image, image_note = _commonest(manifests, "image", image_values)
    video, video_note = _commonest(manifests, "video", video_values)
    return ShardMedia(image=image, video=video, mixed=tuple(filter(None, (image_note, video_note))))


def image_values(settings: MediaSettings) -> Values:
    """What an image processor needs to resize as these settings do."""
    return {"min_pixels": settings.min_pixels, "max_pixels": settings.max_pixels}


def video_values(settings: MediaSettings) -> Values:
    """What a video processor needs to sample as many frames, and resize them, as these settings do."""
    by_rate = settings.video_sampling == "fps"
    values: Values = {
        "min_pixels": settings.video_min_frame_pixels,
        "max_pixels": settings.video_max_frame_pixels,
        "fps": settings.fps if by_rate else 1 / settings.base_interval,
        "min_frames": settings.fps_min_frames if by_rate else settings.video_min_frames,
        "max_frames": settings.fps_max_frames if by_rate else settings.video_max_frames,
        "cap_pixels_per_frame": settings.video_total_pixels is not None,
    }
    if settings.video_total_pixels is not None:
        values["max_video_tokens"] = round(settings.video_total_pixels / TOKEN_PIXELS / BUDGET_SHARE)
    return values


def write_processors(folder: Path, media: ShardMedia) -> None:
    """Set the processor files of a checkpoint to what its shards were made with.

    Args:
        folder: a checkpoint with the processor files of its base, which are edited.
        media: of the shards.

    Raises:
        ConfigError: a file is not a JSON object.
    """
    for name, contents in _with_settings(*_read_all(folder), media).items():
        (folder / name).write_text(json.dumps(contents, indent=2) + "\n")


def compare_processors(source: Path, media: ShardMedia) -> list[str]:
    """How the processors of a trained model differ from those of its base checkpoint, in sentences.

    Raises:
        ConfigError: a file is not a JSON object.
    """
    nested, image, video = _read_all(source)
    notes = list(media.mixed)
    if media.image is not None:
        notes += _differences("images", nested.get("image_processor") or image, image_values(media.image))
    if media.video is not None:
        # Without a file for videos, transformers takes that of images.
        notes += _differences("videos", nested.get("video_processor") or video or image, video_values(media.video))
    return notes


def _with_settings(nested: Values, image: Values, video: Values, media: ShardMedia) -> dict[str, Values]:
    """Contents of the processor files of a trained model by name, from those of its base."""
    files: dict[str, Values] = {}
    if media.image is not None:
        values = image_values(media.image)
        files[IMAGE_FILE] = _updated(image, values)
        if "image_processor" in nested:
            nested["image_processor"] = _updated(nested["image_processor"], values)
    if media.video is not None:
        values = video_values(media.video)
        as_video = {name: value for name, value in image.items() if name != "image_processor_type"}
        files[VIDEO_FILE] = _updated(video or {**as_video, "video_processor_type": VIDEO_PROCESSOR}, values)
        if "video_processor" in nested:
            nested["video_processor"] = _updated(nested["video_processor"], values)
    return {**files, **({PROCESSOR_FILE: nested} if nested else {})}


def _commonest(
    manifests: Iterable[Manifest], kind: str, to_values: Callable[[MediaSettings], Values]
) -> tuple[MediaSettings | None, str]:
    """The settings of the most samples with a kind of medium, and a sentence if others have other values."""
    counts: list[tuple[int, str, MediaSettings]] = []
    for manifest in manifests:
        statistics = {dataset.dataset: dataset for dataset in manifest.statistics}
        total = manifest.counts.num_images if kind == "image" else manifest.counts.num_videos
        for dataset in manifest.inputs:
            count = _count(statistics.get(dataset.dataset), kind, default=total)
            counts += [(count, dataset.dataset, dataset.media)] if count else []
    if not counts:
        return None, ""
    _, name, settings = max(counts, key=lambda item: item[0])
    usual = to_values(settings)
    others = sorted(
        {f"{other} ({_changes(usual, to_values(media))})" for _, other, media in counts if to_values(media) != usual}
    )
    note = f"{kind}s of {', '.join(others)} were made with other settings than those of {name}, which has the most"
    return settings, note if others else ""


def _changes(usual: Values, values: Values) -> str:
    """The values that differ: ``max_pixels 1003520, not 451584``."""
    return ", ".join(
        f"{name} {value}, not {usual.get(name)}" for name, value in values.items() if value != usual.get(name)
    )


def _count(statistics: DatasetStatistics | None, kind: str, *, default: int) -> int:
    """Packed samples of a dataset with a kind of medium."""
    if statistics is None:
        return default
    return sum(count for modality, count in statistics.modalities.items() if kind in modality.split("+"))


def _read_all(folder: Path) -> tuple[Values, Values, Values]:
    """Contents of the processor files: of all processors, of images, of videos. Empty if a file does not exist."""
    nested, image, video = (_read(folder / name) for name in (PROCESSOR_FILE, IMAGE_FILE, VIDEO_FILE))
    return nested, image or nested.get("image_processor", {}), video


def _read(path: Path) -> Values:
    try:
        contents = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}. Use a complete checkpoint.") from error
    if not isinstance(contents, dict):
        raise ConfigError(f"{path} is not a JSON object. Use a complete checkpoint.")
    return contents


def _updated(contents: Values, values: Values) -> Values:
    """A configuration with other values. ``size`` is a second name of the bounds of pixels."""
    updated = {**contents, **values}
    if "size" in updated:
        updated["size"] = {"shortest_edge": values["min_pixels"], "longest_edge": values["max_pixels"]}
    if "fps" in values:
        updated.pop("num_frames", None)  # says the same in another way
    return updated


def _differences(what: str, before: Values, values: Values) -> list[str]:
    size = before.get("size") or {}
    bounds = {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge")}
    known = {**bounds, **before}
    changed = [
        f"{name} {value} (base: {'not set' if known.get(name) is None else known[name]})"
        for name, value in values.items()
        if known.get(name) != value
    ]
    return [f"{what} are processed as for the shards: {', '.join(changed)}"] if changed else []
