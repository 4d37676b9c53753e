"""The demo dataset: which annotations a seed gives, their records, and the files, with a few broken records.

seed -> drafts with the encodings of their images (pure, under a second for 500 annotations) -> a folder with
``annotations.jsonl``, ``heldout.jsonl``, ``images/`` and ``videos/``. The training file is written last: if it exists,
the folder is complete. Cost: about 4 s on one core and 4 MB on disk for 400 annotations.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np

from demo.chats import CHAT_KINDS
from demo.drawing import JPEG, PNG, TURNED_JPEG, Encoding, encode_image
from demo.kinds import Draft, Wording, compose, generator
from demo.pages import PAGE_KINDS
from demo.scenes import SCENE_KINDS, sample_scene
from demo.videos import VIDEO_KINDS, Video, encode_video, sample_video
from schemas.annotation import ReasonCode
from schemas.errors import ConfigError
from storage.files import write_synced

Planned = tuple[Draft, Encoding]
"""A draft, and how its images are stored."""
Record = dict[str, str | list[str] | list[dict[str, str]]]

MIN_ANNOTATIONS = 40
_HELD_OUT_DIVISOR = 5

KINDS = (*SCENE_KINDS, *PAGE_KINDS, *VIDEO_KINDS, *CHAT_KINDS)
_ENCODINGS = (
    *(PNG, JPEG, Encoding("PNG", "L"), Encoding("WEBP")),
    *(Encoding("PNG", "P"), Encoding("JPEG", "L"), Encoding("PNG", "RGBA")),
)
_TURNED_KIND = "scene/left_or_right"
"""The first image of this kind is stored on its side: without its EXIF orientation, up and down look left and right."""

_TAGS_FIRST_SHARE, _TAGS_LAST_SHARE = 0.55, 0.25
_PLAIN_FIELD_SHARE = 0.75

SPARE_IMAGE = "images/broken-spare.png"
"""An intact image, for the broken records whose fault lies elsewhere."""
MISSING_IMAGE, EMPTY_IMAGE = "images/broken-missing.png", "images/broken-empty.png"
TRUNCATED_IMAGE, TRUNCATED_VIDEO = "images/broken-truncated.jpg", "videos/broken-truncated.mp4"


class DemoSummary(NamedTuple):
    """Number of records: good ones by kind ("scene/count"), broken ones by the reason code of their rejection."""

    train: Counter[str]
    held_out: Counter[str]
    broken: Counter[str]

    def __str__(self) -> str:
        """Three lines for a person."""
        return "\n".join(
            f"{counts.total()} {part}: {', '.join(f'{n} {name}' for name, n in sorted(counts.items()))}"
            for part, counts in zip(("for training", "held out", "broken on purpose"), self, strict=True)
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
    _write_damaged_media(out, seed)
    held_out_lines, lines = _write_part(out, held_out, seed, "heldout-"), _write_part(out, train, seed, "")
    positions = generator(seed, "broken/positions").permutation(num_annotations)[: len(broken)]
    for position, (_, line) in zip(sorted(positions.tolist()), broken, strict=True):
        lines.insert(position, line)
    write_synced(out / "heldout.jsonl", "\n".join([*held_out_lines, ""]).encode())
    write_synced(out / "annotations.jsonl", "\n".join([*lines, ""]).encode())
    return DemoSummary(
        train=Counter(draft.kind.name for draft, _ in train),
        held_out=Counter(draft.kind.name for draft, _ in held_out),
        broken=Counter(code.value for code, _ in broken),
    )


def plan_demo(seed: int, count: int, *, held_out: bool) -> list[Planned]:
    """Return the annotations of the training part (good records only) or of the held-out part.

    Both parts ask the same kinds of questions, as far as a part has enough annotations, about different media. No chat
    occurs in both.
    """
    drafts = compose(KINDS, count, generator(seed, "heldout" if held_out else "train"), held_out=held_out)
    turned = next((draft for draft in drafts if draft.kind.name == _TURNED_KIND), None)
    planned = []
    for i, draft in enumerate(drafts):
        encoding = TURNED_JPEG if draft is turned else _ENCODINGS[i % len(_ENCODINGS)]
        planned.append((draft, PNG if draft.kind.needs_colour and encoding.mode == "L" else encoding))
    return planned


def build_record(draft: Draft, paths: Sequence[str], *, identifier: str, rng: np.random.Generator) -> Record:
    """Return the record of a draft, with variations that real datasets have.

    Tags are at the start, at the end or in the middle of the text. Paths are under ``image``, ``images``, ``video`` or
    ``videos``, as strings or lists.

    Args:
        draft: What is said.
        paths: The file of each of ``draft.facts``, relative to the media root. ``.mp4`` is a video.
        identifier: The record's ``id``.
        rng: Picks the positions of tags and the fields of paths.
    """
    record: Record = {"id": identifier, "kind": draft.kind.name}
    types = ["video" if path.endswith(".mp4") else "image" for path in paths]
    for media_type in dict.fromkeys(types):
        of_type = [path for path, its_type in zip(paths, types, strict=True) if its_type == media_type]
        record |= _media_field(media_type, of_type, rng)
    system = draft.kind.system
    turns = [] if system is None else [{"from": "system", "value": draft.wording.say(*system)}]
    tags = [f"<{media_type}>" for media_type in types]
    for i, exchange in enumerate(draft.exchanges):
        text = exchange.question if i else _with_tags(exchange.question, tags, draft.wording, rng)
        turns += [{"from": "human", "value": text}, {"from": "gpt", "value": exchange.answer}]
    return record | {"conversations": turns}


def _media_field(media_type: str, paths: list[str], rng: np.random.Generator) -> Record:
    plain = rng.random() < _PLAIN_FIELD_SHARE
    if len(paths) == 1 and plain:
        return {media_type: paths[0]}
    plural = plain if len(paths) > 1 else rng.random() >= 0.5
    return {f"{media_type}s" if plural else media_type: paths}


def _with_tags(question: str, tags: Sequence[str], wording: Wording, rng: np.random.Generator) -> str:
    if not tags:
        return question
    position = rng.random()
    if position < _TAGS_FIRST_SHARE:
        return ("\n" if rng.random() < 0.5 else "").join(tags) + f"\n{question}"
    if position < _TAGS_FIRST_SHARE + _TAGS_LAST_SHARE:
        return f"{question}\n" + "".join(tags)
    if len(tags) == 1:
        return wording.say(
            (f"Look at this: {tags[0]} {question}", f"Here is something to look at. {tags[0]} Now tell me: {question}"),
            (f"请看：{tags[0]}{question}", f"请先看这里。{tags[0]}请回答：{question}"),
        )
    return "\n".join([*(f"{i}: {tag}" for i, tag in enumerate(tags, start=1)), question])


def _write_part(out: Path, plan: Sequence[Planned], seed: int, prefix: str) -> list[str]:
    """Draw and write the media of one part. Return the lines of its annotation file."""
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
    colour, motion = "<image>\nWhat colour is the shape?", "<video>\nWhat moves?"
    # The reason code, the questions before the answer, and the media.
    faults: Sequence[tuple[ReasonCode, tuple[str, ...], Record]] = (
        (ReasonCode.MEDIA_MISSING, (colour,), {"image": MISSING_IMAGE}),
        (ReasonCode.MEDIA_UNREADABLE, (colour,), {"image": TRUNCATED_IMAGE}),
        (ReasonCode.MEDIA_EMPTY, (colour,), {"image": EMPTY_IMAGE}),
        (ReasonCode.MEDIA_UNREADABLE, (motion,), {"video": TRUNCATED_VIDEO}),
        (ReasonCode.MEDIA_OUTSIDE_ROOT, (colour,), {"image": f"../{SPARE_IMAGE}"}),
        (ReasonCode.TAG_MISMATCH, (colour,), {"images": [SPARE_IMAGE, SPARE_IMAGE]}),
        (ReasonCode.BAD_TURN_ORDER, (colour, "Well?"), {"image": SPARE_IMAGE}),
        (ReasonCode.RESERVED_TOKEN, ("What does <|im_start|> mean?",), {}),
    )
    lines = [
        (ReasonCode.NOT_AN_OBJECT, '"a string where a record should be"'),
        (ReasonCode.BAD_JSON, '{"id": "demo-broken-00009", "conversations": [{"from": "human", "va'),
    ]
    for i, (code, questions, media) in enumerate(faults):
        turns = [*({"from": "human", "value": question} for question in questions), {"from": "gpt", "value": "red"}]
        record = {"id": f"demo-broken-{i:05d}", "kind": f"broken/{code.value}", **media, "conversations": turns}
        lines.append((code, json.dumps(record)))
    return lines
