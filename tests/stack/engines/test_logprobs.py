"""vLLM's processed logprobs are the policy's own, at any temperature, before and after a weight sync."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import ray
import torch

from sae_rl.types import Batch, Prompt, Targets
from sae_rl.workers.run_workers import RunWorkers
from tests.stack.conftest import sampled
from tests.stack.engines.conftest import Shared

pytestmark = pytest.mark.alone


def worst_difference(workers: RunWorkers, prompts: list[Prompt], temperature: float) -> tuple[float, Batch]:
    rollouts = sampled(workers, prompts, group_size=4, max_tokens=24, temperature=temperature)
    batch = Batch.of(rollouts, [0.0] * len(rollouts))
    return float((batch.rollout_logprobs - workers.score(batch).old_logprobs).abs().max()), batch


def test_tied_weights_arrive_under_zero_3_and_what_is_missing_is_noticed(shared: Shared) -> None:
    workers, prompts = shared.workers, shared.prompts[:4]
    before = {}
    for temperature in (1.0, 0.7):
        difference, before[temperature] = worst_difference(workers, prompts, temperature)
        assert difference < 1e-4, f"before a sync, at temperature {temperature}"

    batch = before[1.0]
    scores = workers.score(batch)
    assert scores.values is not None
    advantages = torch.linspace(-1, 1, batch.num_tokens)
    workers.update(batch, scores, Targets(advantages=advantages, returns=scores.values), seed=0)
    moved = float((workers.score(batch).old_logprobs - scores.old_logprobs).abs().max())
    assert moved > 0.01, "the update must be large enough for stale weights to show"
    stale = worst_difference(workers, prompts, 1.0)[1]
    assert torch.equal(stale.token_ids, batch.token_ids), "engines sample the same responses until weights are sent"
    torch.testing.assert_close(stale.rollout_logprobs, batch.rollout_logprobs, atol=1e-6, rtol=1e-6)

    assert workers.sync_weights(1)["sync/logprob_diff_max"] < 1e-4
    for temperature in (1.0, 0.7):
        difference, after = worst_difference(workers, prompts, temperature)
        assert difference < 1e-4, f"after a sync, at temperature {temperature}"
        assert not torch.equal(after.token_ids, before[temperature].token_ids)
    layers = {forget_head: "lm_head", forget_one: "model.layers.1.mlp.down_proj"}
    for version, (forget, layer) in enumerate(layers.items(), 2):
        workers.update(batch, scores, Targets(advantages=batch.rollout_logprobs, returns=scores.values), seed=version)
        tell(workers, forget)
        try:
            with pytest.raises(
                RuntimeError, match=f"engine 0, process 0 did not get all weights of some layers: {layer};"
            ):
                workers.sync_weights(version)
        finally:
            tell(workers, remember)
        assert workers.sync_weights(version)["sync/logprob_diff_max"] < 1e-4


def tell(workers: RunWorkers, what: Callable[[object], None]) -> None:
    ray.get([worker.__ray_call__.remote(what) for worker in workers._groups["policy"].workers])


def forget_head(worker: object) -> None:
    """Runs inside the policy's process: the tied output layer is not sent, as by ``named_parameters()``."""
    sender = worker._sender  # type: ignore[attr-defined]
    sender._sent_names = lambda name: [name.removeprefix("causal_lm.")]


def forget_one(worker: object) -> None:
    """Runs inside the policy's process: one of its tensors is not sent."""
    sender = worker._sender  # type: ignore[attr-defined]
    sent_names = sender._sent_names
    sender._sent_names = lambda name: [] if name.endswith("layers.1.mlp.down_proj.weight") else sent_names(name)


def remember(worker: object) -> None:
    """Runs inside the policy's process: all are sent again."""
    worker._sender.__dict__.pop("_sent_names", None)  # type: ignore[attr-defined]
