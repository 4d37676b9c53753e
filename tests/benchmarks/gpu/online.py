"""Batches as the upstream trainer makes them, from annotations and JPEG files while training: a bin -> its samples.

Worker processes open each image, run the Pillow image processor of transformers, tokenize and collate. A batch has
the samples of one bin, so every contender takes the same samples in the same step. That favours the upstream trainer,
whose batches are drawn at random: their numbers of tokens vary from step to step.

Token ids, labels and positions come from the functions of this project, which are faster than those of the upstream
trainer, so differences in speed are in the images and in what is done with the batch.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from prep.annotations.validation import parse_record
from prep.samples.mrope import position_ids
from prep.samples.text import build_templates, expand
from prep.samples.tokenizer import TextTokenizer
from schemas.qwen import FACTOR, IGNORE_INDEX, Grid
from tests.benchmarks.gpu.corpus import Corpus

PREFETCH = 2
"""Batches that a worker prepares ahead, the default of ``DataLoader``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Content:
    """What a batch holds, however it is arranged.

    Attributes:
        lengths: tokens of every sample.
        num_targets: targets.
        grids: sizes of all images.
    """

    lengths: tuple[int, ...]
    num_targets: int
    grids: tuple[Grid, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of all samples, without padding."""
        return sum(self.lengths)


@dataclass(frozen=True, kw_only=True, slots=True)
class OnlineBatch:
    """Arguments of the model of transformers.

    Attributes:
        content: what it holds.
        input_ids: (S, L) int64 padded, or (1, L) concatenated.
        labels: of the same shape, not shifted.
        position_ids: (3, S, L) or (3, 1, L) int64.
        attention_mask: (S, L) bool; or (S+1,) int32 boundaries, which upstream passes in its place.
        pixel_values: (N, 1176) float32.
        image_grid_thw: (M, 3) int64.
    """

    content: Content
    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    attention_mask: torch.Tensor
    pixel_values: torch.Tensor
    image_grid_thw: torch.Tensor

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> OnlineBatch:
        """Return the batch with ``function`` applied to its tensors."""
        tensors = {field.name: function(getattr(self, field.name)) for field in fields(self) if field.name != "content"}
        return replace(self, **tensors)  # type: ignore[arg-type]

    def pin_memory(self) -> OnlineBatch:
        """Return the batch in page-locked memory; ``DataLoader`` calls this."""
        return self.map(torch.Tensor.pin_memory)

    def to(self, device: torch.device, non_blocking: bool = False) -> OnlineBatch:
        """Return the batch on ``device``."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sample:
    """A sample before it is collated: ids (L,), labels (L,), positions (3, L), pixel values (N, 1176), grid."""

    ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    positions: NDArray[np.int32]
    pixels: NDArray[np.float32]
    grid: Grid


class OnlineBins(Dataset[OnlineBatch]):
    """Bins in the order of training, repeated, each processed when it is requested.

    Args:
        corpus: annotations and images.
        checkpoint: folder with the tokenizer.
        records: records of every bin.
        order: bins in the order of training.
        padded: whether samples are padded to one length; otherwise they are concatenated.
        gate: workers wait while it is not set, so that they do not disturb others' turns.
    """

    def __init__(
        self,
        corpus: Corpus,
        checkpoint: Path,
        records: Sequence[NDArray[np.int64]],
        order: Sequence[int],
        *,
        padded: bool,
        gate: Event,
    ) -> None:
        self._corpus, self._records, self._order, self._gate = corpus, records, order, gate
        self._collate = _pad if padded else _concatenate
        self._tokenizer = TextTokenizer((checkpoint / "tokenizer.json").read_bytes())
        size = {"shortest_edge": FACTOR**2, "longest_edge": corpus.max_pixels}
        self._processor = Qwen2VLImageProcessorPil(size=size)

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> OnlineBatch:
        self._gate.wait()
        return self.batch_of(self._order[index])

    def batch_of(self, bin_id: int) -> OnlineBatch:
        """The batch of a bin."""
        return self._collate([self._sample(record) for record in self._records[bin_id].tolist()])

    def _sample(self, record: int) -> _Sample:
        annotation = parse_record(self._corpus.lines[record]).annotation
        assert annotation is not None, f"record {record} is not valid"
        with Image.open(self._corpus.media_root / f"{record}.jpg") as opened:
            processed: Any = self._processor(images=[opened.convert("RGB")], return_tensors="np")
        grid = Grid(*processed["image_grid_thw"][0].tolist())
        (template,) = build_templates([annotation], self._tokenizer)
        ids, labels = expand(template, [grid])
        positions = position_ids(ids, [grid], [0.0])
        return _Sample(ids=ids, labels=labels, positions=positions, pixels=processed["pixel_values"], grid=grid)


def _pad(samples: Sequence[_Sample]) -> OnlineBatch:
    """Samples as rows, padded at the end to the longest."""
    longest = max(sample.ids.size for sample in samples)
    input_ids = np.zeros((len(samples), longest), dtype=np.int64)
    labels = np.full((len(samples), longest), IGNORE_INDEX, dtype=np.int64)
    positions = np.ones((3, len(samples), longest), dtype=np.int64)
    mask = np.zeros((len(samples), longest), dtype=np.bool_)
    for row, sample in enumerate(samples):
        length = sample.ids.size
        input_ids[row, :length], labels[row, :length], mask[row, :length] = sample.ids, sample.labels, True
        positions[:, row, :length] = sample.positions
    return _batch(samples, input_ids, labels, positions, mask)


def _concatenate(samples: Sequence[_Sample]) -> OnlineBatch:
    """All samples in one row; their boundaries take the place of the mask."""
    input_ids = np.concatenate([sample.ids for sample in samples], dtype=np.int64)[None]
    labels = np.concatenate([sample.labels for sample in samples], dtype=np.int64)[None]
    positions = np.concatenate([sample.positions for sample in samples], axis=1, dtype=np.int64)[:, None]
    boundaries = np.cumsum([0, *(sample.ids.size for sample in samples)], dtype=np.int32)
    return _batch(samples, input_ids, labels, positions, boundaries)


def _batch(
    samples: Sequence[_Sample],
    input_ids: NDArray[np.int64],
    labels: NDArray[np.int64],
    positions: NDArray[np.int64],
    mask: NDArray[Any],
) -> OnlineBatch:
    content = Content(
        lengths=tuple(sample.ids.size for sample in samples),
        num_targets=sum(int((sample.labels != IGNORE_INDEX).sum()) for sample in samples),
        grids=tuple(sample.grid for sample in samples),
    )
    return OnlineBatch(
        content=content,
        input_ids=torch.from_numpy(input_ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(positions),
        attention_mask=torch.from_numpy(mask),
        pixel_values=torch.from_numpy(np.concatenate([sample.pixels for sample in samples])),
        image_grid_thw=torch.tensor([sample.grid for sample in samples]),
    )


class OnlineFeed:
    """Batches from worker processes, which work during the turns of their contender only."""

    def __init__(
        self,
        corpus: Corpus,
        checkpoint: Path,
        records: Sequence[NDArray[np.int64]],
        order: Sequence[int],
        *,
        padded: bool,
        num_workers: int,
        pinned: bool,
    ) -> None:
        self._gate = multiprocessing.get_context("fork").Event()
        self._bins = OnlineBins(corpus, checkpoint, records, order, padded=padded, gate=self._gate)
        self._num_ahead = num_workers * PREFETCH
        self._loader = DataLoader(
            self._bins,
            batch_size=None,
            num_workers=num_workers,
            prefetch_factor=PREFETCH,
            pin_memory=pinned,
            multiprocessing_context="fork",
        )
        self._batches: Iterator[OnlineBatch] | None = None

    def start(self) -> None:
        """Begin a turn. What was prepared during the turns of others is dropped."""
        is_new = self._batches is None
        self._gate.set()
        if not is_new:
            for _ in range(self._num_ahead):
                self.next()

    def next(self) -> OnlineBatch:
        """The next batch, of the next epoch if this one is over."""
        if self._batches is not None and (batch := next(self._batches, None)) is not None:
            return batch
        self._batches = iter(self._loader)
        return next(self._batches)

    def stop(self) -> None:
        """End a turn."""
        self._gate.clear()

    def batch_of(self, bin_id: int) -> OnlineBatch:
        """The batch of a bin, made here and now."""
        return self._bins.batch_of(bin_id)

    def close(self) -> None:
        """End the workers."""
        self._gate.set()
        self._batches = None
