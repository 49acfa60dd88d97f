"""SAE with segmenters that turn it into a known estimator."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sae_rl.algo import Segmenter, segment
from sae_rl.algo.estimators import GAE, SAE, MonteCarlo
from sae_rl.algo.segmenters import Delimiter, FixedLength, LowProbability, Random
from sae_rl.types import Batch, Targets

from .oracle import batches, close, dense_rewards, make_scores, property_test, unit


def sae(batch: Batch, segmenter: Segmenter, lam: float, gamma: float) -> Targets:
    scores = make_scores(batch)
    return SAE(lam, gamma, value_lam=lam)(batch, scores, dense_rewards(batch), segment(segmenter, batch, scores))


@property_test
@given(batch=batches(), lam=unit, gamma=unit)
def test_a_threshold_of_one_is_gae_and_of_zero_monte_carlo(batch: Batch, lam: float, gamma: float) -> None:
    """All probabilities of these batches are below 1."""
    scores, rewards, nowhere = make_scores(batch), dense_rewards(batch), torch.zeros(batch.num_tokens, dtype=torch.bool)
    gae = GAE(lam, gamma, value_lam=lam)(batch, scores, rewards, nowhere)
    monte_carlo = MonteCarlo(gamma)(batch, scores, rewards, nowhere)
    for segmenter in (LowProbability(1.0), FixedLength(1), Random(1.0)):
        found = sae(batch, segmenter, lam, gamma)
        assert torch.equal(found.advantages, gae.advantages)
        assert found.returns is not None and gae.returns is not None and torch.equal(found.returns, gae.returns)
    for segmenter in (LowProbability(0.0), FixedLength(10**6), Random(0.0)):
        assert torch.equal(sae(batch, segmenter, lam, gamma).advantages, monte_carlo.advantages)


def step_level_gae(rewards: Tensor, values: Tensor, starts: list[int], lam: float) -> list[float]:
    """GAE over steps as in AlphaMath (arXiv 2405.03553): a step is an action, and its reward is the sum over its tokens."""
    ends = [*starts[1:], len(rewards)]
    paid = [float(rewards[a:b].sum()) for a, b in zip(starts, ends, strict=True)]
    states = [*(float(values[a]) for a in starts), 0.0]
    deltas = [r + after - before for r, before, after in zip(paid, states, states[1:], strict=False)]
    return [sum(lam ** (j - k) * deltas[j] for j in range(k, len(deltas))) for k in range(len(deltas))]


@property_test
@given(batch=batches(), lam=unit, delimiters=st.sets(st.integers(0, 49), min_size=1, max_size=25))
def test_with_delimiters_it_is_step_level_gae(batch: Batch, lam: float, delimiters: set[int]) -> None:
    rewards, values = dense_rewards(batch), make_scores(batch).values
    assert values is not None
    advantages = sae(batch, Delimiter(tuple(sorted(delimiters))), lam, 1.0).advantages
    for a, b in pairwise(batch.offsets.tolist()):
        tokens = batch.token_ids[a:b].tolist()
        starts = [0, *(t + 1 for t in range(b - a - 1) if tokens[t] in delimiters)]
        steps = step_level_gae(rewards[a:b], values[a:b], starts, lam)
        assert close(advantages[a:b][starts], torch.tensor(steps, dtype=torch.float64))
        for k, (start, end) in enumerate(
            pairwise([*starts, b - a])
        ):  # within a step only the baseline and rewards paid
            for t in range(start, end):
                already = float(rewards[a + start : a + t].sum())
                expected = steps[k] + float(values[a + start]) - already - float(values[a + t])
                assert abs(float(advantages[a + t]) - expected) < 1e-9
