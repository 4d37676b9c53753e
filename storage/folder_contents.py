"""Says what a folder is that a user gave in place of another: a run, a checkpoint, images, shards of another tool.

In: a folder of a file system here. Out: words. Cost: the names in it, of at most 10,000 entries.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from schemas.annotation import ANNOTATION_SUFFIXES
from schemas.manifest import MANIFEST_FILE
from schemas.wording import counted

_MAX_ENTRIES = 10_000

_GROUPS = {
    "image": (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"),
    "video": (".mp4", ".mkv", ".webm", ".avi", ".mov"),
    "tar file": (".tar",),
    "JSON or Parquet file": ANNOTATION_SUFFIXES,
}

_KINDS = (
    ({MANIFEST_FILE, "bins.parquet"}, "a set of shards"),
    ({"settings.toml", "metrics.jsonl"}, "the folder of a training run"),
    ({"settings.toml", "final"}, "the folder of a training run"),
    ({"config.json", "tokenizer.json"}, "a model checkpoint"),
    ({"config.json", "model.safetensors"}, "a model checkpoint"),
    ({"adapter_config.json"}, "an adapter of peft"),
    ({"dataset_info.json", "state.json"}, "a dataset that save_to_disk of Hugging Face datasets wrote"),
    ({"dataset_dict.json"}, "a dataset that save_to_disk of Hugging Face datasets wrote"),
    ({".nv-meta"}, "a dataset of Megatron-Energon"),
)
"""Names of which all lie in a folder, and what it is then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FolderContents:
    """What a folder is.

    Attributes:
        what: in words, with an article.
        data_files: names of the JSON and Parquet files in it, unless these belong to something else.
    """

    what: str
    data_files: tuple[str, ...] = ()

    @property
    def is_shards(self) -> bool:
        """Whether it is a set of shards."""
        return self.what == _KINDS[0][1]

    @property
    def is_run(self) -> bool:
        """Whether it is the folder of a training run."""
        return self.what == _KINDS[1][1]


def describe_folder(folder: Path) -> FolderContents:
    """What a folder is, by the names in it."""
    try:
        with os.scandir(folder) as entries:
            names = {entry.name: entry.is_dir() for entry in islice(entries, _MAX_ENTRIES)}
    except OSError as error:
        return FolderContents(what=f"a folder that cannot be read ({error.strerror})")
    for members, what in _KINDS:
        if names.keys() >= members:
            return FolderContents(what=what)
    if "index.json" in names and any(name.partition(".mds")[1] for name in names):
        return FolderContents(what="a set of shards of MosaicML Streaming")
    if not names:
        return FolderContents(what="an empty folder")
    groups = Counter("folder" if is_folder else _group(name) for name, is_folder in names.items())
    *counts, last = [counted(count, noun) for noun, count in groups.most_common()]
    data = sorted(
        name for name, is_folder in names.items() if not is_folder and name.lower().endswith(ANNOTATION_SUFFIXES)
    )
    return FolderContents(
        what=f"a folder with {', '.join(counts)}{' and ' if counts else ''}{last}",
        data_files=tuple(data),
    )


def _group(name: str) -> str:
    return next((noun for noun, suffixes in _GROUPS.items() if name.lower().endswith(suffixes)), "other file")
