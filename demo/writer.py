"""Draws, encodes and writes the demo dataset.

seed -> a folder with ``annotations.jsonl``, ``heldout.jsonl``, ``images/`` and ``videos/``. The annotation files are
written last, so that their presence means complete. Cost: about 4 s on one core and 4 MB on disk for the default of 400
annotations.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from demo.broken import EMPTY_PICTURE, TRUNCATED_CLIP, TRUNCATED_PICTURE, BrokenLine, broken_lines, truncate
from demo.clips import Clip, encode_clip, require_av, sample_clip
from demo.dataset import Medium, Plan, plan_demo
from demo.kinds import generator
from demo.media import JPEG, PNG, encode_picture
from demo.records import MediaFile, build_record
from demo.scenes import sample_scene
from schemas.errors import ConfigError

logger = logging.getLogger(__name__)

TRAIN_FILE = "annotations.jsonl"
HELD_OUT_FILE = "heldout.jsonl"
MIN_ANNOTATIONS = 40
_HELD_OUT_DIVISOR = 5
_SPARE_PICTURE = "images/broken-spare.png"


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoSummary:
    """What was written.

    Attributes:
        train: Good records of the training file by kind ("scene/count").
        held_out: Records of the held-out file by kind.
        broken: Broken lines of the training file by the reason code they must be rejected with.
        num_images: Picture files, damaged ones included.
        num_videos: Clip files, damaged ones included.
        media_bytes: Size of all of them.
    """

    train: Mapping[str, int]
    held_out: Mapping[str, int]
    broken: Mapping[str, int]
    num_images: int
    num_videos: int
    media_bytes: int

    @property
    def num_annotations(self) -> int:
        """Lines of the training file, broken ones included."""
        return sum(self.train.values()) + sum(self.broken.values())

    @property
    def num_held_out(self) -> int:
        """Lines of the held-out file."""
        return sum(self.held_out.values())

    def __str__(self) -> str:
        """A few lines for a person: how much there is of everything."""
        families: Counter[str] = Counter()
        for kind, count in self.train.items():
            families[kind.split("/")[0]] += count
        good = ", ".join(f"{count} {family}" for family, count in families.items())
        broken = ", ".join(f"{count} {code}" for code, count in self.broken.items())
        return (
            f"{self.num_annotations} annotations for training: {good}; broken on purpose: {broken}\n"
            f"{self.num_held_out} annotations held out\n"
            f"{self.num_images} pictures and {self.num_videos} clips, {self.media_bytes / 1e6:.1f} MB"
        )


class _MediaFolder:
    """The media written so far: the same facts are drawn and stored once, however many annotations use them."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._files: dict[tuple[Medium, ...], tuple[MediaFile, ...]] = {}
        self._num_sets: Counter[str] = Counter()
        self.sizes: dict[str, int] = {}

    def write(self, path: str, content: bytes) -> None:
        (self._root / path).write_bytes(content)
        self.sizes[path] = len(content)

    def files_of(self, facts: tuple[Medium, ...], plan: Plan, prefix: str) -> tuple[MediaFile, ...]:
        """Returns the files of these media, drawing and writing them when they are new."""
        if facts not in self._files:
            stem = f"{prefix}-{self._num_sets[prefix]:05d}"
            self._num_sets[prefix] += 1
            names = [stem] if len(facts) == 1 else [f"{stem}-{i}" for i in range(1, len(facts) + 1)]
            files = [self._draw(medium, plan, facts, name) for medium, name in zip(facts, names, strict=True)]
            self._files[facts] = tuple(files)
        return self._files[facts]

    def _draw(self, medium: Medium, plan: Plan, facts: tuple[Medium, ...], name: str) -> MediaFile:
        if isinstance(medium, Clip):
            file = MediaFile(media_type="video", path=f"videos/{name}.mp4")
            self.write(file.path, encode_clip(medium))
            return file
        encoding = plan.encodings[facts]
        file = MediaFile(media_type="image", path=f"images/{name}{encoding.suffix}")
        self.write(file.path, encode_picture(medium.draw(), encoding))
        return file


def write_demo(out: Path, *, seed: int = 0, num_annotations: int = 400) -> DemoSummary:
    """Writes the demo dataset; the same seed gives the same annotations and the same pixels.

    Files of the same names in ``out`` are replaced, others left alone. All paths in the annotations are relative to
    ``out``. The bytes of the media depend on the versions of Pillow and PyAV too.

    Args:
        out: The folder to write to; it is made if need be.
        seed: Any integer.
        num_annotations: Lines of the training file, the broken ones included, at least 40; the held-out file gets a
            fifth as many.

    Raises:
        ConfigError: If PyAV is not installed, ``out`` cannot be made, or ``num_annotations`` is too small.
    """
    require_av()
    if num_annotations < MIN_ANNOTATIONS:
        raise ConfigError(f"the demo dataset needs at least {MIN_ANNOTATIONS} annotations, not {num_annotations}")
    try:
        for folder in ("images", "videos"):
            (out / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out}: cannot be made a folder for the demo dataset: {error.strerror}") from error

    broken = broken_lines(_SPARE_PICTURE)
    train, held_out = plan_demo(
        seed, num_train=num_annotations - len(broken), num_held_out=num_annotations // _HELD_OUT_DIVISOR
    )
    media = _MediaFolder(out)
    train_lines = _write_part(train, media, seed, "")
    held_out_lines = _write_part(held_out, media, seed, "heldout-")
    _write_damaged_media(media, seed)
    _write_lines(out / HELD_OUT_FILE, held_out_lines)
    _write_lines(out / TRAIN_FILE, _scatter(train_lines, broken, seed))

    summary = DemoSummary(
        train=train.counts(),
        held_out=held_out.counts(),
        broken=dict(sorted(Counter(line.code.value for line in broken).items())),
        num_images=sum(path.startswith("images/") for path in media.sizes),
        num_videos=sum(path.startswith("videos/") for path in media.sizes),
        media_bytes=sum(media.sizes.values()),
    )
    logger.info("%s: %d annotations, %d held out", out, summary.num_annotations, summary.num_held_out)
    return summary


def _write_part(plan: Plan, media: _MediaFolder, seed: int, prefix: str) -> list[str]:
    """Draws and writes the media of one part; returns the lines of its annotation file."""
    rng = generator(seed, f"{prefix}records")
    numbers: Counter[str] = Counter()
    lines = []
    for planned in plan.annotations:
        stem = f"{prefix}{planned.family}"
        record = build_record(
            planned.draft,
            media.files_of(planned.draft.facts, plan, stem) if planned.draft.facts else (),
            identifier=f"demo-{stem}-{numbers[stem]:05d}",
            kind=planned.kind,
            rng=rng,
        )
        numbers[stem] += 1
        lines.append(json.dumps(record, ensure_ascii=False))
    return lines


def _write_damaged_media(media: _MediaFolder, seed: int) -> None:
    rng = generator(seed, "broken")
    scene = sample_scene(rng, min_shapes=4)
    media.write(_SPARE_PICTURE, encode_picture(scene.draw(), PNG))
    media.write(TRUNCATED_PICTURE, truncate(encode_picture(scene.draw(), JPEG)))
    media.write(TRUNCATED_CLIP, truncate(encode_clip(sample_clip(rng))))
    media.write(EMPTY_PICTURE, b"")


def _scatter(lines: list[str], broken: list[BrokenLine], seed: int) -> list[str]:
    """Puts the broken lines between the good ones, at places that the seed chooses."""
    num = len(lines) + len(broken)
    places = sorted(int(place) for place in generator(seed, "broken/places").permutation(num)[: len(broken)])
    scattered = list(lines)
    for place, line in zip(places, broken, strict=True):
        scattered.insert(place, line.text)
    return scattered


def _write_lines(path: Path, lines: list[str]) -> None:
    """Writes the file under another name first, so that it is there whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")
    os.replace(temporary, path)
