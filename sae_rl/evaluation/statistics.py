"""pass@k, maj@k and bootstrap intervals, as functions of arrays.

P   prompts
n   samples of each prompt
k   how many of them a statistic looks at
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

NUM_RESAMPLES = 2000
CHUNK = 1 << 21  # numbers of one pass over resamples or subsets, so that memory does not grow with the data
NO_ANSWER = -1
EXACT_SAMPLES = 16  # n up to which maj@k, k < n, is exact
NUM_SUBSETS = 1 << 19  # where it is not, of all prompts together, within the limits for one prompt
SUBSETS_OF_A_PROMPT = (64, 4096)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over prompts, or a ratio of two, with its 95 % interval; nan where there is nothing to say."""

    value: float
    low: float
    high: float


def powers_up_to(n: int) -> list[int]:
    """1, 2, 4, ... below n, and n itself."""
    return [*(2**i for i in range((n - 1).bit_length())), n]


def pass_at(num_right: npt.NDArray[Any], n: int, k: int) -> Floats:
    """(P,) ``1 - C(n - c, k) / C(n, k)``, c = ``num_right`` (P,) in 0 .. n: unbiased for the chance that one of k
    samples is right. Equation 1 of arXiv 2107.03374.

    ``C(n - c, k) / C(n, k)`` is the product of ``(n - k - j) / (n - j)`` over j < c, so no large number is formed.
    """
    if not 1 <= k <= n:
        raise ValueError(f"pass@k takes k from 1 to n = {n}, found {k}")
    j = np.arange(n)
    wrong = np.concatenate([[1.0], np.cumprod(np.maximum(n - k - j, 0) / (n - j))])
    passed: Floats = 1 - wrong[num_right]
    return passed


def majority_at(answers: Integers, scores: Floats, k: int, *, seed: int = 0) -> Floats:
    """(P,) maj@k (self-consistency, arXiv 2203.11171): the expected score of the most frequent answer among k of the n
    samples, over all subsets of k. A tie is a uniform choice; a subset without an answer scores 0.

    The score of an answer is the mean score of the samples that give it, in case that a verifier looks at more than the
    answer. Exact for k = 1, for k = n, and for n up to `EXACT_SAMPLES`; else the mean over random subsets, `NUM_SUBSETS`
    of all prompts together, which leaves an error of about 0.001 in their mean.

    Args:
        answers: (P, n) numbers from 0, equal within a prompt where the answers are; `NO_ANSWER`: it does not vote.
        scores: (P, n)
    """
    num_prompts, n = scores.shape
    if not 1 <= k <= n:
        raise ValueError(f"maj@k takes k from 1 to n = {n}, found {k}")
    votes, means = ballots(answers, scores)
    if k == 1:
        found: Floats = (votes * means).sum(axis=1) / n
        return found
    if k == n:
        return winners_score(votes, means)
    if n > EXACT_SAMPLES:
        return _majority_of_subsets(answers, means, k, seed)
    found = np.zeros(num_prompts)
    for prompt in range(num_prompts):
        counts = votes[prompt].astype(int)
        chances = winning_chances(tuple(sorted(counts[counts > 0].tolist(), reverse=True)), n)
        found[prompt] = sum(means[prompt, a] * chances[count][k] for a, count in enumerate(counts.tolist()) if count)
    return found


def ballots(answers: Integers, scores: Floats) -> tuple[Floats, Floats]:
    """(P, m), (P, m): how many samples give each of m answers, and their mean score; 0 where none does."""
    num_prompts, width = len(answers), max(1, int(answers.max(initial=NO_ANSWER)) + 1)
    rows = np.arange(num_prompts)[:, None] * width
    voted = answers != NO_ANSWER
    places = (rows + answers)[voted]
    votes = np.bincount(places, minlength=num_prompts * width).reshape(num_prompts, width).astype(float)
    sums = np.bincount(places, weights=scores[voted], minlength=num_prompts * width).reshape(num_prompts, width)
    return votes, np.divide(sums, votes, out=np.zeros_like(votes), where=votes > 0)


def winners_score(votes: Floats, means: Floats) -> Floats:
    """(P,) mean of ``means`` (P, m) over the answers with the most ``votes`` (P, m); 0 where nobody votes."""
    first = (votes == votes.max(axis=1, keepdims=True)) & (votes > 0)
    score: Floats = (means * first).sum(axis=1) / np.maximum(first.sum(axis=1), 1)
    return score


@lru_cache(maxsize=1 << 16)
def winning_chances(counts: tuple[int, ...], n: int) -> dict[int, Floats]:
    """For an answer that ``count`` of n samples give, the chance that it wins among k of them: {count: (n+1,) by k}.

    It wins with t votes against answers with at most t; with r others that have t too, its chance is 1 / (r + 1). The
    subsets in which that happens are counted by a product of polynomials: powers of x count samples, those of y ties.

    Args:
        counts: of each answer, from the largest; what is missing to n are samples without an answer.
    """
    subsets = np.array([math.comb(n, k) for k in range(n + 1)], dtype=float)
    return {own: _won_subsets(own, counts, n) / subsets for own in set(counts)}


def _won_subsets(own: int, counts: tuple[int, ...], n: int) -> Floats:
    """(n+1,) by k: subsets that an answer with ``own`` samples wins, each divided by how many answers tie."""
    others = list(counts)
    others.remove(own)
    won = np.zeros(n + 1)
    for t in range(1, own + 1):
        free = n - sum(counts) + sum(count for count in others if count < t)  # their number of votes does not matter
        product = np.zeros((len(others) + 1, n + 1))  # [ties, samples]
        product[0, : free + 1] = [math.comb(free, u) for u in range(free + 1)]
        for count in (count for count in others if count >= t):
            grown = np.zeros_like(product)
            for u in range(t + 1):
                grown[int(u == t) :, u:] += math.comb(count, u) * product[: len(product) - (u == t), : n + 1 - u]
            product = grown
        shared = (product / np.arange(1, len(product) + 1)[:, None]).sum(axis=0)
        won[t:] += math.comb(own, t) * shared[: n + 1 - t]
    return won


def _majority_of_subsets(answers: Integers, means: Floats, k: int, seed: int) -> Floats:
    """`majority_at` from random subsets of each prompt's samples."""
    random = np.random.default_rng([seed, k])
    num_prompts, n = answers.shape
    num_subsets = int(np.clip(NUM_SUBSETS // num_prompts, *SUBSETS_OF_A_PROMPT))
    width, found = means.shape[1] + 1, np.zeros(num_prompts)  # the last place is for no answer
    rows = max(1, CHUNK // (num_subsets * max(n, width)))
    for start in range(0, num_prompts, rows):
        part = np.where(answers == NO_ANSWER, width - 1, answers)[start : start + rows]
        drawn = random.random((len(part), num_subsets, n)).argpartition(k - 1, axis=2)[:, :, :k]
        names = np.take_along_axis(part[:, None, :], drawn, axis=2).reshape(-1, k)
        places = names + width * np.arange(len(names))[:, None]
        votes = np.bincount(places.ravel(), minlength=len(names) * width).reshape(-1, width)[:, :-1].astype(float)
        by_subset = winners_score(votes, np.repeat(means[start : start + rows], num_subsets, axis=0))
        found[start : start + rows] = by_subset.reshape(-1, num_subsets).mean(axis=1)
    return found


def estimates(numerators: Floats, denominators: Floats, level: float = 0.95, seed: int = 0) -> list[Estimate]:
    """``sum_p numerators[p, i] / sum_p denominators[p, i]`` for each i, with percentile intervals from resampling prompts.

    Every statistic sees the same resamples, so that their intervals can be compared. A resample that leaves nothing to
    divide by does not count. Where all prompts agree on 0 or on 1, resamples agree too and say nothing: the interval is the
    exact one of a proportion (Clopper and Pearson, 1934). One prompt that is neither has none.

    Args:
        numerators, denominators: (P, statistics); a denominator of ones makes a mean.
    """
    num_prompts = len(numerators)
    both = np.concatenate([numerators, denominators], axis=1)
    random = np.random.default_rng(seed)
    rows = max(1, CHUNK // num_prompts)
    sums = np.concatenate(
        [_counts(random, min(rows, NUM_RESAMPLES - done), num_prompts) @ both for done in range(0, NUM_RESAMPLES, rows)]
    )
    values = _ratios(*np.split(both.sum(axis=0)[None], 2, axis=1))[0]
    resampled = _ratios(*np.split(sums, 2, axis=1))
    found = []
    for value, column, counted in zip(values.tolist(), resampled.T, denominators.T, strict=True):
        defined = column[~np.isnan(column)]
        tail, num_counted = (1 - level) / 2, int(np.count_nonzero(counted))
        if value in (0.0, 1.0) and set(counted.tolist()) <= {0.0, 1.0} and np.ptp(defined) == 0:
            far = tail ** (1 / num_counted)  # the chance that so many agree is `tail`
            low, high = (0.0, 1 - far) if value == 0 else (far, 1.0)
        elif not defined.size or num_counted == 1:
            low = high = math.nan
        else:
            low, high = np.quantile(defined, [tail, 1 - tail]).tolist()
        found.append(Estimate(value, low, high))
    return found


def _counts(random: np.random.Generator, num_resamples: int, num_prompts: int) -> Floats:
    """(resamples, P) how often each prompt is drawn."""
    draws = random.integers(0, num_prompts, size=(num_resamples, num_prompts))
    places = draws + num_prompts * np.arange(num_resamples)[:, None]
    counts = np.bincount(places.ravel(), minlength=num_resamples * num_prompts)
    return counts.reshape(num_resamples, num_prompts).astype(float)


def _ratios(numerators: Floats, denominators: Floats) -> Floats:
    return np.divide(numerators, denominators, out=np.full_like(numerators, math.nan), where=denominators != 0)


def quantile(numbers: Sequence[float] | npt.NDArray[Any], q: float) -> float:
    """The smallest number that is not below a fraction q of them."""
    return float(np.quantile(numbers, q, method="inverted_cdf"))
