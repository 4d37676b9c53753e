"""Chats without media, in one or several turns, with answers that can be worked out.

Each function draws the numbers or words of one chat and returns its exchanges. Some texts would trip careless
tokenization: role names at the start of lines, line breaks, characters beyond the basic plane.
"""

from __future__ import annotations

from typing import NoReturn

import numpy as np

from demo.kinds import Kind, sample_names
from demo.wording import Exchange, Wording

Nothing = tuple[NoReturn, ...]

_NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana")
_GOODS = ("eggs", "nails", "stamps", "🍎", "coins", "books", "cups", "seeds")
_FILLER = ("The list was copied by hand, so the order matters.", "It rained all morning and the road was slow.")


def sums(media: Nothing, rng: np.random.Generator, wording: Wording) -> tuple[Exchange, ...]:
    """One sum."""
    a, b = (int(i) for i in rng.integers(2, 60, 2))
    question = wording.say((f"What is {a} plus {b}?", f"{a} + {b} = ?"), f"{a}加{b}等于多少？")
    return (wording.ask(question, a + b),)


def running_sum(media: Nothing, rng: np.random.Generator, wording: Wording) -> tuple[Exchange, ...]:
    """A number that grows over 3 to 5 turns."""
    start, *steps = (int(i) for i in rng.integers(2, 30, int(rng.integers(4, 7))))
    first = wording.say(f"Start with {start} and add {steps[0]}.", f"从{start}开始，加上{steps[0]}。")
    questions = [first, *(wording.say(f"Add {step}.", f"再加{step}。") for step in steps[1:])]
    return tuple(wording.ask(question, start + sum(steps[: i + 1])) for i, question in enumerate(questions))


def shopping_list(media: Nothing, rng: np.random.Generator, wording: Wording) -> tuple[Exchange, ...]:
    """A text of many lines, and two questions about it."""
    people = sample_names(rng, _NAMES, int(rng.integers(4, 9)))
    goods = sample_names(rng, _GOODS, len(people))
    counts = [int(i) + 3 for i in rng.permutation(60)[: len(people)]]
    lines = [
        wording.say(f"- {person} bought {count} {thing}. {_FILLER[i % 2]}", f"- {person}买了{count}个{thing}。")
        for i, (person, count, thing) in enumerate(zip(people, counts, goods, strict=True))
    ]
    one, other = (int(i) for i in rng.permutation(len(people))[:2])
    many = wording.say(f"How many {goods[one]} did {people[one]} buy?", f"{people[one]}买了几个{goods[one]}？")
    who = wording.say(f"Who bought {goods[other]}?", f"谁买了{goods[other]}？")
    return wording.ask("\n".join([*lines, "", many]), counts[one]), wording.ask(who, people[other])


def transcript(media: Nothing, rng: np.random.Generator, wording: Wording) -> tuple[Exchange, ...]:
    """A quoted chat that names the roles as a chat template does."""
    a, b, c = (int(i) for i in rng.integers(2, 30, 3))
    lines = wording.say(
        f"user: What is {a} plus {b}?\nassistant: {a + b}\nuser: And {c} more?",
        f"user: {a}加{b}等于多少？\nassistant: {a + b}\nuser: 再加{c}呢？",
    )
    question = wording.say("What does the assistant answer next?", "assistant接下来会回答什么？")
    return (wording.ask(f"{lines}\n\n{question}", a + b + c),)


def one_word(media: Nothing, rng: np.random.Generator, wording: Wording) -> tuple[Exchange, ...]:
    """Two comparisons under a system message."""
    a, b, c = (int(i) + 1 for i in rng.permutation(99)[:3])
    return tuple(
        wording.ask(wording.say(f"Is {x} larger than {y}?", f"{x}比{y}大吗？"), "yes" if x > y else "no")
        for x, y in ((a, b), (b, c))
    )


_ONE_WORD = ("Answer with yes or no only.", "请只回答是或否。")

CHAT_KINDS: tuple[Kind[NoReturn], ...] = (
    Kind(name="chat/sums", weight=3, sample=lambda rng: (), ask=sums),
    Kind(name="chat/running_sum", weight=3, sample=lambda rng: (), ask=running_sum),
    Kind(name="chat/shopping_list", weight=3, sample=lambda rng: (), ask=shopping_list),
    Kind(name="chat/transcript", weight=2, sample=lambda rng: (), ask=transcript),
    Kind(name="chat/one_word", weight=2, sample=lambda rng: (), ask=one_word, system=_ONE_WORD),
)
