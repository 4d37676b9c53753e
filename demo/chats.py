"""Chats without media, in several turns, with answers that can be worked out.

Some texts would trip careless tokenization: role names at the start of lines, line breaks, characters beyond the basic
plane.
"""

from __future__ import annotations

import numpy as np

from demo.kinds import Exchange, Kind, Wording, sample_names

_NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana")
_GOODS = ("eggs", "nails", "stamps", "🍎", "coins", "books", "cups", "seeds")


def _ask_running_sum(media: tuple[()], rng: np.random.Generator, wording: Wording) -> tuple[Exchange, ...]:
    """A number that grows over 1 to 5 turns."""
    start, *steps = (int(i) for i in rng.integers(2, 30, int(rng.integers(2, 7))))
    first = wording.say(f"Start with {start} and add {steps[0]}.", f"从{start}开始，加上{steps[0]}。")
    questions = [first, *(wording.say(f"Add {step}.", f"再加{step}。") for step in steps[1:])]
    return tuple(wording.ask(question, start + sum(steps[: i + 1])) for i, question in enumerate(questions))


def _ask_transcript(media: tuple[()], rng: np.random.Generator, wording: Wording) -> tuple[Exchange, ...]:
    """A quoted chat of many lines that names the roles as a chat template does, and two questions about it."""
    people = sample_names(rng, _NAMES, int(rng.integers(4, 9)))
    goods = sample_names(rng, _GOODS, len(people))
    counts = [int(i) + 3 for i in rng.permutation(60)[: len(people)]]
    lines = [
        wording.say(
            f"user: {person} bought {count} {thing}.\nassistant: Who else bought something?",
            f"user: {person}买了{count}个{thing}。\nassistant: 还有谁买了东西？",
        )
        for person, count, thing in zip(people, counts, goods, strict=True)
    ]
    first, second = (int(i) for i in rng.permutation(len(people))[:2])
    how_many = wording.say(
        f"How many {goods[first]} did {people[first]} buy?", f"{people[first]}买了几个{goods[first]}？"
    )
    who = wording.say(f"Who bought {goods[second]}?", f"谁买了{goods[second]}？")
    return wording.ask("\n".join([*lines, "", how_many]), counts[first]), wording.ask(who, people[second])


_NUMBERS_ONLY = ("Answer with a number only.", "请只回答数字。")

CHAT_KINDS = (
    Kind(name="chat/running_sum", weight=12, sample=lambda rng: (), ask=_ask_running_sum, system=_NUMBERS_ONLY),
    Kind(name="chat/transcript", weight=8, sample=lambda rng: (), ask=_ask_transcript),
)
