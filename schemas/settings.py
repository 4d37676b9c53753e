"""The settings of a build: an immutable value, checked when it is made and recorded in the manifest.

Defaults are those of the upstream fine-tuning framework. Pixels are counted per image or per video frame. One token of
an image stands for 28 x 28 pixels.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from schemas.bounds import MAX_INT32, MAX_LENGTH
from schemas.codecs import CODECS, DEFAULT_JPEG_QUALITY, JPEG_QUALITIES
from schemas.errors import ConfigError
from schemas.setting import Setting, check_settings

TOKEN_PIXELS = 28 * 28
MAX_FRAMES = 1 << 20
MAX_SECONDS = 1_000_000
MAX_SOURCE_PIXELS = 1 << 40
MAX_SOURCE_BYTES = 1 << 50
"""Upper bounds of settings, far above any use: a manifest beyond them is not one that vlprep wrote."""

PACKERS = ("bfd", "binpacking")
RESERVED_POLICIES = ("reject", "escape")
OVERLONG_POLICIES = ("reject", "shrink")
VIDEO_SAMPLINGS = ("interval", "fps")
BOX_COORDINATES = ("pixels", "norm1", "norm1000", "resized", "off")
"""What the coordinates of boxes and points can be: pixels of the original image as displayed, shares of it from 0 to 1,
the same from 0 to 1000, pixels of the resized image, or nothing (text that only looks like boxes)."""

_FIX = " Change it on the command line."
_FIX_MEDIA = " Change it on the command line or in datasets.toml."


def _spell(name: str) -> str:
    return f"setting {name}"


class MediaSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How images and videos become pixels. A dataset can override each field in ``datasets.toml``."""

    min_pixels: Annotated[
        int, Setting("Images with fewer pixels are enlarged.", unit="pixels", low=TOKEN_PIXELS, high=MAX_INT32)
    ] = 16 * TOKEN_PIXELS
    max_pixels: Annotated[
        int, Setting("Images with more pixels are reduced.", unit="pixels", low=TOKEN_PIXELS, high=MAX_INT32)
    ] = 576 * TOKEN_PIXELS
    video_min_frame_pixels: Annotated[
        int, Setting("Video frames with fewer pixels are enlarged.", unit="pixels", low=TOKEN_PIXELS, high=MAX_INT32)
    ] = 256 * TOKEN_PIXELS
    video_max_frame_pixels: Annotated[
        int, Setting("Video frames with more pixels are reduced.", unit="pixels", low=TOKEN_PIXELS, high=MAX_INT32)
    ] = 1664 * TOKEN_PIXELS
    video_min_frames: Annotated[
        int, Setting("Minimum number of frames sampled from a video.", unit="frames", low=1, high=MAX_FRAMES)
    ] = 4
    video_max_frames: Annotated[
        int, Setting("Maximum number of frames sampled from a video.", unit="frames", low=1, high=MAX_FRAMES)
    ] = 8
    base_interval: Annotated[
        float, Setting("Time between two sampled frames.", unit="seconds", above=0, high=MAX_SECONDS)
    ] = 4.0
    video_sampling: Annotated[
        str,
        Setting(
            "How frames are sampled: one per --base-interval, or --fps frames a second, exactly as qwen_vl_utils does "
            "at inference.",
            choices=VIDEO_SAMPLINGS,
        ),
    ] = "interval"
    fps: Annotated[
        float, Setting("With --video-sampling fps: frames sampled from a second.", unit="frames", above=0, high=1000)
    ] = 2.0
    fps_min_frames: Annotated[
        int,
        Setting("With --video-sampling fps: minimum number of frames sampled.", unit="frames", low=2, high=MAX_FRAMES),
    ] = 4
    fps_max_frames: Annotated[
        int,
        Setting("With --video-sampling fps: maximum number of frames sampled.", unit="frames", low=2, high=MAX_FRAMES),
    ] = 768
    video_total_pixels: Annotated[
        int | None,
        Setting(
            "Bound on half the pixels of all frames of a video together, total_pixels of qwen_vl_utils.",
            unit="pixels",
            low=TOKEN_PIXELS,
            high=MAX_SOURCE_PIXELS,
            unset="no limit",
        ),
    ] = None
    max_source_pixels: Annotated[
        int,
        Setting(
            "Images and frames whose header promises more pixels are rejected undecoded.",
            unit="pixels",
            low=1,
            high=MAX_SOURCE_PIXELS,
        ),
    ] = 178_956_970
    max_source_bytes: Annotated[
        int, Setting("Media files larger than this are rejected unopened.", unit="bytes", low=1, high=MAX_SOURCE_BYTES)
    ] = 1 << 32
    decode_timeout: Annotated[
        float,
        Setting(
            "A decoder that takes longer for an image or video is stopped.", unit="seconds", above=0, high=MAX_SECONDS
        ),
    ] = 60.0
    boxes: Annotated[
        str | msgspec.UnsetType,
        Setting(
            "Coordinates of boxes and points in the text: pixels of the original image, shares of it (norm1: 0 to 1, "
            "norm1000: 0 to 1000), pixels of the resized image, or off for text that only looks like boxes.",
            choices=BOX_COORDINATES,
            unset="undeclared, an error where there are boxes",
        ),
    ] = msgspec.UNSET

    def __post_init__(self) -> None:
        check_settings(self, spell=_spell, fix=_FIX_MEDIA)
        for low, high in (
            ("min_pixels", "max_pixels"),
            ("video_min_frame_pixels", "video_max_frame_pixels"),
            ("video_min_frames", "video_max_frames"),
            ("fps_min_frames", "fps_max_frames"),
        ):
            lower, upper = getattr(self, low), getattr(self, high)
            if upper < lower:
                raise ConfigError(f"{_spell(high)} is {upper}; allowed: at least {low} ({lower}).{_FIX_MEDIA}")


class BuildSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything besides the inputs that decides the bytes of a set of shards.

    ``media`` holds for the datasets that do not override it. ``jpeg_quality`` exists with the codec ``jpeg`` only.
    """

    media: MediaSettings = MediaSettings()
    max_length: Annotated[
        int,
        Setting("Capacity of a bin. Longer samples are rejected as too_long.", unit="tokens", low=32, high=MAX_LENGTH),
    ] = 4096
    max_patches: Annotated[
        int | None,
        Setting(
            "Capacity of a bin in vision patches. A sample that exceeds it gets a bin of its own.",
            unit="patches",
            low=4,
            high=MAX_INT32,
            unset="no limit",
        ),
    ] = None
    packer: Annotated[
        str,
        Setting(
            "How samples are packed: best-fit-decreasing, or the binpacking package for comparison.", choices=PACKERS
        ),
    ] = "bfd"
    pixels: Annotated[str, Setting("Codec of the pixel planes; jpeg is lossy.", choices=CODECS)] = "zstd"
    jpeg_quality: Annotated[
        int | msgspec.UnsetType,
        Setting(
            "With --pixels jpeg: quality on libjpeg's scale.",
            low=JPEG_QUALITIES[0],
            high=JPEG_QUALITIES[1],
            unset=str(DEFAULT_JPEG_QUALITY),
        ),
    ] = msgspec.UNSET
    reserved: Annotated[
        str, Setting("What to do with text that spells a control token.", choices=RESERVED_POLICIES)
    ] = "reject"
    strict_fields: Annotated[
        bool | msgspec.UnsetType,
        Setting(
            "Reject records with fields that have no effect, as unsupported_field.",
            unset="such fields are counted by name",
        ),
    ] = msgspec.UNSET
    overlong: Annotated[
        str,
        Setting(
            "What to do with a sample longer than --max-length: reject it, or shrink its media until it fits.",
            choices=OVERLONG_POLICIES,
        ),
    ] = "reject"
    seed: Annotated[int, Setting("Seeds the sampling and the shuffle of samples and bins.", low=0)] = 0
    shard_bytes: Annotated[
        int,
        Setting("A shard is closed when its bins reach this size, uncompressed.", unit="bytes", low=1, high=2**62 - 1),
    ] = 1 << 29

    def __post_init__(self) -> None:
        check_settings(self, spell=_spell, fix=_FIX)
        if self.pixels != "jpeg" and self.jpeg_quality is not msgspec.UNSET:
            conflict = f"{_spell('jpeg_quality')} is {self.jpeg_quality}, but pixels is {self.pixels}"
            raise ConfigError(f"{conflict}. Leave it out, or choose --pixels jpeg.")
        if self.pixels == "jpeg" and self.jpeg_quality is msgspec.UNSET:
            msgspec.structs.force_setattr(self, "jpeg_quality", DEFAULT_JPEG_QUALITY)
