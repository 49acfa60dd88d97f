"""Curves and intervals, drawn by matplotlib; a page embeds them as SVG."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

Floats = npt.NDArray[np.float64]

# The CSS variables of page.css with these names have these values, and others in dark mode.
COLOURS = {
    **{"c1": "#2257c4", "c2": "#b3500c", "c3": "#168a7e", "c4": "#8a5fd0", "c5": "#a6851a", "c6": "#c2417c"},
    **{"c7": "#4a7f2a", "c8": "#5b6b82", "muted": "#565c66", "grid": "#ebecef"},
}
SERIES = [(f"c{k}", line) for line in ("-", "--", ":") for k in range(1, 9)]  # colours and lines of several curves
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "sae_rl",  # equal figures give equal files
    "text.parse_math": False,
    "font.size": 9,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.edgecolor": COLOURS["muted"],
    "grid.color": COLOURS["grid"],
    "ytick.left": False,
    "legend.frameon": False,
    **{key: COLOURS["muted"] for key in ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")},
}
MAX_INSIDE = 4  # names in a legend inside the axes; more stand below
MIN_SMOOTHED = 24  # points from which on a curve is drawn as its running mean, above the points themselves


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One line, and the interval around it where ``low`` and ``high`` are given."""

    x: Sequence[float]
    y: Sequence[float]  # NaN leaves a gap
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    label: str = ""  # in the legend
    colour: str = "c1"  # a name in `COLOURS`
    line: str = "-"


def draw(
    curves: Sequence[Curve],
    *,
    size: tuple[float, float] = (4.0, 2.1),
    percent: bool = False,
    xlabel: str = "step",
    marks: bool = True,
    smooth: bool = True,
    ticks: Sequence[str] = (),
) -> Figure:
    """Curves over the training step, or what ``xlabel`` says. ``size`` is in inches; the vertical axis includes 0.

    ``ticks`` name x = 0, 1, 2 and so on.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots()
        for curve in curves:
            x, y, colour = np.asarray(curve.x), np.asarray(curve.y, dtype=float), COLOURS[curve.colour]
            if curve.low:
                axes.fill_between(x, curve.low, curve.high, color=colour, alpha=0.16, linewidth=0)
            if smoothed := smooth and window(len(y)) > 1 and not curve.low:
                axes.plot(x, y, color=colour, linewidth=0.8, alpha=0.4)
                y = running_mean(y, window(len(y)))
            marker = "" if smoothed or not marks else "."
            axes.plot(x, y, curve.line, marker=marker, color=colour, linewidth=1.8, label=curve.label)
        low, high = axes.get_ylim()
        axes.set_ylim(min(low, 0.0), max(high, 0.0))
        axes.set_xlabel(xlabel)
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=xlabel == "step"))
        if ticks:
            axes.set_xticks(range(len(ticks)), ticks)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        if percent:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
        if num_labels := sum(bool(curve.label) for curve in curves):
            if num_labels > MAX_INSIDE:
                figure.set_figheight(size[1] + 0.2 * math.ceil(num_labels / 2))
                figure.legend(loc="outside lower center", ncols=2)
            else:
                axes.legend()
    return figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A number with its interval, which may be NaN, and the single observations behind it."""

    label: str
    value: float
    low: float
    high: float
    points: Sequence[float] = ()
    colour: str = "c1"


def draw_rows(rows: Sequence[Row], *, xlabel: str, zero: bool = False, width: float = 5.6) -> Figure:
    """A line for each row, from top to bottom; ``zero`` marks where differences vanish. ``width`` is in inches."""
    with matplotlib.rc_context({**STYLE, "axes.grid.axis": "x"}):
        figure = Figure(figsize=(width, 0.75 + 0.3 * len(rows)), layout="constrained")
        axes = figure.subplots()
        for place, row in enumerate(rows):
            colour = COLOURS[row.colour]
            axes.plot(row.points, [place + 0.22] * len(row.points), "|", color=colour, markersize=6, alpha=0.7)
            axes.plot([row.low, row.high], [place, place], "-", color=colour, linewidth=2.2)
            axes.plot([row.value], [place], "o", color=colour, markersize=5)
        if zero:
            axes.axvline(0, color=COLOURS["muted"], linewidth=1)
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlabel(xlabel)
    return figure


def window(num_points: int) -> int:
    """The points that a running mean averages; 1 for a curve too short to smooth."""
    return 1 if num_points < MIN_SMOOTHED else 2 * (num_points // MIN_SMOOTHED) + 1


def running_mean(values: Floats, size: int) -> Floats:
    """The mean of the ``size`` values around each, without NaN; fewer at both ends."""
    known, ones = ~np.isnan(values), np.ones(size)
    sums = np.convolve(np.where(known, values, 0.0), ones, "same")
    counts = np.convolve(known, ones, "same").round()
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def svg_element(figure: Figure) -> Markup:
    """The figure as an element of an HTML page, in the colours of the page's style sheet."""
    text = io.StringIO()
    with matplotlib.rc_context(STYLE):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    # HTML needs neither the XML prolog, nor namespaces, nor the ids that nothing refers to.
    svg = re.sub(r'^.*?(?=<svg)|xmlns(:xlink)?="[^"]*" ?| id="[\w.]+_\d+"', "", text.getvalue(), flags=re.DOTALL)
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return Markup(svg)
