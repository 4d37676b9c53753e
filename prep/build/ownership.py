"""Keeps a build from replacing a finished set of other annotation files.

Input: the work folder of an output, and the annotation files of the build. Output: nothing, or an error that names
both. Cost: reading one manifest.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from prep.build.work import WorkFolder
from schemas.errors import ConfigError, ShardError
from schemas.manifest import MANIFEST_FILE, InputDataset, Manifest, decode_manifest
from storage.urls import Location


def require_own_set(work: WorkFolder, files: Sequence[Location], inputs: Sequence[InputDataset]) -> None:
    """Check that a finished set in the output shares an annotation file with the build.

    A shared file has the same path, or the same content. If the work folder is gone, the same name is enough.

    Raises:
        ConfigError: the set has other annotation files.
    """
    manifest = _manifest(work)
    if manifest is None or not manifest.inputs:
        return
    shares_path = work.has_inputs(files)
    if shares_path is None:
        shares_path = not _names(manifest.inputs).isdisjoint(_names(inputs))
    if shares_path or not _contents(manifest.inputs).isdisjoint(_contents(inputs)):
        return
    raise ConfigError(
        f"--out {work.output} holds a finished set of {_described(manifest.inputs)}, not of {_described(inputs)}. Give "
        "another --out, or replace the set with --overwrite."
    )


def _manifest(work: WorkFolder) -> Manifest | None:
    """The manifest in the output. None if there is none, or none that this version reads."""
    data = work.output.read(MANIFEST_FILE)
    if data is not None:
        with suppress(ShardError):
            return decode_manifest(data, where=f"{work.output}, {MANIFEST_FILE}")
    return None


def _names(inputs: Sequence[InputDataset]) -> set[tuple[str, str]]:
    return {(dataset.dataset, file.file) for dataset in inputs for file in dataset.files}


def _contents(inputs: Sequence[InputDataset]) -> set[str]:
    return {file.xxh3 for dataset in inputs for file in dataset.files}


def _described(inputs: Sequence[InputDataset]) -> str:
    names = [f"{dataset.dataset} ({dataset.files[0].file}{', …' if dataset.files[1:] else ''})" for dataset in inputs]
    return ", ".join(names[:3]) + (", …" if names[3:] else "")
