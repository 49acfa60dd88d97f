"""Processes for policies and critics that all tests of this folder share: starting one takes longer than a test."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from torch import Tensor

from sae_rl.backends.deepspeed import Learner
from sae_rl.config.compose import load_config
from sae_rl.config.schema import Config
from sae_rl.records.clock import Clock
from sae_rl.types import Batch, Prompt, Rollout
from sae_rl.workers.run_workers import RunWorkers
from sae_rl.workers.session import ray_session
from tests.stack.conftest import for_learners, no_process_left, overrides, start_learners

Learners = Callable[[Config], RunWorkers]


@pytest.fixture(scope="package")
def processes(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, RunWorkers]]:
    """Processes for a policy and a critic, by the number of ranks of each."""
    common = overrides(tiny_model, tmp_path_factory.mktemp("learners"))
    configs = {ranks: load_config([*common, *for_learners(num_workers=ranks, cpus_per_worker=0.2)]) for ranks in (1, 2)}
    with no_process_left(), ray_session(configs[1]), contextlib.ExitStack() as stack:
        started = {ranks: stack.enter_context(start_learners(config)) for ranks, config in configs.items()}
        for group in (group for workers in started.values() for group in workers._groups.values()):
            ray.get([worker.__ray_call__.remote(shard_small_parameters) for worker in group.workers])
        yield started


def shard_small_parameters(worker: object) -> None:
    """Runs inside every rank: otherwise ZeRO 3 keeps parameters of fewer than 100,000 numbers whole, here all of them."""
    configured = Learner._deepspeed_config

    def sharded(*arguments: Any) -> dict[str, Any]:
        tree = configured(*arguments)
        tree["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return tree

    Learner._deepspeed_config = sharded  # type: ignore[method-assign]


@pytest.fixture
def learners(processes: dict[int, RunWorkers]) -> Learners:
    """``learners(config)``: a policy and a critic as configured, with the weights that the configuration names."""

    def learners_of(config: Config) -> RunWorkers:
        workers = RunWorkers(config, processes[config.cluster.policy.num_workers]._groups, [], Clock())
        workers.start()
        return workers

    return learners_of


def rollouts_of_many_lengths(count: int = 16) -> Batch:
    """Random responses of 1 to 40 tokens, some with tool output; always the same, and the first of one token."""
    random = torch.Generator().manual_seed(0)
    rollouts = []
    for i in range(count):
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
                policy_versions=torch.zeros(length, dtype=torch.int64),
                temperature=0.9,
                action_mask=torch.arange(length) % 5 < 3 if i % 4 == 1 else None,
            )
        )
    return Batch.of(rollouts, [float(i % 3 == 0) for i in range(count)])


def weights_of(worker: object) -> dict[str, Tensor]:
    """Runs inside every rank."""
    return {name: tensor.float().clone() for name, tensor in worker._learner.full_weights()}  # type: ignore[attr-defined]


def learners_weights(workers: RunWorkers) -> dict[str, Tensor]:
    """The weights of policy and critic. Every rank takes part, since ZeRO 3 gathers them."""
    weights = {}
    for role in ("policy", "critic"):
        ranks = ray.get([worker.__ray_call__.remote(weights_of) for worker in workers._groups[role].workers])  # type: ignore
        weights |= {f"{role} {name}": tensor for name, tensor in ranks[0].items()}
    return weights
