"""The files of the demo dataset, with a few records that are broken on purpose.

seed -> a folder with ``annotations.jsonl``, ``heldout.jsonl``, ``images/`` and ``videos/``. The training file is
written last: if it exists, the folder is complete. Cost: about 4 s on one core and 4 MB on disk for 400 annotations.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from demo.dataset import Planned, build_record, plan_demo
from demo.drawing import JPEG, PNG, encode_image
from demo.kinds import generator
from demo.scenes import sample_scene
from demo.videos import Video, encode_video, sample_video
from schemas.annotation import ReasonCode
from schemas.errors import ConfigError
from storage.files import write_synced

MIN_ANNOTATIONS = 40
_HELD_OUT_DIVISOR = 5

SPARE_IMAGE = "images/broken-spare.png"
"""An intact image, for the broken records whose fault lies elsewhere."""
MISSING_IMAGE = "images/broken-missing.png"
TRUNCATED_IMAGE = "images/broken-truncated.jpg"
EMPTY_IMAGE = "images/broken-empty.png"
TRUNCATED_VIDEO = "videos/broken-truncated.mp4"


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoSummary:
    """Number of records: good ones by kind ("scene/count"), broken ones by the reason code of their rejection."""

    train: Mapping[str, int]
    held_out: Mapping[str, int]
    broken: Mapping[str, int]

    def __str__(self) -> str:
        """Three lines for a person."""
        parts = {"for training": self.train, "held out": self.held_out, "broken on purpose": self.broken}
        return "\n".join(
            f"{sum(counts.values())} {part}: {', '.join(f'{n} {name}' for name, n in sorted(counts.items()))}"
            for part, counts in parts.items()
        )


def write_demo(out: Path, *, seed: int = 0, num_annotations: int = 400) -> DemoSummary:
    """Write the demo dataset. The same seed gives the same annotations and the same pixels.

    Files of the same names in ``out`` are replaced, others left alone. All paths in the annotations are relative to
    ``out``. The bytes of the media also depend on the versions of Pillow and PyAV.

    Args:
        out: Output folder, created if missing.
        seed: Any integer.
        num_annotations: Lines of the training file, at least 40. The held-out file has a fifth as many.

    Raises:
        ConfigError: If PyAV is not installed, ``out`` cannot be created, or ``num_annotations`` is too small.
    """
    if find_spec("av") is None:
        raise ConfigError("the demo dataset needs PyAV to encode its videos; install it with: pip install av")
    if num_annotations < MIN_ANNOTATIONS:
        raise ConfigError(f"the demo dataset needs at least {MIN_ANNOTATIONS} annotations, not {num_annotations}")
    try:
        for folder in ("images", "videos"):
            (out / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{out}: cannot create this folder for the demo dataset: {error.strerror}") from error

    broken = broken_lines()
    train = plan_demo(seed, num_annotations - len(broken), held_out=False)
    held_out = plan_demo(seed, num_annotations // _HELD_OUT_DIVISOR, held_out=True)
    train_lines = _write_part(out, train, seed, "")
    held_out_lines = _write_part(out, held_out, seed, "heldout-")
    _write_damaged_media(out, seed)
    positions = generator(seed, "broken/positions").permutation(num_annotations)[: len(broken)]
    for position, (_, line) in zip(sorted(map(int, positions)), broken, strict=True):
        train_lines.insert(position, line)
    _write_lines(out / "heldout.jsonl", held_out_lines)
    _write_lines(out / "annotations.jsonl", train_lines)
    return DemoSummary(
        train=Counter(draft.kind.name for draft, _ in train),
        held_out=Counter(draft.kind.name for draft, _ in held_out),
        broken=Counter(code.value for code, _ in broken),
    )


def _write_part(out: Path, plan: Sequence[Planned], seed: int, prefix: str) -> list[str]:
    """Draw and writes the media of one part. Return the lines of its annotation file."""
    rng = generator(seed, f"{prefix}records")
    counts: Counter[str] = Counter()
    lines = []
    for draft, encoding in plan:
        family = draft.kind.name.split("/")[0]
        name = f"{prefix}{family}-{counts[family]:05d}"
        counts[family] += 1
        paths = []
        for i, medium in enumerate(draft.facts, start=1):
            if isinstance(medium, Video):
                path, content = f"videos/{name}-{i}.mp4", encode_video(medium)
            else:
                path = f"images/{name}-{i}.{encoding.format.lower()}"
                content = encode_image(medium.draw(), encoding)
            (out / path).write_bytes(content)
            paths.append(path)
        record = build_record(draft, paths, identifier=f"demo-{name}", rng=rng)
        lines.append(json.dumps(record, ensure_ascii=False))
    return lines


def _write_damaged_media(out: Path, seed: int) -> None:
    rng = generator(seed, "broken")
    image = sample_scene(rng, min_shapes=4).draw()
    jpeg, video = encode_image(image, JPEG), encode_video(sample_video(rng))
    (out / SPARE_IMAGE).write_bytes(encode_image(image, PNG))
    # An interrupted copy leaves the first part of a file.
    (out / TRUNCATED_IMAGE).write_bytes(jpeg[: len(jpeg) // 2])
    (out / TRUNCATED_VIDEO).write_bytes(video[: len(video) // 2])
    (out / EMPTY_IMAGE).write_bytes(b"")


def broken_lines() -> list[tuple[ReasonCode, str]]:
    """Return lines that cannot become samples, each with one fault and the reason code of its rejection."""
    colour = [("human", "<image>\nWhat colour is the shape?"), ("gpt", "red")]
    motion = [("human", "<video>\nWhat moves?"), ("gpt", "a star")]
    twice = [colour[0], ("human", "Well?"), colour[1]]
    token = [("human", "What does <|im_start|> mean?"), ("gpt", "The start of a turn.")]
    faults: Sequence[tuple[ReasonCode, list[tuple[str, str]], dict[str, str | list[str]]]] = (
        (ReasonCode.MEDIA_MISSING, colour, {"image": MISSING_IMAGE}),
        (ReasonCode.MEDIA_UNREADABLE, colour, {"image": TRUNCATED_IMAGE}),
        (ReasonCode.MEDIA_EMPTY, colour, {"image": EMPTY_IMAGE}),
        (ReasonCode.MEDIA_UNREADABLE, motion, {"video": TRUNCATED_VIDEO}),
        (ReasonCode.MEDIA_OUTSIDE_ROOT, colour, {"image": f"../{SPARE_IMAGE}"}),
        (ReasonCode.TAG_MISMATCH, colour, {"images": [SPARE_IMAGE, SPARE_IMAGE]}),
        (ReasonCode.BAD_TURN_ORDER, twice, {"image": SPARE_IMAGE}),
        (ReasonCode.RESERVED_TOKEN, token, {}),
    )
    lines: list[tuple[ReasonCode, str]] = []
    for code, turns, media in faults:
        conversations = [{"from": role, "value": value} for role, value in turns]
        record = {"id": f"demo-broken-{len(lines):05d}", "kind": f"broken/{code.value}", **media}
        lines.append((code, json.dumps(record | {"conversations": conversations})))
    lines.append((ReasonCode.NOT_AN_OBJECT, '"a string where a record should be"'))
    lines.append((ReasonCode.BAD_JSON, '{"id": "demo-broken-00009", "conversations": [{"from": "human", "va'))
    return lines


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    """Write under a temporary name first: the file is complete or does not exist."""
    write_synced(path, "".join(f"{line}\n" for line in lines).encode())
