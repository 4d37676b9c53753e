"""Kinds of annotations: questions in English and Chinese with balanced answers.

A kind is one question about many possible media. ``compose`` draws the answer first, then samples the facts of media
until the question about them has that answer. Every answer of a kind is therefore equally frequent, the text of the
question does not reveal it, and only the media do. Facts have English names in both languages: "red", "star", "left".

Cost: 10 to 100 samples of facts per draft, 10-30 microseconds each. Nothing is drawn here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Language = Literal["en", "zh"]
Facts = tuple[Any, ...]
"""The facts of all media of one annotation, such as a video and a scene."""

_CHINESE = {
    "red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "purple": "紫色",
    "circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "五角星", "left": "左边", "right": "右边",
    "yes": "是", "no": "否", "changes colour": "变了颜色", "grows": "变大了", "shrinks": "变小了",
    "moves left": "向左移动了", "moves right": "向右移动了", "moves up": "向上移动了", "moves down": "向下移动了",
}  # fmt: skip
_CHINESE_SHARE = 0.2
_SENTENCE_SHARE = 0.2
_HELD_OUT_ONE_IN = 5
_MAX_TRIES = 100_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """A question with its answer. ``value`` is the answer as an English fact ("red", "3"), by which it is balanced."""

    question: str
    answer: str
    value: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Wording:
    """How an annotation speaks: its language, short answers or full sentences, and which phrasing it uses."""

    language: Language
    sentence: bool = False
    variant: int = 0

    def say(self, en: str | Sequence[str], zh: str | Sequence[str]) -> str:
        """Return the phrasing in this language. ``variant`` picks one of several."""
        phrases = en if self.language == "en" else zh
        return phrases if isinstance(phrases, str) else phrases[self.variant % len(phrases)]

    def word(self, name: str) -> str:
        """Return a fact's word in this language. Numbers, letters and names are the same in both."""
        return self.say(name, _CHINESE.get(name, name))

    def ask(self, question: str, value: object, *, sentence: str | None = None) -> Exchange:
        """Return a question with its answer: the word for ``value``, or ``sentence`` if this wording prefers those."""
        if self.sentence and sentence is not None:
            request = self.say(" Answer in a full sentence.", "请用一句完整的话回答。")
            return Exchange(question=question + request, answer=sentence, value=str(value))
        return Exchange(question=question, answer=self.word(str(value)), value=str(value))


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """A kind of annotation.

    Attributes:
        name: The family and a stable name ("scene/count"), which is also the ``kind`` of the record.
        weight: Number of drafts relative to the other kinds.
        sample: Draws the facts of all media of one annotation.
        ask: Returns the exchanges about these facts, or none if the facts allow no clear question. Its generator picks
            what to ask about.
        answers: First answers, all equally frequent. Empty if every annotation has its own answer.
        needs_colour: Whether a gray copy of the image would hide the answer.
        system: The system message in English and Chinese.
    """

    name: str
    weight: int
    sample: Callable[[np.random.Generator], Facts]
    ask: Callable[[Any, np.random.Generator, Wording], tuple[Exchange, ...]]
    answers: tuple[str, ...] = ()
    needs_colour: bool = True
    system: tuple[str, str] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft:
    """An annotation before its media are drawn: the facts and what is said about them."""

    kind: Kind
    facts: Facts
    exchanges: tuple[Exchange, ...]
    wording: Wording


def generator(seed: int, purpose: str) -> np.random.Generator:
    """Return a PCG64 generator for one purpose, independent of those for other purposes and seeds."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    """Return one of the options, all equally likely."""
    return options[int(rng.integers(len(options)))]


def sample_names(rng: np.random.Generator, names: Sequence[str], count: int) -> list[str]:
    """Return ``count`` different names in random order."""
    return [names[i] for i in rng.permutation(len(names))[:count]]


def allocate(count: int, weights: Sequence[int]) -> list[int]:
    """Divide ``count`` by weights (largest remainders), with one for each weight if there are enough."""
    base = int(count >= len(weights))
    exact = base + (count - base * len(weights)) * np.array(weights) / sum(weights)
    counts = exact.astype(int)
    counts[np.argsort(counts - exact, kind="stable")[: count - counts.sum()]] += 1
    return [int(share) for share in counts]


def balanced(rng: np.random.Generator, answers: Sequence[str], count: int) -> list[str]:
    """Return ``count`` answers in random order. The counts of any two answers differ by at most one."""
    quotient, rest = divmod(count, len(answers))
    chosen = list(answers) * quotient + [answers[i] for i in rng.permutation(len(answers))[:rest]]
    return [chosen[i] for i in rng.permutation(count)]


def compose(kinds: Sequence[Kind], count: int, rng: np.random.Generator, *, held_out: bool) -> list[Draft]:
    """Return ``count`` drafts of these kinds in random order.

    A question without media belongs to the training part or to the held-out part, depending on a hash of its text.
    Media differ between the parts anyway.
    """
    drafts: list[Draft] = []
    for kind, share in zip(kinds, allocate(count, [kind.weight for kind in kinds]), strict=True):
        targets: list[str | None] = list(balanced(rng, kind.answers, share)) if kind.answers else [None] * share
        drafts += [_draft(kind, target, rng, held_out=held_out) for target in targets]
    return [drafts[i] for i in rng.permutation(len(drafts))]


def _draft(kind: Kind, target: str | None, rng: np.random.Generator, *, held_out: bool) -> Draft:
    wording = Wording(
        language="zh" if rng.random() < _CHINESE_SHARE else "en",
        sentence=bool(rng.random() < _SENTENCE_SHARE),
        variant=int(rng.integers(60)),
    )
    for _ in range(_MAX_TRIES):
        facts = kind.sample(rng)
        exchanges = kind.ask(facts, rng, wording)
        if not exchanges or (target is not None and exchanges[0].value != target):
            continue
        digest = hashlib.sha256(exchanges[0].question.encode()).digest()
        if not facts and (digest[0] % _HELD_OUT_ONE_IN == 0) != held_out:
            continue
        return Draft(kind=kind, facts=facts, exchanges=exchanges, wording=wording)
    raise AssertionError(f"kind {kind.name}: no facts have the answer {target!r} in {_MAX_TRIES} samples")
