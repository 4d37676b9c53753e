"""``manifest.json``: what a set of shards is, and the seal that says it is complete.

It is written last. It holds no time stamp, host name or absolute path: the same inputs and settings give the same
bytes.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from schemas.bounds import MAX_RATE, Count, Digest, FileName, PositiveCount, Sha256, Size
from schemas.errors import GIVE_SHARDS, MEND_SHARDS, ConfigError, ShardError
from schemas.qwen import IMAGE_MEAN, IMAGE_STD
from schemas.settings import BuildSettings, MediaSettings

MANIFEST_FILE = "manifest.json"

MAX_MANIFEST_BYTES = 256 << 20
"""A shard takes about 250 bytes, so this is enough for a million."""

MAX_TOTALS_BYTES = 32 << 20
"""Of counts, statistics and software, which take 2 kB a dataset. They hold dictionaries, which take 20 times the memory
of their JSON."""

_MAX_CODES = 256
_MAX_MODALITIES = 16
_MAX_PACKAGES = _MAX_FIELDS = 1000
"""Entries of these dictionaries. There are about a tenth as many."""

METRICS_FILE = "build_metrics.json"
"""Counts and times of the run that finished the build. Times differ from run to run, so it is not part of the set."""

REPORT_FILE = "report.html"
"""The page that ``vlprep build --report`` writes beside the shards. It is not part of the set either."""

WORK_FOLDER = ".build"
"""What a build keeps beside its shards."""

FORMAT_VERSION = 1

_OWN_FIELDS = (b'"version"', b'"fingerprints"', b'"counts"', b'"shards"')
"""Fields of which a manifest has all, even if it is damaged most."""


RejectsByCode = Annotated[dict[str, Count], Meta(max_length=_MAX_CODES)]


class InputFile(msgspec.Struct, frozen=True, kw_only=True):
    """One annotation file: name relative to the common folder of its dataset, size, XXH3-128 of its bytes."""

    file: str
    num_bytes: Size
    xxh3: Digest
    num_annotations: Count


class InputDataset(msgspec.Struct, frozen=True, kw_only=True):
    """One dataset of the mix: the share taken (1.0 is all, 2.0 every annotation twice), its files, its media settings.

    ``num_drawn`` is ``floor(rate * annotations)``, the number of samples requested.
    """

    dataset: str
    rate: Annotated[float, Meta(ge=0, le=MAX_RATE)]
    num_drawn: Count
    media: MediaSettings
    files: list[InputFile]


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """Totals. ``num_annotations = num_packed + num_rejected + num_not_sampled`` always holds.

    An annotation that is taken k times counts k times. ``rejects_by_code`` counts a record under each of its codes.
    """

    num_annotations: Count
    num_packed: Count
    num_rejected: Count
    num_not_sampled: Count
    rejects_by_code: RejectsByCode
    num_bins: Count
    num_tokens: Count
    num_targets: Count
    num_patches: Count
    num_images: Count
    num_videos: Count

    def balances(self) -> bool:
        """Whether every annotation is accounted for."""
        return self.num_annotations == self.num_packed + self.num_rejected + self.num_not_sampled


class Distribution(msgspec.Struct, frozen=True, kw_only=True):
    """Spread of a number over the packed samples of a dataset; percentiles are values that occur (nearest rank)."""

    total: Count
    mean: Annotated[float, Meta(ge=0)]
    min: Count
    p50: Count
    p90: Count
    p99: Count
    max: Count


CHANGED_PERCENT = 10
"""An image counts as shrunken or enlarged if its pixels change by more. Rounding to 28 pixels changes most by less."""


class MediaStatistics(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sizes of media of the packed samples of a dataset, and repetitions among its packed annotations.

    ``frames`` is over videos. ``kept_percent`` is the size of shrunken images in percent of the original pixels.
    ``num_same_text``, ``num_same_media`` and ``num_same_sample`` count annotations whose text, media, or both occur in
    an earlier one.
    """

    num_images: Count = 0
    num_shrunk: Count = 0
    num_enlarged: Count = 0
    kept_percent: Distribution | None = None
    frames: Distribution | None = None
    num_same_text: Count = 0
    num_same_media: Count = 0
    num_same_sample: Count = 0


class DatasetStatistics(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of one dataset.

    Counts are as in :class:`Counts`. ``modalities`` counts packed samples by what they hold (``text``, ``image``,
    ``video``, ``image+video``); the distributions are over packed samples, None where there are none.
    ``num_boxes`` counts boxes, points and polygons of packed samples; it is left out if there are none.
    ``unused_fields`` counts annotations by the names of their fields that have no effect; absent if there are none.
    ``media`` is absent if there is nothing to tell, and in sets of earlier versions.
    """

    dataset: str
    num_annotations: Count
    num_packed: Count
    num_rejected: Count
    num_not_sampled: Count
    rejects_by_code: RejectsByCode
    modalities: Annotated[dict[str, Count], Meta(max_length=_MAX_MODALITIES)]
    tokens: Distribution | None
    targets: Distribution | None
    patches: Distribution | None
    num_boxes: Count = 0
    unused_fields: Annotated[dict[str, Count], Meta(max_length=_MAX_FIELDS)] | msgspec.UnsetType = msgspec.UNSET
    media: MediaStatistics | msgspec.UnsetType = msgspec.UNSET


class StoredFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file of the set: name relative to the manifest, size, SHA-256."""

    file: FileName
    num_bytes: Size
    sha256: Sha256


class StoredShard(StoredFile, frozen=True, kw_only=True):
    """A shard: a stored file with the run of bins it holds."""

    first_bin: Count
    num_bins: Count


class Fingerprints(msgspec.Struct, frozen=True, kw_only=True):
    """What the token ids and pixels depend on besides the inputs: a trainer compares them with its checkpoint.

    ``tokenizer`` is :func:`schemas.qwen.tokenizer_fingerprint`; ``image_mean`` and ``image_std`` are what the trainer
    normalises with.
    """

    tokenizer: Digest
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]


Decibels = Annotated[float, Meta(ge=0, le=1000)]


class Drift(msgspec.Struct, frozen=True, kw_only=True):
    """How far the pixels of a lossy codec lie from those that were encoded, measured on a part of the frames.

    In every shard the frames are counted from 0 in the order in which they are stored, and those whose number is a
    multiple of ``every`` were decoded again.

    Attributes:
        every: one frame in so many was measured.
        num_frames: measured frames of all shards.
        mean_squared_error: of all their values, on the scale of 0 to 255.
        psnr_db: the peak signal-to-noise ratio that this is; None where no value differs.
        lowest_psnr_db: of a single frame; likewise.
    """

    every: PositiveCount
    num_frames: Count
    mean_squared_error: Annotated[float, Meta(ge=0, le=255**2)]
    psnr_db: Decibels | None
    lowest_psnr_db: Decibels | None


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Contents of ``manifest.json``. Only a lossy codec has a ``drift``."""

    version: int
    settings: BuildSettings
    fingerprints: Fingerprints
    software: Annotated[dict[str, str], Meta(max_length=_MAX_PACKAGES)]
    inputs: list[InputDataset]
    counts: Counts
    statistics: list[DatasetStatistics]
    drift: Drift | msgspec.UnsetType = msgspec.UNSET
    shards: list[StoredShard]
    tables: list[StoredFile]

    @property
    def fill(self) -> float:
        """Share of the token budget of all bins that holds tokens."""
        capacity = self.counts.num_bins * self.settings.max_length
        return self.counts.num_tokens / capacity if capacity else 0.0


_MAX_QUOTED_BYTES = 16 << 20
"""A larger manifest is not decoded a second time only to quote a value."""


def encode_manifest(manifest: Manifest) -> bytes:
    """Serialise: indented JSON, keys in the order of the structs, a newline at the end."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"


def decode_manifest(data: bytes, *, where: str) -> Manifest:
    """Parse the bytes of a manifest; ``where`` names them in messages.

    Raises:
        ShardError: damaged, of another version of the format, or with a value out of its bounds.
    """
    try:
        outline = msgspec.json.decode(data, type=_Outline)
        if outline.version != FORMAT_VERSION:
            raise ShardError(
                f"{where} has format version {outline.version}; this program reads version {FORMAT_VERSION}. "
                "Build the shards again or use the program that wrote them."
            )
        if (size := outline.totals_bytes) > MAX_TOTALS_BYTES:
            raise ShardError(
                f"{where} has {size:,} bytes of counts, statistics and software; allowed: at most "
                f"{MAX_TOTALS_BYTES:,}. {MEND_SHARDS}"
            )
        return msgspec.json.decode(data, type=Manifest)
    except RecursionError:
        raise ShardError(f"{where} is damaged: its JSON is nested too deeply. {MEND_SHARDS}") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, ConfigError) as error:
        if data and not any(name in data for name in _OWN_FIELDS):
            raise ShardError(f"{where} is not the manifest of a set of shards. {GIVE_SHARDS}") from None
        raise ShardError(f"{where} is damaged: {_reason(data, error)}. {MEND_SHARDS}") from error


def normalisation_problem(fingerprints: Fingerprints) -> str | None:
    """What is wrong with the normalisation that pixels were made for, or None if it is that of Qwen2.5-VL."""
    if (fingerprints.image_mean, fingerprints.image_std) == (IMAGE_MEAN, IMAGE_STD):
        return None
    return (
        f"made for pixels normalised with mean {fingerprints.image_mean} and deviation {fingerprints.image_std}; "
        f"Qwen2.5-VL has {IMAGE_MEAN} and {IMAGE_STD}"
    )


def _reason(data: bytes, error: Exception) -> str:
    """What is wrong, with the value that an error of msgspec is about: it ends with the path, ``at `$.counts```."""
    message = str(error).rstrip(".")
    problem, is_located, path = message.partition(" - at `$.")
    if not is_located or len(data) > _MAX_QUOTED_BYTES:
        return message
    try:
        value: Any = msgspec.json.decode(data)
        for name, index in re.findall(r"(\w+)|\[(\d+)\]", path):
            value = value[name] if name else value[int(index)]
    except (
        msgspec.MsgspecError,
        UnicodeDecodeError,
        RecursionError,
        LookupError,
    ):  # more than 64 bits, or a name that is not a word
        return message
    shown = f"is {repr(value)[:80]}" if isinstance(value, (str, int, float)) else "is damaged"
    return f"{path.rstrip('`')} {shown}: {problem[:1].lower()}{problem[1:]}"


class _Outline(msgspec.Struct):
    """What is read of a manifest first. Nothing of the rest is copied."""

    version: int
    counts: msgspec.Raw = msgspec.Raw()
    statistics: msgspec.Raw = msgspec.Raw()
    software: msgspec.Raw = msgspec.Raw()

    @property
    def totals_bytes(self) -> int:
        return sum(len(memoryview(part)) for part in (self.counts, self.statistics, self.software))
