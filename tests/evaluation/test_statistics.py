"""pass@k and maj@n against their definitions; intervals against a naive bootstrap."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_rl.evaluation.statistics import NO_ANSWER, NUM_RESAMPLES, estimates, majority, pass_at, powers_up_to, quantile

Samples = list[tuple[int, float]]  # of one prompt: number of the answer, score


def passes(right: Sequence[bool], k: int) -> float:
    """The definition: of all subsets of k samples, those with a right one."""
    subsets = list(combinations(right, k))
    return sum(map(any, subsets)) / len(subsets)


def elected_score(samples: Samples) -> float:
    """The definition: the score of the most frequent answer, with the expected score of a tie."""
    by_answer: dict[int, list[float]] = {}
    for answer, score in samples:
        if answer != NO_ANSWER:
            by_answer.setdefault(answer, []).append(score)
    most = max(map(len, by_answer.values()), default=0)
    means = [sum(scores) / len(scores) for scores in by_answer.values() if len(scores) == most]
    return sum(means) / len(means) if means else 0.0


def arrays(prompts: Sequence[Samples]) -> tuple[Any, Any]:
    return (
        np.array([[answer for answer, _ in samples] for samples in prompts]),
        np.array([[score for _, score in samples] for samples in prompts], dtype=float),
    )


def prompts_of(max_n: int = 7) -> st.SearchStrategy[list[Samples]]:
    """One to five prompts with the same number of samples; answers and scores have nothing to do with each other."""
    sample = st.tuples(st.integers(NO_ANSWER, 3), st.sampled_from([0.0, 0.25, 1.0]))
    return st.integers(1, max_n).flatmap(
        lambda n: st.lists(st.lists(sample, min_size=n, max_size=n), min_size=1, max_size=5)
    )


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_pass_at_is_the_share_of_subsets_with_a_right_sample(n: int) -> None:
    for k in range(1, n + 1):
        expected = [passes([i < c for i in range(n)], k) for c in range(n + 1)]
        assert pass_at(np.arange(n + 1), n, k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n", [64, 1000])
def test_pass_at_is_equation_1_for_numbers_that_no_float_holds(n: int) -> None:
    for k in (1, 2, n // 3, n - 1, n):
        found = pass_at(np.arange(n + 1), n, k)
        exact = [1 - Fraction(math.comb(n - c, k), math.comb(n, k)) for c in range(n + 1)]
        assert found == pytest.approx([float(x) for x in exact], abs=1e-12)


@given(prompts_of())
def test_majority_is_the_score_of_the_most_frequent_answer(prompts: list[Samples]) -> None:
    expected = [elected_score(samples) for samples in prompts]
    assert majority(*arrays(prompts)) == pytest.approx(expected, abs=1e-12)


@given(prompts_of(), st.randoms(use_true_random=False))
def test_the_order_of_samples_does_not_matter_nor_what_answers_are_called(
    prompts: list[Samples], rng: random.Random
) -> None:
    names = {NO_ANSWER: NO_ANSWER, **dict(zip(range(4), rng.sample(range(4), 4), strict=True))}
    shuffled = [[(names[a], s) for a, s in rng.sample(samples, len(samples))] for samples in prompts]
    assert majority(*arrays(shuffled)) == pytest.approx(majority(*arrays(prompts)), abs=1e-12)


@given(prompts_of(12))
def test_pass_at_rises_with_k_and_begins_with_the_mean(prompts: list[Samples]) -> None:
    _, scores = arrays(prompts)
    n, right = scores.shape[1], (scores >= 1).sum(axis=1)
    found = np.stack([pass_at(right, n, k) for k in range(1, n + 1)])
    assert (np.diff(found, axis=0) >= -1e-12).all()
    assert found[0] == pytest.approx(right / n) and found[-1] == pytest.approx((right > 0).astype(float))


@given(prompts_of(2))
def test_majority_of_one_or_two_is_the_mean_where_all_answer(prompts: list[Samples]) -> None:
    """Two votes agree or tie."""
    answers, scores = arrays([[(max(a, 0), s) for a, s in samples] for samples in prompts])
    assert majority(answers, scores) == pytest.approx(scores.mean(axis=1))


@pytest.mark.parametrize("n", [1, 4, 20])
@pytest.mark.parametrize(("answer", "score"), [(0, 1.0), (0, 0.0), (NO_ANSWER, 0.0)])
def test_samples_that_all_are_alike(n: int, answer: int, score: float) -> None:
    answers, scores = np.full((3, n), answer), np.full((3, n), score)
    assert majority(answers, scores).tolist() == [score] * 3
    for k in powers_up_to(n):
        assert pass_at((scores >= 1).sum(axis=1), n, k).tolist() == [score] * 3


@pytest.mark.parametrize("k", [0, 5])
def test_no_more_samples_than_there_are(k: int) -> None:
    with pytest.raises(ValueError, match=f"from 1 to n = 4, found {k}"):
        pass_at(np.array([1]), 4, k)


def test_the_ks_that_are_reported() -> None:
    assert [powers_up_to(n) for n in (1, 2, 3, 4, 6, 8)] == [
        [1],
        [1, 2],
        [1, 2, 3],
        [1, 2, 4],
        [1, 2, 4, 6],
        [1, 2, 4, 8],
    ]


def naive_interval(numerators: Any, denominators: Any) -> list[float]:
    """One resample after the other, with the draws of `estimates`."""
    draws = np.random.default_rng(0).integers(0, len(numerators), size=(NUM_RESAMPLES, len(numerators)))
    ratios = [numerators[rows].sum() / denominators[rows].sum() for rows in draws if denominators[rows].sum()]
    return [float(end) for end in np.quantile(ratios, [0.025, 0.975])]


def test_intervals_are_those_of_a_naive_bootstrap() -> None:
    rng = np.random.default_rng(1)
    numerators = np.stack([rng.random(40), rng.integers(0, 5, 40) * 10.0, (np.arange(40) == 3) * 2.0], axis=1)
    denominators = np.stack([np.ones(40), numerators[:, 1] / 10 + 1, (np.arange(40) == 3) * 1.0], axis=1)
    found = estimates(numerators, denominators)
    for i, estimate in enumerate(found[:2]):
        assert estimate.value == pytest.approx(numerators[:, i].sum() / denominators[:, i].sum())
        assert [estimate.low, estimate.high] == pytest.approx(naive_interval(numerators[:, i], denominators[:, i]))
    assert math.isnan(found[2].low) and math.isnan(found[2].high), "it is about one prompt"


def test_an_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        (found,) = estimates(rng.binomial(1, 0.4, (100, 1)).astype(float), np.ones((100, 1)))
        covered += found.low <= 0.4 <= found.high
    assert 180 <= covered <= 199  # binomial(200, 0.95): mean 190, standard deviation 3


@pytest.mark.parametrize("num_prompts", [1, 16, 256])
def test_where_all_agree_the_interval_is_that_of_a_proportion(num_prompts: int) -> None:
    ends = np.stack([np.zeros(num_prompts), np.ones(num_prompts)], axis=1)
    none, all_ = estimates(ends, np.ones_like(ends))
    assert (none.value, none.low, all_.value, all_.high) == (0.0, 0.0, 1.0, 1.0)
    # Were the chance of success `high`, no success at all would be as rare as 2.5 %.
    assert (1 - none.high) ** num_prompts == pytest.approx(0.025) == all_.low**num_prompts
    half = np.arange(num_prompts) < max(1, num_prompts // 2)  # only these count
    (counted,) = estimates(np.zeros((num_prompts, 1)), half[:, None].astype(float))
    assert (1 - counted.high) ** half.sum() == pytest.approx(0.025)


def test_a_rare_success_is_within_the_interval_of_none() -> None:
    rng = np.random.default_rng(4)
    covered = 0
    for _ in range(200):
        (found,) = estimates(rng.binomial(1, 0.01, (64, 1)).astype(float), np.ones((64, 1)))
        covered += found.low <= 0.01 <= found.high
    assert covered >= 180


def test_the_order_of_prompts_matters_to_no_mean_and_hardly_to_an_interval() -> None:
    rng = np.random.default_rng(3)
    values = rng.random((300, 1))
    (one,), (other,) = (estimates(x, np.ones_like(x)) for x in (values, rng.permutation(values)))
    assert one.value == pytest.approx(other.value) and one.low == pytest.approx(other.low, abs=0.01)


def test_one_prompt_and_nothing_at_all() -> None:
    one, nothing = estimates(np.array([[0.5, 0.0]]), np.array([[1.0, 0.0]]))
    assert one.value == 0.5 and math.isnan(one.low) and math.isnan(one.high)
    assert math.isnan(nothing.value) and math.isnan(nothing.low) and math.isnan(nothing.high)


def test_quantiles_are_numbers_that_were_there() -> None:
    assert [quantile(range(1, 101), q) for q in (0.5, 0.95, 1.0)] == [50, 95, 100]
    assert quantile([7], 0.95) == 7
