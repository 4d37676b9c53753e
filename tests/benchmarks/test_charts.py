"""The charts of the learning benchmark show their values, and the answers about them follow from the drawing."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from demo.drawing import COLOUR_RGB
from demo.kinds import compose, generator
from schemas.qwen import PATCH_SIZE
from tests.benchmarks.charts import CHART_KINDS, COLUMN_WIDTH, sample_chart


def test_bars_are_as_high_as_their_values() -> None:
    rng = generator(0, "test")
    for _ in range(20):
        chart = sample_chart(rng, ("bar",))
        pixels = np.asarray(chart.draw()).astype(int)
        # (H, W) for each bar: its pixels
        masks = [np.abs(pixels - COLOUR_RGB[colour]).max(axis=-1) < 12 for colour in chart.colours]
        heights = [mask.any(axis=1).sum() for mask in masks]
        lefts = [np.nonzero(mask.any(axis=0))[0].min() for mask in masks]
        per_unit = np.array(heights) / np.array(chart.values)
        assert lefts == sorted(lefts)
        assert np.ptp(per_unit) * max(chart.values) < 0.15 * max(heights)
        assert np.argsort(heights).tolist() == np.argsort(chart.values).tolist()


@pytest.mark.parametrize("chart_type", ["bar", "line"])
def test_names_and_values_are_above_their_column(chart_type: str) -> None:
    """A point's value is in the row of patches above it, its name above that: a new name changes no other pixel."""
    rng = generator(2, "test")
    for _ in range(20):
        chart = sample_chart(rng, (chart_type,))
        column = int(rng.integers(len(chart.values)))
        x, y = chart.point(column)
        renamed = replace(chart, categories=(*chart.categories[:column], "ox", *chart.categories[column + 1 :]))
        changed = (np.asarray(chart.draw()) != np.asarray(renamed.draw())).any(axis=-1)
        rows, columns = np.nonzero(changed)
        assert (x % PATCH_SIZE, y % PATCH_SIZE) == (0, 0)
        assert x - COLUMN_WIDTH / 2 <= columns.min() and columns.max() < x + COLUMN_WIDTH / 2
        assert y - 2.5 * PATCH_SIZE <= rows.min() and rows.max() < y - PATCH_SIZE
        of_value = np.asarray(chart.draw())[y - PATCH_SIZE : y - 5, x - PATCH_SIZE : x + PATCH_SIZE]
        assert (of_value.max(axis=-1) < 128).sum() >= 10


def test_answers_about_charts_follow_from_their_values_and_are_equally_frequent() -> None:
    drafts = compose(CHART_KINDS, 180, generator(0, "test"), held_out=False)
    values: dict[str, Counter[str]] = {kind.name: Counter() for kind in CHART_KINDS}
    for draft in drafts:
        (chart,), (exchange,) = draft.facts, draft.exchanges
        values[draft.kind.name][exchange.value] += 1
        if draft.wording.language == "zh":
            continue
        names = chart.categories if draft.kind.name == "chart/value" else chart.colours
        (name,) = set(names) & set(re.findall(r"\w+", exchange.question))
        value = str(dict(zip(names, chart.values, strict=True))[name])
        assert exchange.value == value
        assert value in exchange.answer
    assert all(set(counts.values()) == {10} and len(counts) == 9 for counts in values.values())
