import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jlora.report.charts import HEIGHT, WIDTH, Chart, Line, smoothed, thinned, tick_text


def coordinates(path: object) -> list[tuple[float, float]]:
    pairs = [pair.split(",") for pair in str(path).split()]
    return [(float(x), float(y)) for x, y in pairs]


def test_a_line_goes_from_edge_to_edge_and_larger_values_are_higher():
    chart = Chart("loss", [Line([(0, 6.0), (5, 1.0), (10, 4.0)])])
    [(x0, y0), (x1, y1), (x2, y2)] = coordinates(chart.drawn[0]["path"])
    assert (x0, x1, x2) == (62, 264, WIDTH - 14)
    assert (y0, y1) == (12, HEIGHT - 28)
    assert y2 == pytest.approx(y0 + (y1 - y0) * 0.4, abs=0.06)


def test_the_mark_is_on_its_point_and_its_text_inside_the_picture():
    for step, anchor in ((1, "start"), (9, "end")):
        points = [(1, 3.0), (5, 2.0), (9, 3.0)]
        mark = (step, 3.0, "best")
        drawn = Chart("loss", [Line(points, mark=mark)]).drawn[0]
        assert drawn["mark"] == {
            "x": coordinates(drawn["path"])[0 if step == 1 else 2][0],
            "y": 12.0,
            "text": "best",
            "anchor": anchor,
        }


def test_all_lines_of_a_chart_share_its_axes():
    chart = Chart("", [Line([(0, 0.0), (10, 1.0)]), Line([(5, 2.0)])])
    assert coordinates(chart.drawn[1]["path"]) == [(264.0, 12.0)]


def test_an_axis_from_zero_shows_where_zero_is():
    chart = Chart("", [Line([(0, 8.0), (1, 9.0)])], from_zero=True)
    assert chart.y_ticks[0] == (HEIGHT - 28, "0")


@pytest.mark.parametrize(
    ("low", "high", "texts"),
    [
        (0.0, 10.0, ["0", "2", "4", "6", "8", "10"]),
        (0.4921, 0.4934, ["0.4925", "0.4930"]),
        (0.0, 2e-4, ["0", "5e-05", "0.0001", "0.00015", "0.0002"]),
        (8000.0, 24000.0, ["10k", "15k", "20k"]),
        (3.0, 3.0, ["2", "3", "4"]),
    ],
)
def test_numbers_beside_an_axis_are_round(low, high, texts):
    chart = Chart("", [Line([(0, low), (1, high)])])
    assert [text for _, text in chart.y_ticks] == texts


@given(
    st.lists(
        st.tuples(
            st.integers(0, 10**9),
            st.floats(-1e30, 1e30, allow_subnormal=False).filter(
                lambda value: value == 0 or abs(value) > 1e-30
            ),
        ),
        min_size=1,
        max_size=20,
    )
)
def test_any_finite_numbers_are_drawn_inside_the_picture(points):
    chart = Chart("", [Line(points)])
    for x, y in coordinates(chart.drawn[0]["path"]):
        assert 0 <= x <= WIDTH
        assert 0 <= y <= HEIGHT
    assert all(re.match(r"-?[\d.]+(e[-+]\d+)?[GMk]?$", t) for _, t in chart.y_ticks)


def test_smoothing_keeps_a_constant_and_short_series_and_follows_a_long_one():
    flat = [(step, 2.5) for step in range(200)]
    assert [y for _, y in smoothed(flat)] == pytest.approx([2.5] * 200)
    short = [(1, 3.0), (2, 1.0)]
    assert smoothed(short) == short
    noisy = [(step, math.sin(step) + step) for step in range(500)]
    assert smoothed(noisy)[-1][1] == pytest.approx(499 - 9.5, abs=1)
    assert smoothed([]) == []


def test_a_line_of_many_points_is_thinned_to_means_that_end_at_the_last_step():
    points = [(step, float(step)) for step in range(1, 100_001)]
    thin = thinned(points)
    assert len(thin) <= 600
    assert thin[-1][0] == 100_000
    assert thin[0] == (167, 84.0)


def test_a_tick_is_short():
    assert tick_text(1.5e9, 5e8) == "1.5G"
    assert tick_text(2e-7, 1e-7) == "2e-07"
