"""The report of ``sae-rl correlate``: a table on the terminal, Markdown, every figure as JSON, and one page of HTML."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic_core import to_json
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sae_rl.analysis.pages import render
from sae_rl.analysis.plots import Curve, Row, draw, draw_rows, svg_element
from sae_rl.analysis.report import Chart
from sae_rl.analysis.viewer import pass_score_of
from sae_rl.config.schema import flat
from sae_rl.correlation.figures import BATCHES, SAE, SLICED, Tree, figures
from sae_rl.correlation.files import load
from sae_rl.correlation.tables import (
    OF_GRADIENT,
    OF_SEGMENT,
    OF_TOKEN,
    SHOWN_BATCH,
    TextTable,
    at,
    cell,
    notes_of,
    summary_of,
    tables_of,
)
from sae_rl.evaluation.statistics import Estimate

FIGURES, MARKDOWN, PAGE = "correlation.json", "report.md", "report.html"
SETTINGS, CONFIG = "correlation.yaml", "config.yaml"
MOST_CURVES = 4  # in a plot of slices or batches
SLICE_CHARTS = {  # kind of slices: figures that its plots show
    "position": ("pearson_corrected", "slope", "mean_error"),
    "tokens to the end": ("pearson_corrected", "mean_error"),
    "probability": ("pearson_corrected", "mean_error"),
    "outcome": ("mean_error",),
}
TITLES = {
    "pearson": "Pearson correlation",
    "pearson_corrected": "Pearson correlation, without noise",
    "slope": "Slope on the true advantage",
    "mean_error": "Mean error",
}


def write_report(folder: Path, console: Console | None = None, *, segments_of: str | None = None) -> Path:
    """Writes ``correlation.json``, ``report.md`` and ``report.html`` beside the measurements, and prints a table.

    Args:
        segments_of: as of `figures`; None: "sae", or the first of ``correlation.boundaries`` if these lack it.

    Returns:
        The path of the page.

    Raises:
        ValueError: the folder has no measurements, or no estimator has the name ``segments_of``.
    """
    measurements, left = load(folder), _read(folder / SETTINGS)
    own = {"boundaries": [], "estimators": {}} | (left["correlation"] if left else {})
    measured = [name for name in own["boundaries"] if name in measurements.names]
    tree = figures(
        measurements,
        settings={name: flat(parts) for name, parts in own["estimators"].items() if parts is not None},
        segments_of=segments_of or (measured[0] if measured and SAE not in measured else None),
        pass_score=pass_score_of(_read(folder / CONFIG)),
    )
    tables, notes = tables_of(tree), notes_of(tree)
    (folder / FIGURES).write_bytes(to_json(tree, indent=2, inf_nan_mode="null") + b"\n")  # JSON has no NaN
    (folder / MARKDOWN).write_text(markdown(tree, tables, notes))
    (folder / PAGE).write_text(page(tree, tables, notes))
    if console is not None:
        console.print(_terminal_table(summary_of(tree)))
        for note in notes:
            console.print(note, markup=False)
    return folder / PAGE


def _read(file: Path) -> dict[str, Any]:
    """What ``sae-rl correlate`` left; empty if the file is not there."""
    return yaml.safe_load(file.read_text()) if file.is_file() else {}


def claim_of(tree: Tree) -> str:
    """One sentence that the figures support: how many responses of Monte Carlo one response is worth."""
    name = tree["segments_of"] or next(iter(tree["estimators"]))
    for batch in (SHOWN_BATCH, BATCHES.index(1)):
        worth, n = at(tree, *OF_GRADIENT, name, "worth", batch), BATCHES[batch]
        if math.isfinite(worth.low):
            batch_of = f"In a batch of {n} prompt{'s' * (n > 1)}"
            verdict = ", which does not tell a difference" if worth.low <= 1 <= worth.high else ""
            return f"{batch_of}, one response with {name} is worth {cell(worth)} responses of Monte Carlo{verdict}."
    pearson = at(tree, *OF_TOKEN, name, "pearson")
    if math.isfinite(pearson.value):
        return f"Advantages of {name} correlate with token-level references by {cell(pearson)}."
    return "These measurements are too few to compare estimators."


def extent_of(tree: Tree) -> str:
    return (
        f"{tree['num_prompts']:,} prompts, {tree['num_responses']:,} responses, {tree['num_tokens']:,} tokens; "
        f"{tree['continuations']} continuations from each of {tree['num_places']:,} places; mean return "
        f"{tree['mean_return']:.3f}; {tree['num_resamples']:,} resamples of the prompts."
    )


def markdown(tree: Tree, tables: Sequence[TextTable], notes: Sequence[str]) -> str:
    lines = ["# Advantages and gradients beside Monte-Carlo references", "", claim_of(tree), "", extent_of(tree)]
    lines += ["Brackets are 95 % bootstrap intervals over prompts.", ""]
    for table in tables:
        lines += [f"## {table.title}", "", table.about, ""]
        lines += ["| " + " | ".join(row) + " |" for row in (table.header, ["---"] + ["--:"] * (len(table.header) - 1))]
        lines += ["| " + " | ".join(text.replace("|", "\\|") for text in row) + " |" for row in table.rows]
        lines.append("")
    if notes:
        lines += ["## What these measurements do not tell", "", *(f"- {note}" for note in notes), ""]
    return "\n".join(lines)


def page(tree: Tree, tables: Sequence[TextTable], notes: Sequence[str]) -> str:
    return render(
        "correlation.html.j2",
        title="sae_rl correlate: advantages and gradients beside Monte-Carlo references",
        claim=claim_of(tree),
        extent=extent_of(tree),
        notes=notes,
        agreement=list(_agreement_charts(tree)),
        gradients=list(_gradient_charts(tree)) if tree["gradients"] else [],
        slices=list(_slice_charts(tree)),
        families=list(_family_charts(tree)),
        key=[(name, f"c{place + 1}") for place, name in enumerate(shown_estimators(tree))],
        tables=tables,
    )


def _terminal_table(table: TextTable) -> Table:
    found = Table(title=escape(table.title), title_justify="left", caption=escape(table.about), caption_justify="left")
    for i, title in enumerate(table.header):
        found.add_column(title, justify="right" if i else "left", overflow="fold", no_wrap=i == 0)  # whole names
    for row in table.rows:
        found.add_row(*(escape(text.replace(" [", "\n[")) for text in row))
    return found


def shown_estimators(tree: Tree) -> list[str]:
    """The few in plots of curves: those that all are compared with, that of the segments, and then by their figures."""

    def figure_of(name: str) -> float:
        of_gradient = at(tree, *OF_GRADIENT, name, "expected_cosine", SHOWN_BATCH).value
        value = at(tree, *OF_TOKEN, name, "pearson").value if math.isnan(of_gradient) else of_gradient
        return -math.inf if math.isnan(value) else value

    first = [*tree["baselines"], *([tree["segments_of"]] if tree["segments_of"] else [])]
    others = sorted((name for name in tree["estimators"] if name not in first), key=figure_of, reverse=True)
    return [*first, *others][:MOST_CURVES]


def _rows_chart(
    tree: Tree, title: str, caption: str, find: Callable[[str], Estimate], xlabel: str = ""
) -> Iterator[Chart]:
    """A dot and its interval for each estimator; nothing where no figure is known."""
    found = {name: find(name) for name in tree["estimators"]}
    if any(math.isfinite(estimate.value) for estimate in found.values()):
        rows = [Row(label=name, value=one.value, low=one.low, high=one.high) for name, one in found.items()]
        yield Chart(title, caption, svg_element(draw_rows(rows, xlabel=xlabel, width=5.6)))


def _agreement_charts(tree: Tree) -> Iterator[Chart]:
    def of_reference(before: tuple[str, ...], key: str) -> Callable[[str], Estimate]:
        return lambda name: at(tree, *before, name, key)

    yield from _rows_chart(tree, "Token reference", "Pearson correlation", of_reference(OF_TOKEN, "pearson"))
    yield from _rows_chart(
        tree,
        "Token reference, without noise",
        "Pearson correlation, corrected for the reference's noise",
        of_reference(OF_TOKEN, "pearson_corrected"),
    )
    caption = f"Pearson correlation, segments of {tree['segments_of']}"
    yield from _rows_chart(tree, "The paper's reference", caption, of_reference(OF_SEGMENT, "pearson"))
    yield from _rows_chart(tree, "Slope", "1: no error depends on the action", of_reference(OF_TOKEN, "slope"))


def _gradient_charts(tree: Tree) -> Iterator[Chart]:
    n, names = BATCHES[SHOWN_BATCH], shown_estimators(tree)

    def of_gradient(*path: str | int) -> Callable[[str], Estimate]:
        return lambda name: at(tree, *OF_GRADIENT, name, *path)

    for title, caption, path in (
        ("Worth of a response", "In responses of Monte Carlo, batch of 1 prompt", ("worth", BATCHES.index(1))),
        (f"Expected cosine, {n} prompts", "Bias and variance", ("expected_cosine", SHOWN_BATCH)),
        ("Cosine of mean gradients", "A batch without end: bias alone", ("cosine",)),
        ("Variance", "The gradient of one prompt, beside the squared length of the reference's", ("variance",)),
    ):
        yield from _rows_chart(tree, title, caption, of_gradient(*path))
    for key, title in (("expected_cosine", "Expected cosine"), ("worth", "Worth of a response")):
        by_batch = {name: [of_gradient(key, i)(name) for i in range(len(BATCHES))] for name in names}
        ticks = [str(batch) for batch in BATCHES]
        caption = "In responses of Monte Carlo; intervals are in correlation.json" if key == "worth" else "By batch"
        yield from _curves_chart(title, caption, by_batch, ticks, "prompts", has_bands=key != "worth")


def _curves_chart(
    title: str,
    caption: str,
    by_name: dict[str, list[Estimate]],
    ticks: Sequence[str],
    xlabel: str,
    *,
    x: Sequence[float] = (),
    has_bands: bool = True,
) -> Iterator[Chart]:
    """A curve with its band for each estimator, over named places or numbers; nothing where no figure is known."""
    curves = [
        Curve(
            x=x or range(len(ticks)),
            y=[one.value for one in found],
            low=[one.low for one in found] if has_bands else [],
            high=[one.high for one in found] if has_bands else [],
            colour=f"c{place + 1}",
        )
        for place, found in enumerate(by_name.values())
        if any(math.isfinite(one.value) for one in found)
    ]
    if curves:
        yield Chart(title, caption, svg_element(draw(curves, size=(5.6, 2.8), xlabel=xlabel, ticks=ticks)))


def _slice_charts(tree: Tree) -> Iterator[Chart]:
    names = shown_estimators(tree)
    for kind, keys in SLICE_CHARTS.items():
        slices = tree["slices"].get(kind, [])
        labels = [one["label"].removesuffix(" %") for one in slices]
        for key in keys:
            by_name = {name: [one["estimators"][name][key] for one in slices] for name in names}
            yield from _curves_chart(TITLES[key], f"By {SLICED[kind]}", by_name, labels, SLICED[kind])


def _family_charts(tree: Tree) -> Iterator[Chart]:
    paths: dict[str, tuple[tuple[str | int, ...], tuple[str | int, ...]]] = {
        "Pearson correlation, without noise": (OF_TOKEN, ("pearson_corrected",)),
        f"Expected cosine, {BATCHES[SHOWN_BATCH]} prompts": (OF_GRADIENT, ("expected_cosine", SHOWN_BATCH)),
        "Worth of a response, 1 prompt": (OF_GRADIENT, ("worth", BATCHES.index(1))),
    }
    for family, members in tree["families"].items():
        for title, (before, after) in paths.items():
            found = {family: [at(tree, *before, name, *after) for _, name in members]}
            yield from _curves_chart(title, family, found, [], family.split()[0], x=[number for number, _ in members])
