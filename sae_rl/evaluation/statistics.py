"""pass@k, maj@n and bootstrap intervals, as functions of arrays.

P   prompts
n   samples of each prompt
k   samples that a statistic looks at
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

NUM_RESAMPLES = 2000
TAIL = 0.025  # probability on either side of a 95 % interval
NO_ANSWER = -1


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over prompts, or a ratio of two sums, with its 95 % interval; NaN where it is undefined."""

    value: float
    low: float
    high: float


UNKNOWN = Estimate(math.nan, math.nan, math.nan)


def powers_up_to(n: int) -> list[int]:
    """1, 2, 4, ... below n, and n itself."""
    return [*(2**i for i in range((n - 1).bit_length())), n]


def pass_at(num_right: npt.NDArray[Any], n: int, k: int) -> Floats:
    """(P,) ``1 - C(n - c, k) / C(n, k)``: an unbiased estimate of the chance that one of k samples is right.

    Equation 1 of arXiv 2107.03374. The ratio is computed as the product of ``(n - k - j) / (n - j)`` over j < c, so that
    no large number is formed.

    Args:
        num_right: (P,) c, from 0 to n.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@k takes k from 1 to n = {n}, found {k}")
    j = np.arange(n)
    wrong = np.concatenate([[1.0], np.cumprod(np.maximum(n - k - j, 0) / (n - j))])
    passed: Floats = 1 - wrong[num_right]
    return passed


def majority(answers: npt.NDArray[np.int64], scores: Floats) -> Floats:
    """(P,) maj@n (self-consistency, arXiv 2203.11171): the score of the most frequent answer of each prompt.

    The score of an answer is the mean score of the samples that give it, in case a verifier looks at more than the
    answer. Tied answers count alike. A prompt without any answer scores 0.

    Args:
        answers: (P, n) numbers from 0, equal within a prompt where the answers are equal; `NO_ANSWER` does not vote.
        scores: (P, n)
    """
    found = np.zeros(len(scores))
    for prompt, voted in enumerate(answers != NO_ANSWER):
        if voted.any():
            votes = np.bincount(answers[prompt, voted])
            sums = np.bincount(answers[prompt, voted], weights=scores[prompt, voted])
            first = votes == votes.max()
            found[prompt] = (sums[first] / votes[first]).mean()
    return found


def estimates(numerators: Floats, denominators: Floats) -> list[Estimate]:
    """``sum_p numerators[p, i] / sum_p denominators[p, i]`` for each i, with percentile bootstrap intervals over prompts.

    All statistics use the same resamples, so that their intervals can be compared. A resample whose denominator is 0
    does not count. Where every prompt has 0, or every prompt has 1, all resamples agree and say nothing: the interval
    is then the exact one of a proportion (Clopper and Pearson, 1934). A single prompt that is neither has no interval.

    Args:
        numerators, denominators: (P, statistics); a denominator of ones makes a mean.
    """
    num_prompts = len(numerators)
    both = np.concatenate([numerators, denominators], axis=1)
    rng = np.random.default_rng(0)
    drawn = (rng.integers(0, num_prompts, size=num_prompts) for _ in range(NUM_RESAMPLES))
    sums = np.stack([np.bincount(rows, minlength=num_prompts) @ both for rows in drawn])
    resampled = _ratios(*np.split(sums, 2, axis=1))
    values = _ratios(numerators.sum(axis=0), denominators.sum(axis=0)).tolist()
    columns = zip(values, resampled.T, denominators.T, strict=True)
    return [Estimate(value, *_interval(value, column, counted)) for value, column, counted in columns]


def _interval(value: float, resampled: Floats, denominator: Floats) -> tuple[float, float]:
    defined = resampled[~np.isnan(resampled)]
    num_counted = int(np.count_nonzero(denominator))
    if value in (0.0, 1.0) and set(denominator.tolist()) <= {0.0, 1.0} and np.ptp(defined) == 0:
        other = TAIL ** (1 / num_counted)  # were this the probability of one outcome, all would agree with chance TAIL
        return (0.0, 1 - other) if value == 0 else (other, 1.0)
    if not defined.size or num_counted == 1:
        return math.nan, math.nan
    low, high = np.quantile(defined, [TAIL, 1 - TAIL]).tolist()
    return low, high


def _ratios(numerators: Floats, denominators: Floats) -> Floats:
    return np.divide(numerators, denominators, out=np.full_like(numerators, math.nan), where=denominators != 0)


def quantile(numbers: Sequence[float] | npt.NDArray[Any], q: float) -> float:
    """The smallest of the numbers that at least a fraction q of them do not exceed."""
    return float(np.quantile(numbers, q, method="inverted_cdf"))
