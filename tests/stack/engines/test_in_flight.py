"""Responses that are under way while weights arrive: every token is of the weights that its version says."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sae_rl.types import Batch, Sampling, Targets
from tests.stack.conftest import sampled
from tests.stack.engines.conftest import Shared

pytestmark = pytest.mark.alone


def test_responses_under_way_go_on_with_new_weights(shared: Shared) -> None:
    """To 1e-4, also behind the change: keys and values are those of the new weights."""
    workers, prompts = shared.workers, shared.prompts
    first = Batch.of(rollouts := sampled(workers, prompts, group_size=4, max_tokens=64), [0.0] * len(rollouts))
    scores = workers.score(first)
    assert scores.values is not None
    draw = torch.randn(first.num_tokens, generator=torch.Generator().manual_seed(0))
    workers.update(first, scores, Targets(advantages=draw, returns=scores.values), seed=0)

    groups = workers.rollout.open(group_size=4, sampling=Sampling(max_tokens=256))
    groups.add(prompts, "test")
    with ThreadPoolExecutor(1) as thread:
        sampling = thread.submit(lambda: [rollout for group in groups for rollout in group])
        time.sleep(0.3)
        assert workers.sync_weights(1)["sync/logprob_diff_max"] < 1e-4
        rollouts = sampling.result()
    batch = Batch.of(rollouts, [0.0] * len(rollouts))
    assert len(rollouts) == 4 * len(prompts)
    mixed = [r for r in rollouts if r.policy_versions.unique().tolist() == [0, 1]]
    assert len(mixed) > 4, "responses were under way"
    assert all(bool((r.policy_versions.diff() >= 0).all()) for r in rollouts)

    new, after = batch.policy_versions == 1, workers.score(batch).old_logprobs
    workers.load(shared.beginning)
    before = workers.score(batch).old_logprobs
    assert float((batch.rollout_logprobs - after)[new].abs().max()) < 1e-4
    assert float((batch.rollout_logprobs - before)[~new].abs().max()) < 1e-4
    assert float((before - after)[new].abs().max()) > 0.01, "the update must be large enough for stale weights to show"
