"""Charts of the report: bars and ticks at round numbers, drawings in proportion."""

from __future__ import annotations

import numpy as np
import pytest

from prep.inspect.report.charts import (
    Drawing,
    Histogram,
    draw,
    growing_histogram,
    number_histogram,
    round_step,
    segments,
    share_histogram,
)


def bars(chart: Histogram) -> dict[str, list[int]]:
    return {name: counts.tolist() for name, counts in chart.counts.items()}


def test_bars_of_a_number_histogram_have_a_round_width_and_ticks_at_round_numbers() -> None:
    small = number_histogram("t", "u", {"a": np.array([0, 1, 1, 5]), "b": np.array([3])})
    assert small.labels == ("0", "1", "2", "3", "4", "5")
    assert bars(small) == {"a": [1, 2, 0, 0, 0, 1], "b": [0, 0, 0, 1, 0, 0]}
    large = number_histogram("t", "u", {"a": np.array([0, 127, 128, 4096])})
    assert large.labels[0] == "0 to 199"
    assert large.labels[-1] == "4,000 to 4,199"
    assert bars(large)["a"] == [3, *[0] * 19, 1]
    assert large.ticks == ((0, "0"), (5, "1,000"), (10, "2,000"), (15, "3,000"), (20, "4,000"))


@pytest.mark.parametrize("top", [0, 1, 7, 39, 40, 41, 99, 100, 123_456, 7 * 10**9])
def test_a_number_histogram_has_few_bars_and_ticks(top: int) -> None:
    chart = number_histogram("t", "u", {"a": np.array([top])})
    assert len(chart.labels) <= 40
    assert 1 <= len(chart.ticks) <= 8
    assert bars(chart)["a"][-1] == 1


def test_bars_of_a_growing_histogram_start_at_1_2_and_5_times_powers_of_ten() -> None:
    chart = growing_histogram("t", "u", {"a": np.array([1, 2, 3, 4, 7, 8, 10])})
    assert chart.labels == ("1", "2 to 4", "5 to 9", "10 to 19")
    assert bars(chart)["a"] == [1, 3, 2, 1]
    assert chart.ticks == ((0, "1"), (1, "2"), (2, "5"), (3, "10"), (4, "20"))
    assert [text for _, text in growing_histogram("t", "u", {"a": np.array([4000])}).ticks][-1] == "1,000"


def test_a_share_histogram_runs_from_a_round_share_to_one() -> None:
    chart = share_histogram("t", "u", "bins", np.array([0.81, 0.999, 1.0]))
    assert chart.labels[0] == "80 % to 81 %"
    assert bars(chart)["bins"] == [0, 1, *[0] * 17, 2]
    assert chart.ticks == ((0, "80 %"), (5, "85 %"), (10, "90 %"), (15, "95 %"), (20, "100 %"))
    assert [text for _, text in share_histogram("t", "u", "b", np.array([0.1])).ticks][:2] == ["0 %", "20 %"]


def test_steps_of_an_axis_are_round() -> None:
    assert [round_step(largest, 4) for largest in (0, 1, 4, 5, 9, 21, 400, 401)] == [1, 1, 1, 2, 5, 10, 100, 200]


def test_empty_charts_can_be_drawn() -> None:
    none = np.empty(0, dtype=np.int64)
    for chart in (
        number_histogram("t", "u", {"a": none}),
        growing_histogram("t", "u", {"a": none}),
        share_histogram("t", "u", "a", none.astype(np.float64)),
    ):
        assert drawn(chart, "c").bars == ()
    assert segments([("c", "none", 0)]) == []


def drawn(chart: Histogram, *colours: str) -> Drawing:
    return draw(chart, colours)


def test_bars_are_proportional_and_stacked() -> None:
    chart = number_histogram("t", "tokens", {"a": np.array([0, 0, 1, 1, 1, 1]), "b": np.array([1, 1])})
    (_, (alone,)), (tooltip, (lower, upper)) = drawn(chart, "first", "second").bars
    assert [alone.css, lower.css, upper.css] == ["first", "first", "second"]
    assert lower.height == pytest.approx(2 * alone.height)
    assert upper.height == pytest.approx(alone.height)
    assert upper.y + upper.height == pytest.approx(lower.y)
    assert tooltip == "1 tokens: 4 a, 2 b"


def test_a_bar_of_shares_is_divided_in_proportion() -> None:
    first, second = segments([("x", "one", 1), ("y", "none", 0), ("z", "three", 3)])
    assert (first.start, first.width, second.start, second.width) == (0, 25, 25, 75)
    assert second.label == "three: 3"
