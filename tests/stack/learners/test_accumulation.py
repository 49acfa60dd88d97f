"""In bfloat16, the gradient of an update is the float32 sum of the gradients of its micro-batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sae_rl.algo.losses import PolicyTokens
from sae_rl.backends.models import PolicyNetwork, load_causal_lm
from sae_rl.backends.packing import build_micro_batch
from sae_rl.config.schema import Config
from sae_rl.types import Batch, Scores, Targets
from sae_rl.workers.run_workers import RunWorkers
from tests.stack.conftest import Configure, for_learners
from tests.stack.learners.conftest import Learners, rollouts_of_many_lengths
from tests.stack.learners.test_layouts import set_budget

pytestmark = pytest.mark.alone


def float32_weights(worker: object) -> dict[str, Tensor]:
    """Runs inside every rank: the optimizer's weights."""
    from deepspeed.utils import safe_get_full_fp32_param

    network = worker._learner.network  # type: ignore[attr-defined]
    assert all(group["fused"] for group in worker._learner.engine.optimizer.param_groups)  # type: ignore[attr-defined]
    return {name: safe_get_full_fp32_param(p).clone() for name, p in network.named_parameters()}


def policys_weights(workers: RunWorkers) -> dict[str, Tensor]:
    found: list[dict[str, Tensor]] = workers._groups["policy"].run(
        lambda worker: worker.__ray_call__.remote(float32_weights)
    )
    return found[0]


def sum_of_single_gradients(config: Config, batch: Batch, scores: Scores, targets: Targets) -> dict[str, Tensor]:
    """By torch alone: the gradient of each response in bfloat16, summed in float32."""
    policy, loss = PolicyNetwork(load_causal_lm(config.model)).train(), config.algorithm.policy_loss
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in policy.named_parameters()}
    for row in range(batch.num_responses):
        micro = build_micro_batch(batch, torch.tensor([row]))
        logprobs, _ = policy(micro, batch.temperature, False)
        at = micro.token_index
        tokens = PolicyTokens(
            logprobs=logprobs,
            old_logprobs=scores.old_logprobs[at],
            advantages=targets.advantages[at],
            counts=micro.counts,
            rollout_logprobs=batch.rollout_logprobs[at],
            rewards=batch.rewards[micro.rows],
        )
        (loss(tokens).sum / loss.total(batch.num_sampled)).backward()
        for name, parameter in policy.named_parameters():
            assert parameter.grad is not None
            sums[name] += parameter.grad.float()
            parameter.grad = None
    return sums


@pytest.mark.parametrize(
    ("ranks", "stage", "offloaded"),
    [(1, 0, False), (2, 1, False), (2, 2, False), (2, 2, True), (2, 3, False), (2, 3, True)],
)
def test_64_micro_batches_add_up_in_float32(
    configure: Configure, learners: Learners, ranks: int, stage: int, offloaded: bool
) -> None:
    # The first step of Adam with a huge epsilon and the inverse learning rate is the gradient itself.
    as_it_is = {"optimizer__lr": 1e6, "optimizer__eps": 1e6, "optimizer__max_grad_norm": 1e6}
    layout = {"num_workers": ranks, "zero_stage": stage, "offload_optimizer": offloaded, "num_mini_batches": 1}
    config = configure(*for_learners(**layout, **as_it_is), "model.precision=bfloat16")
    batch, workers = rollouts_of_many_lengths(64), learners(config)
    workers._groups["policy"].run(lambda worker: worker.__ray_call__.remote(set_budget, 1))  # a response in each pass
    draw = torch.Generator().manual_seed(0)
    advantages = 1 + torch.rand(batch.num_tokens, generator=draw)  # of one sign, so that the sum grows
    scores = Scores(old_logprobs=batch.rollout_logprobs, values=torch.zeros(batch.num_tokens), ref_logprobs=None)
    targets = Targets(advantages=advantages, returns=torch.zeros(batch.num_tokens))
    before = policys_weights(workers)
    assert workers.update(batch, scores, targets, seed=0)[0]["policy/skipped_updates"] == 0
    after = policys_weights(workers)
    expected = sum_of_single_gradients(config, batch, scores, targets)
    gap = sum(float((before[name] - after[name] - gradient).square().sum()) for name, gradient in expected.items())
    norm = sum(float(gradient.square().sum()) for gradient in expected.values())
    # Without float32 the gap is 1e-2 of the norm.
    assert (gap / norm) ** 0.5 < 2e-4
    if offloaded:
        recovers_from_a_skipped_update(workers, batch, scores, targets)


def recovers_from_a_skipped_update(workers: RunWorkers, batch: Batch, scores: Scores, targets: Targets) -> None:
    """The states of an offloaded optimizer keep no gradient that was not finite."""
    bad = Targets(advantages=targets.advantages * float("nan"), returns=targets.returns)
    assert workers.update(batch, scores, bad, seed=0)[0]["policy/skipped_updates"] == 1
    assert workers.update(batch, scores, targets, seed=0)[0]["policy/skipped_updates"] == 0
