"""The HTML page of a report. Everything that comes from users or files goes through ``html.escape``.

Input: a manifest, its :class:`~prep.inspect.report.statistics.Statistics`, and example bins as HTML. Output: one page
that loads nothing and runs no scripts. A content security policy in its head enforces both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

import msgspec
import numpy as np
from numpy.typing import NDArray

from prep.annotations.unused import describe_unused
from prep.inspect.report.charts import Histogram, doubling_histogram, number_histogram, share_histogram, svg
from prep.inspect.report.statistics import MODALITIES, DatasetNumbers, Example, RejectNumbers, Statistics
from prep.inspect.report.style import STYLE
from prep.inspect.transcript import ESCAPED_NOTE
from prep.shards.drift import decibels
from schemas.manifest import Distribution, Drift, Manifest
from schemas.wording import counted, printable

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_COLOURS = {"text only": "c-text-only", "images": "c-images", "video": "c-video"}
_PLAIN = "c-plain"


def render_page(name: str, manifest: Manifest, statistics: Statistics, bins: Sequence[str], note: str) -> str:
    """Render the complete page.

    Args:
        name: name of the set of shards.
        manifest: manifest of the set.
        statistics: numbers of the set.
        bins: example bins as HTML.
        note: a sentence about the example bins, as plain text.
    """
    title = escape(name)
    sections = [
        f"<h1>{title}</h1>",
        f'<p class="soft">{_subtitle(manifest)}</p>',
        _tiles(manifest),
        "<h2>Every annotation is accounted for</h2>",
        _balance(manifest),
        "<h2>Rejects</h2>",
        _rejects(statistics.rejects),
        "<h2>Datasets</h2>",
        _datasets(manifest, statistics),
        "<h2>Samples</h2>",
        _sample_charts(statistics),
        "<h2>Bins</h2>",
        _bin_charts(manifest, statistics),
        "<h2>A look inside</h2>",
        f"<p>{escape(note)} Trained text is <mark>marked</mark>. {escape(ESCAPED_NOTE)}</p>",
        *bins,
        "<h2>How it was built</h2>",
        _settings(manifest),
    ]
    return "\n".join([*_head(title), "<body><main>", *sections, "</main></body>", "</html>", ""])


def _head(title: str) -> list[str]:
    return [
        "<!doctype html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{title}: report</title>",
        f"<style>{STYLE}</style>",
        "</head>",
    ]


def _subtitle(manifest: Manifest) -> str:
    names = ", ".join(escape(dataset.dataset) for dataset in manifest.inputs)
    return f"Packed training shards from {names}"


def _tiles(manifest: Manifest) -> str:
    counts = manifest.counts
    num_bytes = sum(shard.num_bytes for shard in manifest.shards)
    tiles = [
        (f"{counts.num_packed:,}", "samples packed"),
        (f"{counts.num_rejected:,}", "annotations rejected"),
        (f"{counts.num_bins:,}", f"bins of {manifest.settings.max_length:,} tokens"),
        (_percent(manifest.fill), "of the token budget filled"),
        (_large(counts.num_tokens), "tokens"),
        (_percent(_ratio(counts.num_targets, counts.num_tokens)), f"trained: {counts.num_targets:,} targets"),
        (f"{counts.num_images:,}", "images"),
        (f"{counts.num_videos:,}", "videos"),
        (_large(counts.num_patches), "vision patches"),
        (_bytes(num_bytes), f"in {counted(len(manifest.shards), 'shard')}"),
    ]
    if isinstance(drift := manifest.drift, Drift):
        text = f"PSNR of the pixels; the worst frame has {decibels(drift.lowest_psnr_db)}"
        tiles.append((decibels(drift.psnr_db), text))
    return (
        '<div class="tiles">'
        + "".join(f"<div><b>{value}</b><span>{text}</span></div>" for value, text in tiles)
        + "</div>"
    )


def _balance(manifest: Manifest) -> str:
    counts = manifest.counts
    parts = [
        ("packed", "bg-packed", counts.num_packed),
        ("rejected", "bg-rejected", counts.num_rejected),
        ("not sampled", "bg-not-sampled", counts.num_not_sampled),
    ]
    sum_text = " + ".join(f"{count:,} {name}" for name, _, count in parts)
    bar = "".join(
        f'<span class="{colour}" style="flex:{count}" title="{count:,} {name}"></span>'
        for name, colour, count in parts
        if count
    )
    keys = "".join(
        f'<span><i class="key {colour}"></i>{name}: {_percent(_ratio(count, counts.num_annotations))}</span>'
        for name, colour, count in parts
    )
    return (
        f'<div class="card"><p class="balance"><b>{counts.num_annotations:,}</b> annotations = {sum_text}</p>'
        f'<div class="stack">{bar}</div><div class="keys">{keys}</div></div>'
    )


def _rejects(rejects: Sequence[RejectNumbers]) -> str:
    if not rejects:
        return '<div class="card">None. Every annotation that was drawn is packed.</div>'
    rows = [
        [f'<code class="nowrap">{escape(reject.code)}</code>', f"{reject.num_rejected:,}", _examples(reject.examples)]
        for reject in rejects
    ]
    table = _table(("reason", "#annotations", "first examples"), rows)
    return f'{table}<p class="soft">An annotation with several problems counts under each. samples.parquet has all.</p>'


def _examples(examples: Iterable[Example]) -> str:
    items = []
    for example in examples:
        name = f' <span class="soft">(id <bdi>{_text(example.id)}</bdi>)</span>' if example.id is not None else ""
        origin = f"<code>{_text(example.file)}:{example.line}</code>"
        items.append(f"<li>{origin}{name} <bdi>{_text(example.message)}</bdi></li>")
    return f'<ul class="examples">{"".join(items)}</ul>'


def _datasets(manifest: Manifest, statistics: Statistics) -> str:
    rates = {dataset.dataset: dataset.rate for dataset in manifest.inputs}
    head = (
        "dataset",
        "#sampling rate",
        "#rows",
        "#packed",
        "#rejected",
        "#not sampled",
        "#tokens",
        "of all tokens",
        "#trained",
        "#patches",
    )
    rows = [_dataset_row(dataset, rates[dataset.name], manifest.counts.num_tokens) for dataset in statistics.datasets]
    spreads = [
        [
            _text(dataset.dataset),
            (", ".join(f"{count:,} {escape(kind)}" for kind, count in dataset.modalities.items()) or "–")
            + (f"; {dataset.num_boxes:,} boxes and points" if dataset.num_boxes else ""),
            *(_spread(numbers) for numbers in (dataset.tokens, dataset.targets, dataset.patches)),
        ]
        for dataset in manifest.statistics
    ]
    spread_head = ("dataset", "samples packed", "tokens per sample", "trained tokens", "vision patches")
    note = '<p class="soft">Per sample: median · 99th percentile · maximum.</p>'
    return _table(head, rows) + _table(spread_head, spreads) + note + _unused_fields(manifest)


def _unused_fields(manifest: Manifest) -> str:
    """The fields of the annotations that have no effect, by dataset."""
    return "".join(
        f'<p class="soft">{_text(dataset.dataset)}: fields not used: '
        f"{_text(describe_unused(dataset.unused_fields))}</p>"
        for dataset in manifest.statistics
        if dataset.unused_fields
    )


def _spread(numbers: Distribution | None) -> str:
    return f"{numbers.p50:,} · {numbers.p99:,} · {numbers.max:,}" if numbers is not None else "–"


def _dataset_row(dataset: DatasetNumbers, rate: float, all_tokens: int) -> list[str]:
    share = _ratio(dataset.num_tokens, all_tokens)
    return [
        _text(dataset.name),
        f"{rate * 100:.6g} %",
        f"{dataset.num_annotations:,}",
        f"{dataset.num_packed:,}",
        f"{dataset.num_rejected:,}",
        f"{dataset.num_not_sampled:,}",
        f"{dataset.num_tokens:,}",
        f'<span class="meter"><i style="width:{share * 100:.1f}%"></i></span> {_percent(share)}',
        _percent(_ratio(dataset.num_targets, dataset.num_tokens)),
        f"{dataset.num_patches:,}",
    ]


def _sample_charts(statistics: Statistics) -> str:
    numbers = {name: values.size for name, values in statistics.num_tokens.items()}
    total = sum(numbers.values())
    tokens = {name: int(values.sum()) for name, values in statistics.num_tokens.items()}
    rows = [
        [
            f'<i class="key {_COLOURS[name]}"></i>{name}',
            f"{numbers[name]:,}",
            _percent(_ratio(numbers[name], total)),
            f"{tokens[name]:,}",
            _percent(_ratio(tokens[name], sum(tokens.values()))),
            _quantiles(statistics.num_tokens[name]),
        ]
        for name in MODALITIES
    ]
    head = ("kind", "#samples", "#of samples", "#tokens", "#of tokens", "tokens per sample")
    lengths = number_histogram("Sample lengths", "tokens per sample", statistics.num_tokens)
    targets = doubling_histogram("Trained tokens per sample", "trained tokens per sample", statistics.num_targets)
    return _table(head, rows) + _charts([lengths, targets])


def _bin_charts(manifest: Manifest, statistics: Statistics) -> str:
    charts = [
        share_histogram("Fill of bins", "of the token budget", "bins", statistics.fill),
        number_histogram("Samples per bin", "samples per bin", {"bins": statistics.samples_of_bin}),
        number_histogram("Trained tokens per bin", "trained tokens per bin", {"bins": statistics.targets_of_bin}),
        number_histogram("Vision patches per bin", "vision patches per bin", {"bins": statistics.patches_of_bin}),
    ]
    notes = [
        f"{_percent(manifest.fill)} of the token budget of all bins is filled",
        _quantiles(statistics.samples_of_bin),
        _quantiles(statistics.targets_of_bin),
        _quantiles(statistics.patches_of_bin),
    ]
    return _charts(charts, notes)


def _charts(charts: Sequence[Histogram], notes: Sequence[str] = ()) -> str:
    figures = []
    for index, chart in enumerate(charts):
        colours = [_COLOURS.get(name, _PLAIN) for name in chart.counts]
        keys = "".join(
            f'<span><i class="key {_COLOURS[name]}"></i>{name}</span>' for name in chart.counts if name in _COLOURS
        )
        caption = f"<figcaption>{escape(notes[index])}</figcaption>" if notes else f'<div class="keys">{keys}</div>'
        figures.append(f"<figure><h3>{escape(chart.title)}</h3>{svg(chart, colours)}{caption}</figure>")
    return f'<div class="charts">{"".join(figures)}</div>'


def _settings(manifest: Manifest) -> str:
    settings = msgspec.to_builtins(manifest.settings)
    drift = msgspec.to_builtins(manifest.drift) if isinstance(manifest.drift, Drift) else {}
    media = settings.pop("media")
    fingerprints = manifest.fingerprints
    origin = {
        "tokenizer fingerprint": fingerprints.tokenizer,
        "image mean": ", ".join(map(str, fingerprints.image_mean)),
        "image standard deviation": ", ".join(map(str, fingerprints.image_std)),
        **manifest.software,
        **{f"drift: {name}": value for name, value in drift.items()},
    }
    files = [
        [_text(dataset.dataset), _text(file.file), f"{file.num_annotations:,}", f"{file.num_bytes:,}", _code(file.xxh3)]
        for dataset in manifest.inputs
        for file in dataset.files
    ]
    stored = [
        [_code(file.file), f"{file.num_bytes:,}", _code(file.sha256)] for file in (*manifest.shards, *manifest.tables)
    ]
    overrides = {
        f"{dataset.dataset}: {name}": value
        for dataset in manifest.inputs
        for name, value in msgspec.to_builtins(dataset.media).items()
        if value != media.get(name)
    }
    return "".join(
        [
            f'<div class="charts"><div class="card"><h3>Settings</h3>{_list({**settings, **media, **overrides})}</div>',
            f'<div class="card"><h3>Fingerprints and software</h3>{_list(origin)}</div></div>',
            "<details><summary>Annotation files</summary>",
            _table(("dataset", "file", "#annotations", "#bytes", "XXH3-128"), files),
            "</details><details><summary>Files of the set</summary>",
            _table(("file", "#bytes", "SHA-256"), stored),
            "</details>",
        ]
    )


def _list(items: Mapping[str, object]) -> str:
    rows = (
        f"<dt>{escape(name)}</dt><dd class='mono'>{'none' if value is None else _text(str(value))}</dd>"
        for name, value in items.items()
    )
    return f"<dl>{''.join(rows)}</dl>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of HTML cells. A heading that begins with ``#`` marks a column of numbers."""
    numeric = [name.startswith("#") for name in head]
    cells = "".join(
        f"<th{' class=n' if right else ''}>{escape(name.removeprefix('#'))}</th>" for name, right in zip(head, numeric)
    )
    body = "".join(
        "<tr>"
        + "".join(f'<td class="{"n" if right else "name"}">{cell}</td>' for cell, right in zip(row, numeric))
        + "</tr>"
        for row in rows
    )
    return f'<div class="card scroll"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


def _text(text: str) -> str:
    return escape(printable(text))


def _code(text: str) -> str:
    return f"<code>{_text(text)}</code>"


def _quantiles(values: NDArray[np.int64]) -> str:
    if not values.size:
        return "–"
    lowest, median, high, highest = np.quantile(values, (0, 0.5, 0.95, 1), method="nearest").tolist()
    return f"{lowest:,} to {highest:,}, median {median:,}, 95th percentile {high:,}"


def _ratio(part: int, total: int) -> float:
    return part / total if total else 0.0


def _percent(share: float) -> str:
    return f"{share * 100:.2f} %" if 0 < share < 1 else f"{share * 100:.0f} %"


def _large(count: int) -> str:
    for size, letter in ((10**9, " G"), (10**6, " M")):
        if count >= size:
            return f"{count / size:.4g}{letter}"
    return f"{count:,}"


def _bytes(num_bytes: int) -> str:
    for size, unit in ((10**12, "TB"), (10**9, "GB")):
        if num_bytes >= size:
            return f"{num_bytes / size:.4g} {unit}"
    return f"{num_bytes / 1e6:.1f} MB"
