"""Collects what a report shows, renders the page and writes it.

Input: a finished set, and the tokenizer that made it if it is available. Output: an HTML file.
"""

from __future__ import annotations

from pathlib import Path

from prep.inspect.report.page import render_page
from prep.inspect.report.samples import bin_section
from prep.inspect.report.statistics import gather, notable_bins
from prep.inspect.transcript import Transcriber, cached_transcriber, open_transcriber
from schemas.errors import ConfigError
from schemas.qwen import DEFAULT_MODEL
from storage.files import write_synced
from storage.shard_set import ShardSet, open_set
from storage.urls import Location

_MAX_BINS = 3


def write_report(folder: Location, out: Path, model: str | None) -> int:
    """Write the page about a set of shards.

    Args:
        folder: the set, a folder or URL.
        out: file to write.
        model: checkpoint folder or hub id of the tokenizer. By default, the default model is used if it made these
            shards and is in the local hub cache. Otherwise the page has no texts and says so.

    Returns:
        Size of the page in bytes.

    Raises:
        ShardError: the set is incomplete or damaged.
        ConfigError: ``model`` is not the checkpoint of the build, or ``out`` cannot be written.
    """
    shards = open_set(folder)
    if model is not None:
        transcriber = open_transcriber(model, shards.manifest)
    else:
        transcriber = cached_transcriber(DEFAULT_MODEL, shards.manifest) or Transcriber(None)
    # The name of a folder may contain bytes that are not text.
    page = render_report(shards, transcriber).encode(errors="replace")
    try:
        write_synced(out, page)
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror}.") from error
    return len(page)


def render_report(shards: ShardSet, transcriber: Transcriber) -> str:
    """Render the page as HTML.

    Args:
        shards: the set.
        transcriber: reads the token ids. Without a tokenizer, it gives the count of tokens instead of the text.

    Raises:
        ShardError: a table or a shard is damaged.
    """
    bins = [bin_section(shards, bin_id, reason, transcriber) for bin_id, reason in notable_bins(shards, _MAX_BINS)]
    note = "A few bins in the order in which the model reads them, with thumbnails of their images and videos."
    if not transcriber.reads_text:
        note += " Their texts are missing, because the tokenizer is not available. Pass its checkpoint as --model."
    name = shards.folder.resolve().name if isinstance(shards.folder, Path) else shards.folder.name
    return render_page(name, shards.manifest, gather(shards), bins, note)
