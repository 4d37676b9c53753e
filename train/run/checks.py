"""Checks of what a run reads and writes, before anything expensive starts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from schemas.errors import ConfigError
from storage.urls import Location
from train.model import pretrained
from train.run.run_dir import ADAPTER_DIR, FINAL_DIR
from train.settings.arguments import TrainArguments
from train.shards.index import ShardIndex, open_shards
from train.shards.reader import ReadSettings


def check_outputs(run_dir: Path, source: Path) -> None:
    """Check that the trained model can be written without replacing the checkpoint that the run starts from.

    Raises:
        ConfigError: its folder is a link or a file, or contains the checkpoint.
    """
    for out in (run_dir / FINAL_DIR, run_dir / ADAPTER_DIR):
        if out.is_symlink() or (out.exists() and not out.is_dir()):
            kind = "a link" if out.is_symlink() else "a file"
            raise ConfigError(
                f"{out} is {kind}, but the trained model is written there: remove it, or give another --output_dir."
            )
        if source.resolve().is_relative_to(out.resolve()):
            raise ConfigError(
                f"--model_name_or_path {source} is what this run would replace at its end: give another --output_dir."
            )


def check_tokenizers(source: Path, args: TrainArguments, index: ShardIndex, eval_index: ShardIndex | None) -> None:
    """Check that all shards were built with the tokenizer and processor of the checkpoint.

    Raises:
        ConfigError: they were not.
    """
    fingerprints = index.manifests[0].fingerprints
    pretrained.check_fingerprints(source, fingerprints, shards=str(args.shards))
    # Reading a tokenizer takes a second: the same fingerprints are not compared twice.
    if eval_index is not None and (of_eval := eval_index.manifests[0].fingerprints) != fingerprints:
        pretrained.check_fingerprints(source, of_eval, shards=str(args.eval_shards))


def open_eval_shards(shards: str) -> ShardIndex:
    """Open the shards to evaluate on. Each of their bins is used once.

    Raises:
        ConfigError: they have weights or epochs.
        ShardError: they are incomplete.
    """
    index = open_shards(shards)
    if index.mixture is not None:
        raise ConfigError(
            f"--eval_shards {shards} gives weights or epochs, but every bin is used once: leave them out."
        )
    return index


def trained_folders(index: ShardIndex, eval_index: ShardIndex) -> list[str]:
    """The folders to evaluate on that are trained on as well."""
    trained = set(map(_resolved, index.folders))
    return [str(folder) for folder in eval_index.folders if _resolved(folder) in trained]


def _resolved(folder: Location) -> Location:
    return folder.resolve() if isinstance(folder, Path) else folder


def check_read_flags(args: TrainArguments, indexes: Sequence[ShardIndex]) -> None:
    """Check how shards are read, and that flags for remote shards have remote shards.

    Raises:
        ConfigError: a value is out of bounds, or a flag would have no effect.
    """
    for index in indexes:
        read_settings(args, index)
    if any(index.is_remote for index in indexes):
        return
    for name in ("read_connections", "cache_dir"):
        if (value := getattr(args, name)) is not None:
            raise ConfigError(
                f"--{name} {value} has no effect: all shards lie on a file system. Leave it out, or give a URL."
            )


def read_settings(args: TrainArguments, index: ShardIndex) -> ReadSettings:
    """How the bins of an index are read.

    Raises:
        ConfigError: a value is out of bounds.
    """
    remote: dict[str, Any] = {}
    if index.is_remote:
        flags = {"connections": args.read_connections, "cache_dir": args.cache_dir, "cache_bytes": args.cache_bytes}
        remote = {name: value for name, value in flags.items() if value is not None}
    return ReadSettings(verify=args.verify, **remote)
