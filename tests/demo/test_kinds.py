"""The plan of the demo dataset: its answers follow from the facts of the media, and the text does not reveal them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from demo.dataset import KINDS, Planned, plan_demo
from demo.kinds import Draft, allocate, balanced, generator

Parts = tuple[list[Planned], list[Planned]]


@pytest.fixture(scope="module")
def plans() -> list[Parts]:
    return [(plan_demo(seed, 390, held_out=False), plan_demo(seed, 80, held_out=True)) for seed in range(5)]


def drafts_of(plans: list[Parts], kind: str) -> list[Draft]:
    """The English drafts of a kind, of all seeds and parts."""
    drafts = [draft for parts in plans for part in parts for draft, _ in part]
    return [draft for draft in drafts if draft.kind.name == kind and draft.wording.language == "en"]


def test_answers_about_documents_follow_from_their_pages(plans: list[Parts]) -> None:
    drafts = drafts_of(plans, "page/title")
    assert len(drafts) > 150
    for draft in drafts:
        for exchange in draft.exchanges:
            page = int(re.search(r"page (\d)", exchange.question)[1])  # type: ignore[index]
            assert draft.facts[page - 1].title == exchange.answer
            assert draft.facts[page - 1].number == page


def test_answers_about_videos_follow_from_their_facts(plans: list[Parts]) -> None:
    for draft in drafts_of(plans, "video/event"):
        assert draft.exchanges[0].answer == draft.facts[0].event
    drafts = drafts_of(plans, "video/same_colour")
    assert len(drafts) > 10
    for draft in drafts:
        video, scene = draft.facts
        assert draft.exchanges[0].answer == ("yes" if video.start.colour == scene.figures[0].colour else "no")
        assert video.start.colour == video.end.colour


def test_all_answers_of_a_kind_are_equally_frequent(plans: list[Parts]) -> None:
    assert all(len(kind.answers) != 1 for kind in KINDS)
    for part in (part for parts in plans for part in parts):
        values: dict[str, Counter[str]] = defaultdict(Counter)
        for draft, _ in part:
            values[draft.kind.name][draft.exchanges[0].value] += 1
        for kind in (kind for kind in KINDS if kind.answers):
            counts = [values[kind.name][answer] for answer in kind.answers]
            assert max(counts) - min(counts) <= 1, kind.name
            assert set(values[kind.name]) <= set(kind.answers), kind.name


def test_the_text_of_a_question_does_not_reveal_its_answer(plans: list[Parts]) -> None:
    """The most frequent training answer to the same words is right no more often than a guess.

    A kind without balanced answers has so many that a guess is right 1 of 20 times at most.
    """
    hits, chances = [], []
    for train, held_out in plans:
        by_words: dict[tuple[str, str, int], Counter[str]] = defaultdict(Counter)
        for draft, _ in train:
            kind, first = draft.kind.name, draft.exchanges[0]
            for key in ((kind, first.question, len(draft.facts)), (kind, "", 0)):
                by_words[key][first.value] += 1
        for draft in (draft for draft, _ in held_out if draft.facts):
            kind, first = draft.kind.name, draft.exchanges[0]
            guesses = by_words.get((kind, first.question, len(draft.facts)), by_words[kind, "", 0])
            hits.append(guesses.most_common(1)[0][0] == first.value)
            chances.append(1 / (len(draft.kind.answers) or 20))
    deviation = np.sqrt(np.sum([chance * (1 - chance) for chance in chances])) / len(chances)
    assert len(hits) > 200
    assert np.mean(hits) < np.mean(chances) + 3 * deviation
    assert np.mean(chances) < 0.35


def test_different_answers_have_different_words_in_both_languages(plans: list[Parts]) -> None:
    words: dict[tuple[str, str], dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for draft in (draft for train, _ in plans for draft, _ in train):
        if draft.kind.answers and not draft.wording.sentence:
            exchange = draft.exchanges[0]
            words[draft.kind.name, draft.wording.language][exchange.value].add(exchange.answer)
    for (name, language), answers in words.items():
        texts = [text for phrasings in answers.values() for text in phrasings]
        assert len(set(texts)) == len(texts) == len(answers), (name, language, answers)
        if language == "zh" and name != "scene/count":
            assert not any(text.isascii() for text in texts), (name, texts)
    assert {language for _, language in words} == {"en", "zh"}


@pytest.mark.parametrize(("count", "seed"), [(40, 0), (57, 1), (203, 2)])
def test_any_number_of_annotations_is_planned_exactly(count: int, seed: int) -> None:
    assert len(plan_demo(seed, count, held_out=False)) == count
    assert len(plan_demo(seed, count // 5, held_out=True)) == count // 5


def test_the_plan_does_not_depend_on_the_hash_seed() -> None:
    code = (
        "import hashlib; from demo.dataset import plan_demo; plan = plan_demo(0, 60, held_out=False);"
        "facts = [(draft.facts, draft.exchanges, encoding) for draft, encoding in plan];"
        "print(hashlib.sha256(repr(facts).encode()).hexdigest())"
    )
    environments = [{"PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])} for seed in ("1", "2")]
    first, second = (subprocess.check_output([sys.executable, "-c", code], env=env, text=True) for env in environments)
    assert first == second


def test_balanced_answers_are_equally_frequent() -> None:
    answers = balanced(generator(0, "test"), ("a", "b", "c"), 11)
    assert sorted(Counter(answers).values()) == [3, 4, 4]


@pytest.mark.parametrize("count", [0, 2, 3, 7, 100])
def test_allocate_distributes_exactly_the_count(count: int) -> None:
    counts = allocate(count, [5, 1, 3])
    assert sum(counts) == count
    assert min(counts) >= (1 if count >= 3 else 0)


def test_allocate_follows_the_weights() -> None:
    """12 = one each + 9 in the ratio 5:1:3."""
    assert allocate(12, [5, 1, 3]) == [6, 2, 4]
