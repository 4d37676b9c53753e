"""Checks what one bin says: its arrays against each other, its row of ``bins.parquet``, and the ledger.

Input: a :class:`~schemas.bins.Bin` that could be read. Output: findings, one for every rule that is broken. Cost: a few
passes over the tokens and the decompression of the pixels.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import msgspec
import numpy as np
from numpy.typing import NDArray

from prep.inspect.verify.findings import Finding, inconsistent, unreadable
from prep.inspect.verify.positions import position_problem
from prep.inspect.verify.statistics import modality
from prep.shards.reader import LedgerRow, StoredBin, decode_pixels
from schemas.annotation import SampleRef
from schemas.bins import MEDIA_IMAGE, MEDIA_VIDEO, SAMPLES_MEMBER, Bin
from schemas.errors import ShardError
from schemas.qwen import (
    CONTROL_TOKENS,
    IGNORE_INDEX,
    IM_END,
    IM_START,
    IMAGE_PAD,
    MERGE_SIZE,
    VIDEO_PAD,
    VISION_END,
    VISION_START,
    Grid,
)
from schemas.settings import BuildSettings

_PADS = {MEDIA_IMAGE: IMAGE_PAD, MEDIA_VIDEO: VIDEO_PAD}
_VISION = (VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD)
_UNUSED = {token: text for text, token in CONTROL_TOKENS.items() if token not in (IM_START, IM_END, *_VISION)}
_EXAMPLES = 3


@dataclass(frozen=True)
class BinCheck:
    """One bin and what it is compared with.

    Attributes:
        found: the bin.
        row: its row of ``bins.parquet``.
        ledger: what the ledger says of its samples, by slot; None where the ledger cannot be read.
        settings: of the build.
    """

    found: Bin
    row: StoredBin
    ledger: Sequence[LedgerRow] | None
    settings: BuildSettings

    def findings(self) -> Iterator[Finding]:
        """Everything that is wrong."""
        problems = [*self._tokens(), *self._labels()]
        grids = list(self._grids())
        problems += grids
        if not grids:
            media = list(self._media())
            problems += media
            if not media:
                problems += self._positions()
            problems += self._budgets()
        problems += [*self._samples(), *self._counts()]
        yield from (inconsistent(self.row.where, problem) for problem in problems)
        if not grids:
            try:
                decode_pixels(self.found, where=self.row.where)
            except ShardError as error:
                yield unreadable(self.row.where, error)

    def modalities(self) -> Counter[tuple[str, str]]:
        """Samples by dataset and modality, where the bin says both."""
        counted = Counter[tuple[str, str]]()
        if len(self._runs) == self.found.media_type.size and self._references is not None:
            for reference, first, last in zip(self._references, self._first_media, self._first_media[1:]):
                kinds = self.found.media_type[first:last].tolist()
                counted[reference.dataset, modality(kinds.count(MEDIA_IMAGE), kinds.count(MEDIA_VIDEO))] += 1
        return counted

    @cached_property
    def _references(self) -> list[SampleRef] | None:
        """Contents of ``samples.json``; None where it cannot be read."""
        try:
            return self.found.samples()
        except (msgspec.MsgspecError, UnicodeDecodeError):
            return None

    @cached_property
    def _lengths(self) -> NDArray[np.int32]:
        return np.diff(self.found.cu_seqlens)

    @cached_property
    def _grid_list(self) -> list[tuple[Grid, int]]:
        return self.found.grids()

    @cached_property
    def _runs(self) -> list[tuple[int, int]]:
        """(start, end) of every run of equal pad tokens."""
        ids = self.found.input_ids
        pads = np.where((ids == IMAGE_PAD) | (ids == VIDEO_PAD), ids, 0)
        edges = np.flatnonzero(np.diff(pads, prepend=0, append=0)).tolist()
        return [(start, end) for start, end in itertools.pairwise(edges) if pads[start]]

    @cached_property
    def _first_media(self) -> list[int]:
        """Sample ``s`` has the media from ``[s]`` to before ``[s + 1]``, by the runs of pad tokens."""
        starts = np.asarray([start for start, _ in self._runs], dtype=np.int64)
        return [int(place) for place in np.searchsorted(starts, self.found.cu_seqlens)]

    def _place(self, token: int) -> str:
        sample = int(np.searchsorted(self.found.cu_seqlens, token, side="right")) - 1
        return f"token {token} (sample {sample})"

    def _tokens(self) -> Iterator[str]:
        ids, first = self.found.input_ids, self.found.cu_seqlens[:-1]
        if ids.size > self.settings.max_length:
            yield f"the bin has {ids.size} tokens, max_length is {self.settings.max_length}"
        if (ids < 0).any():
            yield f"input_ids is {ids[(at := int(np.argmax(ids < 0)))]} at {self._place(at)}; an id is 0 or more"
        for token, text in _UNUSED.items():
            if (ids == token).any():
                yield f"input_ids holds {text} at {self._place(int(np.argmax(ids == token)))}; no build writes that"
        for sample in np.flatnonzero(ids[first] != IM_START)[:_EXAMPLES].tolist():
            yield f"sample {sample} starts with id {ids[first[sample]]}, not with <|im_start|> ({IM_START})"

    def _labels(self) -> Iterator[str]:
        ids, labels, borders = self.found.input_ids, self.found.labels, self.found.cu_seqlens
        trained = labels != IGNORE_INDEX
        wrong = np.flatnonzero(trained & (labels != ids))
        if wrong.size:
            at = int(wrong[0])
            yield (
                f"{wrong.size} labels are neither {IGNORE_INDEX} nor the id of their token, the first at "
                f"{self._place(at)}: label {labels[at]}, id {ids[at]}"
            )
        for sample in np.flatnonzero(trained[borders[:-1]])[:_EXAMPLES].tolist():
            yield f"the first label of sample {sample} is {labels[borders[sample]]}; it must be {IGNORE_INDEX}"
        without = np.flatnonzero(np.add.reduceat(trained, borders[:-1], dtype=np.int64) == 0)
        for sample in without[:_EXAMPLES].tolist():
            yield f"sample {sample} has no target; such a record is rejected as no_targets"
        vision = np.flatnonzero(trained & np.isin(ids, _VISION))
        if vision.size:
            yield f"{vision.size} tokens of media are trained, the first at {self._place(int(vision[0]))}"

    def _grids(self) -> Iterator[str]:
        for number, (grid, kind) in enumerate(self._grid_list):
            if kind not in _PADS:
                yield f"media_type of medium {number} is {kind}; allowed: {MEDIA_IMAGE} (image), {MEDIA_VIDEO} (video)"
            if grid.t < 1 or min(grid.h, grid.w) < MERGE_SIZE or grid.h % MERGE_SIZE or grid.w % MERGE_SIZE:
                yield f"the grid of medium {number} is {tuple(grid)}; t is 1 or more, h and w even and 2 or more"
            elif kind == MEDIA_IMAGE and grid.t != 1:
                yield f"the grid of image {number} is {tuple(grid)}; an image has t = 1"

    def _media(self) -> Iterator[str]:
        """Runs of pad tokens against the grids; what follows relies on their agreement."""
        ids, media = self.found.input_ids, self._grid_list
        if len(self._runs) != len(media):
            yield f"input_ids has {len(self._runs)} runs of pad tokens, grid_thw {len(media)} media"
            return
        for number, ((start, end), (grid, kind)) in enumerate(zip(self._runs, media)):
            if ids[start] != _PADS[kind] or end - start != grid.num_tokens:
                yield (
                    f"medium {number} (type {kind}, grid {tuple(grid)}) needs {grid.num_tokens} pad tokens "
                    f"{_PADS[kind]}; {self._place(start)} starts {end - start} tokens {ids[start]}"
                )
            elif start == 0 or end == ids.size or (ids[start - 1], ids[end]) != (VISION_START, VISION_END):
                yield f"the pad tokens of medium {number} do not stand between <|vision_start|> and <|vision_end|>"
            elif np.searchsorted(self.found.cu_seqlens, start, "right") != np.searchsorted(self.found.cu_seqlens, end):
                yield f"medium {number} crosses the border of its sample at {self._place(start)}"
        for text, token in (("<|vision_start|>", VISION_START), ("<|vision_end|>", VISION_END)):
            if (held := int(np.count_nonzero(ids == token))) != len(media):
                yield f"input_ids has {held} {text} for {len(media)} media"

    def _positions(self) -> Iterator[str]:
        media = list(zip(self._runs, self._grid_list))
        borders = self.found.cu_seqlens.tolist()
        for sample, (first, last) in enumerate(itertools.pairwise(borders)):
            of_sample = [
                (start - first, grid, kind)
                for (start, _), (grid, kind) in media[self._first_media[sample] : self._first_media[sample + 1]]
            ]
            problem = position_problem(self.found.position_ids[:, first:last], of_sample)
            if problem is not None:
                yield f"position_ids of sample {sample}: {problem}"

    def _budgets(self) -> Iterator[str]:
        num_patches = sum(grid.num_patches for grid, _ in self._grid_list)
        limit = self.settings.max_patches
        if limit is not None and num_patches > limit and self._lengths.size > 1:
            yield f"the bin has {num_patches} patches in {self._lengths.size} samples, max_patches is {limit}"
        if self.found.codec != self.settings.pixels:
            yield f"the pixels are stored as {self.found.codec}, the manifest says {self.settings.pixels}"

    def _counts(self) -> Iterator[str]:
        """The row of ``bins.parquet``, counted again."""
        kinds = self.found.media_type
        counted = {
            "num_tokens": self.found.input_ids.size,
            "num_targets": int(np.count_nonzero(self.found.labels != IGNORE_INDEX)),
            "num_samples": self._lengths.size,
            "num_patches": sum(grid.num_patches for grid, _ in self._grid_list),
            "num_images": int(np.count_nonzero(kinds == MEDIA_IMAGE)),
            "num_videos": int(np.count_nonzero(kinds == MEDIA_VIDEO)),
            "sum_squared_lengths": int(np.square(self._lengths, dtype=np.int64).sum()),
        }
        said = msgspec.structs.asdict(self.row)
        for name, number in counted.items():
            if said[name] != number:
                yield f"bins.parquet says {name} {said[name]}, the bin has {number}"

    def _samples(self) -> Iterator[str]:
        """``samples.json`` against the borders and the ledger."""
        samples = self._references
        if samples is None:
            yield f"{SAMPLES_MEMBER} cannot be read as a list of dataset, record and id"
            return
        if msgspec.json.encode(samples) != self.found.samples_json:
            yield f"{SAMPLES_MEMBER} is not spelled as vlprep writes it"
        if len(samples) != self._lengths.size:
            yield f"{SAMPLES_MEMBER} names {len(samples)} samples, cu_seqlens cuts the bin into {self._lengths.size}"
        if self.ledger is None:
            return
        if [row.slot for row in self.ledger] != list(range(self._lengths.size)):
            slots = [row.slot for row in self.ledger]
            yield f"samples.parquet has the slots {_shortened(slots)} for {self._lengths.size} samples of the bin"
            return
        wrong = [text for text in map(self._sample_problem, samples, self.ledger) if text is not None]
        yield from wrong[:_EXAMPLES]
        if len(wrong) > _EXAMPLES:
            yield f"{len(wrong) - _EXAMPLES} more samples differ from samples.parquet"

    def _sample_problem(self, reference: SampleRef, row: LedgerRow) -> str | None:
        """What samples.parquet says of one sample, counted again."""
        found = {"dataset": reference.dataset, "record": reference.record, "id": reference.id}
        first, last = self.found.cu_seqlens[row.slot : row.slot + 2].tolist()
        found["num_tokens"] = last - first
        found["num_targets"] = int(np.count_nonzero(self.found.labels[first:last] != IGNORE_INDEX))
        if len(self._runs) == len(self.found.media_type):
            media = self._grid_list[self._first_media[row.slot] : self._first_media[row.slot + 1]]
            found["num_patches"] = sum(grid.num_patches for grid, _ in media)
            has_video = any(kind == MEDIA_VIDEO for _, kind in media)
            if has_video != (row.video_backend is not None):
                return (
                    f"sample {row.slot} has {'a' if has_video else 'no'} video, samples.parquet names the decoder "
                    f"{row.video_backend} for it"
                )
        said = msgspec.structs.asdict(row)
        wrong = [f"{name} {said[name]}, the bin has {value}" for name, value in found.items() if said[name] != value]
        return f"samples.parquet says of sample {row.slot}: {'; '.join(wrong)}" if wrong else None


def _shortened(numbers: Sequence[int]) -> str:
    return f"{list(numbers[:8])}{'…' if len(numbers) > 8 else ''}"
