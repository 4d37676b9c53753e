"""The settings of a build: one immutable value, checked when made, echoed in the manifest.

Defaults are those of the upstream fine-tuning framework. Pixels are counted per picture or per frame; one token of a
picture stands for 28 by 28 pixels.
"""

from __future__ import annotations

from functools import partial

import msgspec

from schemas.errors import ConfigError
from schemas.pixels import CODECS, DEFAULT_JPEG_QUALITY, JPEG_QUALITIES

TOKEN_PIXELS = 28 * 28


def _require(condition: bool, name: str, found: object, allowed: str, where: str = "on the command line") -> None:
    if not condition:
        raise ConfigError(f"setting {name} is {found}; allowed: {allowed}. Change it {where}.")


_require_of_media = partial(_require, where="on the command line or in datasets.toml")


class MediaSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How pictures and clips become pixels.

    Attributes:
        min_pixels: a picture is enlarged to at least this many pixels.
        max_pixels: a picture is reduced to at most this many pixels.
        video_min_frame_pixels: as ``min_pixels``, for a frame of a clip.
        video_max_frame_pixels: as ``max_pixels``, for a frame of a clip.
        video_min_frames: fewest frames sampled from a clip.
        video_max_frames: most frames sampled from a clip.
        base_interval: seconds of a clip for one sampled frame.
        max_source_pixels: a medium with more pixels (per picture or frame) in its header is not decoded.
        max_source_bytes: a media file larger than this is not opened.
        decode_timeout: seconds after which the decoder of a medium is stopped.
    """

    min_pixels: int = 16 * TOKEN_PIXELS
    max_pixels: int = 576 * TOKEN_PIXELS
    video_min_frame_pixels: int = 256 * TOKEN_PIXELS
    video_max_frame_pixels: int = 1664 * TOKEN_PIXELS
    video_min_frames: int = 4
    video_max_frames: int = 8
    base_interval: float = 4.0
    max_source_pixels: int = 178_956_970
    max_source_bytes: int = 1 << 32
    decode_timeout: float = 60.0

    def __post_init__(self) -> None:
        for low, high in (("min_pixels", "max_pixels"), ("video_min_frame_pixels", "video_max_frame_pixels")):
            least, most = int(getattr(self, low)), int(getattr(self, high))
            _require_of_media(least >= TOKEN_PIXELS, low, least, f"at least {TOKEN_PIXELS} (one token of 28x28 pixels)")
            _require_of_media(most >= least, high, most, f"at least {low} ({least})")
        _require_of_media(self.video_min_frames >= 1, "video_min_frames", self.video_min_frames, "1 or more")
        _require_of_media(
            self.video_max_frames >= self.video_min_frames,
            "video_max_frames",
            self.video_max_frames,
            f"at least video_min_frames ({self.video_min_frames})",
        )
        _require_of_media(
            0 < self.base_interval < float("inf"), "base_interval", self.base_interval, "a positive number of seconds"
        )
        _require_of_media(self.max_source_pixels >= 1, "max_source_pixels", self.max_source_pixels, "1 or more")
        _require_of_media(self.max_source_bytes >= 1, "max_source_bytes", self.max_source_bytes, "1 or more")
        _require_of_media(
            0 < self.decode_timeout < float("inf"),
            "decode_timeout",
            self.decode_timeout,
            "a positive number of seconds",
        )


class BuildSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything besides the inputs that decides the bytes of a set of shards.

    Attributes:
        media: how pictures and clips become pixels, unless a dataset overrides it.
        max_length: tokens that a bin holds at most; a longer sample is rejected as ``too_long``.
        max_patches: vision patches that a bin holds at most (one medium-rich sample more than that still gets a bin of
            its own), or None for no second budget.
        packer: ``bfd`` (best-fit-decreasing over the histogram of lengths) or ``binpacking``.
        pixels: codec of the pixel planes.
        jpeg_quality: on libjpeg's scale, 95 unless given; there with the codec ``jpeg`` alone.
        reserved: what to do with text that spells a control token: ``reject`` or ``escape``.
        overlong: what to do with a sample longer than ``max_length``: ``reject``, or ``shrink`` its media until it
            fits.
        seed: seeds sampling and the shuffle of samples and bins.
        shard_bytes: a shard is closed once its bins hold about this many bytes (before compression).
    """

    media: MediaSettings = MediaSettings()
    max_length: int = 4096
    max_patches: int | None = None
    packer: str = "bfd"
    pixels: str = "zstd"
    jpeg_quality: int | msgspec.UnsetType = msgspec.UNSET
    reserved: str = "reject"
    overlong: str = "reject"
    seed: int = 0
    shard_bytes: int = 1 << 29

    def __post_init__(self) -> None:
        _require(self.max_length >= 32, "max_length", self.max_length, "32 or more tokens")
        _require(
            self.max_patches is None or self.max_patches >= 4, "max_patches", self.max_patches, "4 or more patches"
        )
        _require(self.packer in PACKERS, "packer", self.packer, " or ".join(PACKERS))
        _require(self.pixels in CODECS, "pixels", self.pixels, " or ".join(CODECS))
        if self.pixels != "jpeg":
            _require(
                self.jpeg_quality is msgspec.UNSET, "jpeg_quality", self.jpeg_quality, "none, unless pixels is jpeg"
            )
        elif self.jpeg_quality is msgspec.UNSET:
            msgspec.structs.force_setattr(self, "jpeg_quality", DEFAULT_JPEG_QUALITY)
        else:
            least, most = JPEG_QUALITIES
            _require(least <= self.jpeg_quality <= most, "jpeg_quality", self.jpeg_quality, f"{least} to {most}")
        _require(self.reserved in RESERVED_POLICIES, "reserved", self.reserved, " or ".join(RESERVED_POLICIES))
        _require(self.overlong in OVERLONG_POLICIES, "overlong", self.overlong, " or ".join(OVERLONG_POLICIES))
        _require(0 <= self.seed < 2**63, "seed", self.seed, "0 to 2^63 - 1")
        _require(1 <= self.shard_bytes < 2**62, "shard_bytes", self.shard_bytes, "1 to 2^62 - 1")


PACKERS = ("bfd", "binpacking")
RESERVED_POLICIES = ("reject", "escape")
OVERLONG_POLICIES = ("reject", "shrink")
