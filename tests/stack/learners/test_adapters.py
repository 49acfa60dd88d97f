"""A policy with adapters: the policy without them is the reference, and a checkpoint holds the adapters alone."""

from __future__ import annotations

import pytest
import torch

from sae_rl.types import Batch, Targets
from sae_rl.workers.run_workers import RunWorkers
from tests.stack.conftest import KL, LORA, Configure, for_learners
from tests.stack.learners.conftest import Learners, learners_weights, rollouts_of_many_lengths

pytestmark = pytest.mark.alone


def update(workers: RunWorkers, batch: Batch, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    advantages, returns = (torch.randn(batch.num_tokens, generator=draw) for _ in range(2))
    workers.update(batch, workers.score(batch), Targets(advantages=advantages, returns=returns), seed=seed)


@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 2), (2, 3)])  # each saves in a format of its own
def test_the_reference_is_the_frozen_policy_and_adapters_are_saved(
    configure: Configure, learners: Learners, ranks: int, stage: int
) -> None:
    config = configure(
        *LORA, *KL, *for_learners(num_workers=ranks, zero_stage=stage), "cluster.reference.num_workers=0"
    )
    batch = rollouts_of_many_lengths()
    workers = learners(config)
    first = workers.score(batch)
    assert first.ref_logprobs is not None
    torch.testing.assert_close(first.ref_logprobs, first.old_logprobs)  # untrained adapters change nothing
    update(workers, batch, seed=1)
    workers.save(config.output_dir)
    second = workers.score(batch)
    assert second.ref_logprobs is not None
    torch.testing.assert_close(second.ref_logprobs, first.ref_logprobs)
    assert float((second.old_logprobs - first.old_logprobs).abs().max()) > 0.01
    update(workers, batch, seed=2)
    weights = learners_weights(workers)
    workers.load(config.output_dir)
    torch.testing.assert_close(workers.score(batch).old_logprobs, second.old_logprobs)
    update(workers, batch, seed=2)
    for name, tensor in learners_weights(workers).items():
        torch.testing.assert_close(tensor, weights[name], msg=lambda m, n=name: f"{n}: {m}")
    saved = sum(file.stat().st_size for file in (config.output_dir / "policy" / "state").iterdir())
    trained_whole = sum(file.stat().st_size for file in (config.output_dir / "critic" / "state").iterdir())
    assert saved < trained_whole / 2  # frozen weights are not saved
