"""The comparison of arms: every number, the sentences about them, and the choices behind them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Literal

import numpy as np

from sae_rl.comparison.curves import DIAGNOSTICS, Floats
from sae_rl.comparison.outcomes import DURATIONS, OUTCOMES, SCORES, Arm, halfway
from sae_rl.comparison.resampling import (
    MIN_SEEDS,
    NUM_RESAMPLES,
    Estimates,
    Resampled,
    estimates,
    iqm,
    mean,
    nan_mean,
    probability_of_improvement,
    profile,
    prompt_weights,
    resample,
)
from sae_rl.comparison.runs import Unread
from sae_rl.comparison.selection import Selection
from sae_rl.evaluation.statistics import Estimate
from sae_rl.evaluation.student import holm
from sae_rl.names import nearest
from sae_rl.records.metrics import PHASES, show

Verdict = Literal["better", "worse", "no difference shown", "no interval"]
ALPHA = 0.05
NUM_THRESHOLDS = 101  # thresholds in a performance profile


@dataclass(frozen=True, slots=True, kw_only=True)
class Choices:
    """What the user chooses."""

    baseline: str = ""  # an arm; empty: the first one
    outcome: str = "final"  # a key of `OUTCOMES`: the sentences are about it
    threshold: float | None = None  # a score; None: see `halfway`
    last_fraction: float = 0.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """A mean over runs, by step, and its 95 % interval; NaN where there is none."""

    value: list[float]
    low: list[float]
    high: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmResult:
    """The numbers of one arm."""

    name: str
    seeds: list[str]
    sources: list[str]
    failed: list[str]  # incomplete runs, with the reason
    num_diverged: int
    outcomes: dict[str, Estimate]  # mean over runs, of `OUTCOMES`; durations restricted to the shortest run's end
    iqm: dict[str, Estimate]  # interquartile mean, of `SCORES`
    final_std: float  # over seeds
    num_reached: int  # runs that reached the threshold
    num_cut: dict[str, int]  # runs that count with the shortest run's end, of `DURATIONS`
    runs: dict[str, list[float]]  # `OUTCOMES` of each run
    curve: Band  # by evaluation
    tokens: list[float]  # mean tokens sampled until each evaluation
    profile: Band  # fraction of runs with a final score above each threshold of the profile
    diagnostics: dict[str, Estimate]  # mean over steps
    diagnostic_curves: dict[str, Band]  # by training step
    seconds: dict[str, float]  # mean of a step, by phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """An arm's mean minus the baseline's."""

    value: float
    low: float
    high: float
    p: float
    holm_p: float  # adjusted for the number of arms


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """An arm beside the baseline."""

    arm: str
    num_pairs: int  # pairs of runs with the same seed; 0: the arms are independent samples
    without_partner: list[str]  # seeds that a paired difference leaves out
    outcomes: dict[str, Change]
    improvement: Estimate  # probability that a run of the arm has a higher final score than one of the baseline
    verdict: Verdict
    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Everything that the pages and tables show."""

    measure: str
    task: str
    held_out: str
    num_prompts: int  # whose scores are resampled; 0: intervals are over seeds alone
    num_steps: int
    steps: list[int]  # steps done at each evaluation
    baseline: str
    outcome: str
    threshold: float
    is_threshold_chosen: bool
    last_fraction: float
    profile_thresholds: list[float]
    num_resamples: int
    arms: list[ArmResult]
    differences: list[Difference]
    arms_without_runs: dict[str, list[str]]  # arms none of whose runs is complete
    left_out: list[Unread]
    notes: list[str]


def compare(selection: Selection, notes: Sequence[str], choices: Choices) -> Comparison:
    """Compares every arm with the baseline. Raises ValueError if no arm has the baseline's name."""
    arms = selection.arms
    names = [arm.name for arm in arms]
    if choices.baseline and choices.baseline not in names:
        failed = " (all its runs are incomplete)" if choices.baseline in selection.failed else ""
        listed = ", ".join(map(repr, names))
        hint = nearest(choices.baseline, names)
        raise ValueError(f"--baseline {choices.baseline!r}: no such arm{failed}, {hint}; the arms are {listed}")
    baseline = arms[names.index(choices.baseline)] if choices.baseline else arms[0]
    first = baseline.runs[0]
    strata = [*first.prompts.values()] if baseline.has_scores else []
    weights = prompt_weights(strata, np.random.default_rng(1)) if strata else None
    threshold = halfway(arms) if choices.threshold is None else choices.threshold
    horizon = np.min([arm.durations(threshold)[1].min(axis=0) for arm in arms], axis=0)
    finals = np.concatenate([arm.curves[:, -1] for arm in arms])
    thresholds = np.linspace(min(0.0, finals.min()), max(1.0, finals.max()), NUM_THRESHOLDS)
    samples = {arm.name: _Samples.of(arm, threshold, horizon, weights) for arm in arms}
    return Comparison(
        measure=selection.measure,
        task=first.task,
        held_out=first.held_out,
        num_prompts=sum(strata),
        num_steps=first.steps,
        steps=list(baseline.steps),
        baseline=baseline.name,
        outcome=choices.outcome,
        threshold=threshold,
        is_threshold_chosen=choices.threshold is not None,
        last_fraction=choices.last_fraction,
        profile_thresholds=thresholds.tolist(),
        num_resamples=NUM_RESAMPLES,
        arms=[_arm_result(arm, samples[arm.name], selection, thresholds) for arm in arms],
        differences=_differences(baseline, [a for a in arms if a is not baseline], samples, choices.outcome),
        arms_without_runs={n: _failures(selection, n) for n in selection.failed if n not in names},
        left_out=selection.left_out,
        notes=[*selection.notes, *notes],
    )


@dataclass(frozen=True, slots=True)
class _Samples:
    """The quantities of an arm's runs, and their resamples."""

    linear: Floats  # (A, E + 3), or (A, E + 3, P)
    others: Floats  # (A, 3) drawdown, steps and tokens to the threshold
    reached: int
    num_cut: list[int]  # (2,) runs whose steps, and whose tokens, are cut to those of the shortest run
    weights: Floats | None

    @classmethod
    def of(cls, arm: Arm, threshold: float, horizon: Floats, weights: Floats | None) -> _Samples:
        durations, _ = arm.durations(threshold)
        reached = int(np.isfinite(durations[:, 0]).sum())
        others = np.column_stack([arm.drawdowns, np.minimum(durations, horizon)])
        return cls(arm.linear, others, reached, (durations > horizon).sum(0).tolist(), weights)

    def parts(self) -> tuple[Resampled, Resampled]:
        rng = np.random.default_rng(0)
        return resample(self.linear, mean, rng, self.weights), resample(self.others, mean, rng)

    def pairs(self, other: _Samples, places: Sequence[tuple[int, int]]) -> _Samples:
        """The differences of paired runs."""
        ours, theirs = (list(side) for side in zip(*places, strict=True))
        linear, others = self.linear[ours] - other.linear[theirs], self.others[ours] - other.others[theirs]
        return _Samples(linear, others, 0, [], self.weights)


def _failures(selection: Selection, arm: str) -> list[str]:
    return [f"{run.source}: {run.problem}" for run in selection.failed[arm]]


def _listed(found: Estimates) -> list[Estimate]:
    return [
        Estimate(*numbers)
        for numbers in zip(found.value.tolist(), found.low.tolist(), found.high.tolist(), strict=True)
    ]


def _clipped(estimate: Estimate, most: float) -> Estimate:
    """With an interval inside what is possible: a mean of scores from 0 to 1 is from 0 to 1."""
    low, high = np.clip([estimate.low, estimate.high], 0.0, most).tolist()
    return Estimate(estimate.value, low, high)


def _band(found: Sequence[Estimate]) -> Band:
    return Band(value=[e.value for e in found], low=[e.low for e in found], high=[e.high for e in found])


def _arm_result(arm: Arm, samples: _Samples, selection: Selection, thresholds: Floats) -> ArmResult:
    num_steps, is_fraction = len(arm.steps), arm.curves.min() >= 0 and arm.curves.max() <= 1
    linear, others = (_listed(estimates(part)) for part in samples.parts())
    linear = [_clipped(each, 1.0) for each in linear] if is_fraction else linear
    others[0] = _clipped(others[0], math.inf)  # a drawdown
    middle = _listed(estimates(resample(arm.linear[:, num_steps:], iqm, np.random.default_rng(0), samples.weights)))
    middle = [_clipped(each, 1.0) for each in middle] if is_fraction else middle
    runs = arm.linear if samples.weights is None else arm.linear.mean(-1)
    by_run = np.column_stack([runs[:, num_steps:], samples.others])
    metrics = {name: by_step for name in DIAGNOSTICS if not np.isnan(by_step := _by_step(arm, name)).all()}
    curves = {name: _over_seeds(values) for name, values in metrics.items()}
    means = {name: _over_seeds(nan_mean(values, 1)[:, None])[0] for name, values in metrics.items()}
    phases = {name: by_step for name in (*PHASES, "time/step_s") if not np.isnan(by_step := _by_step(arm, name)).all()}
    final = arm.curves[:, -1]
    failed = selection.failed[arm.name]
    return ArmResult(
        name=arm.name,
        seeds=arm.seeds,
        sources=[str(run.source) for run in arm.runs],
        failed=_failures(selection, arm.name),
        num_diverged=arm.diverged + sum(run.update_failed for run in failed),
        outcomes=dict(zip(OUTCOMES, [*linear[num_steps:], *others], strict=True)),
        iqm=dict(zip(SCORES, middle, strict=True)),
        final_std=float(final.std(ddof=1)) if len(final) > 1 else math.nan,
        num_reached=samples.reached,
        num_cut=dict(zip(DURATIONS, samples.num_cut, strict=True)),
        runs=dict(zip(OUTCOMES, by_run.T.tolist(), strict=True)),
        curve=_band(linear[:num_steps]),
        tokens=arm.tokens.mean(0).tolist(),
        profile=Band(
            **dict(zip(("value", "low", "high"), (p.tolist() for p in profile(final, thresholds)), strict=True))
        ),
        diagnostics=means,
        diagnostic_curves={name: _band(found) for name, found in curves.items()},
        # Most steps have no evaluation and no checkpoint.
        seconds={name: float(np.nan_to_num(values).mean()) for name, values in phases.items()},
    )


def _by_step(arm: Arm, name: str) -> Floats:
    """(A, S) a metric of training; NaN where it was not recorded."""
    series = [(run.training.get(name, {}), run.steps) for run in arm.runs]
    return np.array([[by_step.get(step, math.nan) for step in range(steps)] for by_step, steps in series])


def _over_seeds(values: Floats) -> list[Estimate]:
    """The mean over runs of (A, K) values."""
    return _listed(estimates(resample(values, mean, np.random.default_rng(0))))


def _differences(baseline: Arm, arms: Sequence[Arm], samples: Mapping[str, _Samples], outcome: str) -> list[Difference]:
    theirs, start = samples[baseline.name], len(baseline.steps)
    found: list[tuple[Arm, list[tuple[int, int]], list[Estimates]]] = []
    for arm in arms:
        ours = samples[arm.name]
        places = [(i, baseline.seeds.index(seed)) for i, seed in enumerate(arm.seeds) if seed in baseline.seeds]
        if len(places) >= MIN_SEEDS:
            changes = [estimates(part) for part in ours.pairs(theirs, places).parts()]
        else:
            places = []
            changes = [estimates(*both) for both in zip(ours.parts(), theirs.parts(), strict=True)]
        found.append((arm, places, changes))
    both = [np.concatenate([np.stack(astuple(c[0]))[:, start:], np.stack(astuple(c[1]))], axis=1) for _, _, c in found]
    values, lows, highs, ps = np.stack(both, axis=1) if both else np.zeros((4, 0, len(OUTCOMES)))  # (arms, outcomes)
    adjusted = np.column_stack([holm(column) for column in ps.T]) if arms else ps
    result = []
    for row, (arm, places, _) in enumerate(found):
        numbers = [*zip(*(a[row].tolist() for a in (values, lows, highs, ps, adjusted)), strict=True)]
        changes_by_name = {
            name: Change(value=v, low=lo, high=hi, p=p, holm_p=q)
            for name, (v, lo, hi, p, q) in zip(OUTCOMES, numbers, strict=True)
        }
        result.append(_difference(arm, baseline, places, changes_by_name, outcome, len(arms)))
    return result


def _difference(
    arm: Arm, baseline: Arm, places: Sequence[tuple[int, int]], changes: dict[str, Change], outcome: str, num_arms: int
) -> Difference:
    alone = [s for s in arm.seeds if s not in baseline.seeds] + [s for s in baseline.seeds if s not in arm.seeds]
    num_seeds = min(len(arm.runs), len(baseline.runs))
    verdict = verdict_of(outcome, changes[outcome], num_seeds)
    return Difference(
        arm=arm.name,
        num_pairs=len(places),
        without_partner=alone if places else [],
        outcomes=changes,
        improvement=Estimate(*probability_of_improvement(arm.curves[:, -1], baseline.curves[:, -1])),
        verdict=verdict,
        sentence=sentence(arm, baseline, len(places), changes[outcome], outcome, verdict, num_arms),
    )


def verdict_of(outcome: str, change: Change, num_seeds: int) -> Verdict:
    """Whether an arm is better than the baseline, by the p value after Holm's correction."""
    if num_seeds < MIN_SEEDS or (math.isnan(change.p) and change.value != 0):
        return "no interval"
    if not change.holm_p < ALPHA:  # NaN: all runs agree
        return "no difference shown"
    lower_is_better = outcome in (*DURATIONS, "drawdown")
    return "better" if (change.value < 0) == lower_is_better else "worse"


def signed(value: float) -> str:
    """A difference with its sign."""
    return f"{'+' if value > 0 else ''}{show(value)}"


def p_text(p: float) -> str:
    """``p = 0.021``, or ``p < 0.001``."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def sentence(
    arm: Arm, baseline: Arm, num_pairs: int, change: Change, outcome: str, verdict: Verdict, num_arms: int
) -> str:
    """The verdict in words, with the numbers that it rests on."""
    difference = f"{OUTCOMES[outcome]}, difference {signed(change.value)}"
    ours, theirs = len(arm.runs), len(baseline.runs)
    if verdict == "no interval":
        sizes = [(len(each.runs), each.name) for each in (arm, baseline)]
        counts = " and ".join(f"{n} complete run{'s' * (n != 1)} of {name}" for n, name in sizes)
        why = f"there are {counts}; {MIN_SEEDS} of each are needed"
        if min(ours, theirs) >= MIN_SEEDS:
            why = "not every run has that number" if math.isnan(change.value) else "all runs differ by the same"
        return f"{arm.name} and {baseline.name}: no interval, since {why} ({difference})."
    if math.isnan(change.low):
        return f"{arm.name} and {baseline.name}: no difference shown; {difference} without any spread over the runs."
    how = f"paired over {num_pairs} seeds" if num_pairs else f"{ours} and {theirs} runs, not paired"
    several = f", {p_text(change.holm_p)} after Holm's correction for {num_arms} arms" if num_arms > 1 else ""
    p = f"{p_text(change.p)}{several}"
    numbers = f"95 % interval [{signed(change.low)}, {signed(change.high)}]; {how}; {p}"
    if verdict == "no difference shown":
        alone = "; the interval, by itself, excludes 0" if change.low > 0 or change.high < 0 else ""
        return f"{arm.name} and {baseline.name}: no difference shown; {difference}, {numbers}{alone}."
    return f"{arm.name} is {verdict} than {baseline.name}: {difference}, {numbers}."
