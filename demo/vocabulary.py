"""The words of the demo dataset: colours, shapes, and how a question is worded in English or Chinese.

Facts are named by their English words everywhere ("red", "star"); ``Wording`` turns them into the language of an
annotation. Pure look-ups, no drawing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

RGB = tuple[int, int, int]
Language = Literal["en", "zh"]

COLOUR_RGB: dict[str, RGB] = {
    "red": (220, 30, 40),
    "green": (30, 160, 60),
    "blue": (35, 85, 220),
    "yellow": (250, 205, 20),
    "purple": (150, 50, 175),
}
COLOURS = tuple(COLOUR_RGB)
_COLOUR_ZH = {"red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "purple": "紫色"}

SHAPES = ("circle", "square", "triangle", "star")
SHAPE_PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "star": "stars"}
_SHAPE_ZH = {"circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "五角星"}

INK: RGB = (45, 45, 50)
"""Text, axes and the outline of every shape: dark enough to show in grey pictures too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """A question with its answer.

    ``value`` is the answer as a bare English fact ("red", "3", "left"), whatever the language and the style of
    ``answer``; answers are balanced by it.
    """

    question: str
    answer: str
    value: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Dialogue:
    """One or more exchanges about the same facts, and the system message before them, if any."""

    exchanges: tuple[Exchange, ...]
    system: str | None = None

    @property
    def value(self) -> str:
        """The value of the first answer: the one that is balanced."""
        return self.exchanges[0].value


@dataclass(frozen=True, kw_only=True, slots=True)
class Wording:
    """How an annotation speaks: its language, short answers or full sentences, and which of the phrasings it takes."""

    language: Language
    sentence: bool
    variant: int

    def say(self, en: str | Sequence[str], zh: str | Sequence[str]) -> str:
        """Returns the phrasing in this language; of several, the one that ``variant`` picks."""
        phrases = en if self.language == "en" else zh
        return phrases if isinstance(phrases, str) else phrases[self.variant % len(phrases)]

    def colour(self, name: str) -> str:
        """Returns a colour's word in this language."""
        return self.say(name, _COLOUR_ZH[name])

    def shape(self, name: str) -> str:
        """Returns a shape's word in this language."""
        return self.say(name, _SHAPE_ZH[name])

    def thing(self, colour: str, shape: str) -> str:
        """Returns "red circle" in this language."""
        return self.say(f"{colour} {shape}", f"{_COLOUR_ZH[colour]}的{_SHAPE_ZH[shape]}")

    def exchange(self, question: str, *, value: str, short: str | None = None, sentence: str | None = None) -> Exchange:
        """Joins a question with its answer, in a full sentence if this wording wants that and ``sentence`` is given.

        Args:
            question: The question, in this language.
            value: The answer as a bare fact.
            short: The short answer in this language; ``value`` itself when None.
            sentence: The answer as a full sentence, where the question has one.
        """
        if self.sentence and sentence is not None:
            request = self.say(" Answer in a full sentence.", "请用一句完整的话回答。")
            return Exchange(question=question + request, answer=sentence, value=value)
        return Exchange(question=question, answer=value if short is None else short, value=value)
