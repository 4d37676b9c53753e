"""From a draft and the paths of its media to the record of an annotation file.

Records vary as those of real datasets do: tags stand at the start, the end or in the middle of the text, and paths
under ``image``, ``images``, ``video`` or ``videos``, as strings or lists. Pure functions; no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from demo.kinds import Draft
from demo.vocabulary import Wording

M = TypeVar("M")
Value = str | list[str] | list[dict[str, str]]
Record = dict[str, Value]

_START_SHARE, _END_SHARE = 0.55, 0.25
_PLAIN_FIELD_SHARE = 0.75


@dataclass(frozen=True, kw_only=True, slots=True)
class MediaFile:
    """A medium that a record refers to: its type and its path, relative to the media root, with forward slashes."""

    media_type: Literal["image", "video"]
    path: str


def build_record(
    draft: Draft[M], media: Sequence[MediaFile], *, identifier: str, kind: str, rng: np.random.Generator
) -> Record:
    """Returns the record of a draft.

    Args:
        draft: What is said.
        media: The file of each of ``draft.facts``, in the same order.
        identifier: The record's ``id``.
        kind: The record's ``kind``, a field of our own that readers of annotations ignore.
        rng: Picks where tags stand and which fields name the paths.
    """
    record: Record = {"id": identifier, "kind": kind}
    for media_type in ("image", "video"):
        paths = [medium.path for medium in media if medium.media_type == media_type]
        if paths:
            field, value = _media_field(media_type, paths, rng)
            record[field] = value
    turns = [] if draft.dialogue.system is None else [{"from": "system", "value": draft.dialogue.system}]
    for i, exchange in enumerate(draft.dialogue.exchanges):
        shown = media[i : i + 1] if draft.turn_by_turn else media if i == 0 else ()
        text = _with_tags(exchange.question, [medium.media_type for medium in shown], draft.wording, rng)
        turns += [{"from": "human", "value": text}, {"from": "gpt", "value": exchange.answer}]
    record["conversations"] = turns
    return record


def _media_field(media_type: str, paths: list[str], rng: np.random.Generator) -> tuple[str, str | list[str]]:
    plain = rng.random() < _PLAIN_FIELD_SHARE
    if len(paths) == 1 and plain:
        return media_type, paths[0]
    if len(paths) == 1:
        return (media_type, paths) if rng.random() < 0.5 else (f"{media_type}s", paths)
    return (f"{media_type}s", paths) if plain else (media_type, paths)


def _with_tags(question: str, media_types: Sequence[str], wording: Wording, rng: np.random.Generator) -> str:
    tags = [f"<{media_type}>" for media_type in media_types]
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
    numbered = [f"{i}: {tag}" for i, tag in enumerate(tags, start=1)]
    heading = wording.say(f"Look at these {len(tags)} in order.", f"请依次看这{len(tags)}个。")
    return "\n".join([heading, *numbered, question])
