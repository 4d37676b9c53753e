"""Kinds of annotations with balanced answers.

A kind is one question about many possible media. ``compose`` draws the answer first, then samples the facts of media
until the question about them has that answer. Every answer of a kind is therefore equally frequent, the text of the
question does not reveal it, and only the media do.

Cost: 10 to 100 samples of facts per draft, 10-30 microseconds each. Nothing is drawn here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from demo.wording import Exchange, Wording

M = TypeVar("M")

_MAX_TRIES = 100_000
_CHINESE_SHARE = 0.2
_SENTENCE_SHARE = 0.2
_HELD_OUT_ONE_IN = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind(Generic[M]):
    """A kind of annotation over media of type ``M``.

    Attributes:
        name: The family and a stable name ("scene/count"), which is also the ``kind`` of the record.
        weight: Number of drafts relative to the other kinds of the family.
        sample: Draws the facts of all media of one annotation.
        ask: Returns the exchanges about these facts, or none if the facts allow no clear question.
        answers: First answers, all equally frequent. Empty if every annotation has its own answer.
        needs_colour: Whether a gray copy of the image would hide the answer.
        turn_by_turn: Whether medium i comes with question i, not all media with the first.
        system: The system message in English and Chinese.
    """

    name: str
    weight: int
    sample: Callable[[np.random.Generator], tuple[M, ...]]
    ask: Callable[[tuple[M, ...], np.random.Generator, Wording], tuple[Exchange, ...]]
    answers: tuple[str, ...] = ()
    needs_colour: bool = True
    turn_by_turn: bool = False
    system: tuple[str, str] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft(Generic[M]):
    """An annotation before its media are drawn: the facts and what is said about them."""

    kind: Kind[M]
    facts: tuple[M, ...]
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
    base = 1 if count >= len(weights) else 0
    left = count - base * len(weights)
    exact = [left * weight / sum(weights) for weight in weights]
    counts = [base + int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: (int(exact[i]) - exact[i], -weights[i], i))
    for i in by_remainder[: count - sum(counts)]:
        counts[i] += 1
    return counts


def balanced(rng: np.random.Generator, answers: Sequence[str], count: int) -> list[str]:
    """Return ``count`` answers in random order. The counts of any two answers differ by at most one."""
    quotient, rest = divmod(count, len(answers))
    chosen = list(answers) * quotient + [answers[i] for i in rng.permutation(len(answers))[:rest]]
    return [chosen[i] for i in rng.permutation(count)]


def compose(kinds: Sequence[Kind[M]], count: int, rng: np.random.Generator, *, held_out: bool) -> list[Draft[M]]:
    """Return ``count`` drafts of these kinds in random order.

    A question without media belongs to the training part or to the held-out part, depending on a hash of its text.
    Media differ between the parts anyway.
    """
    drafts: list[Draft[M]] = []
    for kind, share in zip(kinds, allocate(count, [kind.weight for kind in kinds]), strict=True):
        targets: list[str | None] = list(balanced(rng, kind.answers, share)) if kind.answers else [None] * share
        drafts += [_draft(kind, target, rng, held_out=held_out) for target in targets]
    return [drafts[i] for i in rng.permutation(len(drafts))]


def _is_held_out(question: str) -> bool:
    return hashlib.sha256(question.encode()).digest()[0] % _HELD_OUT_ONE_IN == 0


def _draft(kind: Kind[M], target: str | None, rng: np.random.Generator, *, held_out: bool) -> Draft[M]:
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
        if not facts and _is_held_out(exchanges[0].question) != held_out:
            continue
        return Draft(kind=kind, facts=facts, exchanges=exchanges, wording=wording)
    raise AssertionError(f"kind {kind.name}: no facts have the answer {target!r} in {_MAX_TRIES} samples")
