"""The demo dataset as a plan: which annotations a seed gives, their media as facts and how each picture is stored.

seed, number of annotations -> ``Plan`` for the training part and the held-out part. Pure: nothing is drawn, no file is
touched. Cost: under a second for 500 annotations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from demo.chart_questions import CHART_KINDS
from demo.charts import Chart
from demo.chats import CHAT_KINDS
from demo.clip_questions import CLIP_KINDS
from demo.clips import Clip
from demo.kinds import Draft, Kind, allocate, compose, generator
from demo.media import (
    GREY_JPEG,
    GREY_PNG,
    JPEG,
    PALETTE_PNG,
    PNG,
    TRANSPARENT_PNG,
    TURNED_JPEG,
    WEBP,
    Encoding,
)
from demo.page_questions import PAGE_KINDS
from demo.pages import Page
from demo.scene_questions import SCENE_KINDS
from demo.scenes import Scene

Medium = Scene | Chart | Page | Clip
M = TypeVar("M")

_SHARES = {"scene": 51, "chart": 14, "page": 12, "clip": 5, "chat": 18}
_ENCODINGS: dict[str, tuple[Encoding, ...]] = {
    "scene": (PNG, JPEG, GREY_PNG, JPEG, WEBP, PNG, PALETTE_PNG, JPEG, GREY_JPEG, JPEG, TRANSPARENT_PNG),
    "chart": (PNG, JPEG, PALETTE_PNG, GREY_PNG, WEBP),
    "page": (PNG, GREY_JPEG, JPEG, GREY_PNG),
    "clip": (PNG,),
}
_TURNED_KIND = "left_or_right"
"""The first picture of this kind is stored on its side: who ignores EXIF takes up and down for left and right."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """An annotation of the plan: its family ("scene", "chart", …) and draft."""

    family: str
    draft: Draft[Medium]

    @property
    def kind(self) -> str:
        """The family and the kind, as the record's ``kind`` has them: "scene/count"."""
        return f"{self.family}/{self.draft.kind}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """One part of the dataset: its annotations in order, and how the pictures of each set of facts are stored."""

    annotations: tuple[Planned, ...]
    encodings: Mapping[tuple[Medium, ...], Encoding]

    def counts(self) -> dict[str, int]:
        """Returns how many annotations of each kind there are, by name."""
        return dict(sorted(Counter(annotation.kind for annotation in self.annotations).items()))


def plan_demo(seed: int, *, num_train: int, num_held_out: int) -> tuple[Plan, Plan]:
    """Returns the plans of the training part (good records only) and of the held-out part.

    Both ask the same kinds of questions, where a part has enough annotations for them, about different media. Chats of
    the held-out part do not occur in the other.
    """
    return _plan_part(seed, num_train, held_out=False), _plan_part(seed, num_held_out, held_out=True)


def _plan_part(seed: int, num: int, *, held_out: bool) -> Plan:
    part = "heldout" if held_out else "train"
    counts = dict(zip(_SHARES, allocate(num, list(_SHARES.values())), strict=True))

    def drafts(family: str, kinds: Sequence[Kind[M]]) -> list[Draft[M]]:
        return compose(kinds, counts[family], generator(seed, f"{part}/{family}"), held_out=held_out)

    scenes = drafts("scene", SCENE_KINDS)
    charts = drafts("chart", CHART_KINDS)
    pages = drafts("page", PAGE_KINDS)
    clips = drafts("clip", CLIP_KINDS)
    chats = drafts("chat", CHAT_KINDS)
    by_family: dict[str, Sequence[Draft[Medium]]] = {
        "scene": scenes,
        "chart": charts,
        "page": pages,
        "clip": clips,
        "chat": chats,
    }
    encodings: dict[tuple[Medium, ...], Encoding] = {}
    for family, patterns in _ENCODINGS.items():
        encodings |= _choose_encodings(by_family[family], patterns)
    planned = [Planned(family=family, draft=draft) for family, chosen in by_family.items() for draft in chosen]
    shuffled = generator(seed, f"{part}/order").permutation(len(planned))
    return Plan(annotations=tuple(planned[i] for i in shuffled), encodings=encodings)


def _choose_encodings(
    drafts: Sequence[Draft[Medium]], patterns: tuple[Encoding, ...]
) -> dict[tuple[Medium, ...], Encoding]:
    """Goes round the patterns; media of which a colour is asked are never stored grey."""
    coloured = {draft.facts for draft in drafts if draft.needs_colour}
    chosen: dict[tuple[Medium, ...], Encoding] = {}
    for draft in drafts:
        if draft.facts not in chosen:
            encoding = patterns[len(chosen) % len(patterns)]
            chosen[draft.facts] = PNG if encoding.mode == "L" and draft.facts in coloured else encoding
    turned = next((draft.facts for draft in drafts if draft.kind == _TURNED_KIND), None)
    return chosen if turned is None else chosen | {turned: TURNED_JPEG}
