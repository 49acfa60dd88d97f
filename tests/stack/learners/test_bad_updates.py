"""A NaN or infinite gradient skips the update and is counted; too many in a row end the run."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from sae_rl.types import Targets
from sae_rl.workers.group import WorkerError
from tests.stack.conftest import Configure, for_learners
from tests.stack.learners.conftest import Learners, learners_weights, rollouts_of_many_lengths

pytestmark = pytest.mark.alone


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 2), (2, 3)])  # each skips in code of its own
def test_updates_with_nonfinite_gradients_are_skipped_and_counted(
    configure: Configure, learners: Learners, ranks: int, stage: int
) -> None:
    layout = for_learners(num_workers=ranks, zero_stage=stage, optimizer__max_skipped_updates=3)
    config, batch = configure(*layout), rollouts_of_many_lengths()
    workers = learners(config)
    scores = workers.score(batch)
    draw = torch.randn(batch.num_tokens, generator=torch.Generator().manual_seed(0))
    good = Targets(advantages=draw, returns=draw.abs())
    everywhere = Targets(advantages=draw * math.nan, returns=draw * math.inf)
    before = learners_weights(workers)
    metrics, _ = workers.update(batch, scores, everywhere, seed=0)
    for role in ("policy", "critic"):
        assert metrics[f"{role}/skipped_updates"] == metrics[f"{role}/num_updates"] == 2
        assert math.isnan(metrics[f"{role}/grad_norm"])
    after = learners_weights(workers)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())

    metrics, _ = workers.update(batch, scores, good, seed=0)
    for role in ("policy", "critic"):
        assert metrics[f"{role}/skipped_updates"] == 0 and metrics[f"{role}/grad_norm"] > 0
    learned = learners_weights(workers)
    assert all(bool(tensor.isfinite().all()) for tensor in learned.values())
    assert any(not torch.equal(learned[name], tensor) for name, tensor in before.items())

    only_policy = replace(good, advantages=everywhere.advantages)
    workers.update(batch, scores, only_policy, seed=1)
    with pytest.raises(
        WorkerError, match=r"policy worker [01] failed: FloatingPointError: the gradient's norm is"
    ) as died:
        workers.update(batch, scores, only_policy, seed=2)
    assert "the 3 before, which were skipped" in str(died.value) and "optimizer.lr" in str(died.value)
