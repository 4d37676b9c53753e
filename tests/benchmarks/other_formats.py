"""Loaders with formats of their own, over the arrays of a set of shards: LitData and MosaicML Streaming."""

from __future__ import annotations

import importlib.util
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.benchmarks.turns import Prepare, Work, run_apart
from train.shards.index import ShardIndex, open_shards
from train.shards.reader import read_checked_bin

ARRAYS = ("input_ids", "labels", "position_ids", "cu_seqlens", "grid_thw", "media_type", "pixels")
"""The arrays of a bin."""

Samples = Iterable[Mapping[str, NDArray[Any]]]


def write_litdata(shards: Path, folder: Path) -> None:
    """Write all bins in the format of LitData."""
    from litdata.streaming.writer import BinaryWriter

    folder.mkdir()
    writer = BinaryWriter(str(folder), chunk_bytes="64MB")
    for bin_id, arrays in enumerate(_arrays(shards)):
        writer.add_item(bin_id, arrays)
    writer.done()
    writer.merge()


def open_litdata(folder: Path) -> Samples:
    """The samples that :func:`write_litdata` wrote."""
    from litdata import StreamingDataset

    samples: Samples = StreamingDataset(str(folder), shuffle=False)
    return samples


def write_mosaicml(shards: Path, folder: Path) -> None:
    """Write all bins in the format of MosaicML Streaming."""
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns=dict.fromkeys(ARRAYS, "ndarray")) as writer:
        for arrays in _arrays(shards):
            writer.write(arrays)


def open_mosaicml(folder: Path) -> Samples:
    """The samples that :func:`write_mosaicml` wrote."""
    from streaming import StreamingDataset

    samples: Samples = StreamingDataset(local=str(folder), shuffle=False, batch_size=1)
    return samples


def _arrays(shards: Path) -> Iterator[dict[str, NDArray[Any]]]:
    """The arrays of every bin."""
    index = open_shards(shards)
    for bin_id in range(index.num_bins):
        bin_ = read_checked_bin(index, bin_id)
        yield {name: np.array(getattr(bin_, name)) for name in ARRAYS}


OTHER_FORMATS: dict[str, tuple[str, Callable[[Path, Path], None], Callable[[Path], Samples]]] = {
    "LitData": ("litdata", write_litdata, open_litdata),
    "MosaicML Streaming": ("streaming", write_mosaicml, open_mosaicml),
}
"""Name of a loader -> its module, how its files are written, and how they are read."""


def other_formats(shards: Path, folder: Path, num_kept: int) -> Iterator[tuple[str, Prepare]]:
    """Write the files of the loaders that are installed.

    Yields:
        Two contenders for each: one takes a sample at a time, the other makes tensors of it and keeps ``num_kept``.
    """
    for name, (module, write, read) in OTHER_FORMATS.items():
        if importlib.util.find_spec(module):
            run_apart(write, shards, folder / module)
            for kept in (0, num_kept):
                yield kept_name(name, kept), partial(_prepare, shards, read, folder / module, kept)


def kept_name(name: str, num_kept: int) -> str:
    """Name of a loader of which so many samples are kept."""
    return f"{name}, {num_kept} kept" if num_kept else name


def _prepare(shards: Path, read: Callable[[Path], Samples], folder: Path, num_kept: int) -> Callable[[], Work]:
    index = open_shards(shards)
    return lambda: _read_samples(read(folder), index, num_kept)


def _read_samples(samples: Samples, index: ShardIndex, num_kept: int) -> Work:
    tokens = 0
    kept: deque[dict[str, torch.Tensor]] = deque(maxlen=num_kept)
    for sample in samples:
        tokens += sample["input_ids"].size
        if num_kept:
            kept.append({name: torch.from_numpy(array) for name, array in sample.items()})
    assert tokens == int(index.num_tokens.sum())
    return Work(tokens, int(index.num_bytes.sum()))
