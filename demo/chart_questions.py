"""What is asked about charts: values, extremes, comparisons, colours, types and titles.

A bar is named by its category or by its colour; its value is then found without reading its name.

Every function maps the facts of a chart to a dialogue, or to None where it allows no clear question; ``CHART_KINDS``
is the list.
"""

from __future__ import annotations

import numpy as np

from demo.charts import CHART_TYPES, TOPICS, Chart, sample_chart
from demo.kinds import Kind, pick
from demo.vocabulary import COLOURS, Dialogue, Exchange, Wording

Charts = tuple[Chart, ...]

_TOPIC_NOUNS = {
    "Fruit sold": ("fruit", "种水果"),
    "Drinks ordered": ("drink", "种饮料"),
    "Pets at school": ("pet", "种宠物"),
    "Visitors": ("month", "个月份"),
    "Books read": ("person", "个人"),
}
_TYPES_ZH = {"bar": "柱状图", "line": "折线图", "pie": "饼图"}
_PARTS = {"bar": ("bars", "根柱子"), "line": ("points", "个数据点"), "pie": ("slices", "个扇形")}


def ask_value(charts: Charts, rng: np.random.Generator, wording: Wording) -> Dialogue | None:
    """The value of some category."""
    chart = charts[0]
    category, value = _any_entry(chart, rng)
    question = wording.say(
        (f"What is the value for {category}?", f"Which value does {category} have?"), f"图中{category}的数值是多少？"
    )
    sentence = wording.say(f"The value for {category} is {value}.", f"{category}的数值是{value}。")
    return Dialogue(exchanges=(wording.exchange(question, value=str(value), sentence=sentence),))


def ask_value_by_colour(charts: Charts, rng: np.random.Generator, wording: Wording) -> Dialogue | None:
    """The value of the bar of some colour."""
    chart = charts[0]
    column = _any_column(chart, rng)
    value, colour = chart.values[column], chart.colours[column]
    question = wording.say(
        (f"What is the value of the {colour} bar?", f"Which value does the {colour} bar have?"),
        f"{wording.colour(colour)}柱子的数值是多少？",
    )
    sentence = wording.say(
        f"The value of the {colour} bar is {value}.", f"{wording.colour(colour)}柱子的数值是{value}。"
    )
    return Dialogue(exchanges=(wording.exchange(question, value=str(value), sentence=sentence),))


def ask_category_by_colour(charts: Charts, rng: np.random.Generator, wording: Wording) -> Dialogue | None:
    """The category whose bar has some colour."""
    chart = charts[0]
    column = _any_column(chart, rng)
    category, colour = chart.categories[column], chart.colours[column]
    question = wording.say(
        (f"What does the {colour} bar stand for?", f"Which label does the {colour} bar have?"),
        f"{wording.colour(colour)}柱子代表什么？",
    )
    sentence = wording.say(f"The {colour} bar stands for {category}.", f"{wording.colour(colour)}柱子代表{category}。")
    return Dialogue(exchanges=(wording.exchange(question, value=category, sentence=sentence),))


def ask_extreme(charts: Charts, rng: np.random.Generator, wording: Wording) -> Dialogue | None:
    """The category with the highest or the lowest value."""
    chart = charts[0]
    highest = bool(rng.random() < 0.5)
    value = max(chart.values) if highest else min(chart.values)
    category = chart.categories[chart.values.index(value)]
    noun_en, noun_zh = _TOPIC_NOUNS[_topic(chart)]
    en, zh = ("highest", "最大") if highest else ("lowest", "最小")
    question = wording.say(f"Which {noun_en} has the {en} value?", f"哪{noun_zh}的数值{zh}？")
    sentence = wording.say(f"{category} has the {en} value, {value}.", f"{category}的数值{zh}，是{value}。")
    return Dialogue(exchanges=(wording.exchange(question, value=category, sentence=sentence),))


def ask_higher(charts: Charts, rng: np.random.Generator, wording: Wording) -> Dialogue | None:
    """Whether one category has a higher value than another."""
    (one, one_value), (other, other_value) = _two_entries(charts[0], rng)
    value = "yes" if one_value > other_value else "no"
    question = wording.say(f"Is the value for {one} higher than for {other}?", f"{one}的数值比{other}大吗？")
    short = wording.say(value, {"yes": "是", "no": "不是"}[value])
    en, zh = ("higher", "大") if value == "yes" else ("lower", "小")
    sentence = wording.say(
        f"{value.capitalize()}, {one} is {en}: {one_value} against {other_value}.",
        f"{short}，{one}的数值更{zh}，{one_value}对{other_value}。",
    )
    return Dialogue(exchanges=(wording.exchange(question, value=value, short=short, sentence=sentence),))


def ask_difference(charts: Charts, rng: np.random.Generator, wording: Wording) -> Dialogue | None:
    """The difference of two values, after asking for both of them."""
    (one, one_value), (other, other_value) = _two_entries(charts[0], rng)
    first = wording.say(f"What is the value for {one}?", f"图中{one}的数值是多少？")
    second = wording.say(f"And for {other}?", f"{other}呢？")
    third = wording.say("What is the difference between the two?", "两者相差多少？")
    answers = (one_value, other_value, abs(one_value - other_value))
    return Dialogue(
        exchanges=tuple(
            Exchange(question=question, answer=str(value), value=str(value))
            for question, value in zip((first, second, third), answers, strict=True)
        )
    )


def ask_chart_type(charts: Charts, rng: np.random.Generator, wording: Wording) -> Dialogue | None:
    """Whether it is a bar, line or pie chart."""
    value = charts[0].chart_type
    question = wording.say(
        ("Is this a bar chart, a line chart or a pie chart?", "What type of chart is this: bar, line or pie?"),
        "这是柱状图、折线图还是饼图？",
    )
    zh = _TYPES_ZH[value]
    sentence = wording.say(f"This is a {value} chart.", f"这是一张{zh}。")
    return Dialogue(
        exchanges=(wording.exchange(question, value=value, short=wording.say(value, zh), sentence=sentence),)
    )


def ask_colour(charts: Charts, rng: np.random.Generator, wording: Wording) -> Dialogue | None:
    """The colour of a bar or a slice."""
    chart = charts[0]
    if chart.chart_type == "line":
        return None
    category = pick(rng, chart.categories)
    colour = chart.colours[chart.categories.index(category)]
    en, zh = {"bar": ("bar", "柱子"), "pie": ("slice", "扇形")}[chart.chart_type]
    question = wording.say(f"What colour is the {en} for {category}?", f"{category}的{zh}是什么颜色？")
    sentence = wording.say(f"The {en} for {category} is {colour}.", f"{category}的{zh}是{wording.colour(colour)}。")
    return Dialogue(
        exchanges=(wording.exchange(question, value=colour, short=wording.colour(colour), sentence=sentence),)
    )


def ask_count(charts: Charts, rng: np.random.Generator, wording: Wording) -> Dialogue | None:
    """The number of bars, points or slices."""
    chart = charts[0]
    num = len(chart.values)
    en, zh = _PARTS[chart.chart_type]
    question = wording.say(f"How many {en} does the chart have?", f"图中有几{zh}？")
    sentence = wording.say(f"The chart has {num} {en}.", f"图中有{num}{zh}。")
    return Dialogue(exchanges=(wording.exchange(question, value=str(num), sentence=sentence),))


def ask_title(charts: Charts, rng: np.random.Generator, wording: Wording) -> Dialogue | None:
    """The title, word for word."""
    question = wording.say(("What is the title of the chart?", "Read the title of the chart."), "图表的标题是什么？")
    return Dialogue(exchanges=(wording.exchange(question, value=charts[0].title),))


def _topic(chart: Chart) -> str:
    return chart.title.split(",")[0]


def _any_column(chart: Chart, rng: np.random.Generator) -> int:
    return int(rng.integers(len(chart.values)))


def _any_entry(chart: Chart, rng: np.random.Generator) -> tuple[str, int]:
    column = _any_column(chart, rng)
    return chart.categories[column], chart.values[column]


def _two_entries(chart: Chart, rng: np.random.Generator) -> tuple[tuple[str, int], tuple[str, int]]:
    i, j = (int(i) for i in rng.permutation(len(chart.values))[:2])
    return (chart.categories[i], chart.values[i]), (chart.categories[j], chart.values[j])


def _chart(rng: np.random.Generator) -> Charts:
    return (sample_chart(rng),)


def _bars(rng: np.random.Generator) -> Charts:
    return (sample_chart(rng, ("bar",)),)


def _bars_or_line(rng: np.random.Generator) -> Charts:
    return (sample_chart(rng, ("bar", "line")),)


_CATEGORIES = tuple(category for categories in TOPICS.values() for category in categories)
_TENS = tuple(str(value) for value in range(10, 100, 10))

CHART_KINDS: tuple[Kind[Chart], ...] = (
    Kind(name="value", weight=10, sample=_bars_or_line, ask=ask_value, answers=_TENS, needs_colour=False),
    Kind(name="value_by_colour", weight=5, sample=_bars, ask=ask_value_by_colour, answers=_TENS),
    Kind(name="category_by_colour", weight=3, sample=_bars, ask=ask_category_by_colour, answers=_CATEGORIES),
    Kind(name="extreme", weight=6, sample=_chart, ask=ask_extreme, answers=_CATEGORIES, needs_colour=False),
    Kind(name="higher", weight=5, sample=_chart, ask=ask_higher, answers=("yes", "no"), needs_colour=False),
    Kind(name="difference", weight=3, sample=_bars_or_line, ask=ask_difference, answers=_TENS, needs_colour=False),
    Kind(name="chart_type", weight=6, sample=_chart, ask=ask_chart_type, answers=CHART_TYPES, needs_colour=False),
    Kind(name="colour", weight=6, sample=_chart, ask=ask_colour, answers=COLOURS),
    Kind(name="count", weight=4, sample=_chart, ask=ask_count, answers=("3", "4", "5"), needs_colour=False),
    Kind(name="title", weight=6, sample=_chart, ask=ask_title, needs_colour=False, shares_media=True),
)
