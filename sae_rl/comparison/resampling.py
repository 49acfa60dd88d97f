"""Intervals over seeds and prompts by the stratified bootstrap, and the statistics of rliable (arXiv 2108.13264).

A   seeds of an arm
K   quantities of a run
P   held-out prompts
R   resamples
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sae_rl.evaluation.student import Floats, quantile, within

NUM_RESAMPLES = 2000
LEVEL = 0.95
MIN_SEEDS = 3  # with fewer there is no interval over seeds
NORMAL = 1.959963984540054

Statistic = Callable[[Floats], Floats]  # (..., A, K) -> (..., K)


def mean(values: Floats) -> Floats:
    """(..., A, K) -> (..., K)"""
    return np.asarray(values.mean(-2))


def iqm(values: Floats) -> Floats:
    """(..., A, K) -> (..., K) the interquartile mean: a quarter of the values, rounded down, is cut off at either end."""
    n = values.shape[-2]
    cut = n // 4
    return np.asarray(np.sort(values, axis=-2)[..., cut : n - cut, :].mean(-2))


def prompt_weights(strata: Sequence[int], rng: np.random.Generator) -> Floats:
    """(R, P) weights of resampled prompts; each data set of ``strata`` prompts keeps its size."""
    total = sum(strata)
    drawn = [rng.multinomial(size, np.full(size, 1 / size), size=NUM_RESAMPLES) for size in strata]
    return np.concatenate(drawn, axis=1) / total


@dataclass(frozen=True, slots=True)
class Resampled:
    """A statistic of one arm, and its values on resamples of seeds, of prompts, and of both."""

    value: Floats  # (K,)
    num_seeds: int
    num_prompts: int  # 0: only the means of runs are known
    seeds: Floats  # (R, K)
    prompts: Floats  # (R, K)
    both: Floats  # (R, K)


def resample(
    values: Floats, statistic: Statistic, rng: np.random.Generator, weights: Floats | None = None
) -> Resampled:
    """Resamples an arm.

    Args:
        values: (A, K), or (A, K, P) with ``weights``, in which case a run's quantity is the mean over prompts.
        weights: (R, P) of `prompt_weights`; the same for all arms, since they answer the same prompts.
    """
    num_seeds = len(values)
    runs = values if weights is None else values.mean(-1)
    drawn = rng.integers(0, num_seeds, size=(NUM_RESAMPLES, num_seeds))
    value, seeds = statistic(runs), statistic(runs[drawn])
    if weights is None:
        return Resampled(value, num_seeds, 0, seeds, np.broadcast_to(value, seeds.shape), seeds)
    reweighted = np.moveaxis(values @ weights.T, -1, 0)  # (R, A, K)
    both = statistic(np.take_along_axis(reweighted, drawn[..., None], axis=1))
    return Resampled(value, num_seeds, values.shape[-1], seeds, statistic(reweighted), both)


@dataclass(frozen=True, slots=True)
class Estimates:
    """(K,) values with their 95 % intervals and two-sided p values of being 0; NaN where there is no interval."""

    value: Floats
    low: Floats
    high: Floats
    p: Floats


def estimates(arm: Resampled, minus: Resampled | None = None) -> Estimates:
    """The statistic of an arm, or its difference to an independent arm, with Student's interval.

    Seeds and prompts are crossed, so the variance is that of seeds, plus that of prompts, minus that of their interaction,
    which both contain (an analysis of variance with random effects; resampling both at once counts it three times, Owen,
    The pigeonhole bootstrap, 2007). Each part is the variance over resamples times n / (n - 1), which the bootstrap
    lacks. Degrees of freedom are Satterthwaite's. For the mean over seeds alone this is Student's interval and, for a
    difference, Welch's.

    Fewer than `MIN_SEEDS` seeds, or no spread at all, have no interval.
    """
    arms = [arm] if minus is None else [arm, minus]
    value = arm.value if minus is None else arm.value - minus.value
    prompts = arm.prompts if minus is None else arm.prompts - minus.prompts
    if min(each.num_seeds for each in arms) < MIN_SEEDS:
        nothing = np.full_like(value, np.nan)
        return Estimates(value, nothing, nothing, nothing)
    num_prompts = arm.num_prompts
    of_prompts = num_prompts / (num_prompts - 1) if num_prompts > 1 else 1.0
    parts: list[tuple[Floats, float]] = [(of_prompts * prompts.var(0), max(num_prompts - 1, 1))]
    shared = []
    for each in arms:
        of_seeds, freedom = each.num_seeds / (each.num_seeds - 1), each.num_seeds - 1
        parts.append((of_seeds * each.seeds.var(0), freedom))
        interaction = (
            each.both.var(0) - each.seeds.var(0) - each.prompts.var(0) if num_prompts else np.zeros_like(value)
        )
        shared.append((of_seeds * of_prompts * np.maximum(interaction, 0), freedom * max(num_prompts - 1, 1)))
    both = sum(variance for variance, _ in shared)
    own = sum(variance for variance, _ in parts)
    variance = np.maximum(own - both, np.maximum(parts[0][0], own - parts[0][0]))
    with np.errstate(invalid="ignore", divide="ignore"):
        df = variance**2 / sum(part**2 / freedom for part, freedom in (*parts, *shared))
        error = np.sqrt(variance)
        has_spread = error > 1e-12 * np.maximum(np.abs(value), 1e-12)
        df = np.where(has_spread, np.maximum(df, min(each.num_seeds for each in arms) - 1), np.nan)
        error = np.where(has_spread, error, np.nan)
        half = quantile(LEVEL, df) * error
        p = 1 - within(np.minimum(np.abs(value) / error, 100.0), df)
    return Estimates(value, value - half, value + half, p)


def probability_of_improvement(ours: Floats, theirs: Floats) -> tuple[float, float, float]:
    """P(X > Y) + P(X = Y) / 2 for a run X of one arm and Y of the other, with its 95 % interval.

    The mean over all pairs of runs, which is Mann and Whitney's U / (m n). The bootstrap has no spread where all runs of
    one arm beat the other's; so the interval is Newcombe's (2006), which inverts the variance of Hanley and McNeil (1982).

    Args:
        ours, theirs: (m,) and (n,) scores of runs.
    """
    m, n = len(ours), len(theirs)
    found = float(((ours[:, None] > theirs) + 0.5 * (ours[:, None] == theirs)).mean())
    if min(m, n) < MIN_SEEDS:
        return found, math.nan, math.nan
    true, pairs = np.linspace(0, 1, 20001), (m + n) / 2 - 1
    variance = true * (1 - true) * (1 + pairs * ((1 - true) / (2 - true) + true / (1 + true))) / (m * n)
    kept = true[(found - true) ** 2 <= NORMAL**2 * variance + 1e-15]
    return found, float(kept[0]), float(kept[-1])


def profile(scores: Floats, thresholds: Floats) -> tuple[Floats, Floats, Floats]:
    """(T,) the fraction of runs above each threshold, with Wilson's 95 % interval (1927); NaN with fewer than three runs."""
    n = len(scores)
    found = (scores[:, None] > thresholds).mean(0)
    if n < MIN_SEEDS:
        nothing = np.full_like(found, np.nan)
        return found, nothing, nothing
    centre = (found + NORMAL**2 / (2 * n)) / (1 + NORMAL**2 / n)
    half = NORMAL / (1 + NORMAL**2 / n) * np.sqrt(found * (1 - found) / n + NORMAL**2 / (4 * n * n))
    return found, centre - half, centre + half


def nan_mean(values: npt.NDArray[Any], axis: int) -> Floats:
    """The mean without NaN; NaN where there is nothing else."""
    known = ~np.isnan(values)
    sums, counts = np.where(known, values, 0.0).sum(axis), known.sum(axis)
    return np.asarray(np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0))
