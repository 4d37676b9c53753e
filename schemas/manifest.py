"""``manifest.json``: what a set of shards is, and the seal that says it is complete.

It is written last. It holds no time stamp, host name or absolute path: the same inputs and settings give the same
bytes.
"""

from __future__ import annotations

import msgspec

from schemas.errors import MEND_SHARDS, ConfigError, ShardError
from schemas.settings import BuildSettings, MediaSettings

MANIFEST_FILE = "manifest.json"

METRICS_FILE = "build_metrics.json"
"""Counts and times of the run that finished the build. Times differ from run to run, so it is not part of the set."""

REPORT_FILE = "report.html"
"""The page that ``vlprep build --report`` writes beside the shards. It is not part of the set either."""

WORK_FOLDER = ".build"
"""What a build keeps beside its shards."""

FORMAT_VERSION = 1


class InputFile(msgspec.Struct, frozen=True, kw_only=True):
    """One annotation file: name relative to the common folder of its dataset, size, XXH3-128 of its bytes."""

    file: str
    num_bytes: int
    xxh3: str
    num_annotations: int


class InputDataset(msgspec.Struct, frozen=True, kw_only=True):
    """One dataset of the mix: the share taken (1.0 is all, 2.0 every annotation twice), its files, its media settings.

    ``num_drawn`` is ``floor(rate * annotations)``, the number of samples requested.
    """

    dataset: str
    rate: float
    num_drawn: int
    media: MediaSettings
    files: list[InputFile]


class Counts(msgspec.Struct, frozen=True, kw_only=True):
    """Totals. ``num_annotations = num_packed + num_rejected + num_not_sampled`` always holds.

    An annotation that is taken k times counts k times. ``rejects_by_code`` counts a record under each of its codes.
    """

    num_annotations: int
    num_packed: int
    num_rejected: int
    num_not_sampled: int
    rejects_by_code: dict[str, int]
    num_bins: int
    num_tokens: int
    num_targets: int
    num_patches: int
    num_images: int
    num_videos: int

    def balances(self) -> bool:
        """Whether every annotation is accounted for."""
        return self.num_annotations == self.num_packed + self.num_rejected + self.num_not_sampled


class Distribution(msgspec.Struct, frozen=True, kw_only=True):
    """Spread of a number over the packed samples of a dataset; percentiles are values that occur (nearest rank)."""

    total: int
    mean: float
    min: int
    p50: int
    p90: int
    p99: int
    max: int


CHANGED_PERCENT = 10
"""An image counts as shrunken or enlarged if its pixels change by more. Rounding to 28 pixels changes most by less."""


class MediaStatistics(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Sizes of media of the packed samples of a dataset, and repetitions among its packed annotations.

    ``frames`` is over videos. ``kept_percent`` is the size of shrunken images in percent of the original pixels.
    ``num_same_text``, ``num_same_media`` and ``num_same_sample`` count annotations whose text, media, or both occur in
    an earlier one.
    """

    num_images: int = 0
    num_shrunk: int = 0
    num_enlarged: int = 0
    kept_percent: Distribution | None = None
    frames: Distribution | None = None
    num_same_text: int = 0
    num_same_media: int = 0
    num_same_sample: int = 0


class DatasetStatistics(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of one dataset.

    Counts are as in :class:`Counts`. ``modalities`` counts packed samples by what they hold (``text``, ``image``,
    ``video``, ``image+video``); the distributions are over packed samples, None where there are none.
    ``num_boxes`` counts boxes, points and polygons of packed samples; it is left out if there are none.
    ``unused_fields`` counts annotations by the names of their fields that have no effect; absent if there are none.
    ``media`` is absent if there is nothing to tell, and in sets of earlier versions.
    """

    dataset: str
    num_annotations: int
    num_packed: int
    num_rejected: int
    num_not_sampled: int
    rejects_by_code: dict[str, int]
    modalities: dict[str, int]
    tokens: Distribution | None
    targets: Distribution | None
    patches: Distribution | None
    num_boxes: int = 0
    unused_fields: dict[str, int] | msgspec.UnsetType = msgspec.UNSET
    media: MediaStatistics | msgspec.UnsetType = msgspec.UNSET


class StoredFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file of the set: name relative to the manifest, size, SHA-256."""

    file: str
    num_bytes: int
    sha256: str


class StoredShard(StoredFile, frozen=True, kw_only=True):
    """A shard: a stored file with the run of bins it holds."""

    first_bin: int
    num_bins: int


class Fingerprints(msgspec.Struct, frozen=True, kw_only=True):
    """What the token ids and pixels depend on besides the inputs: a trainer compares them with its checkpoint.

    ``tokenizer`` is :func:`schemas.qwen.tokenizer_fingerprint`; ``image_mean`` and ``image_std`` are what the trainer
    normalises with.
    """

    tokenizer: str
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]


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

    every: int
    num_frames: int
    mean_squared_error: float
    psnr_db: float | None
    lowest_psnr_db: float | None


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Contents of ``manifest.json``. Only a lossy codec has a ``drift``."""

    version: int
    settings: BuildSettings
    fingerprints: Fingerprints
    software: dict[str, str]
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


def encode_manifest(manifest: Manifest) -> bytes:
    """Serialise: indented JSON, keys in the order of the structs, a newline at the end."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"


def decode_manifest(data: bytes, *, where: str) -> Manifest:
    """Parse the bytes of a manifest; ``where`` names them in messages.

    Raises:
        ShardError: damaged, or of another version of the format.
    """
    try:
        version = msgspec.json.decode(data, type=_Version).version
        if version != FORMAT_VERSION:
            raise ShardError(
                f"{where} has format version {version}; this program reads version {FORMAT_VERSION}. "
                "Build the shards again or use the program that wrote them."
            )
        return msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, ConfigError) as error:
        raise ShardError(f"{where} is damaged: {str(error).rstrip('.')}. {MEND_SHARDS}") from error


class _Version(msgspec.Struct):
    version: int
