"""Puts the numbers of a report into words and tables for the template ``page.html``.

Input: a manifest, its :class:`~prep.inspect.report.statistics.Statistics`, the samples and rejects to show. Output: the
page. It loads nothing, and its content security policy admits only the style sheet and the script of the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import xxhash
from numpy.typing import NDArray

from prep.annotations.unused import describe_unused
from prep.inspect.report import charts
from prep.inspect.report.charts import Drawing, Histogram, draw, growing_histogram, number_histogram, segments
from prep.inspect.report.command import BuildCommand
from prep.inspect.report.gallery import Card, Thumbnail
from prep.inspect.report.statistics import MODALITIES, Example, Statistics, busy_share
from prep.inspect.report.templates import percent, render
from prep.inspect.transcript import ESCAPED_NOTE
from prep.shards.drift import decibels
from schemas.manifest import CHANGED_PERCENT, Distribution, Drift, Manifest, MediaStatistics, encode_manifest
from schemas.wording import counted, kinds_text, size_text

_COLOURS = {"text only": "text-only", "images": "images", "video": "video"}
_NUM_DATASET_COLOURS = 8
_RANKS = (8, 64, 512)
_MAX_FILES = 200
_MAX_NAMES = 8
_SIZE = {
    "width": charts.WIDTH,
    "height": charts.HEIGHT,
    "left": charts.LEFT,
    "right": charts.RIGHT,
    "baseline": charts.BASELINE,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """A chart with the keys of its colours and a caption."""

    drawing: Drawing
    keys: tuple[tuple[str, str], ...]
    caption: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Reject:
    """Rejected annotations of one code, with examples and their thumbnails."""

    code: str
    num_rejected: int
    examples: tuple[tuple[Example, Thumbnail | None], ...]


def render_page(
    name: str,
    manifest: Manifest,
    statistics: Statistics,
    cards: Sequence[Card],
    rejects: Sequence[Reject],
    note: str,
    command: BuildCommand,
) -> str:
    """Render the complete page.

    Args:
        name: name of the set of shards.
        manifest: manifest of the set.
        statistics: numbers of the set.
        cards: samples to show, those of a dataset one after another.
        rejects: rejects to show.
        note: a sentence about the samples, as plain text.
        command: the command that builds the set.
    """
    datasets = [dataset.dataset for dataset in manifest.inputs]
    groups = [{"dataset": name, "cards": own} for name in datasets if (own := _cards_of(cards, name))]
    variables = {
        "name": name,
        "identity": xxhash.xxh3_64_hexdigest(encode_manifest(manifest)),
        "datasets": datasets,
        "max_names": _MAX_NAMES,
        "modalities": MODALITIES,
        "counts": manifest.counts,
        "tiles": _tiles(manifest),
        "note": note,
        "escaped_note": ESCAPED_NOTE,
        "groups": groups,
        "rejects": rejects,
        "size": _SIZE,
        "command": command,
        **_balance(manifest),
        **_mixture(statistics),
        **_datasets(manifest, statistics),
        **_lengths(statistics),
        **_bins(manifest, statistics),
        **_media(manifest),
        **_origin(manifest),
    }
    return render("page.html", variables)


def _cards_of(cards: Sequence[Card], dataset: str) -> list[Card]:
    return [card for card in cards if card.choice.dataset == dataset]


def _tiles(manifest: Manifest) -> list[tuple[str, str]]:
    counts = manifest.counts
    num_bytes = sum(shard.num_bytes for shard in manifest.shards)
    tiles = [
        (f"{counts.num_packed:,}", "samples packed"),
        (f"{counts.num_rejected:,}", "annotations rejected"),
        (
            f"{counts.num_bins:,}",
            f"{'bin' if counts.num_bins == 1 else 'bins'} of {manifest.settings.max_length:,} tokens",
        ),
        (percent(manifest.fill), "of the token budget filled"),
        (_large(counts.num_tokens), "tokens"),
        (percent(_ratio(counts.num_targets, counts.num_tokens)), f"trained: {counts.num_targets:,} targets"),
        (f"{counts.num_images:,}", "images"),
        (f"{counts.num_videos:,}", "videos"),
        (_large(counts.num_patches), "vision patches"),
        (size_text(num_bytes), f"in {counted(len(manifest.shards), 'shard')}"),
    ]
    if isinstance(drift := manifest.drift, Drift):
        text = f"PSNR of the pixels; the worst frame has {decibels(drift.lowest_psnr_db)}"
        tiles.append((decibels(drift.psnr_db), text))
    return tiles


def _balance(manifest: Manifest) -> dict[str, object]:
    counts = manifest.counts
    parts = [
        ("packed", "packed", counts.num_packed),
        ("rejected", "rejected", counts.num_rejected),
        ("not-sampled", "not sampled", counts.num_not_sampled),
    ]
    keys = [(css, f"{label}: {percent(_ratio(count, counts.num_annotations))}") for css, label, count in parts]
    return {"balance": segments(parts), "balance_keys": keys}


def _mixture(statistics: Statistics) -> dict[str, object]:
    datasets = statistics.datasets
    colours = [f"d{index}" if index < _NUM_DATASET_COLOURS else "others" for index in range(len(datasets))]
    keys = [(colour, dataset.name) for colour, dataset in zip(colours, datasets) if colour != "others"]
    if len(keys) < len(datasets):
        keys.append(("others", f"{len(datasets) - len(keys)} others"))
    bars = [
        (label, segments([(colour, dataset.name, count) for colour, dataset, count in zip(colours, datasets, counts)]))
        for label, counts in (
            ("Samples", [dataset.num_packed for dataset in datasets]),
            ("Tokens", [dataset.num_tokens for dataset in datasets]),
            ("Trained tokens", [dataset.num_targets for dataset in datasets]),
        )
    ]
    return {"mixture": bars, "mixture_keys": keys}


def _datasets(manifest: Manifest, statistics: Statistics) -> dict[str, object]:
    outcomes = ("#rows", "#packed", "#rejected", "#not sampled")
    head = ("dataset", "#sampling rate", *outcomes, "#tokens", "#of all tokens", "#trained", "#patches")
    rows = [
        (
            dataset.name,
            f"{inputs.rate * 100:.6g} %",
            f"{dataset.num_annotations:,}",
            f"{dataset.num_packed:,}",
            f"{dataset.num_rejected:,}",
            f"{dataset.num_not_sampled:,}",
            f"{dataset.num_tokens:,}",
            percent(_ratio(dataset.num_tokens, manifest.counts.num_tokens)),
            percent(_ratio(dataset.num_targets, dataset.num_tokens)),
            f"{dataset.num_patches:,}",
        )
        for dataset, inputs in zip(statistics.datasets, manifest.inputs)
    ]
    spreads = [
        (
            dataset.dataset,
            (kinds_text(dataset.modalities) or "–")
            + (f"; {dataset.num_boxes:,} boxes and points" if dataset.num_boxes else ""),
            *(_spread(sizes) for sizes in (dataset.tokens, dataset.targets, dataset.patches)),
        )
        for dataset in manifest.statistics
    ]
    return {
        "dataset_head": head,
        "dataset_rows": rows,
        "spread_head": ("dataset", "samples packed", "tokens per sample", "trained tokens", "vision patches"),
        "spread_rows": spreads,
        "unused": [
            (dataset.dataset, describe_unused(dataset.unused_fields))
            for dataset in manifest.statistics
            if dataset.unused_fields
        ],
    }


def _spread(sizes: Distribution | None) -> str:
    return f"{sizes.p50:,} · {sizes.p99:,} · {sizes.max:,}" if sizes is not None else "–"


def _lengths(statistics: Statistics) -> dict[str, object]:
    tokens = {name: int(values.sum()) for name, values in statistics.num_tokens.items()}
    num_samples = {name: values.size for name, values in statistics.num_tokens.items()}
    rows = [
        (
            name,
            f"{num_samples[name]:,}",
            percent(_ratio(num_samples[name], sum(num_samples.values()))),
            f"{tokens[name]:,}",
            percent(_ratio(tokens[name], sum(tokens.values()))),
            _quantiles(statistics.num_tokens[name]),
        )
        for name in MODALITIES
    ]
    all_tokens = np.concatenate(list(statistics.num_tokens.values()))
    all_targets = np.concatenate(list(statistics.num_targets.values()))
    return {
        "length_charts": [
            _chart(
                number_histogram("Sample lengths", "tokens per sample", statistics.num_tokens), _quantiles(all_tokens)
            ),
            _chart(
                growing_histogram("Trained tokens", "trained tokens per sample", statistics.num_targets),
                _quantiles(all_targets),
            ),
        ],
        "kind_head": ("kind", "#samples", "#of samples", "#tokens", "#of tokens", "tokens per sample"),
        "kind_rows": rows,
    }


def _bins(manifest: Manifest, statistics: Statistics) -> dict[str, object]:
    tokens = np.rint(statistics.fill * manifest.settings.max_length).astype(np.int64)
    fill = charts.share_histogram("Fill of bins", "of the token budget", "bins", statistics.fill)
    shown = [_chart(fill, f"{percent(manifest.fill)} of the token budget of all bins is filled")]
    for title, values in (
        ("Samples per bin", statistics.samples_of_bin),
        ("Trained tokens per bin", statistics.targets_of_bin),
        ("Vision patches per bin", statistics.patches_of_bin),
    ):
        shown.append(_chart(number_histogram(title, title.lower(), {"bins": values}), _quantiles(values)))
    rows = [
        (label, *(percent(busy_share(values, ranks)) for ranks in _RANKS))
        for label, values in (
            ("tokens", tokens),
            ("attention (squared lengths of samples)", statistics.attention_of_bin),
            ("vision patches", statistics.patches_of_bin),
        )
    ]
    return {
        "bin_charts": shown,
        "rank_head": ("work of a bin", *(f"#{ranks} ranks" for ranks in _RANKS)),
        "rank_rows": rows,
    }


def _media(manifest: Manifest) -> dict[str, object]:
    head = ("dataset", "#images", "#shrunken", "pixels kept", "#enlarged", "frames of a video")
    rows = []
    for dataset in manifest.statistics:
        media = dataset.media
        if isinstance(media, MediaStatistics):
            kept, frames = media.kept_percent, media.frames
            rows.append(
                (
                    dataset.dataset,
                    f"{media.num_images:,}",
                    percent(_ratio(media.num_shrunk, media.num_images)),
                    f"median {kept.p50} %, least {kept.min} %" if kept is not None else "–",
                    percent(_ratio(media.num_enlarged, media.num_images)),
                    f"{frames.min:,} to {frames.max:,}, median {frames.p50:,}" if frames is not None else "–",
                    f"{media.num_same_text:,}",
                    f"{media.num_same_media:,}",
                    f"{media.num_same_sample:,}",
                )
            )
    repeated = ("#same text", "#same media", "#same text and media")
    return {"media_head": (*head, *repeated), "media_rows": rows, "changed_percent": CHANGED_PERCENT}


def _chart(histogram: Histogram, caption: str) -> Chart:
    names = list(histogram.counts)
    keys = tuple((_COLOURS[name], name) for name in names if name in _COLOURS)
    return Chart(drawing=draw(histogram, [_COLOURS.get(name, "plain") for name in names]), keys=keys, caption=caption)


def _origin(manifest: Manifest) -> dict[str, object]:
    settings = msgspec.to_builtins(manifest.settings)
    media = settings.pop("media")
    drift = msgspec.to_builtins(manifest.drift) if isinstance(manifest.drift, Drift) else {}
    fingerprints = manifest.fingerprints
    overrides = {
        f"{dataset.dataset}: {name}": value
        for dataset in manifest.inputs
        for name, value in msgspec.to_builtins(dataset.media).items()
        if value != media.get(name)
    }
    return {
        "settings": {**settings, **media, **overrides},
        "origin": {
            "tokenizer fingerprint": fingerprints.tokenizer,
            "image mean": ", ".join(map(str, fingerprints.image_mean)),
            "image standard deviation": ", ".join(map(str, fingerprints.image_std)),
            **manifest.software,
            **{f"drift: {name}": value for name, value in drift.items()},
        },
        "file_head": ("dataset", "file", "#annotations", "#size", "XXH3-128"),
        "max_files": _MAX_FILES,
        "file_rows": [
            (
                "" if index else dataset.dataset,
                file.file,
                f"{file.num_annotations:,}",
                size_text(file.num_bytes),
                file.xxh3,
            )
            for dataset in manifest.inputs
            for index, file in enumerate(dataset.files)
        ],
        "stored_head": ("file", "#bytes", "SHA-256"),
        "stored_rows": [
            (file.file, f"{file.num_bytes:,}", file.sha256) for file in (*manifest.shards, *manifest.tables)
        ],
    }


def _quantiles(values: NDArray[np.int64]) -> str:
    if not values.size:
        return "–"
    lowest, median, high, highest = np.quantile(values, (0, 0.5, 0.95, 1), method="nearest").tolist()
    if lowest == highest:
        return f"{lowest:,} each"
    return f"{lowest:,} to {highest:,}, median {median:,}, 95th percentile {high:,}"


def _ratio(part: int, total: int) -> float:
    return part / total if total else 0.0


def _large(count: int) -> str:
    for size, letter in ((10**9, " G"), (10**6, " M")):
        if count >= size:
            return f"{count / size:.4g}{letter}"
    return f"{count:,}"
