"""Curves against what they were given, and SVG elements that need nothing from outside."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from importlib.resources import files

import numpy as np
import pytest

from sae_rl.analysis.plots import COLOURS, MIN_SMOOTHED, Curve, Row, draw, draw_rows, running_mean, svg_element, window


def test_a_short_curve_is_drawn_as_it_is_with_its_interval_and_with_zero() -> None:
    figure = draw([Curve(x=[0, 1, 2], y=[1.0, math.nan, 3.0], low=[0.5, math.nan, 2.0], high=[2.0, math.nan, 4.0])])
    (axes,) = figure.axes
    (line,), (band,) = axes.lines, axes.collections
    assert np.asarray(line.get_ydata()).tolist() == pytest.approx([1.0, math.nan, 3.0], nan_ok=True)
    assert band.get_datalim(axes.transData).ymax == 4.0
    assert axes.get_ylim()[0] == 0.0 and axes.get_ylim()[1] > 4.0 and axes.get_legend() is None
    svg = str(svg_element(figure))
    drawn = re.search(r'<path d="([^"]*)"[^>]*stroke: var\(--c1\); stroke-width: 1.8', svg)
    assert drawn is not None and drawn[1].count("M") == 2 and "nan" not in svg, "a gap, not a line through it"


def test_a_long_curve_is_drawn_above_its_points_as_a_running_mean() -> None:
    x = list(range(2 * MIN_SMOOTHED))
    y = np.random.default_rng(0).random(len(x))
    y[[0, 7, 8, 9, 10, 11]] = math.nan
    (axes,) = draw([Curve(x=x, y=y.tolist())]).axes
    points, mean = (np.asarray(line.get_ydata(), dtype=float) for line in axes.lines)
    assert points.tolist() == pytest.approx(y.tolist(), nan_ok=True)
    half = (window(len(x)) - 1) // 2
    around = [[v for v in y[max(0, i - half) : i + half + 1] if math.isfinite(v)] for i in x]
    assert mean.tolist() == pytest.approx([sum(a) / len(a) if a else math.nan for a in around], nan_ok=True)
    assert half == 2 and math.isnan(mean[9]) and window(MIN_SMOOTHED - 1) == 1
    assert running_mean(np.array([1.0, 3.0]), 1).tolist() == [1.0, 3.0]


def test_several_curves_have_a_legend_and_fractions_are_percentages() -> None:
    runs = [Curve(x=[0, 1], y=[0.0, 0.5], label="SAE"), Curve(x=[0, 1], y=[0.0, 0.25], label="GAE <1>", colour="c2")]
    svg = str(svg_element(draw(runs, percent=True)))
    assert "SAE" in svg and "GAE &lt;1&gt;" in svg and "40 %" in svg


def test_an_element_refers_to_itself_alone_and_takes_its_colours_from_the_page() -> None:
    class Element(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            for name, value in attrs:
                assert not name.startswith(("xmlns", "on")) and name != "src"
                if name == "id":
                    identifiers.append(value)

    identifiers: list[str | None] = []
    curve = Curve(x=[0, 1], y=[0.0, 0.5], low=[0, 0.25], high=[0.25, 1])
    svg = str(svg_element(draw([curve])))
    Element().feed(svg)
    references = re.findall(r'(?:href="|url\()#(\w+)', svg)
    assert svg.startswith("<svg") and references and set(references) <= set(identifiers)
    assert "http" not in svg and svg.count("href=") + svg.count("url(") == len(references)
    css = files("sae_rl.analysis").joinpath("page.css").read_text()
    assert all(f"--{name}: {colour};" in css for name, colour in COLOURS.items()) and "var(--c1)" in svg
    assert not any(colour in svg for colour in COLOURS.values())
    assert svg == str(svg_element(draw([curve]))), "a page is the same each time it is written"


def test_a_long_curve_may_stay_as_it_is() -> None:
    y = np.random.default_rng(0).random(2 * MIN_SMOOTHED)
    (line,) = draw([Curve(x=range(len(y)), y=y.tolist())], smooth=False).axes[0].lines
    assert np.asarray(line.get_ydata()).tolist() == y.tolist()


def test_many_names_stand_below_the_axes() -> None:
    few, many = ([Curve(x=[0, 1], y=[0, n], label=f"arm {n}") for n in range(count)] for count in (4, 15))
    inside, below = draw(few), draw(many)
    assert inside.axes[0].get_legend() is not None and not inside.legends
    assert below.axes[0].get_legend() is None and len(below.legends[0].get_texts()) == 15
    assert below.get_figheight() > inside.get_figheight()


def test_rows_show_intervals_and_single_observations() -> None:
    rows = [
        Row(label="a", value=1.0, low=0.5, high=1.5, points=[0.8, 1.2]),
        Row(label="b", value=2.0, low=math.nan, high=math.nan),
    ]
    axes = draw_rows(rows, xlabel="score", zero=True).axes[0]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["a", "b"] and axes.get_xlabel() == "score"
    points, interval, value, *_, zero = (line.get_xdata() for line in axes.get_lines())
    assert [*points] == [0.8, 1.2] and [*interval] == [0.5, 1.5] and [*value] == [1.0] and [*zero] == [0, 0]
    assert axes.get_ylim()[0] > axes.get_ylim()[1], "the first row is at the top"
