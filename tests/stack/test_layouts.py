"""Ranks and ZeRO stages change nothing: the same rollouts give the same losses and parameters."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import ray
import torch
from torch import Tensor

from sae_rl.algo.estimators import SAE
from sae_rl.algo.segmenters import LowProbability, segment
from sae_rl.algo.shaping import TokenRewards, Whitening
from sae_rl.clock import Clock
from sae_rl.types import Batch, Prompt, Rollout, Scores, Targets
from sae_rl.workers.crew import Crew, ray_session, start_learners
from tests.stack.conftest import Configure, for_learners

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Outcome:
    """What two updates leave behind."""

    scores: Scores
    metrics: dict[str, float]
    weights: dict[str, Tensor]


def rollouts_of_many_lengths() -> Batch:
    """Made up, so that every layout is given exactly the same: 16 responses of 1 to 40 tokens, some with tool output."""
    random = torch.Generator().manual_seed(0)
    rollouts = []
    for i in range(16):
        prompt = Prompt(id=str(i // 4), text="", token_ids=(1, *range(3, 8 + i // 4)), answer="", task="", reward="")
        length = int(torch.randint(1, 41, (1,), generator=random)) if i else 1
        rollouts.append(
            Rollout(
                prompt=prompt,
                sample=i % 4,
                token_ids=torch.randint(3, 80, (length,), generator=random),
                rollout_logprobs=-3 * torch.rand(length, generator=random),
                text="",
                finish_reason="stop",
                policy_version=0,
                temperature=0.9,
                sampled=torch.arange(length) % 5 < 3 if i % 4 == 1 else None,
            )
        )
    return Batch.of(rollouts, [float(i % 3 == 0) for i in range(16)])


def weights_of(worker: object) -> dict[str, Tensor]:
    """Runs inside every rank."""
    return {name: tensor.float().clone() for name, tensor in worker._learner.full_weights()}  # type: ignore[attr-defined]


def learners_weights(crew: Crew) -> dict[str, Tensor]:
    """Of both networks; every rank takes part, since ZeRO 3 gathers them."""
    weights = {}
    for role in ("policy", "critic"):
        ranks = ray.get([worker.__ray_call__.remote(weights_of) for worker in crew._groups[role].workers])  # type: ignore
        weights |= {f"{role} {name}": tensor for name, tensor in ranks[0].items()}
    return weights


def train_twice(crew: Crew, batch: Batch) -> Outcome:
    metrics: dict[str, float] = {}
    first = crew.score(batch)
    assert batch.sampled is not None and first.values is not None
    for flat in (first.old_logprobs, first.values):
        assert bool(flat.isfinite().all()) and not bool(flat[~batch.sampled].any())
    assert bool((first.old_logprobs[batch.sampled] < 0).all())
    for step in range(2):
        scores = crew.score(batch)
        opens = segment(LowProbability(0.3), batch, scores)
        targets = SAE(0.9)(batch, scores, TokenRewards()(batch, scores), opens)
        targets = Targets(advantages=Whitening()(targets.advantages, batch.sampled), returns=targets.returns)
        update = crew.update(batch, scores, targets, seed=step)
        metrics |= {
            f"{step} {name}": value for name, value in update.items() if not name.startswith(("time/", "memory/"))
        }
    return Outcome(first, metrics, learners_weights(crew))


def outcome_of(configure: Configure, ranks: int, stage: int, budget: int) -> Outcome:
    layout = for_learners(num_workers=ranks, zero_stage=stage, micro_batch_tokens=budget, optimizer__lr=1e-3)
    config = configure(*layout)
    with ray_session(config), start_learners(config, Clock()) as crew:
        return train_twice(crew, rollouts_of_many_lengths())


@pytest.fixture(scope="module")
def reference(tiny_model: object, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    from sae_rl.compose import load_config
    from tests.stack.conftest import overrides

    output = tmp_path_factory.mktemp("reference")
    return outcome_of(lambda *more: load_config(overrides(tiny_model, output, *more)), 1, 0, 4096)  # type: ignore


@pytest.mark.parametrize(("ranks", "stage"), [(2, 2), (2, 3), (2, 1)])
def test_two_ranks_equal_one(configure: Configure, reference: Outcome, ranks: int, stage: int) -> None:
    found = outcome_of(configure, ranks, stage, budget=128)
    torch.testing.assert_close(found.scores.old_logprobs, reference.scores.old_logprobs, atol=1e-5, rtol=1e-5)
    assert found.metrics.keys() == reference.metrics.keys()
    for name, value in reference.metrics.items():
        assert found.metrics[name] == pytest.approx(value, abs=2e-5, rel=2e-4), name
    assert found.weights.keys() == reference.weights.keys()
    for name, tensor in reference.weights.items():
        # Adam divides by the gradient's size: where that is near zero, rounding decides part of a step of lr = 1e-3.
        torch.testing.assert_close(found.weights[name], tensor, atol=3e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
