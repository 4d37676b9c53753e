"""The ``vlprep build`` command that builds a set again, as far as it is known here.

Input: the manifest, and what the user named: datasets, model, folders. Output: a :class:`BuildCommand`. A set holds no
paths, and neither does a page: names relative to the working folder stay, an absolute path keeps its last part.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from prep.annotations.registry import Source
from schemas.annotation import ANNOTATION_SUFFIXES
from schemas.manifest import InputDataset, Manifest
from schemas.qwen import DEFAULT_MODEL
from schemas.setting import setting_fields
from schemas.settings import BuildSettings, MediaSettings
from storage.urls import Location, Url, is_url, without_secrets

_HIDDEN = "PATH/"
_UNKNOWN_MODEL = "MODEL"


@dataclass(frozen=True, kw_only=True, slots=True)
class NamedInputs:
    """What the user named for the build or the report.

    Attributes:
        datasets: DATASETS as they were written; empty if they are not known.
        registry, media_root: options beside them.
        model: checkpoint whose tokenizer made the shards; None if it is not known.
    """

    datasets: tuple[str, ...] = ()
    registry: Path | None = None
    media_root: Location | None = None
    model: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildCommand:
    """The command, and sentences about what must be filled in before it can be run."""

    text: str
    notes: tuple[str, ...]


def build_command(
    manifest: Manifest, out: Location, named: NamedInputs, sources: Sequence[Source] = ()
) -> BuildCommand:
    """The ``vlprep build`` command of a set, with all settings that are not defaults.

    Args:
        manifest: of the set.
        out: the set.
        named: what the user named.
        sources: the datasets that ``named.datasets`` are.
    """
    drawn = [(dataset.dataset, dataset.rate) for dataset in manifest.inputs]
    is_known = bool(named.datasets) and [(source.name, float(source.rate)) for source in sources] == drawn
    datasets = list(named.datasets) if is_known else [_dataset(dataset) for dataset in manifest.inputs]
    words = ["vlprep", "build", *map(_portable, datasets)]
    words += ["--out", out.name if isinstance(out, Path) and out.is_absolute() else str(out)]
    if is_known:
        for option, value in (("--registry", named.registry), ("--media-root", named.media_root)):
            words += [] if value is None else [option, _portable(value.url if isinstance(value, Url) else str(value))]
    model = named.model or _UNKNOWN_MODEL
    words += [] if model == DEFAULT_MODEL else ["--model", _portable(model)]
    words += _setting_words(manifest)
    return BuildCommand(text=shlex.join(words), notes=tuple(_notes(words, manifest, is_known=is_known)))


def _dataset(dataset: InputDataset) -> str:
    """A dataset of which only the manifest is known: a file of this name, or a table of the registry."""
    files = [file.file for file in dataset.files]
    is_file = len(files) == 1 and files[0] in {dataset.dataset + suffix for suffix in ANNOTATION_SUFFIXES}
    share = "" if dataset.rate == 1 else f"%{dataset.rate * 100:.12g}"
    return f"{_HIDDEN + files[0] if is_file else dataset.dataset}{share}"


def _portable(word: str) -> str:
    """A path or URL without secrets and without folders of this machine."""
    if is_url(word):
        return without_secrets(word)
    return f"{_HIDDEN}{Path(word).name}" if Path(word).is_absolute() else word


def _setting_words(manifest: Manifest) -> list[str]:
    words = []
    for kind, settings in ((BuildSettings, manifest.settings), (MediaSettings, manifest.settings.media)):
        for field in setting_fields(kind).values():
            value = getattr(settings, field.name)
            if value in (None, msgspec.UNSET) or value == field.default:
                continue
            words.append(f"--{field.name.replace('_', '-')}")
            words += [] if field.kind is bool else [str(value)]
    return words


def _notes(words: Sequence[str], manifest: Manifest, *, is_known: bool) -> list[str]:
    notes = []
    if any(word.startswith(_HIDDEN) for word in words):
        notes.append("Put the folder in place of PATH: a page holds no absolute path.")
    if _UNKNOWN_MODEL in words:
        notes.append(
            f"Put the checkpoint of the build in place of {_UNKNOWN_MODEL}: the set holds the fingerprint of its "
            f"tokenizer alone, {manifest.fingerprints.tokenizer}."
        )
    if not is_known:
        notes.append(
            "The set does not hold --media-root and --registry. Add them, if the media lie in another folder than the "
            "annotations, or the datasets are registered in another file than datasets.toml."
        )
        if any(dataset.rate != 1 for dataset in manifest.inputs):
            notes.append("A share contains the sampling_rate of a registered dataset. Leave it out, if that is all.")
    return notes
