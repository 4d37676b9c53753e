"""Checks the contents of one bin: its arrays against each other, against ``bins.parquet`` and against the ledger.

Input: a :class:`~schemas.bins.Bin` that could be read. Output: findings, one per broken rule. Cost: a few passes over
the tokens, and decompressing the pixels.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import msgspec
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from prep.inspect.verify.findings import Finding, inconsistent, unreadable
from prep.inspect.verify.positions import position_problem
from prep.inspect.verify.statistics import modality
from schemas.annotation import SampleBox, SampleRef
from schemas.bins import MEDIA_IMAGE, MEDIA_VIDEO, SAMPLES_MEMBER, Bin, frame_shape
from schemas.errors import ShardError
from schemas.qwen import (
    CONTROL_TOKENS,
    ENDOFTEXT,
    IGNORE_INDEX,
    IM_END,
    IM_START,
    IMAGE_PAD,
    MERGE_SIZE,
    NUM_TOKENS,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    Grid,
)
from schemas.settings import BuildSettings
from schemas.tables import LedgerRow, StoredBin
from schemas.wording import counted
from storage.pixels import decode_pixels
from storage.shard_set import ledger_rows

_PADS = {MEDIA_IMAGE: IMAGE_PAD, MEDIA_VIDEO: VIDEO_PAD}
_VISION = (VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)
_GROUNDING = {CONTROL_TOKENS[f"<|{name}_start|>"]: CONTROL_TOKENS[f"<|{name}_end|>"] for name in ("object_ref", "box")}
_USED = (IM_START, IM_END, *_VISION, *_GROUNDING.keys(), *_GROUNDING.values())
_UNUSED = {token: text for text, token in CONTROL_TOKENS.items() if token not in _USED}
_EXAMPLES = 3


@dataclass(frozen=True)
class BinCheck:
    """A bin, and everything that it is compared with.

    Attributes:
        bin: the bin.
        row: its row of ``bins.parquet``.
        ledger: the ledger's rows of its samples (columns of ``LedgerRow``), sorted by slot. None if the ledger cannot
            be read.
        settings: settings of the build.
    """

    bin: Bin
    row: StoredBin
    ledger: pa.Table | None
    settings: BuildSettings

    def findings(self) -> Iterator[Finding]:
        """Check everything. Some checks run only if those that they rely on pass."""
        problems = [*self._tokens(), *self._grounding(), *self._labels()]
        media = list(self._grids()) or list(self._media())
        problems += media
        if not media:
            problems += self._positions()
        problems += [*self._budgets(), *self._samples(), *self._counts()]
        yield from (inconsistent(self.row.where, problem) for problem in problems)
        if not media:  # the tokens bound the size of the pixels
            try:
                decode_pixels(self.bin, where=self.row.where)
            except ShardError as error:
                yield unreadable(self.row.where, error)

    def modalities(self) -> Counter[tuple[str, str]]:
        """Count samples by dataset and modality. Empty if the bin is too damaged to tell."""
        counts = Counter[tuple[str, str]]()
        if len(self._runs) == self.bin.media_type.size and self._references is not None:
            for reference, first, last in zip(self._references, self._first_media, self._first_media[1:]):
                kinds = self.bin.media_type[first:last].tolist()
                counts[reference.dataset, modality(kinds.count(MEDIA_IMAGE), kinds.count(MEDIA_VIDEO))] += 1
        return counts

    @cached_property
    def _references(self) -> list[SampleRef] | None:
        """Contents of ``samples.json``. None if it cannot be read."""
        try:
            return self.bin.samples()
        except ShardError:
            return None

    @cached_property
    def _lengths(self) -> NDArray[np.int32]:
        return np.diff(self.bin.cu_seqlens)

    @cached_property
    def _grid_list(self) -> list[tuple[Grid, int]]:
        return self.bin.grids()

    @cached_property
    def _runs(self) -> list[tuple[int, int]]:
        """(start, end) of every run of equal pad tokens."""
        ids = self.bin.input_ids
        # (L,): the pad token, or 0 for any other token.
        pads = np.where((ids == IMAGE_PAD) | (ids == VIDEO_PAD), ids, 0)
        edges = np.flatnonzero(np.diff(pads, prepend=0, append=0)).tolist()
        return [(start, end) for start, end in itertools.pairwise(edges) if pads[start]]

    @cached_property
    def _first_media(self) -> list[int]:
        """(S + 1,): sample ``s`` has the media ``[s]`` to ``[s + 1]`` (exclusive), by the runs of pad tokens."""
        starts = np.asarray([start for start, _ in self._runs], dtype=np.int64)
        return [int(index) for index in np.searchsorted(starts, self.bin.cu_seqlens)]

    def _describe(self, token: int) -> str:
        sample = int(np.searchsorted(self.bin.cu_seqlens, token, side="right")) - 1
        return f"token {token} (sample {sample})"

    def _tokens(self) -> Iterator[str]:
        ids, first = self.bin.input_ids, self.bin.cu_seqlens[:-1]
        # (S,): samples of continued pretraining, which have no chat template, end with <|endoftext|>.
        is_text = ids[self.bin.cu_seqlens[1:] - 1] == ENDOFTEXT
        if ids.size > self.settings.max_length:
            yield f"the bin has {ids.size} tokens, max_length is {self.settings.max_length}"
        is_outside = (ids < 0) | (ids >= NUM_TOKENS)
        if is_outside.any():
            at = int(np.argmax(is_outside))
            yield f"input_ids is {ids[at]} at {self._describe(at)}; allowed: 0 to {NUM_TOKENS - 1}"
        for token, text in _UNUSED.items():
            is_unused = ids == token
            if token == ENDOFTEXT:
                is_unused[self.bin.cu_seqlens[1:] - 1] = False
            if is_unused.any():
                at = int(np.argmax(is_unused))
                yield f"input_ids has {text} at {self._describe(at)}; no build writes this token"
        for sample in np.flatnonzero(~is_text & (ids[first] != IM_START))[:_EXAMPLES].tolist():
            yield f"sample {sample} starts with id {ids[first[sample]]} instead of <|im_start|> ({IM_START})"

    def _grounding(self) -> Iterator[str]:
        """Tokens around boxes and names of objects come in pairs within a sample."""
        ids = self.bin.input_ids
        at = np.flatnonzero(np.isin(ids, [*_GROUNDING.keys(), *_GROUNDING.values()]))
        sample_of = np.searchsorted(self.bin.cu_seqlens, at, side="right")
        tokens = list(zip(at.tolist(), ids[at].tolist(), sample_of.tolist()))
        for (start, first, sample), after in itertools.zip_longest(tokens[::2], tokens[1::2]):
            if after is None or (_GROUNDING.get(first), sample) != after[1:]:
                yield f"the token of boxes or objects at {self._describe(start)} is not one of a pair"
                return

    def _labels(self) -> Iterator[str]:
        ids, labels, starts = self.bin.input_ids, self.bin.labels, self.bin.cu_seqlens[:-1]
        trained = labels != IGNORE_INDEX
        wrong = np.flatnonzero(trained & (labels != ids))
        if wrong.size:
            at = int(wrong[0])
            yield (
                f"{counted(wrong.size, 'label')} neither {IGNORE_INDEX} nor the id of the token, the first at "
                f"{self._describe(at)}: label {labels[at]}, id {ids[at]}"
            )
        for sample in np.flatnonzero(trained[starts])[:_EXAMPLES].tolist():
            yield f"the first label of sample {sample} is {labels[starts[sample]]}; it must be {IGNORE_INDEX}"
        without = np.flatnonzero(np.add.reduceat(trained, starts, dtype=np.int64) == 0)
        for sample in without[:_EXAMPLES].tolist():
            yield f"sample {sample} has no target; a build rejects such a record as no_targets"
        vision = np.flatnonzero(trained & np.isin(ids, _VISION))
        if vision.size:
            yield f"{counted(vision.size, 'trained token')} of media, the first at {self._describe(int(vision[0]))}"

    def _grids(self) -> Iterator[str]:
        for index, (grid, kind) in enumerate(self._grid_list):
            if kind not in _PADS:
                yield f"media_type of medium {index} is {kind}; allowed: {MEDIA_IMAGE} (image), {MEDIA_VIDEO} (video)"
            if grid.t < 1 or min(grid.h, grid.w) < MERGE_SIZE or grid.h % MERGE_SIZE or grid.w % MERGE_SIZE:
                yield f"the grid of medium {index} is {tuple(grid)}; t must be at least 1, h and w even and at least 2"
            elif kind == MEDIA_IMAGE and grid.t != 1:
                yield f"the grid of image {index} is {tuple(grid)}; an image has t = 1"

    def _media(self) -> Iterator[str]:
        """Compare the runs of pad tokens with the grids. Later checks rely on their agreement."""
        ids, media = self.bin.input_ids, self._grid_list
        if len(self._runs) != len(media):
            yield f"input_ids has {len(self._runs)} runs of pad tokens, grid_thw {len(media)} media"
            return
        for index, ((start, end), (grid, kind)) in enumerate(zip(self._runs, media)):
            if ids[start] != _PADS[kind] or end - start != grid.num_tokens:
                yield (
                    f"medium {index} (type {kind}, grid {tuple(grid)}) needs {grid.num_tokens} pad tokens "
                    f"{_PADS[kind]}; at {self._describe(start)} are {end - start} tokens {ids[start]}"
                )
            elif start == 0 or end == ids.size or (ids[start - 1], ids[end]) != (VISION_START, VISION_END):
                yield f"the pad tokens of medium {index} are not between <|vision_start|> and <|vision_end|>"
            elif np.searchsorted(self.bin.cu_seqlens, start, "right") != np.searchsorted(self.bin.cu_seqlens, end):
                yield f"medium {index} crosses a sample boundary at {self._describe(start)}"
        for text, token in (("<|vision_start|>", VISION_START), ("<|vision_end|>", VISION_END)):
            if (count := int(np.count_nonzero(ids == token))) != len(media):
                yield f"input_ids has {count} {text} for {len(media)} media"

    def _positions(self) -> Iterator[str]:
        media = list(zip(self._runs, self._grid_list))
        boundaries = self.bin.cu_seqlens.tolist()
        for sample, (first, last) in enumerate(itertools.pairwise(boundaries)):
            sample_media = [
                (start - first, grid, kind)
                for (start, _), (grid, kind) in media[self._first_media[sample] : self._first_media[sample + 1]]
            ]
            problem = position_problem(self.bin.position_ids[:, first:last], sample_media)
            if problem is not None:
                yield f"position_ids of sample {sample}: {problem}"

    def _budgets(self) -> Iterator[str]:
        num_patches = sum(grid.num_patches for grid, _ in self._grid_list)
        limit = self.settings.max_patches
        if limit is not None and num_patches > limit and self._lengths.size > 1:
            yield f"the bin has {num_patches} patches in {self._lengths.size} samples, max_patches is {limit}"
        if self.bin.codec != self.settings.pixels:
            yield f"the pixels are stored as {self.bin.codec}, the manifest says {self.settings.pixels}"

    def _counts(self) -> Iterator[str]:
        """Recompute the row of ``bins.parquet``."""
        kinds = self.bin.media_type
        counts = {
            "num_tokens": self.bin.input_ids.size,
            "num_targets": int(np.count_nonzero(self.bin.labels != IGNORE_INDEX)),
            "num_samples": self._lengths.size,
            "num_patches": sum(grid.num_patches for grid, _ in self._grid_list),
            "num_images": int(np.count_nonzero(kinds == MEDIA_IMAGE)),
            "num_videos": int(np.count_nonzero(kinds == MEDIA_VIDEO)),
            "sum_squared_lengths": int(np.square(self._lengths, dtype=np.int64).sum()),
        }
        stated = msgspec.structs.asdict(self.row)
        for name, count in counts.items():
            if stated[name] != count:
                yield f"bins.parquet says {name} {stated[name]}, the bin has {count}"

    def _samples(self) -> Iterator[str]:
        """Compare ``samples.json`` with the sample boundaries and the ledger."""
        samples = self._references
        if samples is None:
            yield f"{SAMPLES_MEMBER} cannot be read as a list of dataset, record and id"
            return
        if msgspec.json.encode(samples) != self.bin.samples_json:
            yield f"{SAMPLES_MEMBER} is not formatted as vlprep writes it"
        if len(samples) != self._lengths.size:
            num_samples = counted(len(samples), "sample")
            yield f"{SAMPLES_MEMBER} names {num_samples}, cu_seqlens divides the bin into {self._lengths.size}"
        yield from itertools.islice(self._boxes(samples), _EXAMPLES)
        if self.ledger is None:
            return
        slots = self.ledger.column("slot").to_pylist()
        if slots != list(range(self._lengths.size)):
            yield f"samples.parquet has the slots {_shortened(slots)} for {counted(self._lengths.size, 'sample')}"
            return
        wrong = [text for text in map(self._sample_problem, samples, ledger_rows(self.ledger)) if text is not None]
        yield from wrong[:_EXAMPLES]
        if len(wrong) > _EXAMPLES:
            yield f"differences from samples.parquet in {counted(len(wrong) - _EXAMPLES, 'more sample')}"

    def _boxes(self, samples: Sequence[SampleRef]) -> Iterator[str]:
        """Compare the boxes of ``samples.json`` with the images of their samples."""
        if len(self._runs) != len(self._grid_list):
            return
        for sample, (first, last) in enumerate(itertools.pairwise(self._first_media)):
            grids = [grid for grid, kind in self._grid_list[first:last] if kind == MEDIA_IMAGE]
            for box in samples[sample].boxes if sample < len(samples) else ():
                if not _fits(box, grids):
                    yield (
                        f"{SAMPLES_MEMBER} has {_shortened(box.numbers)} in image {box.image} of sample {sample}, "
                        f"which has {counted(len(grids), 'image')}; a box has 4 numbers inside one of them, a point 2"
                    )

    def _sample_problem(self, reference: SampleRef, row: LedgerRow) -> str | None:
        """Recompute what ``samples.parquet`` says about a sample. Returns the differences, or None."""
        actual = {"dataset": reference.dataset, "record": reference.record, "id": reference.id}
        first, last = self.bin.cu_seqlens[row.slot : row.slot + 2].tolist()
        actual["num_tokens"] = last - first
        actual["num_targets"] = int(np.count_nonzero(self.bin.labels[first:last] != IGNORE_INDEX))
        if len(self._runs) == len(self.bin.media_type):
            media = self._grid_list[self._first_media[row.slot] : self._first_media[row.slot + 1]]
            actual["num_patches"] = sum(grid.num_patches for grid, _ in media)
            has_video = any(kind == MEDIA_VIDEO for _, kind in media)
            if has_video != (row.video_backend is not None):
                return (
                    f"sample {row.slot} has {'a' if has_video else 'no'} video, but its video_backend in "
                    f"samples.parquet is {row.video_backend}"
                )
        stated = msgspec.structs.asdict(row)
        differing = [name for name, value in actual.items() if stated[name] != value]
        wrong = [f"{name} {stated[name]}, the bin has {actual[name]}" for name in differing]
        return f"samples.parquet says of sample {row.slot}: {'; '.join(wrong)}" if wrong else None


def _fits(box: SampleBox, grids: Sequence[Grid]) -> bool:
    """Whether a box or point is inside one of the images, or at most one pixel outside, with its corners in order."""
    numbers = box.numbers
    if not 0 <= box.image < len(grids) or len(numbers) not in (2, 4):
        return False
    _, height, width = frame_shape(grids[box.image])
    is_inside = all(-1 <= x <= width + 1 for x in numbers[::2]) and all(-1 <= y <= height + 1 for y in numbers[1::2])
    return is_inside and (len(numbers) == 2 or (numbers[0] <= numbers[2] and numbers[1] <= numbers[3]))


def _shortened(numbers: Sequence[float]) -> str:
    return f"{list(numbers[:8])}{'…' if len(numbers) > 8 else ''}"
