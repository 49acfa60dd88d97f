"""Projected policy gradients of real workers, against torch's own backward pass response by response."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sae_rl.backends.models import PolicyNetwork, load_causal_lm
from sae_rl.backends.packing import build_micro_batch
from sae_rl.backends.projection import Projection
from sae_rl.config.schema import Config
from sae_rl.types import Batch, Scores, Targets
from tests.stack.conftest import Configure, for_learners
from tests.stack.learners.conftest import Learners, learners_weights, rollouts_of_many_lengths

pytestmark = pytest.mark.alone


def gradient_by_hand(config: Config, batch: Batch, advantages: Tensor) -> Tensor:
    """(P,) by torch alone, in the order of the parameters."""
    policy = PolicyNetwork(load_causal_lm(config.model)).eval()
    for row in range(batch.num_responses):
        micro = build_micro_batch(batch, torch.tensor([row]))
        logprobs, _ = policy(micro, batch.temperature, False)
        (logprobs * advantages[micro.token_index]).sum().backward()
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


@pytest.mark.parametrize(("ranks", "stage", "sharing"), [(1, 0, 1), (2, 1, 1), (2, 2, 1), (2, 0, 2)])
def test_gradients_are_those_of_torch_and_leave_no_trace(
    configure: Configure, learners: Learners, ranks: int, stage: int, sharing: int
) -> None:
    layout = {"num_workers": ranks, "zero_stage": stage, "micro_batch_tokens": 64, "activation_checkpointing": True}
    config = configure(*for_learners(**layout), f"learner.sequence_parallel_size={sharing}")
    batch, draw = rollouts_of_many_lengths(7), torch.Generator().manual_seed(0)
    advantages = torch.randn(3, batch.num_tokens, generator=draw, dtype=torch.float64)
    advantages[1] = 0
    workers = learners(config)
    exact = workers.policy_gradients(batch, advantages, dimension=10**9, seed=0)
    for found, row in zip(exact, advantages, strict=True):
        expected = gradient_by_hand(config, batch, row)
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(1e-9 + expected.abs().max()))
    projected = workers.policy_gradients(batch, advantages, dimension=64, seed=5)
    project = Projection([exact[0]], 64, seed=5)
    expected = torch.stack([project([row]) for row in exact]).float()
    torch.testing.assert_close(projected, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))
    if sharing == 1:
        scores = Scores(old_logprobs=batch.rollout_logprobs, values=torch.zeros(batch.num_tokens), ref_logprobs=None)
        targets = Targets(advantages=advantages[0].float(), returns=torch.zeros(batch.num_tokens))
        batch = rollouts_of_many_lengths(7)
        workers.update(batch, scores, targets, seed=0)
        after = learners_weights(workers)
        workers = learners(config)
        workers.update(batch, scores, targets, seed=0)
        assert all(torch.equal(after[name], weight) for name, weight in learners_weights(workers).items())
