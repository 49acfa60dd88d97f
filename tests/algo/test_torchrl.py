"""The recursion against torchrl's independent implementation, in float32."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sae_rl.algo import Estimator
from sae_rl.algo.estimators import GAE, SAE
from sae_rl.types import Batch, Scores, Targets

from .oracle import batches, dense_rewards, make_scores, property_test, random_opens, unit

functional = pytest.importorskip("torchrl.objectives.value.functional")


def torchrl_advantages(
    batch: Batch, rewards: Tensor, values: Tensor, lams: Tensor | float, gamma: float
) -> tuple[Tensor, Tensor]:
    """Computed per response in torchrl's shape (time, 1); the last token is terminal."""
    advantages, targets = torch.zeros(batch.num_tokens), torch.zeros(batch.num_tokens)
    for a, b in pairwise(batch.offsets.tolist()):
        done = torch.zeros(b - a, 1, dtype=torch.bool)
        done[-1] = True
        value, reward = values[a:b, None], rewards[a:b, None]
        next_value = torch.cat([value[1:], torch.zeros(1, 1)])
        lam = lams[a:b, None] if isinstance(lams, Tensor) else lams
        found = functional.generalized_advantage_estimate(gamma, lam, value, next_value, reward, done)
        advantages[a:b], targets[a:b] = (part[:, 0] for part in found)
    return advantages, targets


def ours(estimator: Estimator, batch: Batch, rewards: Tensor, opens: Tensor) -> tuple[Targets, Scores]:
    scores = make_scores(batch)
    assert scores.values is not None
    scores = Scores(old_logprobs=scores.old_logprobs, values=scores.values.float(), ref_logprobs=None)
    return estimator(batch, scores, rewards, opens), scores


@property_test
@given(batch=batches(), lam=unit, gamma=unit)
def test_gae(batch: Batch, lam: float, gamma: float) -> None:
    rewards = dense_rewards(batch).float()
    found, scores = ours(GAE(lam, gamma, value_lam=lam), batch, rewards, random_opens(batch, 0.5))
    assert scores.values is not None
    advantages, targets = torchrl_advantages(batch, rewards, scores.values, lam, gamma)
    torch.testing.assert_close(found.advantages, advantages, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.returns, targets, atol=1e-5, rtol=1e-5)


@property_test
@given(batch=batches(), lam=unit, gamma=unit, rate=st.floats(0, 1))
def test_sae_by_a_lambda_for_each_token(batch: Batch, lam: float, gamma: float, rate: float) -> None:
    """torchrl accepts one lambda per token: lam where the next token opens a segment, else 1."""
    opens, rewards = random_opens(batch, rate), dense_rewards(batch).float()
    found, scores = ours(SAE(lam, gamma, value_lam=lam), batch, rewards, opens)
    lams = torch.where(torch.cat([opens[1:], torch.zeros(1, dtype=torch.bool)]), lam, 1.0)
    assert scores.values is not None
    advantages, targets = torchrl_advantages(batch, rewards, scores.values, lams, gamma)
    torch.testing.assert_close(found.advantages, advantages, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.returns, targets, atol=1e-5, rtol=1e-5)
