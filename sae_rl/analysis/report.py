"""The report of one run: a single HTML file without scripts or network, and a table for the console."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import yaml  # type: ignore[import-untyped]
from markupsafe import Markup
from rich.table import Table

from sae_rl.analysis.charts import Line, line_chart, outlines, smoothing_window, stacked_bars
from sae_rl.analysis.pages import environment
from sae_rl.analysis.responses import Decode, Response, pick_responses
from sae_rl.analysis.run_files import RunFiles
from sae_rl.records.metrics import METRICS, PHASES, Metric, metric_of, show
from sae_rl.records.rollouts import flat_column, read_rollouts

LEARNING = (
    "rollout/reward_mean",
    "rollout/tokens_mean",
    "policy/approx_kl",
    "policy/clip_fraction",
    "critic/explained_variance",
    "policy/entropy_mean",
)
SEGMENTS = ("segment/per_response_mean", "segment/tokens_mean", "segment/opens_fraction")
NUM_BINS = 25
MAX_COLUMNS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A titled image of the page."""

    title: str
    caption: str
    svg: Markup
    legend: tuple[tuple[str, str], ...] = ()  # (colour, text)


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseTime:
    """One line of the table of times."""

    title: str
    meaning: str
    colour: str
    seconds: float
    share: float


def write_report(run_dir: Path, output: Path, title: str, decode: Decode) -> None:
    """Writes the page; ``decode`` turns the token ids of a response into one string per token.

    Raises:
        ValueError: ``run_dir`` holds no metrics of training.
    """
    run = RunFiles(run_dir)
    if run.num_steps == 0:
        raise ValueError(f"{run_dir}/metrics.jsonl has no training step: there is nothing to report yet")
    steps, times = time_chart(run), phase_times(run)
    page = (
        environment()
        .get_template("report.html.j2")
        .render(
            title=title,
            run=run,
            claim=claim(run),
            changes=run.changes(),
            heldout=heldout_curve(run, "success", size=(540, 330)),
            heldout_parts=heldout_parts(run),
            learning=[chart for name in LEARNING if (chart := curve(run, name)) is not None],
            segments=[chart for name in SEGMENTS if (chart := curve(run, name)) is not None],
            smoothed=2 * smoothing_window(run.num_steps) + 1,
            histogram=histogram(run),
            responses=recorded_responses(run, decode),
            time_chart=steps,
            times=times,
            step_seconds=run.seconds / run.num_steps,
            duration=duration(run.seconds),
            config=run.config_text,
        )
    )
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page)


def final_table(run_dir: Path) -> Table:
    """Before and after, for the console at the end of a run."""
    run = RunFiles(run_dir)
    n = run.averaged_steps
    table = Table(title=f"{run.num_steps} steps in {duration(run.seconds)}", title_justify="left")
    table.add_column("", no_wrap=True)
    table.add_column("before", justify="right")
    table.add_column("after", justify="right", style="bold")
    for change in run.changes():
        before, after = f"{change.before} {change.before_interval}", f"{change.after} {change.after_interval}"
        table.add_row(change.label, before.strip(), after.strip())
    table.caption = f"training: means of the first and the last {n if n > 1 else ''} step{'s' if n > 1 else ''}"
    return table


def claim(run: RunFiles) -> str:
    """What the held-out evaluations allow to say, in one sentence."""
    if len(run.evaluations) < 2:
        reward = next((change for change in run.changes() if change.label == "training reward"), None)
        return f"Mean training reward: {reward.before} at the start, {reward.after} at the end." if reward else "A run."
    first, last = run.evaluations[0], run.evaluations[-1]
    numbers = f"from {show(first.success_mean)} to {show(last.success_mean)} in {last.step - first.step} steps"
    if last.success_low > first.success_high:
        return f"The policy learns: success on held-out prompts rose {numbers}."
    if last.success_high < first.success_low:
        return f"Success on held-out prompts fell {numbers}."
    return f"No clear change: success on held-out prompts went {numbers}, and the two intervals overlap."


def curve(run: RunFiles, name: str, size: tuple[float, float] = (380, 210)) -> Chart | None:
    """One metric of training over the steps; None where it was not recorded."""
    metric = METRICS[name]
    return _chart(metric, metric.title, Line(label=metric.title, points=run.series(name)), size)


def heldout_curve(run: RunFiles, what: str, title: str = "", size: tuple[float, float] = (380, 210)) -> Chart | None:
    """A result of evaluations with its interval; ``what`` is ``success``, or ``DATA SET/success``."""
    metric = metric_of(f"evaluation/{what}_mean")
    assert metric is not None, what
    mean, low, high = (dict(run.series(f"evaluation/{what}_{end}", "evaluation")) for end in ("mean", "low", "high"))
    band = [(step, low[step], high[step]) for step in sorted(mean)]
    line = Line(label=title or metric.title, points=sorted(mean.items()), colour="c2", band=band, dots=True)
    return _chart(metric, title or metric.title, line, size)


def heldout_parts(run: RunFiles) -> list[Chart]:
    """What lies behind held-out success: each of several data sets, and pass@n and maj@n of all."""
    if len(run.evaluations) < 2:
        return []
    charts = [heldout_curve(run, f"{name}/success", name) for name in run.data_sets]
    if run.evaluations[-1].samples_per_prompt > 1:
        charts += [heldout_curve(run, what) for what in ("pass_at_n", "maj_at_n")]
    return [chart for chart in charts if chart is not None]


def _chart(metric: Metric, title: str, line: Line, size: tuple[float, float]) -> Chart | None:
    if not any(math.isfinite(value) for _, value in line.points):
        return None
    svg = line_chart(
        [line],
        label=f"{title} over the steps",
        x_label="step",
        show=partial(show, unit=metric.unit),
        zero=True,
        size=size,
        percent=metric.unit == "fraction",
    )
    unit = f", {metric.unit}" if metric.unit not in ("", "fraction") else ""
    if title == metric.title:  # and not the name of a data set, which stays as it is
        title = f"{title[0].upper()}{title[1:]}"
    return Chart(title=f"{title}{unit}", caption=metric.meaning, svg=svg)


def histogram(run: RunFiles) -> Chart | None:
    """Probabilities of the sampled tokens at the first and the last recorded step."""
    if not run.rollouts:
        return None
    ends = [run.rollouts[0], run.rollouts[-1]] if len(run.rollouts) > 1 else run.rollouts
    lines = []
    for (step, file), colour in zip(ends, ("c3", "c1"), strict=False):
        probabilities = np.exp(flat_column(read_rollouts(file), "rollout_logprobs"))
        counts, _ = np.histogram(probabilities.clip(0, 1), bins=NUM_BINS, range=(0, 1))
        lines.append((f"step {step}", colour, (counts / max(1, counts.sum())).tolist()))
    svg = outlines(
        lines,
        label="share of sampled tokens by probability",
        x_label="probability of the sampled token, exp(rollout_logprob)",
        mark=threshold(run),
    )
    return Chart(
        title="Probability of sampled tokens",
        caption="Share of the step's tokens, on a logarithmic axis",
        svg=svg,
        legend=tuple((colour, title) for title, colour, _ in lines),
    )


def threshold(run: RunFiles) -> float | None:
    """The p of a low-probability segmenter, where the configuration says so."""
    node = yaml.safe_load(run.config_text or "")
    for key in ("algorithm", "segmenter"):
        node = node.get(key) if isinstance(node, dict) else None
    if not isinstance(node, dict) or node.get("name") != "low_probability":
        return None
    return float(node["p"]) if "p" in node else None


def recorded_responses(run: RunFiles, decode: Callable[[list[int]], list[str]]) -> list[Response]:
    return pick_responses(read_rollouts(run.rollouts[-1][1]), decode) if run.rollouts else []


def phase_times(run: RunFiles) -> list[PhaseTime]:
    """Mean seconds of each phase per step."""
    steps = run.series("time/step_s")
    total = run.seconds or math.nan
    times = []
    for i, name in enumerate(PHASES):
        seconds = float(np.nansum([value for _, value in run.series(name)]))
        if seconds > 0:
            metric = METRICS[name]
            times.append(
                PhaseTime(
                    title=metric.title,
                    meaning=metric.meaning,
                    colour=f"p{i}",
                    seconds=seconds / len(steps),
                    share=seconds / total,
                )
            )
    return times


def time_chart(run: RunFiles) -> Markup | None:
    """Seconds per step by phase; long runs are averaged into at most ``MAX_COLUMNS`` columns."""
    steps = [step for step, _ in run.series("time/step_s")]
    used = [(i, name) for i, name in enumerate(PHASES) if run.series(name)]
    if not steps or not used:
        return None
    by_phase = [dict(run.series(name)) for _, name in used]
    columns = []
    for group in np.array_split(np.array(steps), min(len(steps), MAX_COLUMNS)):
        title = f"step {group[0]}" if len(group) == 1 else f"steps {group[0]} to {group[-1]}"
        columns.append(
            (title, [float(np.nansum([seconds.get(int(s), 0.0) for s in group])) / len(group) for seconds in by_phase])
        )
    return stacked_bars(
        columns,
        [(METRICS[name].title, f"p{i}") for i, name in used],
        x=(steps[0] - 0.5, steps[-1] + 0.5),
        label="seconds per step by phase",
        x_label="step",
        unit="s",
    )


def duration(seconds: float) -> str:
    minutes = seconds / 60
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 120 else f"{minutes / 60:.1f} h"
