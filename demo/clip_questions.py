"""What is asked about clips: directions, colours, shapes, what happens, and comparisons with another medium.

Every function maps the media of one annotation (a clip, two clips, or a picture and a clip) to a dialogue, or to None
where they allow no clear question; ``CLIP_KINDS`` is the list.
"""

from __future__ import annotations

import numpy as np

from demo.clips import DIRECTIONS, EVENTS, Actor, Clip, sample_clip
from demo.kinds import Kind
from demo.scenes import Scene, sample_scene
from demo.vocabulary import COLOURS, SHAPES, Dialogue, Wording

Clips = tuple["Clip | Scene", ...]

_DIRECTIONS_ZH = {"left": "左", "right": "右", "up": "上", "down": "下"}
_EVENTS_ZH = {
    "moves": "移动了",
    "changes colour": "变了颜色",
    "grows": "变大了",
    "shrinks": "变小了",
    "appears": "出现了",
    "disappears": "消失了",
}
_PATHS_EN = {"left": "to the left", "right": "to the right", "up": "up", "down": "down"}


def ask_direction(media: Clips, rng: np.random.Generator, wording: Wording) -> Dialogue | None:
    """Which way the moving shape goes."""
    actor = _actor(media)
    value, shape = actor.direction, wording.shape(actor.figure.shape)
    question = wording.say(
        (f"In which direction does the {shape} move: left, right, up or down?", f"Which way does the {shape} go?"),
        f"{shape}向哪个方向移动？",
    )
    short = wording.say(value, f"向{_DIRECTIONS_ZH[value]}")
    sentence = wording.say(f"The {shape} moves {_PATHS_EN[value]}.", f"{shape}{short}移动。")
    return Dialogue(exchanges=(wording.exchange(question, value=value, short=short, sentence=sentence),))


def ask_colour(media: Clips, rng: np.random.Generator, wording: Wording) -> Dialogue | None:
    """The colour of the moving shape."""
    colour = _actor(media).figure.colour
    word = wording.colour(colour)
    question = wording.say("What colour is the moving shape?", "移动的图形是什么颜色？")
    sentence = wording.say(f"The moving shape is {colour}.", f"移动的图形是{word}。")
    return Dialogue(exchanges=(wording.exchange(question, value=colour, short=word, sentence=sentence),))


def ask_shape(media: Clips, rng: np.random.Generator, wording: Wording) -> Dialogue | None:
    """Which shape moves."""
    shape = _actor(media).figure.shape
    word = wording.shape(shape)
    question = wording.say("Which shape moves?", "哪个形状在移动？")
    sentence = wording.say(f"The {shape} moves.", f"{word}在移动。")
    return Dialogue(exchanges=(wording.exchange(question, value=shape, short=word, sentence=sentence),))


def ask_event(media: Clips, rng: np.random.Generator, wording: Wording) -> Dialogue | None:
    """What happens to the shape: it moves, grows, changes colour, and so on."""
    actor = _actor(media)
    shape, zh = wording.shape(actor.figure.shape), _EVENTS_ZH[actor.event]
    question = wording.say(
        (f"What happens to the {shape}?", f"What does the {shape} do in the clip?"), f"视频中的{shape}发生了什么？"
    )
    short = wording.say(f"it {actor.event}", zh)
    sentence = wording.say(f"The {shape} {actor.event}.", f"{shape}{zh}。")
    return Dialogue(exchanges=(wording.exchange(question, value=actor.event, short=short, sentence=sentence),))


def ask_overview(media: Clips, rng: np.random.Generator, wording: Wording) -> Dialogue | None:
    """The clip told in a sentence."""
    if len(media) != 1:
        return None
    actor = _actor(media)
    colour, shape = actor.figure.colour, actor.figure.shape
    thing = wording.thing(colour, shape)
    en = f"A {thing} {actor.event}."
    zh = f"一个{thing}{_EVENTS_ZH[actor.event]}。"
    if actor.event == "moves":
        en = f"A {thing} moves {_PATHS_EN[actor.direction]}."
        zh = f"一个{thing}向{_DIRECTIONS_ZH[actor.direction]}移动。"
    elif actor.event == "changes colour":
        en = f"A {shape} changes from {colour} to {actor.end_colour}."
        zh = f"一个{wording.shape(shape)}从{wording.colour(colour)}变成了{wording.colour(actor.end_colour)}。"
    question = wording.say(
        ("What happens in the clip? Answer in one sentence.", "Describe the clip in one sentence."),
        "请用一句话描述这个视频。",
    )
    answer = wording.say(en, zh)
    return Dialogue(exchanges=(wording.exchange(question, value=answer),))


def ask_same_colour(media: Clips, rng: np.random.Generator, wording: Wording) -> Dialogue | None:
    """Whether the shape of a picture has the colour of the one that moves in a clip."""
    scene = media[0]
    assert isinstance(scene, Scene), "the picture comes first"
    value = "yes" if scene.figures[0].colour == _actor(media[1:]).figure.colour else "no"
    question = wording.say(
        "Does the shape in the picture have the same colour as the one that moves in the clip?",
        "图片中的图形和视频中移动的图形颜色相同吗？",
    )
    short = wording.say(value, {"yes": "相同", "no": "不同"}[value])
    return Dialogue(exchanges=(wording.exchange(question, value=value, short=short),))


def ask_which_clip(media: Clips, rng: np.random.Generator, wording: Wording) -> Dialogue | None:
    """In which of two clips something moves the way asked for."""
    first, second = (_actor((medium,)).direction for medium in media)
    if first == second:
        return None
    value = "first" if rng.random() < 0.5 else "second"
    way = first if value == "first" else second
    question = wording.say(
        f"In which clip does the shape move {_PATHS_EN[way]}, the first or the second?",
        f"哪个视频中的图形向{_DIRECTIONS_ZH[way]}移动，第一个还是第二个？",
    )
    short = wording.say(value, {"first": "第一个", "second": "第二个"}[value])
    return Dialogue(exchanges=(wording.exchange(question, value=value, short=short),))


def _actor(media: Clips) -> Actor:
    clip = media[0]
    assert isinstance(clip, Clip), "the first medium is a clip"
    return clip.actors[0]


def _moving(rng: np.random.Generator) -> Clips:
    return (sample_clip(rng, events=("moves",)),)


def _moving_among_others(rng: np.random.Generator) -> Clips:
    return (sample_clip(rng, events=("moves",), min_shapes=2),)


def _any(rng: np.random.Generator) -> Clips:
    return (sample_clip(rng),)


def _two_moving(rng: np.random.Generator) -> Clips:
    return (*_alone(rng), *_alone(rng))


def _alone(rng: np.random.Generator) -> Clips:
    return (sample_clip(rng, events=("moves",), max_shapes=1),)


def _picture_and_clip(rng: np.random.Generator) -> Clips:
    return (sample_scene(rng, max_shapes=1), *_alone(rng))


CLIP_KINDS: tuple[Kind[Clip | Scene], ...] = (
    Kind(name="direction", weight=4, sample=_moving, ask=ask_direction, answers=DIRECTIONS),
    Kind(name="colour", weight=4, sample=_moving_among_others, ask=ask_colour, answers=COLOURS),
    Kind(name="event", weight=5, sample=_any, ask=ask_event, answers=EVENTS),
    Kind(name="shape", weight=2, sample=_moving_among_others, ask=ask_shape, answers=SHAPES),
    Kind(name="same_colour", weight=1, sample=_picture_and_clip, ask=ask_same_colour, answers=("yes", "no")),
    Kind(name="which_clip", weight=1, sample=_two_moving, ask=ask_which_clip, answers=("first", "second")),
    Kind(name="overview", weight=4, sample=_any, ask=ask_overview, shares_media=True),
)
