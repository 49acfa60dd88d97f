"""The numbers of an evaluation as rows of text, for the console and the page of samples."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import ROUNDED
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sae_rl.evaluation.files import PAGE, SAMPLES, SUMMARY
from sae_rl.records.metrics import show

Summary = Mapping[str, Any]  # of one data set, as in summary.json


@dataclass(frozen=True, slots=True)
class Row:
    label: str
    value: str
    interval: str = ""


def rows_of(summary: Summary) -> list[Row]:
    """Everything that is known; maj@k where there are answers, segments where they are known."""
    rows = [_row(f"avg@{summary['samples_per_prompt']}", summary["success"])]
    rows += [_row(f"pass@{k}", estimate) for k, estimate in summary["pass_at"].items()]
    has_answers = summary["maj_at_n"] is not None
    rows += [_row(f"maj@{summary['samples_per_prompt']}", summary["maj_at_n"])] if has_answers else []
    rows += [
        _row("tokens, mean", summary["response_tokens"]),
        Row("tokens, median", f"{summary['response_tokens_p50']:,.0f}"),
        Row("tokens, 95th percentile", f"{summary['response_tokens_p95']:,.0f}"),
        Row("tokens, longest", f"{summary['response_tokens_max']:,.0f}"),
        _row("tokens, mean of right", summary["right_tokens"]),
        _row("tokens, mean of wrong", summary["wrong_tokens"]),
        _row("truncated", summary["truncated"], "fraction"),
        _row("checks that failed", summary["failed"], "fraction"),
    ]
    if has_answers:
        rows.append(_row("with an answer", summary["answered"], "fraction"))
    if summary["segments"] is not None:
        rows += [
            Row("segments per response", _text(summary["segments"]["per_response_mean"])),
            Row("tokens per segment", _text(summary["segments"]["tokens_mean"])),
            Row("tokens that open", _text(summary["segments"]["opens_fraction"], "fraction")),
        ]
    return rows


def _row(label: str, estimate: Mapping[str, float | None], unit: str = "") -> Row:
    if estimate["low"] is None:
        return Row(label, _text(estimate["value"], unit))
    ends = f"[{_text(estimate['low'], unit)}, {_text(estimate['high'], unit)}]"
    return Row(label, _text(estimate["value"], unit), ends)


def _text(value: float | None, unit: str = "") -> str:
    """Null stands for a number that does not exist, such as the length of right responses where none is right."""
    return "-" if value is None else show(value if math.isfinite(value) else math.nan, unit)


def summaries_of(evaluation: Mapping[str, Any]) -> dict[str, Summary]:
    """By title, from what summary.json holds: each data set, and of several all together first."""
    data_sets: dict[str, Summary] = evaluation["data_sets"]
    together = {"all data sets": evaluation["all"]} if len(data_sets) > 1 else {}
    return {**together, **data_sets}


def print_evaluation(folder: Path, *, plain: bool) -> None:
    """What `write_evaluation` left in a folder, on the console; without colours and lines where that is no terminal."""
    evaluation = json.loads((folder / SUMMARY).read_text())
    console = Console(highlight=False, soft_wrap=True)
    if plain or not console.is_terminal:
        plain, console = True, Console(highlight=False, soft_wrap=True, no_color=True, force_terminal=False)
    for table in console_tables(evaluation, plain=plain):
        console.print(table)
    if evaluation["segments_left_out"]:
        console.print(f"segments are left out: {evaluation['segments_left_out']}", markup=False)
    for file in (SUMMARY, SAMPLES, PAGE):
        console.print(str(folder / file), markup=False)


def console_tables(evaluation: Mapping[str, Any], *, plain: bool) -> list[Table]:
    """One table per data set, from what summary.json holds."""
    tables = []
    for title, summary in summaries_of(evaluation).items():
        table = Table(
            title=escape(f"{title}: {extent(summary)}"),
            title_justify="left",
            title_style="" if plain else "bold",
            box=None if plain else ROUNDED,
        )
        table.add_column("", no_wrap=True)
        table.add_column("value", justify="right", style="" if plain else "bold", no_wrap=True)
        table.add_column("95 % interval", no_wrap=True)
        for row in rows_of(summary):
            table.add_row(row.label, row.value, row.interval)
        tables.append(table)
    return tables


def extent(summary: Summary) -> str:
    prompts, n = summary["num_prompts"], summary["samples_per_prompt"]
    return f"{prompts:,} prompt{'s' * (prompts != 1)}, {n} sample{'s' * (n != 1)} each"
