"""The tables of a comparison as rows of text, for the console, for Markdown and for the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from sae_rl.comparison.outcomes import DURATIONS, OUTCOMES, SCORES
from sae_rl.comparison.results import ArmResult, Change, Comparison, Difference, p_text, signed
from sae_rl.evaluation.statistics import UNKNOWN, Estimate
from sae_rl.records.metrics import METRICS, show
from sae_rl.records.terminal import console

Cell = tuple[str, str]  # a value, and its interval or a remark, which may be empty


@dataclass(frozen=True, slots=True, kw_only=True)
class TextTable:
    """A table of text: a row for each arm."""

    title: str
    caption: str
    columns: list[str]  # after the first, which names the arm
    rows: dict[str, list[Cell]]


def tables(comparison: Comparison) -> list[TextTable]:
    """Every table of a comparison that has a row."""
    found = [
        _scores(comparison),
        _learning(comparison),
        _changes(comparison),
        _diagnostics(comparison),
        _phases(comparison),
    ]
    return [table for table in found if table.rows and table.columns]


def _scores(comparison: Comparison) -> TextTable:
    empty: list[Cell] = [("-", "")] * 5
    failed = {name: [(f"0 of {len(runs)}", ""), *empty] for name, runs in comparison.arms_without_runs.items()}
    return TextTable(
        title="Scores",
        caption="Means over complete runs: final score, its interquartile mean (IQM), the mean of the last evaluations, "
        "the area under the curve, and the standard deviation of final scores. In brackets: 95 % intervals.",
        columns=["runs", "final", "IQM", f"last {comparison.last_fraction:.0%}", "area", "spread"],
        rows={arm.name: _score_cells(arm) for arm in comparison.arms} | failed,
    )


def _score_cells(arm: ArmResult) -> list[Cell]:
    final, last, area = (_cell(arm.outcomes[name]) for name in SCORES)
    num_runs = f"{len(arm.seeds)} of {len(arm.seeds) + len(arm.failed)}"
    return [(num_runs, ""), final, _cell(arm.iqm["final"]), last, area, (_number(arm.final_std), "")]


def _learning(comparison: Comparison) -> TextTable:
    threshold, chosen = show(comparison.threshold), comparison.is_threshold_chosen
    return TextTable(
        title="Speed and stability",
        caption=f"Runs that reach {threshold}{'' if chosen else ', half way to the best arm'}, and mean steps and sampled "
        "tokens until then; a run that does not, or only later than the shortest run is long, counts with the length of "
        "the shortest run (≥: a lower bound). Drawdown: largest fall below the best score before. "
        "Diverged: final score below the first, or below half the best if that is positive.",
        columns=[f"reach {threshold}", "steps", "tokens", "drawdown", "diverged"],
        rows={arm.name: _learning_cells(arm) for arm in comparison.arms},
    )


def _learning_cells(arm: ArmResult) -> list[Cell]:
    started = len(arm.seeds) + len(arm.failed)
    durations = [_at_least(arm, name) for name in DURATIONS]
    reached, diverged = f"{arm.num_reached} of {len(arm.seeds)}", f"{arm.num_diverged} of {started}"
    return [(reached, ""), *durations, _cell(arm.outcomes["drawdown"]), (diverged, "")]


def _changes(comparison: Comparison) -> TextTable:
    names = [
        name for name in OUTCOMES if any(not math.isnan(each.outcomes[name].value) for each in comparison.differences)
    ]
    return TextTable(
        title=f"Differences to {comparison.baseline}",
        caption="In brackets 95 % intervals of each difference by itself; p is adjusted by Holm for the number of arms. "
        "Better and worse refer to the "
        f"{OUTCOMES[comparison.outcome]}.",
        columns=["", "paired seeds", *(OUTCOMES[name] for name in names), "probability of improvement"],
        rows={
            each.arm: [
                (each.verdict, ""),
                (str(each.num_pairs) if each.num_pairs else "not paired", ""),
                *(_change(each.outcomes[name]) for name in names),
                _cell(each.improvement),
            ]
            for each in comparison.differences
        },
    )


def _diagnostics(comparison: Comparison) -> TextTable:
    names = list(dict.fromkeys(name for arm in comparison.arms for name in arm.diagnostics))
    return TextTable(
        title="Metrics of training",
        caption="Means over all steps and runs; in brackets 95 % intervals over seeds.",
        columns=names,
        rows={
            arm.name: [_cell(arm.diagnostics.get(name, UNKNOWN), METRICS[name].unit) for name in names]
            for arm in comparison.arms
        },
    )


def _phases(comparison: Comparison) -> TextTable:
    names = list(dict.fromkeys(name for arm in comparison.arms for name in arm.seconds))
    return TextTable(
        title="Wall time",
        caption="Seconds of a step by phase, mean over all steps and runs.",
        columns=[METRICS[name].title for name in names],
        rows={arm.name: [(_number(arm.seconds.get(name, math.nan)), "") for name in names] for arm in comparison.arms},
    )


def _number(value: float, unit: str = "") -> str:
    return "-" if math.isnan(value) else show(value, unit)


def _cell(estimate: Estimate, unit: str = "") -> Cell:
    return _number(estimate.value, unit), _interval(estimate.low, estimate.high, unit)


def _interval(low: float, high: float, unit: str = "") -> str:
    return "" if math.isnan(low) else f"[{show(low, unit)}, {show(high, unit)}]"


def _at_least(arm: ArmResult, name: str) -> Cell:
    value, interval = _cell(arm.outcomes[name])
    return ("≥ " if arm.num_cut[name] else "") + value, interval


def _change(change: Change) -> Cell:
    if math.isnan(change.value):
        return "-", ""
    if math.isnan(change.low):
        return signed(change.value), ""
    return signed(change.value), f"[{signed(change.low)}, {signed(change.high)}], {p_text(change.holm_p)}"


def summary_of(comparison: Comparison) -> str:
    """What was compared, in one line."""
    runs = sum(len(arm.seeds) for arm in comparison.arms)
    failed = sum(len(arm.failed) for arm in comparison.arms) + sum(map(len, comparison.arms_without_runs.values()))
    over = f"seeds and {comparison.num_prompts:,} held-out prompts" if comparison.num_prompts else "seeds"
    arms = len(comparison.arms)
    counts = f"{runs} complete run{'s' * (runs != 1)} of {arms} arm{'s' * (arms != 1)}, {failed} incomplete"
    counts += f", {len(comparison.left_out)} not compared" if comparison.left_out else ""
    where = f"{comparison.task}, {comparison.num_steps} steps"
    return f"{where}: {counts}. Score: {METRICS[comparison.measure].title}. Intervals: over {over}."


def remarks(comparison: Comparison) -> list[str]:
    """Every run that is not in the numbers, and what else a reader must know."""
    failed = [line for arm in comparison.arms for line in arm.failed]
    failed += [line for lines in comparison.arms_without_runs.values() for line in lines]
    lines = [*comparison.notes, *(f"Incomplete: {line}." for line in failed)]
    lines += [f"Not compared: {run.source}: {run.reason}." for run in comparison.left_out]
    return lines + [f"{each.arm}: {_without(each)}" for each in comparison.differences if each.without_partner]


def _without(difference: Difference) -> str:
    return f"the paired difference leaves out seeds that only one arm has: {', '.join(difference.without_partner)}."


def markdown(comparison: Comparison) -> str:
    """The comparison as a Markdown page."""
    lines = ["# Comparison", "", summary_of(comparison), ""]
    lines += [f"- {each.sentence}" for each in comparison.differences] + [""]
    for table in tables(comparison):
        lines += [f"## {table.title}", "", table.caption, "", _line(["arm", *table.columns])]
        lines += [_line(["---"] * (len(table.columns) + 1))]
        lines += [_line([arm, *(" ".join(cell).strip() for cell in row)]) for arm, row in table.rows.items()] + [""]
    if found := remarks(comparison):
        lines += ["## Remarks", "", *(f"- {line}" for line in found), ""]
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def print_comparison(comparison: Comparison) -> None:
    """Prints scores, the threshold and the sentences about differences; the files have the other tables."""
    output = console(plain=False)
    output.print(summary_of(comparison), markup=False)
    for table in tables(comparison)[:2]:
        shown = Table(title=table.title, caption=table.caption, box=SIMPLE_HEAD)
        shown.title_justify = shown.caption_justify = "left"
        shown.add_column("arm", overflow="fold")
        for column in table.columns:
            shown.add_column(column, justify="right")
        for arm, row in table.rows.items():
            shown.add_row(escape(arm), *(escape("\n".join(cell).strip()) for cell in row))
        output.print(shown)
    for each in comparison.differences:
        output.print(each.sentence, markup=False)
    for line in remarks(comparison):
        output.print(line, style="yellow", markup=False)
