"""Chats without any medium: small sums, words, lists and texts, in one or several turns, in English and Chinese.

Every function draws the numbers or words of one chat and returns its dialogue; all answers can be worked out.
``CHAT_KINDS`` is the list. Some texts are there to trip careless tokenization: role names at the start of lines, code,
line breaks, leading spaces, characters beyond the basic plane.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import numpy as np

from demo.kinds import Kind, pick
from demo.vocabulary import COLOURS, Dialogue, Exchange, Wording

Nothing = tuple[NoReturn, ...]

_WORDS = (
    "banana", "candle", "dragon", "engine", "forest", "garden", "hammer", "island", "jacket", "kitchen",
    "lemon", "mirror", "needle", "orange", "pencil", "rabbit", "silver", "tunnel", "violin", "window",
)  # fmt: skip
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_DAYS_ZH = "一二三四五六日"
_NAMES = ("Ann", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana")
_GOODS = ("eggs", "nails", "stamps", "apples", "coins", "books", "cups", "seeds")
_FILLER = (
    "The list was copied by hand, so the order matters.",
    "Some of it had to be fetched from the other side of the river.",
    "Nobody remembered who had asked for it in the first place.",
    "It rained all morning and the road was slow.",
    "The rest was left for the week after.",
)


def sums(rng: np.random.Generator, wording: Wording) -> Dialogue:
    """One sum or difference."""
    a, b = sorted((int(rng.integers(2, 60)), int(rng.integers(2, 40))), reverse=True)
    if rng.random() < 0.5:
        question = wording.say((f"What is {a} plus {b}?", f"{a} + {b} = ?"), f"{a}加{b}等于多少？")
        sentence = wording.say(f"{a} plus {b} is {a + b}.", f"{a}加{b}等于{a + b}。")
        return Dialogue(exchanges=(wording.exchange(question, value=str(a + b), sentence=sentence),))
    question = wording.say((f"What is {a} minus {b}?", f"{a} - {b} = ?"), f"{a}减{b}等于多少？")
    sentence = wording.say(f"{a} minus {b} is {a - b}.", f"{a}减{b}等于{a - b}。")
    return Dialogue(exchanges=(wording.exchange(question, value=str(a - b), sentence=sentence),))


def running_sum(rng: np.random.Generator, wording: Wording) -> Dialogue:
    """A number that grows over three to five turns."""
    total = int(rng.integers(1, 30))
    step = int(rng.integers(2, 10))
    exchanges = [
        _exchange(wording.say(f"Start with {total} and add {step}.", f"从{total}开始，加上{step}。"), total + step)
    ]
    total += step
    for _ in range(int(rng.integers(2, 5))):
        step = int(rng.integers(2, 10))
        total += step
        exchanges.append(_exchange(wording.say(f"Add {step}.", f"再加{step}。"), total))
    return Dialogue(exchanges=tuple(exchanges))


def words(rng: np.random.Generator, wording: Wording) -> Dialogue:
    """A word's number of letters, first letter, or letters backwards."""
    word = pick(rng, _WORDS)
    about = pick(rng, ("length", "first", "backwards"))
    if about == "length":
        return _single(wording.say(f'How many letters has the word "{word}"?', f"单词“{word}”有几个字母？"), len(word))
    if about == "first":
        return _single(
            wording.say(f'What is the first letter of "{word}"?', f"单词“{word}”的第一个字母是什么？"), word[0]
        )
    return _single(wording.say(f'Spell "{word}" backwards.', f"把单词“{word}”倒过来拼写。"), word[::-1])


def order(rng: np.random.Generator, wording: Wording) -> Dialogue:
    """Numbers to sort, or the largest of them."""
    numbers = [int(i) + 1 for i in rng.permutation(99)[: int(rng.integers(3, 6))]]
    listed = ", ".join(map(str, numbers))
    if rng.random() < 0.5:
        answer = ", ".join(map(str, sorted(numbers)))
        return _single(wording.say(f"Sort from small to large: {listed}", f"从小到大排序：{listed}"), answer)
    return _single(wording.say(f"Which is the largest number: {listed}?", f"哪个数最大：{listed}？"), max(numbers))


def days(rng: np.random.Generator, wording: Wording) -> Dialogue:
    """Which day it is so many days later."""
    start, later = int(rng.integers(7)), int(rng.integers(1, 30))
    end = (start + later) % 7
    question = wording.say(
        f"Today is {_DAYS[start]}. Which day is it {later} days from now?",
        f"今天是星期{_DAYS_ZH[start]}，{later}天以后是星期几？",
    )
    answer = wording.say(_DAYS[end], f"星期{_DAYS_ZH[end]}")
    return _single(question, answer)


def translation(rng: np.random.Generator, wording: Wording) -> Dialogue:
    """A few colours from English to Chinese, or the other way round."""
    chosen = [COLOURS[i] for i in rng.permutation(len(COLOURS))[: int(rng.integers(2, 4))]]
    zh = Wording(language="zh", sentence=False, variant=0)
    in_zh = [zh.colour(colour) for colour in chosen]
    if wording.language == "en":
        return _single(f"Translate into Chinese: {', '.join(chosen)}", "、".join(in_zh))
    return _single(f"请翻译成英语：{'、'.join(in_zh)}", ", ".join(chosen))


def shopping_list(rng: np.random.Generator, wording: Wording) -> Dialogue:
    """A text of many lines, and two questions about what it says."""
    people = [_NAMES[i] for i in rng.permutation(len(_NAMES))[: int(rng.integers(4, 9))]]
    goods = [_GOODS[i] for i in rng.permutation(len(_GOODS))]
    numbers = [int(i) + 3 for i in rng.permutation(60)]
    lines = []
    for person, thing, number in zip(people, goods, numbers, strict=False):
        filler = _FILLER[int(rng.integers(len(_FILLER)))]
        lines.append(wording.say(f"- {person} bought {number} {thing}. {filler}", f"- {person}买了{number}个{thing}。"))
    one, other = (int(i) for i in rng.permutation(len(people))[:2])
    ask = wording.say(f"How many {goods[one]} did {people[one]} buy?", f"{people[one]}买了几个{goods[one]}？")
    who = wording.say(f"Who bought {goods[other]}?", f"谁买了{goods[other]}？")
    first = _exchange("\n".join([*lines, "", ask]), numbers[one])
    return Dialogue(exchanges=(first, _exchange(who, people[other])))


def code(rng: np.random.Generator, wording: Wording) -> Dialogue:
    """A few lines of code, and what they print."""
    start, step, times = (int(rng.integers(low, high)) for low, high in ((0, 9), (2, 6), (2, 5)))
    program = f"x = {start}\nfor _ in range({times}):\n    x += {step}\nprint(x)"
    question = wording.say("What does this print?", "这段代码输出什么？")
    return _single(f"{question}\n\n```python\n{program}\n```", start + step * times)


def transcript(rng: np.random.Generator, wording: Wording) -> Dialogue:
    """A quoted chat that names the roles as a chat template does, to be continued."""
    a, b, c = (int(rng.integers(2, 30)) for _ in range(3))
    lines = wording.say(
        f"user: What is {a} plus {b}?\nassistant: {a + b}\nuser: And {c} more?",
        f"user: {a}加{b}等于多少？\nassistant: {a + b}\nuser: 再加{c}呢？",
    )
    question = wording.say("What does the assistant answer next?", "assistant接下来会回答什么？")
    return _single(f"{lines}\n\n{question}", a + b + c)


def symbols(rng: np.random.Generator, wording: Wording) -> Dialogue:
    """Symbols beyond the basic plane, to be counted."""
    symbol, other = (("🍎", "🍐", "⭐", "🎈")[i] for i in rng.permutation(4)[:2])
    num, others = int(rng.integers(1, 7)), int(rng.integers(1, 7))
    row = [symbol] * num + [other] * others
    text = " ".join(row[i] for i in rng.permutation(len(row)))
    return _single(wording.say(f"How many {symbol} are here?  {text}", f"这里有几个{symbol}？  {text}"), num)


def one_word(rng: np.random.Generator, wording: Wording) -> Dialogue:
    """Two comparisons under a system message that asks for one word."""
    system = wording.say("Answer with one word only.", "请只用一个词回答。")
    exchanges = []
    for _ in range(2):
        a, b = (int(i) + 1 for i in rng.permutation(99)[:2])
        value = "yes" if a > b else "no"
        question = wording.say(f"Is {a} larger than {b}?", f"{a}比{b}大吗？")
        exchanges.append(_exchange(question, wording.say(value, {"yes": "是", "no": "否"}[value])))
    return Dialogue(exchanges=tuple(exchanges), system=system)


def _exchange(question: str, answer: str | int) -> Exchange:
    return Exchange(question=question, answer=str(answer), value=str(answer))


def _single(question: str, answer: str | int) -> Dialogue:
    return Dialogue(exchanges=(_exchange(question, answer),))


def _nothing(rng: np.random.Generator) -> Nothing:
    return ()


def _kind(name: str, weight: int, chat: Callable[[np.random.Generator, Wording], Dialogue]) -> Kind[NoReturn]:
    def ask(media: Nothing, rng: np.random.Generator, wording: Wording) -> Dialogue:
        return chat(rng, wording)

    return Kind(name=name, weight=weight, sample=_nothing, ask=ask, needs_colour=False)


CHAT_KINDS: tuple[Kind[NoReturn], ...] = (
    _kind("sums", 10, sums),
    _kind("running_sum", 8, running_sum),
    _kind("words", 7, words),
    _kind("order", 7, order),
    _kind("days", 5, days),
    _kind("translation", 5, translation),
    _kind("shopping_list", 7, shopping_list),
    _kind("code", 4, code),
    _kind("transcript", 4, transcript),
    _kind("symbols", 4, symbols),
    _kind("one_word", 5, one_word),
)
