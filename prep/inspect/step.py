"""The bins of a training step and the checkpoint of its run, for ``vlprep show --step``.

Input: the folder of a run, and a step. Output: a :class:`StepBin` for each bin that a rank computes. The order belongs
to the trainer, which the preparation does not import: ``python -m train.order`` runs as a process and answers in JSON.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from prep.inspect.transcript import Transcriber, find_transcriber
from schemas.errors import ConfigError, VlprepError
from storage.shard_set import ShardSet, open_set
from storage.urls import Location, Url, parse_location

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


class StepBin(msgspec.Struct, frozen=True, kw_only=True):
    """A bin of a step: the micro-step and the rank that computes it, its set of shards, its number there."""

    micro_step: int
    rank: int
    folder: str
    bin: int


def open_bins(
    folder: Location, *, bin_id: int | None, step: int | None, model: str | None
) -> Iterator[tuple[str, ShardSet, int, Transcriber]]:
    """Open the sets of :func:`shown_bins`, each once.

    Args:
        folder: a set of shards, or with ``step`` the folder of a run.
        bin_id: a bin of the set.
        step: a step of the run.
        model: checkpoint folder or hub id of the tokenizer. By default the checkpoint of the run.

    Yields:
        For each bin a heading, its set, its number there, and what decodes its text.

    Raises:
        ConfigError: as :func:`shown_bins`, or the model has another tokenizer.
    """
    if model is None and step is not None:
        model = checkpoint_of_run(folder)
    sets: dict[Location, tuple[ShardSet, Transcriber]] = {}
    for heading, shards_folder, shown_bin in shown_bins(folder, bin_id=bin_id, step=step):
        if shards_folder not in sets:
            shards = open_set(shards_folder)
            sets[shards_folder] = shards, find_transcriber(model, shards.manifest)
        shards, transcriber = sets[shards_folder]
        yield heading, shards, shown_bin, transcriber


def shown_bins(folder: Location, *, bin_id: int | None, step: int | None) -> Iterator[tuple[str, Location, int]]:
    """What ``show`` prints: for each bin a heading, its set of shards, and its number there.

    Args:
        folder: a set of shards, or with ``step`` the folder of a run.
        bin_id: a bin of the set.
        step: a step of the run.

    Raises:
        ConfigError: both or neither are given; otherwise as :func:`bins_of_step`.
    """
    if (bin_id is None) == (step is None):
        raise ConfigError("give either --bin N, of the shards in DIR, or --step N, of the run in DIR.")
    if bin_id is not None:
        yield "", folder, bin_id
    elif step is not None:
        if isinstance(folder, Url):
            raise ConfigError(f"--step needs the folder of a run, which is not behind a URL such as {folder}.")
        for index, shown in enumerate(bins_of_step(folder, step)):
            heading = f"━━ step {step}, micro-step {shown.micro_step}, rank {shown.rank} ━━"
            yield f"\n{heading}" if index else heading, parse_location(shown.folder), shown.bin


def bins_of_step(run: Path, step: int) -> list[StepBin]:
    """Ask ``train.order`` for the bins of a step.

    Raises:
        ConfigError: the folder is not that of a run, or the run has no such step.
        VlprepError: its shards are incomplete, or the trainer is not installed.
    """
    command = [sys.executable, "-m", "train.order", "--run", str(run), "--step", str(step), "--json"]
    answer = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if answer.returncode:
        lines = answer.stderr.strip().splitlines() or ["it ended without a message"]
        reason = lines[-1].removeprefix("error: ")
        if answer.returncode == ConfigError.exit_code:
            raise ConfigError(reason)
        raise VlprepError(f"python -m train.order failed for step {step} of {run}: {reason}")
    return msgspec.json.decode(answer.stdout, type=list[StepBin])


def checkpoint_of_run(run: Location) -> str | None:
    """The folder of the checkpoint that a run started from, if its record names one that is still there."""
    try:
        record = tomllib.loads((run / "settings.toml").read_text(encoding="utf-8")) if isinstance(run, Path) else {}
        checkpoint = str(record["run"]["checkpoint"])
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, KeyError, TypeError):
        return None
    return checkpoint if Path(checkpoint).is_dir() else None
