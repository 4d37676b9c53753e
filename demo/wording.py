"""Questions and answers in English and Chinese. Facts have English names everywhere: "red", "star", "left"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Language = Literal["en", "zh"]

SHAPES = ("circle", "square", "triangle", "star")
COLOURS = ("red", "green", "blue", "yellow", "purple")

_CHINESE = {
    "red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "purple": "紫色",
    "circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "五角星", "table": "表格",
    "left": "左边", "right": "右边", "up": "上边", "down": "下边", "above": "上面", "below": "下面",
    "yes": "是", "no": "否", "first": "第一个", "second": "第二个",
    "moves": "移动了", "changes colour": "变了颜色", "grows": "变大了", "shrinks": "变小了",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchange:
    """A question with its answer.

    ``value`` is the answer as a plain English fact ("red", "3", "left"), whatever the language and the style of
    ``answer``. Answers are balanced by value.
    """

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

    def thing(self, colour: str, shape: str) -> str:
        """Return "red circle" in this language."""
        return self.say(f"{colour} {shape}", f"{self.word(colour)}的{self.word(shape)}")

    def ask(self, question: str, value: object, *, short: str | None = None, sentence: str | None = None) -> Exchange:
        """Return a question with its answer, a full sentence if this wording wants one and ``sentence`` is given.

        Args:
            question: The question, in this language.
            value: The answer as a plain fact.
            short: The short answer in this language. Default: the word for ``value``.
            sentence: The answer as a full sentence, for questions that allow one.
        """
        value = str(value)
        if self.sentence and sentence is not None:
            request = self.say(" Answer in a full sentence.", "请用一句完整的话回答。")
            return Exchange(question=question + request, answer=sentence, value=value)
        return Exchange(question=question, answer=self.word(value) if short is None else short, value=value)
