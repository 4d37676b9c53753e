"""What is asked about scenes: colours, shapes, counts, positions, comparisons, in one or several turns.

Every function maps facts (and a generator that only picks whom to ask about) to a dialogue, or to None where the
scene allows no clear question. ``SCENE_KINDS`` is the list; half of the demo dataset comes from here.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from demo.kinds import Kind, pick
from demo.scenes import Scene, sample_scene
from demo.shapes import Figure
from demo.vocabulary import COLOURS, SHAPE_PLURALS, SHAPES, Dialogue, Exchange, Wording

Scenes = tuple[Scene, ...]
Ask = Callable[[Scenes, np.random.Generator, Wording], Dialogue | None]

LETTERS = ("A", "B", "C", "D")
_NUMBERS = ("1", "2", "3", "4", "5")
_SEVERAL = ("2", "3", "4", "5")


def _one(exchange: Exchange) -> Dialogue:
    return Dialogue(exchanges=(exchange,))


def ask_colour(scenes: Scenes, rng: np.random.Generator, wording: Wording) -> Dialogue | None:
    """The colour of the only shape."""
    colour = scenes[0].figures[0].colour
    question = wording.say(
        ("What colour is the shape?", "Which colour does the shape have?"),
        ("图中的形状是什么颜色？", "这个图形是什么颜色的？"),
    )
    sentence = wording.say(f"The shape is {colour}.", f"图中的形状是{wording.colour(colour)}。")
    return _one(wording.exchange(question, value=colour, short=wording.colour(colour), sentence=sentence))


def ask_shape(scenes: Scenes, rng: np.random.Generator, wording: Wording) -> Dialogue | None:
    """The shape of the only figure."""
    shape = scenes[0].figures[0].shape
    question = wording.say(("What shape is in the picture?", "Which shape do you see?"), "图中是什么形状？")
    sentence = wording.say(f"There is a {shape} in the picture.", f"图中是一个{wording.shape(shape)}。")
    return _one(wording.exchange(question, value=shape, short=wording.shape(shape), sentence=sentence))


def ask_colour_of(scenes: Scenes, rng: np.random.Generator, wording: Wording) -> Dialogue | None:
    """The colour of the only figure of some shape, among others."""
    shape = pick(rng, SHAPES)
    found = scenes[0].select(shape=shape)
    if len(found) != 1:
        return None
    colour, name = found[0].colour, wording.shape(shape)
    question = wording.say((f"What colour is the {name}?", f"Which colour is the {name}?"), f"{name}是什么颜色？")
    sentence = wording.say(f"The {name} is {colour}.", f"{name}是{wording.colour(colour)}。")
    return _one(wording.exchange(question, value=colour, short=wording.colour(colour), sentence=sentence))


def ask_shape_of(scenes: Scenes, rng: np.random.Generator, wording: Wording) -> Dialogue | None:
    """The shape of the only figure of some colour, among others."""
    colour = pick(rng, COLOURS)
    found = scenes[0].select(colour=colour)
    if len(found) != 1:
        return None
    shape, name = found[0].shape, wording.colour(colour)
    question = wording.say((f"What shape is the {name} one?", f"Which shape is {name}?"), f"{name}的图形是什么形状？")
    sentence = wording.say(f"The {name} shape is a {shape}.", f"{name}的图形是{wording.shape(shape)}。")
    return _one(wording.exchange(question, value=shape, short=wording.shape(shape), sentence=sentence))


def ask_count(scenes: Scenes, rng: np.random.Generator, wording: Wording) -> Dialogue | None:
    """How many figures there are."""
    num = scenes[0].count()
    question = wording.say(
        ("How many shapes are there?", "How many shapes are in the picture?"),
        ("图中有几个图形？", "一共有多少个图形？"),
    )
    sentence = wording.say(f"There {_are(num, 'shape', 'shapes')} in the picture.", f"图中有{num}个图形。")
    return _one(wording.exchange(question, value=str(num), sentence=sentence))


def ask_count_colour(scenes: Scenes, rng: np.random.Generator, wording: Wording) -> Dialogue | None:
    """How many figures have some colour."""
    colour = pick(rng, COLOURS)
    num = scenes[0].count(colour=colour)
    question = wording.say(f"How many {colour} shapes are there?", f"有几个{wording.colour(colour)}的图形？")
    sentence = wording.say(
        f"There {_are(num, f'{colour} shape', f'{colour} shapes')}.", f"有{num}个{wording.colour(colour)}的图形。"
    )
    return _one(wording.exchange(question, value=str(num), sentence=sentence))


def ask_count_shape(scenes: Scenes, rng: np.random.Generator, wording: Wording) -> Dialogue | None:
    """How many figures have some shape."""
    shape = pick(rng, SHAPES)
    num = scenes[0].count(shape=shape)
    question = wording.say(f"How many {SHAPE_PLURALS[shape]} are there?", f"有几个{wording.shape(shape)}？")
    sentence = wording.say(f"There {_are(num, shape, SHAPE_PLURALS[shape])}.", f"有{num}个{wording.shape(shape)}。")
    return _one(wording.exchange(question, value=str(num), sentence=sentence))


def ask_left_or_right(scenes: Scenes, rng: np.random.Generator, wording: Wording) -> Dialogue | None:
    """On which side of another figure some figure lies."""
    pair = _two_named(scenes[0], rng)
    if pair is None or abs(pair[0].x - pair[1].x) < pair[0].radius + pair[1].radius:
        return None
    value = "left" if pair[0].x < pair[1].x else "right"
    one, other = (wording.thing(figure.colour, figure.shape) for figure in pair)
    question = wording.say(f"Is the {one} left or right of the {other}?", f"{one}在{other}的左边还是右边？")
    side = wording.say(value, {"left": "左边", "right": "右边"}[value])
    sentence = wording.say(f"The {one} is to the {value} of the {other}.", f"{one}在{other}的{side}。")
    return _one(wording.exchange(question, value=value, short=side, sentence=sentence))


def ask_above_or_below(scenes: Scenes, rng: np.random.Generator, wording: Wording) -> Dialogue | None:
    """Whether some figure lies above or below another."""
    pair = _two_named(scenes[0], rng)
    if pair is None or abs(pair[0].y - pair[1].y) < pair[0].radius + pair[1].radius:
        return None
    value = "above" if pair[0].y < pair[1].y else "below"
    one, other = (wording.thing(figure.colour, figure.shape) for figure in pair)
    question = wording.say(f"Is the {one} above or below the {other}?", f"{one}在{other}的上面还是下面？")
    side = wording.say(value, {"above": "上面", "below": "下面"}[value])
    sentence = wording.say(f"The {one} is {value} the {other}.", f"{one}在{other}的{side}。")
    return _one(wording.exchange(question, value=value, short=side, sentence=sentence))


def ask_outermost(scenes: Scenes, rng: np.random.Generator, wording: Wording) -> Dialogue | None:
    """The colour of the figure farthest to one side."""
    side = pick(rng, ("left", "right", "top", "bottom"))
    along = [f.x if side in ("left", "right") else f.y for f in scenes[0].figures]
    order = np.argsort(along if side in ("left", "top") else [-value for value in along], kind="stable")
    first, second = (scenes[0].figures[i] for i in order[:2])
    if abs(along[order[0]] - along[order[1]]) < max(first.radius, second.radius):
        return None
    en = {"left": "leftmost", "right": "rightmost", "top": "topmost", "bottom": "lowest"}[side]
    zh = {"left": "最左边", "right": "最右边", "top": "最上面", "bottom": "最下面"}[side]
    question = wording.say(f"What colour is the {en} shape?", f"{zh}的图形是什么颜色？")
    colour = wording.colour(first.colour)
    sentence = wording.say(f"The {en} shape is {colour}.", f"{zh}的图形是{colour}。")
    return _one(wording.exchange(question, value=first.colour, short=colour, sentence=sentence))


def ask_exists(scenes: Scenes, rng: np.random.Generator, wording: Wording) -> Dialogue | None:
    """Whether there is a figure of some colour and shape."""
    colour, shape = pick(rng, COLOURS), pick(rng, SHAPES)
    value = "yes" if scenes[0].count(colour=colour, shape=shape) else "no"
    name = wording.thing(colour, shape)
    question = wording.say(f"Is there a {name}?", f"图中有{name}吗？")
    short = wording.say(value, {"yes": "有", "no": "没有"}[value])
    en = {"yes": f"Yes, there is a {name}.", "no": f"No, there is no {name}."}[value]
    sentence = wording.say(en, f"图中{short}{name}。")
    return _one(wording.exchange(question, value=value, short=short, sentence=sentence))


def ask_describe(scenes: Scenes, rng: np.random.Generator, wording: Wording) -> Dialogue | None:
    """All figures from left to right."""
    figures = sorted(scenes[0].figures, key=lambda figure: figure.x)
    if any(b.x - a.x < max(a.radius, b.radius) for a, b in pairwise(figures)):
        return None
    question = wording.say("Name the shapes from left to right.", "请从左到右说出所有图形。")
    names = [wording.thing(figure.colour, figure.shape) for figure in figures]
    answer = wording.say(", ".join(f"a {name}" for name in names), "，".join(names))
    return _one(Exchange(question=question, answer=answer, value=answer))


def ask_choice(scenes: Scenes, rng: np.random.Generator, wording: Wording) -> Dialogue | None:
    """A question about colour, shape or number with four answers to choose from."""
    asks: dict[str, tuple[Ask, tuple[str, ...]]] = {
        "colour": (ask_colour_of, COLOURS),
        "shape": (ask_shape_of, SHAPES),
        "count": (ask_count, _SEVERAL),
    }
    about = pick(rng, tuple(asks))
    ask, values = asks[about]
    short = Wording(language=wording.language, sentence=False, variant=wording.variant)
    dialogue = ask(scenes, rng, short)
    if dialogue is None:
        return None
    options = [values[i] for i in rng.permutation(len(values))[: len(LETTERS)]]
    if dialogue.value not in options:
        return None
    words: dict[str, Callable[[str], str]] = {"colour": wording.colour, "shape": wording.shape, "count": str}
    lines = [f"{letter}. {words[about](option)}" for letter, option in zip(LETTERS, options, strict=True)]
    request = wording.say("Answer with the letter.", "请只回答字母。")
    question = "\n".join([dialogue.exchanges[0].question, *lines, request])
    letter = LETTERS[options.index(dialogue.value)]
    return _one(Exchange(question=question, answer=letter, value=letter))


def ask_more_shapes(scenes: Scenes, rng: np.random.Generator, wording: Wording) -> Dialogue | None:
    """Which of two pictures has more figures."""
    first, second = (scene.count() for scene in scenes)
    if first == second:
        return None
    value = "first" if first > second else "second"
    question = wording.say(
        ("Which picture has more shapes, the first or the second?", "Is it the first or the second with more shapes?"),
        "第一张和第二张，哪张图里的图形更多？",
    )
    short = wording.say(value, {"first": "第一张", "second": "第二张"}[value])
    sentence = wording.say(f"The {value} picture has more shapes.", f"{short}图里的图形更多。")
    return _one(wording.exchange(question, value=value, short=short, sentence=sentence))


def ask_two_in_turn(scenes: Scenes, rng: np.random.Generator, wording: Wording) -> Dialogue | None:
    """The colour of one figure, then, with a second picture, that of another."""
    first, second = (scene.figures[0].colour for scene in scenes)
    start = wording.say("What colour is the shape?", "图中的形状是什么颜色？")
    follow_up = wording.say("And in this picture?", "那么这张图呢？")
    return Dialogue(
        exchanges=(
            wording.exchange(start, value=first, short=wording.colour(first)),
            wording.exchange(follow_up, value=second, short=wording.colour(second)),
        )
    )


def ask_conversation(scenes: Scenes, rng: np.random.Generator, wording: Wording) -> Dialogue | None:
    """The number of figures, then two questions that lean on the answers before."""
    order = sorted(scenes[0].figures, key=lambda figure: figure.x)
    if order[1].x - order[0].x < max(order[0].radius, order[1].radius):
        return None
    count = ask_count(scenes, rng, wording)
    assert count is not None, "every scene can be counted"
    left = order[0]
    colour, shape = wording.colour(left.colour), wording.shape(left.shape)
    which = wording.say("What colour is the leftmost one?", "最左边的那个是什么颜色？")
    what = wording.say("And what shape is it?", "它是什么形状？")
    return Dialogue(
        exchanges=(
            *count.exchanges,
            wording.exchange(which, value=left.colour, short=colour),
            wording.exchange(what, value=left.shape, short=shape),
        )
    )


def _are(num: int, singular: str, plural: str) -> str:
    return f"is 1 {singular}" if num == 1 else f"are {num} {plural}"


def _two_named(scene: Scene, rng: np.random.Generator) -> tuple[Figure, Figure] | None:
    """Two figures of which each is the only one of its colour and shape; None if the two drawn are not."""
    one, other = (scene.figures[i] for i in rng.permutation(len(scene.figures))[:2])
    named = all(scene.count(colour=f.colour, shape=f.shape) == 1 for f in (one, other))
    return (one, other) if named else None


def _single(rng: np.random.Generator) -> Scenes:
    return (sample_scene(rng, max_shapes=1),)


def _two_singles(rng: np.random.Generator) -> Scenes:
    return (*_single(rng), *_single(rng))


def _any(rng: np.random.Generator) -> Scenes:
    return (sample_scene(rng, max_shapes=5),)


def _pair(rng: np.random.Generator) -> Scenes:
    return (*_any(rng), *_any(rng))


def _several(rng: np.random.Generator) -> Scenes:
    return (sample_scene(rng, min_shapes=2, max_shapes=5),)


def _colourful(rng: np.random.Generator) -> Scenes:
    return (sample_scene(rng, min_shapes=2, max_shapes=4, max_colours=len(COLOURS)),)


def _several_colourful(rng: np.random.Generator) -> Scenes:
    return (sample_scene(rng, min_shapes=2, max_shapes=5, max_colours=len(COLOURS)),)


_WITH_ZERO = ("0", "1", "2", "3")

SCENE_KINDS: tuple[Kind[Scene], ...] = (
    Kind(name="colour", weight=12, sample=_single, ask=ask_colour, answers=COLOURS),
    Kind(name="shape", weight=8, sample=_single, ask=ask_shape, answers=SHAPES, needs_colour=False),
    Kind(name="colour_of", weight=9, sample=_colourful, ask=ask_colour_of, answers=COLOURS),
    Kind(name="shape_of", weight=6, sample=_colourful, ask=ask_shape_of, answers=SHAPES),
    Kind(name="count", weight=12, sample=_any, ask=ask_count, answers=_NUMBERS, needs_colour=False),
    Kind(name="count_colour", weight=8, sample=_several, ask=ask_count_colour, answers=_WITH_ZERO),
    Kind(name="count_shape", weight=4, sample=_several, ask=ask_count_shape, answers=_WITH_ZERO, needs_colour=False),
    Kind(name="left_or_right", weight=6, sample=_colourful, ask=ask_left_or_right, answers=("left", "right")),
    Kind(name="above_or_below", weight=6, sample=_colourful, ask=ask_above_or_below, answers=("above", "below")),
    Kind(name="outermost", weight=5, sample=_colourful, ask=ask_outermost, answers=COLOURS),
    Kind(name="exists", weight=6, sample=_colourful, ask=ask_exists, answers=("yes", "no")),
    Kind(name="choice", weight=9, sample=_several_colourful, ask=ask_choice, answers=LETTERS),
    Kind(
        name="more_shapes",
        weight=4,
        sample=_pair,
        ask=ask_more_shapes,
        answers=("first", "second"),
        needs_colour=False,
    ),
    Kind(name="two_in_turn", weight=3, sample=_two_singles, ask=ask_two_in_turn, answers=COLOURS, turn_by_turn=True),
    Kind(name="conversation", weight=6, sample=_several, ask=ask_conversation, answers=_SEVERAL),
    Kind(name="describe", weight=4, sample=_colourful, ask=ask_describe),
)
