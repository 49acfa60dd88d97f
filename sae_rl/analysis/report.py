"""The report of one run: a single HTML file that needs no network, and a table for the console."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
import torch
from markupsafe import Markup
from rich.table import Table

from sae_rl.algo.stats import BINS, Reliability
from sae_rl.analysis.pages import render
from sae_rl.analysis.plots import draw, svg_element, window
from sae_rl.analysis.run_files import RunFiles
from sae_rl.analysis.viewer import Vocabulary, show_responses, view_of_step
from sae_rl.records.metrics import METRICS, metric_of, show
from sae_rl.records.rollouts import read_rollouts

COMPARED = {  # metric: label in the table of changes
    "evaluation/success_mean": "held-out success",
    "evaluation/response_tokens_mean": "held-out length, tokens",
    "evaluation/truncated_fraction": "held-out truncated",
    "rollout/reward_mean": "training reward",
    "rollout/tokens_mean": "response length, tokens",
    "segment/per_response_mean": "segments per response",
    "critic/explained_variance": "explained variance",
    "time/step_s": "seconds per step",
}
CURVES = [name for name, metric in METRICS.items() if metric.title and not name.startswith(("evaluation/", "time/"))]


@dataclass(frozen=True, slots=True)
class Chart:
    """A titled plot of the page."""

    title: str
    caption: str
    svg: Markup


@dataclass(frozen=True, slots=True)
class Change:
    """One line of the table of changes: (value, interval) before and after; an interval may be empty."""

    label: str
    before: tuple[str, str]
    after: tuple[str, str]


def write_report(run_dir: Path, output: Path, title: str, vocabulary: Vocabulary) -> None:
    """Writes the page of a run. Raises ValueError if ``run_dir`` holds no metrics of training."""
    run = RunFiles(run_dir)
    if run.num_steps == 0:
        raise ValueError(f"{run_dir}/metrics.jsonl has no training step: there is nothing to report yet")
    page = render(
        "report.html.j2",
        title=title,
        run=run,
        claim=claim(run),
        changes=changes(run),
        heldout=chart(run, "evaluation/success_mean", size=(5.6, 3.3)),
        heldout_parts=heldout_parts(run),
        learning=[found for name in CURVES if (found := chart(run, name))],
        smoothed=window(run.num_steps),
        reliability=reliability_table(run),
        viewer=last_responses(run, vocabulary),
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page)


def last_responses(run: RunFiles, vocabulary: Vocabulary) -> dict[str, Any] | None:
    """Three responses of the last recorded step for the viewer; None where no step was recorded."""
    if not run.rollouts:
        return None
    table = read_rollouts(run.rollouts[-1][1])
    picked = pick_responses(table)
    return show_responses(view_of_step(table, run.config), picked, vocabulary, picked[0])


def pick_responses(table: pa.Table) -> list[int]:
    """Three rows of a recorded step: of the highest reward, of the lowest, and another; each of median length.

    The choice follows from the recorded rows alone, so that nobody can pick the prettiest.
    """
    rows = table.select(["prompt_id", "sample", "reward"]).to_pylist()
    lengths = pc.list_value_length(table["token_ids"]).to_pylist()
    order = sorted(range(len(rows)), key=lambda i: (lengths[i], rows[i]["prompt_id"], rows[i]["sample"]))
    rewards, picked = [row["reward"] for row in rows], list[int]()
    for wanted in ({max(rewards)}, {min(rewards)}, set(rewards)):
        if fitting := [i for i in order if rewards[i] in wanted]:
            picked.append(fitting[len(fitting) // 2])
            order.remove(picked[-1])
    return picked


def reliability_table(run: RunFiles) -> list[tuple[str, ...]]:
    """Bin, tokens, mean value and mean return of the critic in the last recorded step; empty where these are not known."""
    table = read_rollouts(run.rollouts[-1][1]) if run.rollouts else None
    if table is None or "returns" not in table.column_names or table["returns"].null_count:
        return []
    values, returns = (torch.tensor(pc.list_flatten(table[name]).to_numpy()) for name in ("values", "returns"))
    if not (known := ~returns.isnan()).any():
        return []
    found, last = Reliability.of(values[known], returns[known]), BINS - 1
    ends = [f"{show(a)} to {show(b)}" for a, b in pairwise(found.edges.tolist())]
    ends[0], ends[last] = f"up to {show(float(found.edges[1]))}", f"above {show(float(found.edges[last]))}"
    means = zip(ends, found.counts.tolist(), found.values.tolist(), found.returns.tolist(), strict=True)
    return [(end, f"{count:,}", show(value), show(mean)) for end, count, value, mean in means if count]


def final_table(run_dir: Path) -> Table:
    """The table of changes, for the console at the end of a run."""
    run = RunFiles(run_dir)
    caption = "training: means of the first and the last tenth of the steps"
    table = Table(title=f"{run.num_steps} steps in {run.duration}", title_justify="left", caption=caption)
    table.add_column("", no_wrap=True)
    table.add_column("before", justify="right")
    table.add_column("after", justify="right", style="bold")
    for change in changes(run):
        table.add_row(change.label, " ".join(change.before).strip(), " ".join(change.after).strip())
    return table


def claim(run: RunFiles) -> str:
    """One sentence that the held-out evaluations support."""
    if len(run.evaluations) < 2:
        reward = {change.label: change for change in changes(run)}.get("training reward")
        return f"Mean training reward: {reward.before[0]} at the start, {reward.after[0]} at the end." if reward else ""
    first, last = run.evaluations[0], run.evaluations[-1]
    mean, low, high = (f"evaluation/success_{end}" for end in ("mean", "low", "high"))
    numbers = f"from {show(first[mean])} to {show(last[mean])} in {last['step'] - first['step']} steps"
    if last[low] > first[high]:
        return f"The policy learns: success on held-out prompts rose {numbers}."
    if last[high] < first[low]:
        return f"Success on held-out prompts fell {numbers}."
    return f"No clear change: success on held-out prompts went {numbers}, and the two intervals overlap."


def changes(run: RunFiles) -> list[Change]:
    """The first and the last of several evaluations, and means of the first and the last steps of training."""
    found = []
    for name, label in COMPARED.items():
        curve, is_heldout = run.curve(name), name.startswith("evaluation/")
        if len(curve.y) > is_heldout:
            n, unit = 1 if is_heldout else max(1, run.num_steps // 10), METRICS[name].unit
            before = show(_mean(curve.y[:n]), unit), _interval(curve.low[:1], curve.high[:1])
            after = show(_mean(curve.y[-n:]), unit), _interval(curve.low[-1:], curve.high[-1:])
            found.append(Change(label, before, after))
    return found


def _interval(low: Sequence[float], high: Sequence[float]) -> str:
    return f"[{show(low[0])}, {show(high[0])}]" if low and math.isfinite(low[0]) else ""


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return float(np.mean(finite)) if finite else math.nan


def chart(run: RunFiles, name: str, title: str = "", size: tuple[float, float] = (4.0, 2.1)) -> Chart | None:
    """A metric over the steps, with its interval where it has one; None where it was not recorded."""
    metric, curve = metric_of(name), run.curve(name)
    assert metric is not None, name
    if not any(map(math.isfinite, curve.y)):
        return None
    unit = f", {metric.unit}" if metric.unit not in ("", "fraction") else ""
    title = title or f"{metric.title[0].upper()}{metric.title[1:]}{unit}"
    return Chart(title, metric.meaning, svg_element(draw([curve], size=size, percent=metric.unit == "fraction")))


def heldout_parts(run: RunFiles) -> list[Chart]:
    """The success on each of several data sets, and pass@n and maj@n of all."""
    if len(run.evaluations) < 2:
        return []
    names = {f"evaluation/{data_set}/success_mean": data_set for data_set in run.data_sets}
    if run.evaluations[-1]["evaluation/samples_per_prompt"] > 1:
        names |= {"evaluation/pass_at_n_mean": "", "evaluation/maj_at_n_mean": ""}
    return [found for name, title in names.items() if (found := chart(run, name, title))]
