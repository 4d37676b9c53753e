"""What is asked about documents of several pages: titles, where something is, tables, charts and figures.

Every function maps the pages of a document to a dialogue, or to None where it allows no clear question;
``PAGE_KINDS`` is the list.
"""

from __future__ import annotations

import numpy as np

from demo.charts import Chart
from demo.kinds import Kind, pick
from demo.pages import FIGURE_TYPES, Document, Page, Table, sample_document
from demo.shapes import Figure
from demo.vocabulary import COLOURS, Dialogue, Exchange, Wording

_FIGURES_ZH = {"bar chart": "柱状图", "pie chart": "饼图", "table": "表格"}


def ask_page_of_figure(pages: Document, rng: np.random.Generator, wording: Wording) -> Dialogue | None:
    """Which page shows some type of figure."""
    figure_type = pick(rng, FIGURE_TYPES)
    found = [page for page in pages if page.figure_type == figure_type]
    if not found:
        return None
    number, figure = found[0].number, found[0].figure
    if isinstance(figure, Figure):
        name = wording.shape(figure.shape)
    else:
        name = wording.say(figure_type, _FIGURES_ZH[figure_type])
    question = wording.say((f"Which page shows the {name}?", f"On which page is the {name}?"), f"哪一页上有{name}？")
    sentence = wording.say(f"The {name} is on page {number}.", f"{name}在第{number}页。")
    return Dialogue(exchanges=(_page_exchange(pages, wording, question, number, sentence),))


def ask_page_of_title(pages: Document, rng: np.random.Generator, wording: Wording) -> Dialogue | None:
    """Which page has some title."""
    page = _any_page(pages, rng)
    question = wording.say(f'Which page is titled "{page.title}"?', f"哪一页的标题是“{page.title}”？")
    sentence = wording.say(
        f'Page {page.number} is titled "{page.title}".', f"第{page.number}页的标题是“{page.title}”。"
    )
    return Dialogue(exchanges=(_page_exchange(pages, wording, question, page.number, sentence),))


def ask_title(pages: Document, rng: np.random.Generator, wording: Wording) -> Dialogue | None:
    """The title of some page, word for word."""
    page = _any_page(pages, rng)
    question = wording.say(f"What is the title of page {page.number}?", f"第{page.number}页的标题是什么？")
    sentence = wording.say(
        f'The title of page {page.number} is "{page.title}".', f"第{page.number}页的标题是“{page.title}”。"
    )
    return Dialogue(exchanges=(wording.exchange(question, value=page.title, sentence=sentence),))


def ask_total(pages: Document, rng: np.random.Generator, wording: Wording) -> Dialogue | None:
    """The total in the table."""
    table = _table(pages)
    if table is None:
        return None
    question = wording.say("What is the total in the table?", "表格中的总数是多少？")
    sentence = wording.say(f"The total in the table is {table.total}.", f"表格中的总数是{table.total}。")
    return Dialogue(exchanges=(wording.exchange(question, value=str(table.total), sentence=sentence),))


def ask_cell(pages: Document, rng: np.random.Generator, wording: Wording) -> Dialogue | None:
    """The number of some item in the table."""
    table = _table(pages)
    if table is None:
        return None
    name, value = table.rows[int(rng.integers(len(table.rows)))]
    question = wording.say(f"How many {name} does the table list?", f"表格中{name}的数量是多少？")
    sentence = wording.say(f"The table lists {value} {name}.", f"表格中{name}的数量是{value}。")
    return Dialogue(exchanges=(wording.exchange(question, value=str(value), sentence=sentence),))


def ask_figure_colour(pages: Document, rng: np.random.Generator, wording: Wording) -> Dialogue | None:
    """The colour of the coloured shape on its page."""
    for page in pages:
        if isinstance(page.figure, Figure):
            colour, shape = page.figure.colour, page.figure.shape
            number, name, word = page.number, wording.shape(shape), wording.colour(colour)
            question = wording.say(
                f"What colour is the {name} on page {number}?", f"第{number}页上的{name}是什么颜色？"
            )
            sentence = wording.say(f"The {name} on page {number} is {colour}.", f"第{number}页上的{name}是{word}。")
            return Dialogue(exchanges=(wording.exchange(question, value=colour, short=word, sentence=sentence),))
    return None


def ask_chart_value(pages: Document, rng: np.random.Generator, wording: Wording) -> Dialogue | None:
    """The value of some category in the bar chart."""
    for page in pages:
        if isinstance(page.figure, Chart) and page.figure.chart_type == "bar":
            i = int(rng.integers(len(page.figure.values)))
            category, value = page.figure.categories[i], page.figure.values[i]
            question = wording.say(
                f"What is the value for {category} in the bar chart?", f"柱状图中{category}的数值是多少？"
            )
            sentence = wording.say(
                f"In the bar chart, {category} has the value {value}.", f"柱状图中{category}的数值是{value}。"
            )
            return Dialogue(exchanges=(wording.exchange(question, value=str(value), sentence=sentence),))
    return None


def ask_conversation(pages: Document, rng: np.random.Generator, wording: Wording) -> Dialogue | None:
    """The title of one page, then that of another, then where some figure is."""
    first, second = (pages[i] for i in rng.permutation(len(pages))[:2])
    where = ask_page_of_figure(pages, rng, wording)
    if where is None:
        return None
    start = wording.say(f"What is the title of page {first.number}?", f"第{first.number}页的标题是什么？")
    follow_up = wording.say(f"And of page {second.number}?", f"第{second.number}页呢？")
    titles = (
        Exchange(question=start, answer=first.title, value=first.title),
        Exchange(question=follow_up, answer=second.title, value=second.title),
    )
    return Dialogue(exchanges=(*titles, *where.exchanges))


def _page_exchange(pages: Document, wording: Wording, question: str, number: int, sentence: str) -> Exchange:
    """The value names the number of pages too: every page of a document of that length is the answer equally often."""
    short = wording.say(f"page {number}", f"第{number}页")
    return wording.exchange(question, value=f"{number} of {len(pages)}", short=short, sentence=sentence)


def _any_page(pages: Document, rng: np.random.Generator) -> Page:
    return pages[int(rng.integers(len(pages)))]


def _table(pages: Document) -> Table | None:
    return next((page.figure for page in pages if isinstance(page.figure, Table)), None)


_PLACES = tuple(f"{number} of {total}" for total in (2, 3, 4) for number in range(1, total + 1))
_TENS = tuple(str(value) for value in range(10, 100, 10))

PAGE_KINDS: tuple[Kind[Page], ...] = (
    Kind(
        name="page_of_figure",
        weight=9,
        sample=sample_document,
        ask=ask_page_of_figure,
        answers=_PLACES,
        needs_colour=False,
    ),
    Kind(name="figure_colour", weight=6, sample=sample_document, ask=ask_figure_colour, answers=COLOURS),
    Kind(name="total", weight=5, sample=sample_document, ask=ask_total, needs_colour=False),
    Kind(name="chart_value", weight=5, sample=sample_document, ask=ask_chart_value, answers=_TENS, needs_colour=False),
    Kind(
        name="page_of_title",
        weight=5,
        sample=sample_document,
        ask=ask_page_of_title,
        answers=_PLACES,
        needs_colour=False,
    ),
    Kind(name="title", weight=7, sample=sample_document, ask=ask_title, needs_colour=False, shares_media=True),
    Kind(name="cell", weight=4, sample=sample_document, ask=ask_cell, needs_colour=False, shares_media=True),
    Kind(
        name="conversation",
        weight=4,
        sample=sample_document,
        ask=ask_conversation,
        needs_colour=False,
        shares_media=True,
    ),
)
