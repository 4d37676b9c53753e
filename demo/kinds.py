"""Kinds of annotation, and how facts are found whose answers come out balanced.

A kind is a question that can be asked about many facts. ``compose`` takes kinds with weights and returns so many
drafts, every answer of a kind equally often: the answer is drawn first, then facts are sampled until the question
about them has it. So the question's text says nothing about its answer, and only who looks at the media can know.

Cost: about 10 to 100 samples of facts per draft, 10-30 microseconds each; nothing is drawn here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

from demo.vocabulary import Dialogue, Wording

M = TypeVar("M")
M_co = TypeVar("M_co", covariant=True)

_MAX_TRIES = 100_000
_CHINESE_SHARE = 0.2
_SENTENCE_SHARE = 0.2
_HELD_OUT_ONE_IN = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind(Generic[M]):
    """A kind of annotation over media of type ``M``.

    Attributes:
        name: Short and stable; the annotation's ``kind`` is ``family/name``.
        weight: How many drafts of this kind, relative to the others of the family.
        sample: Draws the facts of all media of one annotation.
        ask: Words the dialogue about these facts, or returns None where they allow no clear question.
        answers: The values to give equally often; empty where every annotation has its own answer.
        needs_colour: Whether a grey copy of the picture would hide the answer.
        turn_by_turn: Whether medium i comes with question i, instead of all media with the first.
        shares_media: Whether it asks again about media made for another kind of the family.
    """

    name: str
    weight: int
    sample: Callable[[np.random.Generator], tuple[M, ...]]
    ask: Callable[[tuple[M, ...], np.random.Generator, Wording], Dialogue | None]
    answers: tuple[str, ...] = ()
    needs_colour: bool = True
    turn_by_turn: bool = False
    shares_media: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Draft(Generic[M_co]):
    """An annotation before its media are drawn: the facts and what is said about them; the rest is as in ``Kind``."""

    kind: str
    facts: tuple[M_co, ...]
    dialogue: Dialogue
    wording: Wording
    needs_colour: bool
    turn_by_turn: bool


def generator(seed: int, purpose: str) -> np.random.Generator:
    """Returns a PCG64 generator for one purpose, independent of those for other purposes and seeds."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little")))


def pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    """Returns one of the options, each as likely."""
    return options[int(rng.integers(len(options)))]


def allocate(num: int, weights: Sequence[int]) -> list[int]:
    """Divides ``num`` by weights (largest remainders), one for each first where there are enough."""
    base = 1 if num >= len(weights) else 0
    left = num - base * len(weights)
    exact = [left * weight / sum(weights) for weight in weights]
    counts = [base + int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: (int(exact[i]) - exact[i], -weights[i], i))
    for i in by_remainder[: num - sum(counts)]:
        counts[i] += 1
    return counts


def balanced(rng: np.random.Generator, answers: Sequence[str], num: int) -> list[str]:
    """Returns ``num`` answers in random order, each as often as the others (the rest of the division: once more)."""
    whole, rest = divmod(num, len(answers))
    chosen = list(answers) * whole + [answers[i] for i in rng.permutation(len(answers))[:rest]]
    return [chosen[i] for i in rng.permutation(num)]


def compose(kinds: Sequence[Kind[M]], num: int, rng: np.random.Generator, *, held_out: bool) -> list[Draft[M]]:
    """Returns ``num`` drafts of these kinds in random order.

    Args:
        kinds: The kinds of one family; those that share media come after those whose media they ask about.
        num: How many drafts.
        rng: The only source of randomness.
        held_out: For which part of the dataset. Media differ anyway, but a question without a medium belongs to one
            part only, by a hash of its text.
    """
    drafts: list[Draft[M]] = []
    for kind, count in zip(kinds, allocate(num, [kind.weight for kind in kinds]), strict=True):
        targets: list[str | None] = list(balanced(rng, kind.answers, count)) if kind.answers else [None] * count
        hosts = [drafts[i] for i in rng.permutation(len(drafts))] if kind.shares_media else []
        for target in targets:
            drafts.append(_draft(kind, target, rng, hosts, held_out=held_out))
    return [drafts[i] for i in rng.permutation(len(drafts))]


def _is_held_out(question: str) -> bool:
    return hashlib.sha256(question.encode()).digest()[0] % _HELD_OUT_ONE_IN == 0


def _draft(
    kind: Kind[M], target: str | None, rng: np.random.Generator, hosts: list[Draft[M]], *, held_out: bool
) -> Draft[M]:
    wording = Wording(
        language="zh" if rng.random() < _CHINESE_SHARE else "en",
        sentence=bool(rng.random() < _SENTENCE_SHARE),
        variant=int(rng.integers(60)),
    )
    for _ in range(_MAX_TRIES):
        facts = hosts.pop().facts if hosts else kind.sample(rng)
        dialogue = kind.ask(facts, rng, wording)
        if dialogue is None or (target is not None and dialogue.value != target):
            continue
        if not facts and _is_held_out(dialogue.exchanges[0].question) != held_out:
            continue
        return Draft(
            kind=kind.name,
            facts=facts,
            dialogue=dialogue,
            wording=wording,
            needs_colour=kind.needs_colour,
            turn_by_turn=kind.turn_by_turn,
        )
    raise AssertionError(f"kind {kind.name}: no facts have the answer {target!r} in {_MAX_TRIES} samples")
