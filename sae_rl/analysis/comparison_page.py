"""The plots and the page of a comparison: one HTML file that needs no network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import yaml
from markupsafe import Markup
from matplotlib.figure import Figure

from sae_rl.analysis.comparison_table import remarks, summary_of, tables
from sae_rl.analysis.pages import render
from sae_rl.analysis.plots import SERIES, STYLE, Curve, Row, draw, draw_rows, svg_element
from sae_rl.comparison.outcomes import OUTCOMES
from sae_rl.comparison.results import Band, Change, Comparison
from sae_rl.evaluation.statistics import Estimate
from sae_rl.records.metrics import METRICS

WIDE = (5.6, 3.3)  # inches


@dataclass(frozen=True, slots=True)
class Plot:
    """A titled figure, with the names of its arms for a file, and without them for a page that has one key."""

    title: str
    caption: str
    figure: Callable[[bool], Figure]  # with names or without

    def save(self, folder: Path, name: str) -> None:
        """Writes the figure as SVG and as PNG."""
        with matplotlib.rc_context(STYLE):
            figure = self.figure(True)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None}, facecolor="white")
            figure.savefig(folder / f"{name}.png", dpi=150, facecolor="white")

    @property
    def svg(self) -> Markup:
        return svg_element(self.figure(False))


def figures(comparison: Comparison) -> dict[str, Plot]:
    """Every plot by the name of its file."""
    arms, score, outcome = comparison.arms, METRICS[comparison.measure].title, comparison.outcome
    names = [arm.name for arm in arms]
    colours = {name: SERIES[place % len(SERIES)][0] for place, name in enumerate(names)}
    final = [_row(arm.name, arm.outcomes["final"], colours, arm.runs["final"]) for arm in arms]
    changes = [_row(each.arm, each.outcomes[outcome], colours) for each in comparison.differences]
    curves = {arm.name: (comparison.steps, arm.curve) for arm in arms}
    by_tokens = {arm.name: ([n / 1e6 for n in arm.tokens], replace(arm.curve, low=[], high=[])) for arm in arms}
    profiles = {arm.name: (comparison.profile_thresholds, replace(arm.profile, low=[], high=[])) for arm in arms}
    band, beside = "band: 95 % interval", f"Difference to {comparison.baseline}"
    every, threshold = "Fraction of runs with a final score above t.", {"xlabel": "t", "marks": False}
    by_token = {"size": WIDE, "xlabel": "million tokens"}
    found = {
        "learning_curve": _lines(_capital(score), f"Mean over runs; {band}.", names, curves, size=WIDE),
        "final_score": _rows("Final score", "Mean, 95 % interval, and each run.", final, score),
        "differences": _rows(
            beside, "With 95 % intervals before Holm's correction.", changes, OUTCOMES[outcome], zero=True
        ),
        "tokens": _lines(f"{_capital(score)} by sampled tokens", "Mean over runs.", names, by_tokens, **by_token),
        "profile": _lines("Performance profile", every, names, profiles, size=WIDE, **threshold),
    }
    for name in dict.fromkeys(name for arm in arms for name in arm.diagnostic_curves):
        own = {arm.name: arm.diagnostic_curves[name] for arm in arms if name in arm.diagnostic_curves}
        lines = {arm: (range(1, len(each.value) + 1), each) for arm, each in own.items()}
        metric, title = METRICS[name], _capital(METRICS[name].title) or name
        percent = metric.unit == "fraction"
        found[name.replace("/", "_")] = _lines(
            title, f"{name}: {metric.meaning}.", names, lines, percent=percent, marks=False
        )
    return found if changes else {name: plot for name, plot in found.items() if name != "differences"}


def page(comparison: Comparison, plots: Mapping[str, Plot]) -> str:
    """The page of a comparison."""
    main = [name for name in ("learning_curve", "final_score", "differences", "tokens", "profile") if name in plots]
    about = {
        "arms": {arm.name: {"runs": arm.sources, "seeds": arm.seeds} for arm in comparison.arms},
        "held-out prompts": comparison.held_out,
        "resamples": comparison.num_resamples,
    }
    return render(
        "comparison.html.j2",
        title=f"sae_rl: comparison of {len(comparison.arms)} arms",
        comparison=comparison,
        claim=_claim(comparison),
        summary=summary_of(comparison),
        key=[(arm.name, *SERIES[place % len(SERIES)]) for place, arm in enumerate(comparison.arms)],
        tables=tables(comparison),
        remarks=remarks(comparison),
        main=[plots[name] for name in main],
        training=[plot for name, plot in plots.items() if name not in main],
        about=yaml.safe_dump(about, sort_keys=False, width=120),
    )


def _claim(comparison: Comparison) -> str:
    """One sentence that the verdicts support."""
    if not comparison.differences:
        return "One arm: there is nothing to compare it with."
    verdicts = [each.verdict for each in comparison.differences]
    counts = [(verdicts.count(verdict), verdict) for verdict in dict.fromkeys(verdicts)]
    said = {
        "better": "better",
        "worse": "worse",
        "no difference shown": "not shown to differ",
        "no interval": "without an interval",
    }
    parts = ", ".join(f"{n} {said[verdict]}" for n, verdict in counts)
    arms = f"{len(verdicts)} arm{'s' * (len(verdicts) != 1)}"
    return f"{_capital(OUTCOMES[comparison.outcome])} beside {comparison.baseline}: of {arms}, {parts}."


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _row(name: str, found: Estimate | Change, colours: Mapping[str, str], points: Sequence[float] = ()) -> Row:
    return Row(label=name, value=found.value, low=found.low, high=found.high, points=points, colour=colours[name])


def _rows(title: str, caption: str, rows: Sequence[Row], xlabel: str, zero: bool = False) -> Plot:
    return Plot(title, caption, lambda _: draw_rows(rows, xlabel=xlabel, zero=zero))


def _lines(
    title: str, caption: str, names: Sequence[str], bands: Mapping[str, tuple[Sequence[float], Band]], **options: Any
) -> Plot:
    """Curves of arms, which look alike in all plots; ``options`` are those of `draw`."""

    def figure(with_names: bool) -> Figure:
        curves = []
        for name, (x, band) in bands.items():
            colour, line = SERIES[names.index(name) % len(SERIES)]
            label = name if with_names else ""
            curves.append(Curve(x=x, y=band.value, low=band.low, high=band.high, label=label, colour=colour, line=line))
        return draw(curves, smooth=False, **options | ({"size": WIDE} if with_names else {}))

    return Plot(title, caption, figure)
