"""Collects what a report shows, renders the page and writes it.

Input: a finished set, and as far as they are available the tokenizer and the datasets that made it. Output: an HTML
file below 3 MB.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import storage
from prep.annotations.registry import Source
from prep.inspect.report.choice import Choice, choose_samples, fitting
from prep.inspect.report.command import BuildCommand, NamedInputs, build_command
from prep.inspect.report.gallery import DETAILS, Detail, Thumbnail, make_cards, thumbnail
from prep.inspect.report.page import Reject, render_page
from prep.inspect.report.sources import RecordKey, SourceRecord, read_originals
from prep.inspect.report.statistics import Statistics, gather
from prep.inspect.transcript import Transcriber, find_transcriber, warn_without_texts
from schemas.errors import ConfigError
from schemas.manifest import REPORT_FILE
from schemas.qwen import DEFAULT_MODEL
from schemas.wording import counted, size_text
from storage.files import write_synced
from storage.shard_set import ShardSet, open_set
from storage.urls import Location, Url

MAX_BYTES = 3_000_000
"""A larger page shows smaller thumbnails and shorter texts."""

MAX_SAMPLES = 240
"""Samples of a page: four of every kind in 60 datasets of one kind, and fewer of each in more datasets."""

_START_BYTES = 256

_REJECT_SIDE = 0.4
"""Side of the image of a reject, relative to that of a sample."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReportRequest:
    """What a report shows.

    Attributes:
        named: what the user named. Its model is a checkpoint folder or hub id of the tokenizer. By default, the default
            model is used if it made these shards and is in the local hub cache. Otherwise the page has no texts.
        sources: the datasets of the build, for sizes before resizing and for images of rejected records.
        bins: bins to show completely, instead of a choice of samples.
        samples: samples to show, as ``dataset:record``, likewise.
    """

    named: NamedInputs = field(default_factory=NamedInputs)
    sources: tuple[Source, ...] = field(default=())
    bins: tuple[int, ...] = ()
    samples: tuple[str, ...] = ()


def write_report(folder: Location, out: Location, request: ReportRequest) -> str:
    """Write the page about a set of shards.

    Args:
        folder: the set, a folder or URL.
        out: file or URL to write. Its folder is created.
        request: what to show.

    Returns:
        Where the page is and how large, in words.

    Raises:
        ShardError: the set is incomplete or damaged.
        ConfigError: the model or a dataset is not that of the build, there is no such bin or sample, or ``out`` cannot
            be written.
    """
    if isinstance(out, Path):
        _require_page(out)
    shards = open_set(folder)
    transcriber = find_transcriber(request.named.model, shards.manifest)
    # The name of a folder may contain bytes that are not text.
    page = render_report(shards, transcriber, request).encode(errors="replace")
    if isinstance(out, Url):
        with TemporaryDirectory(prefix="vlprep-") as scratch:
            path = Path(scratch) / REPORT_FILE
            path.write_bytes(page)
            storage.upload(path, out)
    else:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_synced(out, page)
        except OSError as error:
            raise ConfigError(f"--out {out} cannot be written: {error.strerror}. Give another file.") from error
    warn_without_texts(transcriber)
    return f"{out}: {size_text(len(page))}"


def _require_page(out: Path) -> None:
    """Check that what is overwritten is an HTML page, not a file of the set or the like.

    Raises:
        ConfigError: it is another file.
    """
    if out.is_file() and out.stat().st_size:
        with out.open("rb") as file:
            is_page = file.read(_START_BYTES).lstrip().lower().startswith(b"<!doctype html")
        if not is_page:
            raise ConfigError(f"--out {out} would overwrite a file that is not an HTML page. Give another file.")


def render_report(shards: ShardSet, transcriber: Transcriber, request: ReportRequest | None = None) -> str:
    """Render the page as HTML.

    Args:
        shards: the set.
        transcriber: reads the token ids. Without a tokenizer, it gives the count of tokens instead of the text.
        request: what to show.

    Raises:
        ConfigError: a dataset is not that of the build, or there is no such bin or sample.
        ShardError: a table or a shard is damaged.
    """
    request = request or ReportRequest()
    choices = choose_samples(shards, bins=request.bins, samples=request.samples)
    note = _note(transcriber, num_hidden=max(0, len(choices) - MAX_SAMPLES))
    choices = fitting(choices, MAX_SAMPLES)
    statistics = gather(shards)
    records = read_originals(
        request.sources,
        shards.manifest,
        packed={(choice.dataset, choice.record) for choice in choices},
        rejected={(example.dataset, example.record) for code in statistics.rejects for example in code.examples},
    )
    named = request.named
    if named.model is None and transcriber.reads_text:
        named = replace(named, model=DEFAULT_MODEL)
    command = build_command(shards.manifest, shards.folder, named, request.sources)
    page = ""
    for detail in DETAILS:
        page = _render(shards, transcriber, choices, statistics, records, detail, note, command)
        if len(page.encode(errors="replace")) < MAX_BYTES:
            break
    return page


def _render(
    shards: ShardSet,
    transcriber: Transcriber,
    choices: Sequence[Choice],
    statistics: Statistics,
    records: Mapping[RecordKey, SourceRecord],
    detail: Detail,
    note: str,
    command: BuildCommand,
) -> str:
    originals = {key: record.sizes for key, record in records.items()}
    rejects = [
        Reject(
            code=reject.code,
            num_rejected=reject.num_rejected,
            examples=tuple(
                (example, _thumbnail(records.get((example.dataset, example.record)), example.message, detail))
                for example in reject.examples
            ),
        )
        for reject in statistics.rejects
    ]
    cards = make_cards(shards, choices, transcriber, originals, detail)
    name = shards.folder.resolve().name if isinstance(shards.folder, Path) else shards.folder.name
    return render_page(name, shards.manifest, statistics, cards, rejects, note, command)


def _thumbnail(record: SourceRecord | None, message: str, detail: Detail) -> Thumbnail | None:
    if record is None or record.image is None:
        return None
    return thumbnail(record.image, int(detail.side * _REJECT_SIDE), f"first image of the record: {message}")


def _note(transcriber: Transcriber, *, num_hidden: int) -> str:
    note = "What the model reads, with thumbnails of the images and of a few frames of each video."
    if not transcriber.reads_text:
        note += " The texts are missing, because the tokenizer is not available. Pass its checkpoint as --model."
    if num_hidden:
        note += f" {counted(num_hidden, 'more sample')} would not fit; name those that you want with --sample."
    return note
