"""``sae-rl compare``: arms of runs compared, with a table, a page, plots and files."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic_core import to_json

from sae_rl.commands.arguments import Arguments
from sae_rl.comparison.arms import with_arms
from sae_rl.comparison.curves import RunCurves, csv_text, is_curves
from sae_rl.comparison.outcomes import OUTCOMES
from sae_rl.comparison.results import Choices, Comparison, compare
from sae_rl.comparison.runs import Unread, read_runs
from sae_rl.comparison.selection import select
from sae_rl.settings import ConfigError

DESCRIPTION = """\
Compares runs of several seeds: folders of runs, folders of sweeps, and CSV files that --export wrote. Runs whose
configurations differ in nothing but their seeds are one arm. docs/comparison.md says what every number means."""


def run_comparison(arguments: Sequence[str]) -> None:
    """Compares, prints the table, and writes the files.

    Raises:
        ConfigError: the arguments, or the runs that they name, cannot be compared.
    """
    chosen = read_arguments(arguments)
    try:
        runs, unread = read_runs(chosen.paths)
        runs, notes = with_arms(runs, chosen.arm_by)
        choices = Choices(
            baseline=chosen.baseline, outcome=chosen.outcome, threshold=chosen.threshold, last_fraction=chosen.last
        )
        selection = select(runs, unread, chosen.last)
        comparison = compare(selection, notes, choices)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    if chosen.export is not None:
        export(chosen.export, runs, unread)
    write_comparison(comparison, chosen.output)


def read_arguments(arguments: Sequence[str]) -> Any:
    """The options. Raises ConfigError for those that do not exist or do not fit; ``--help`` prints them and exits."""
    parser = Arguments(
        prog="sae-rl compare", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.advice = "; sae-rl compare --help lists the options"
    add = parser.add_argument
    add("paths", nargs="+", type=Path, metavar="FOLDER", help="a run, a sweep, or CSV files of curves")
    add("--baseline", default="", metavar="ARM", help="the arm that the others are compared with (default: the first)")
    add(
        "--arm-by",
        action="append",
        default=[],
        metavar="KEY",
        help="a key or section that tells arms apart; repeatable",
    )
    add("--outcome", choices=OUTCOMES, default="final", help="what better and worse refer to (default: final)")
    add("--threshold", type=float, metavar="SCORE", help="the score to reach (default: half way to the best arm)")
    add("--last", type=float, default=0.25, metavar="FRACTION", help="part of the steps that `last` averages (0.25)")
    add("--output", type=Path, default=Path("outputs/comparison"), metavar="FOLDER", help="default: outputs/comparison")
    add("--export", type=Path, metavar="FOLDER", help="also write the curves of each run there, as small CSV files")
    chosen = parser.parse_args(list(arguments))
    if not 0 < chosen.last <= 1:
        parser.error(f"--last takes a fraction above 0 and at most 1, found {chosen.last:g}")
    return chosen


def export(folder: Path, runs: Sequence[RunCurves], unread: Sequence[Unread]) -> None:
    """Writes a CSV file for each run, also for those that failed.

    Raises:
        ConfigError: the folder cannot be written to, or holds curves of other runs.
    """
    nothing: dict[str, Any] = {"seed": "", "task": "", "held_out": "", "steps": 0, "training": {}, "success": {}}
    failed = [
        RunCurves(source=Path(run.source), arm=Path(run.source).name, problem=run.reason, **nothing) for run in unread
    ]
    texts: dict[str, str] = {}
    for run in [*runs, *failed]:
        stem = re.sub(r"[^\w.=-]+", "_", f"{run.arm}, seed={run.seed}" if run.seed else run.arm).strip("_")
        name = next(f for n in range(1, 1000) if (f := f"{stem}{f'_{n}' * (n > 1)}.csv") not in texts)
        texts[name] = csv_text(run)
    others = [file for file in folder.glob("*.csv") if file.name not in texts and file.is_file() and is_curves(file)]
    if others:
        listed = ", ".join(sorted(file.name for file in others))
        raise ConfigError([f"--export {folder}: it holds curves of other runs: {listed}; remove them or name another"])
    _write(folder, texts)


def write_comparison(comparison: Comparison, folder: Path) -> None:
    """Prints the comparison, and writes it as JSON, Markdown, plots and a page. Raises ConfigError as `export` does."""
    from sae_rl.analysis.comparison_page import figures, page  # matplotlib takes a second
    from sae_rl.analysis.comparison_table import markdown, print_comparison

    drawn = figures(comparison)
    _write(
        folder,
        {
            "comparison.json": to_json(comparison, indent=2, inf_nan_mode="null").decode() + "\n",  # JSON has no NaN
            "comparison.md": markdown(comparison),
            "comparison.html": page(comparison, drawn),
        },
    )
    for name, plot in drawn.items():
        plot.save(folder, name)
    print_comparison(comparison)
    print(f"{folder}/: comparison.html, comparison.md, comparison.json, and plots as SVG and PNG")


def _write(folder: Path, texts: dict[str, str]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text)
    except OSError as error:
        raise ConfigError([f"{folder}: cannot write there ({error.strerror})"]) from error
