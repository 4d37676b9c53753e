"""The real ``qwen_vl_utils``, with a stand-in for torchvision, which no test needs: sizes and frames are arithmetic."""

from __future__ import annotations

import sys
from functools import cache
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch


class _Resized:
    """What ``transforms.functional.resize`` would return, of which only the size is used."""

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def float(self) -> _Resized:
        return self


@cache
def qwen_vl_utils() -> Any:
    """The module ``qwen_vl_utils.vision_process``."""
    torchvision, transforms = ModuleType("torchvision"), ModuleType("torchvision.transforms")
    stand_in: Any = torchvision
    stand_in.io, stand_in.transforms = ModuleType("torchvision.io"), transforms
    stand_in.transforms.InterpolationMode = SimpleNamespace(BICUBIC="bicubic")
    stand_in.transforms.functional = SimpleNamespace(resize=lambda video, size, **_: _Resized(tuple(size)))
    modules = {"torchvision": torchvision, "torchvision.io": stand_in.io, "torchvision.transforms": transforms}
    with patch.dict(sys.modules, modules):
        return import_module("qwen_vl_utils.vision_process")


def resized_frames(element: dict[str, Any], num_frames: int, height: int, width: int) -> tuple[int, int]:
    """Height and width that ``fetch_video`` resizes ``num_frames`` frames of a video to."""
    module = qwen_vl_utils()
    frames = SimpleNamespace(shape=(num_frames, 3, height, width))
    readers = {"frames": lambda _: (frames, {}, 2.0)}
    with (
        patch.object(module, "VIDEO_READER_BACKENDS", readers),
        patch.object(module, "get_video_reader_backend", lambda: "frames"),
    ):
        size: tuple[int, int] = module.fetch_video({"video": "x", **element}).size
    return size


def sampled_video(element: dict[str, Any]) -> tuple[list[int], float, tuple[int, int]]:
    """Indices, sampled frames a second and resized height and width that ``fetch_video`` gives with decord."""
    module = qwen_vl_utils()
    with patch.object(module, "get_video_reader_backend", lambda: "decord"):
        (resized, metadata), fps = module.fetch_video(element, return_video_sample_fps=True, return_video_metadata=True)
    return metadata["frames_indices"], fps, resized.size
