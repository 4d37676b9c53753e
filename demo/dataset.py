"""The demo dataset as a plan: which annotations a seed gives, the facts of their media, and how images are stored.

seed, number of annotations -> drafts; a draft and the paths of its media -> a record. Pure:
nothing is drawn, no file is touched. Cost: under a second for 500 annotations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from demo.chats import CHAT_KINDS
from demo.drawing import JPEG, PNG, TURNED_JPEG, Encoding
from demo.kinds import Draft, Kind, M, allocate, compose, generator
from demo.pages import PAGE_KINDS
from demo.scenes import SCENE_KINDS
from demo.videos import VIDEO_KINDS
from demo.wording import Wording

Planned = tuple[Draft[Any], Encoding]
"""A draft, and how its images are stored."""

Record = dict[str, str | list[str] | list[dict[str, str]]]

_SHARES = {"scene": 60, "page": 14, "video": 6, "chat": 20}
_KINDS: dict[str, Sequence[Kind[Any]]] = {
    "scene": SCENE_KINDS,
    "page": PAGE_KINDS,
    "video": VIDEO_KINDS,
    "chat": CHAT_KINDS,
}
_ENCODINGS = (
    *(PNG, JPEG, Encoding("PNG", "L"), Encoding("WEBP")),
    *(Encoding("PNG", "P"), Encoding("JPEG", "L"), Encoding("PNG", "RGBA")),
)
_TURNED_KIND = "scene/left_or_right"
"""The first image of this kind is stored on its side: without its EXIF orientation, up and down look left and right."""

_START_SHARE, _END_SHARE = 0.55, 0.25
_PLAIN_FIELD_SHARE = 0.75


def plan_demo(seed: int, count: int, *, held_out: bool) -> list[Planned]:
    """Return the annotations of the training part (good records only) or of the held-out part.

    Both parts ask the same kinds of questions, as far as a part has enough annotations, about different media. No chat
    occurs in both.
    """
    part = "heldout" if held_out else "train"
    counts = dict(zip(_SHARES, allocate(count, list(_SHARES.values())), strict=True))
    planned: list[Planned] = []
    for family, kinds in _KINDS.items():
        drafts = compose(kinds, counts[family], generator(seed, f"{part}/{family}"), held_out=held_out)
        turned = next((draft for draft in drafts if draft.kind.name == _TURNED_KIND), None)
        for i, draft in enumerate(drafts):
            encoding = TURNED_JPEG if draft is turned else _ENCODINGS[i % len(_ENCODINGS)]
            if draft.kind.needs_colour and encoding.mode == "L":
                encoding = PNG
            planned.append((draft, encoding))
    return [planned[i] for i in generator(seed, f"{part}/order").permutation(len(planned))]


def build_record(draft: Draft[M], paths: Sequence[str], *, identifier: str, rng: np.random.Generator) -> Record:
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
    for media_type in ("image", "video"):
        of_type = [path for path, its_type in zip(paths, types, strict=True) if its_type == media_type]
        if of_type:
            field, value = _media_field(media_type, of_type, rng)
            record[field] = value
    system = draft.kind.system
    turns = [] if system is None else [{"from": "system", "value": draft.wording.say(*system)}]
    for i, exchange in enumerate(draft.exchanges):
        shown = types[i : i + 1] if draft.kind.turn_by_turn else types if i == 0 else []
        text = _with_tags(exchange.question, [f"<{media_type}>" for media_type in shown], draft.wording, rng)
        turns += [{"from": "human", "value": text}, {"from": "gpt", "value": exchange.answer}]
    record["conversations"] = turns
    return record


def _media_field(media_type: str, paths: list[str], rng: np.random.Generator) -> tuple[str, str | list[str]]:
    plain = rng.random() < _PLAIN_FIELD_SHARE
    if len(paths) == 1:
        if plain:
            return media_type, paths[0]
        return (media_type, paths) if rng.random() < 0.5 else (f"{media_type}s", paths)
    return (f"{media_type}s", paths) if plain else (media_type, paths)


def _with_tags(question: str, tags: Sequence[str], wording: Wording, rng: np.random.Generator) -> str:
    if not tags:
        return question
    where = rng.random()
    if where < _START_SHARE:
        return ("\n" if rng.random() < 0.5 else "").join(tags) + f"\n{question}"
    if where < _START_SHARE + _END_SHARE:
        return f"{question}\n" + "".join(tags)
    if len(tags) == 1:
        return wording.say(
            (f"Look at this: {tags[0]} {question}", f"Here is something to look at. {tags[0]} Now tell me: {question}"),
            (f"请看：{tags[0]}{question}", f"请先看这里。{tags[0]}请回答：{question}"),
        )
    return "\n".join([*(f"{i}: {tag}" for i, tag in enumerate(tags, start=1)), question])
