"""Intervals cover at their nominal rate, and equal closed forms where there are any."""

from __future__ import annotations

import itertools
import math
from statistics import NormalDist

import numpy as np
import pytest

from sae_rl.comparison.resampling import (
    NUM_RESAMPLES,
    Estimates,
    estimates,
    iqm,
    mean,
    probability_of_improvement,
    profile,
    prompt_weights,
    resample,
)
from sae_rl.evaluation.student import Floats, holm, quantile, within

REPEATED = 500  # simulated experiments, side by side as quantities


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def nominal(covered: Floats, rate: float = 0.95, slack: float = 0.0) -> bool:
    """Within four standard errors of the rate; ``slack`` more above it."""
    error = 4 * math.sqrt(rate * (1 - rate) / len(covered))
    return rate - error <= float(np.mean(covered)) <= rate + error + slack


def covers(found: Estimates, truth: float) -> Floats:
    return np.asarray((found.low < truth) & (truth < found.high), dtype=float)


# Student's t


def test_t_has_its_closed_forms_and_its_table() -> None:
    t = np.array([0.0, 0.3, 1.0, 4.0, 30.0])
    assert within(t, np.full(5, 1.0)) == pytest.approx(2 / math.pi * np.arctan(t), abs=1e-12)
    assert within(t, np.full(5, 2.0)) == pytest.approx(t / np.sqrt(2 + t**2), abs=1e-12)
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 30: 2.042, 120: 1.980}
    assert quantile(0.95, np.array([*table], dtype=float)) == pytest.approx([*table.values()], abs=6e-4)
    normal = NormalDist()
    large = within(np.array([0.5, 1.96, 3.0]), np.full(3, 1e6))
    assert large == pytest.approx([2 * normal.cdf(x) - 1 for x in (0.5, 1.96, 3.0)], abs=1e-5)


def test_holm_as_in_the_textbook() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    adjusted = holm([0.03, math.nan, 0.04])
    assert adjusted[[0, 2]] == pytest.approx([0.06, 0.06]) and math.isnan(adjusted[1])
    assert holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])


# statistics


@pytest.mark.parametrize("n", range(1, 14))
def test_the_iqm_cuts_a_quarter_of_the_runs_at_either_end(n: int) -> None:
    values = rng(n).normal(size=(n, 3))
    for k in range(3):
        kept = sorted(values[:, k].tolist())[int(0.25 * n) : n - int(0.25 * n)]  # scipy.stats.trim_mean(values, 0.25)
        assert iqm(values)[k] == pytest.approx(sum(kept) / len(kept))


@pytest.mark.parametrize("statistic", [mean, iqm])
def test_resamples_of_seeds_have_the_distribution_of_all_resamples(statistic: object) -> None:
    values = np.array([0.1, 0.15, 0.4, 0.7, 0.9])[:, None]
    every = [
        iqm(values[list(c)])[0] if statistic is iqm else values[list(c)].mean()
        for c in itertools.product(range(5), repeat=5)
    ]
    found = resample(values, iqm if statistic is iqm else mean, rng()).seeds[:, 0]
    assert len(found) == NUM_RESAMPLES
    assert found.mean() == pytest.approx(np.mean(every), abs=0.015)
    assert found.std() == pytest.approx(np.std(every), rel=0.08)
    assert np.quantile(found, [0.05, 0.5, 0.95]) == pytest.approx(np.quantile(every, [0.05, 0.5, 0.95]), abs=0.03)


def test_every_data_set_keeps_its_size_in_every_resample() -> None:
    weights = prompt_weights([3, 5], rng())
    assert weights.shape == (NUM_RESAMPLES, 8)
    assert weights[:, :3].sum(1) == pytest.approx(3 / 8) and weights[:, 3:].sum(1) == pytest.approx(5 / 8)
    counts = weights * 8
    assert counts == pytest.approx(counts.round()) and counts[:, 0].mean() == pytest.approx(1, abs=0.08)


def test_over_seeds_alone_they_are_the_intervals_of_student_and_welch() -> None:
    ours, theirs = rng(1).normal(0.5, 0.1, (5, 40)), rng(2).normal(0.4, 0.3, (8, 40))
    found = estimates(resample(ours, mean, rng()))
    half = 2.776445 * ours.std(axis=0, ddof=1) / math.sqrt(5)
    assert found.value == pytest.approx(ours.mean(0)) and found.high - found.value == pytest.approx(half, rel=0.08)
    assert found.value - found.low == pytest.approx(half, rel=0.08)
    a, b = ours.var(axis=0, ddof=1) / 5, theirs.var(axis=0, ddof=1) / 8
    df = (a + b) ** 2 / (a**2 / 4 + b**2 / 7)
    t = (ours.mean(0) - theirs.mean(0)) / np.sqrt(a + b)
    difference = estimates(resample(ours, mean, rng()), resample(theirs, mean, rng()))
    assert difference.high - difference.value == pytest.approx(quantile(0.95, df) * np.sqrt(a + b), rel=0.08)
    assert difference.p == pytest.approx(1 - within(np.abs(t), df), abs=0.03)


def test_over_seeds_and_prompts_the_variance_is_that_of_the_crossed_design() -> None:
    seeds, prompts = 6, 40
    values = (
        rng(3).normal(0, 1, (seeds, 20, 1))
        + rng(4).normal(0, 2, (1, 20, prompts))
        + rng(5).normal(0, 6, (seeds, 20, prompts))
    )
    found = estimates(resample(values, mean, rng(), prompt_weights([prompts], rng(1))))
    of_seeds = values.mean(2).var(axis=0, ddof=1) / seeds
    of_prompts = values.mean(0).var(axis=1, ddof=1) / prompts
    rest = values - values.mean(2, keepdims=True) - values.mean(0, keepdims=True) + values.mean((0, 2), keepdims=True)
    both = (rest**2).sum((0, 2)) / ((seeds - 1) * (prompts - 1) * seeds * prompts)
    variance = np.maximum(of_seeds + of_prompts - both, np.maximum(of_seeds, of_prompts))
    df = variance**2 / (of_seeds**2 / 5 + of_prompts**2 / 39 + both**2 / 195)
    half = quantile(0.95, np.maximum(df, 5)) * np.sqrt(variance)
    assert found.high - found.value == pytest.approx(half, rel=0.15)
    assert np.mean((found.high - found.value) / half) == pytest.approx(1, abs=0.04)


# coverage


@pytest.mark.parametrize("num_seeds", [3, 5, 10])
@pytest.mark.parametrize("statistic", [mean, iqm])
def test_intervals_over_seeds_cover(num_seeds: int, statistic: object) -> None:
    values = rng(num_seeds).normal(0.6, 0.05, (num_seeds, REPEATED))
    found = estimates(resample(values, mean if statistic is mean else iqm, rng()))
    assert nominal(covers(found, 0.6), slack=0.02 if statistic is iqm else 0.0)


@pytest.mark.parametrize(("ours", "theirs", "difference"), [(5, 5, 0.1), (4, 8, -0.05), (10, 6, 0.0)])
def test_intervals_of_unpaired_differences_cover(ours: int, theirs: int, difference: float) -> None:
    one = rng(ours).normal(0.5 + difference, 0.03, (ours, REPEATED))
    other = rng(theirs + 100).normal(0.5, 0.06, (theirs, REPEATED))
    found = estimates(resample(one, mean, rng()), resample(other, mean, rng()))
    assert nominal(covers(found, difference), slack=0.02)


@pytest.mark.parametrize("difference", [0.0, 0.08])
def test_intervals_of_paired_differences_cover_and_are_shorter(difference: float) -> None:
    shared = rng(1).normal(0.5, 0.1, (5, REPEATED))  # what a seed does to both arms
    one = shared + difference + rng(2).normal(0, 0.02, (5, REPEATED))
    other = shared + rng(3).normal(0, 0.02, (5, REPEATED))
    paired = estimates(resample(one - other, mean, rng()))
    alone = estimates(resample(one, mean, rng()), resample(other, mean, rng()))
    assert nominal(covers(paired, difference))
    assert np.mean(paired.high - paired.low) < 0.5 * np.mean(alone.high - alone.low)


@pytest.mark.parametrize("spreads", [(0.05, 0.3, 0.3), (0.06, 0.1, 0.2), (0.0, 0.3, 0.2)], ids=str)
def test_intervals_over_seeds_and_prompts_cover(spreads: tuple[float, float, float]) -> None:
    of_seeds, of_prompts, rest = spreads
    num_seeds, num_prompts, repeated = 5, 32, 200
    values = (
        0.5
        + rng(1).normal(0, of_seeds, (num_seeds, repeated, 1))
        + rng(2).normal(0, of_prompts, (1, repeated, num_prompts))
    )
    values = values + rng(3).normal(0, rest, (num_seeds, repeated, num_prompts))
    weights = prompt_weights([num_prompts], rng())
    assert nominal(covers(estimates(resample(values, mean, rng(), weights)), 0.5), slack=0.03)
    if of_prompts > 0.2:
        without_prompts = estimates(resample(values.mean(2), mean, rng()))
        assert covers(without_prompts, 0.5).mean() < 0.93, "prompts are a part of the uncertainty"


def test_no_difference_is_shown_at_the_nominal_rate() -> None:
    """Of five arms that do not differ from the baseline, one is found better or worse in at most 5 % of experiments."""
    baseline, arms = rng(1).normal(0.5, 0.05, (5, REPEATED)), rng(2).normal(0.5, 0.05, (5, 5, REPEATED))
    p = np.stack([estimates(resample(arm, mean, rng()), resample(baseline, mean, rng())).p for arm in arms])
    assert nominal(p[0] >= 0.05, slack=0.01)
    false_findings = np.mean([(holm(p[:, k]) < 0.05).any() for k in range(REPEATED)])
    assert false_findings <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / REPEATED)
    assert np.mean((p < 0.05).any(axis=0)) > 0.09, "without the correction there are more"


def test_a_large_difference_is_found() -> None:
    better, baseline = rng(1).normal(0.7, 0.05, (5, REPEATED)), rng(2).normal(0.5, 0.05, (5, REPEATED))
    found = estimates(resample(better, mean, rng()), resample(baseline, mean, rng()))
    assert np.mean(found.p < 0.05) > 0.95 and np.mean(found.low > 0) > 0.95


@pytest.mark.parametrize("num_seeds", [1, 2])
def test_one_or_two_seeds_have_no_interval(num_seeds: int) -> None:
    few, many = rng().normal(size=(num_seeds, 4)), rng().normal(size=(6, 4))
    for found in (
        estimates(resample(few, mean, rng())),
        estimates(resample(many, mean, rng()), resample(few, mean, rng())),
    ):
        assert np.isfinite(found.value).all() and np.isnan([found.low, found.high, found.p]).all()


def test_runs_without_any_spread_have_no_interval() -> None:
    found = estimates(resample(np.full((5, 1), 0.7), mean, rng()))
    assert found.value == 0.7 and np.isnan([found.low, found.high, found.p]).all()


# probability of improvement and profiles


def test_probability_of_improvement_is_mann_and_whitneys_u() -> None:
    ours, theirs = rng(1).integers(0, 6, 7).astype(float), rng(2).integers(0, 6, 9).astype(float)
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in ours for b in theirs]
    everything = np.concatenate([ours, theirs])
    ranks = np.array([(everything < x).sum() + ((everything == x).sum() + 1) / 2 for x in everything])
    u = ranks[:7].sum() - 7 * 8 / 2
    found, low, high = probability_of_improvement(ours, theirs)
    assert found == pytest.approx(sum(pairs) / len(pairs)) == pytest.approx(u / 63)
    assert low < found < high
    backwards = probability_of_improvement(theirs, ours)
    assert backwards == pytest.approx((1 - found, 1 - high, 1 - low), abs=1e-4)


@pytest.mark.parametrize(("num_runs", "shift"), [(5, 0.0), (5, 1.0), (10, 0.5), (4, 2.5)])
def test_intervals_of_the_probability_of_improvement_cover(num_runs: int, shift: float) -> None:
    truth = NormalDist().cdf(shift / math.sqrt(2))
    ours, theirs = rng(1).normal(shift, 1, (REPEATED, num_runs)), rng(2).normal(0, 1, (REPEATED, num_runs))
    found = [probability_of_improvement(a, b) for a, b in zip(ours, theirs, strict=True)]
    assert nominal(np.array([low <= truth <= high for _, low, high in found], dtype=float), slack=0.03)


def test_it_stays_unsure_where_every_run_beats_every_other() -> None:
    found, low, high = probability_of_improvement(np.array([4.0, 5.0, 6.0]), np.array([1.0, 2.0, 3.0]))
    assert found == high == 1.0 and 0.3 < low < 0.8
    assert np.isnan(probability_of_improvement(np.array([1.0, 2.0]), np.array([0.0] * 5))[1:]).all()


def test_a_profile_counts_runs_above_and_its_interval_covers() -> None:
    scores, thresholds = np.array([0.2, 0.5, 0.5, 0.9]), np.array([0.0, 0.2, 0.4, 0.5, 0.95])
    found, low, high = profile(scores, thresholds)
    assert found.tolist() == [1.0, 0.75, 0.75, 0.25, 0.0]
    assert ((low <= found) & (found <= high)).all() and high[-1] > 0.3 and low[0] < 0.7
    for n in (3, 5, 10):
        ends = [profile(np.array([1.0] * k + [0.0] * (n - k)), np.array([0.5])) for k in range(n + 1)]
        coverage = [
            sum(
                math.comb(n, k) * p**k * (1 - p) ** (n - k) for k, (_, lo, hi) in enumerate(ends) if lo[0] <= p <= hi[0]
            )
            for p in np.linspace(0.02, 0.98, 97)
        ]
        assert np.mean(coverage) > 0.93
    assert np.isnan(profile(np.array([0.2, 0.3]), thresholds)[1:]).all()
