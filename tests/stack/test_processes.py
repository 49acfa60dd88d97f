"""The processes of a run are real and separate, hold the engines they should, and are missed when they die."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace

import psutil
import pytest
import ray
import torch

from sae_rl.commands.assemble import load_tokenizer
from sae_rl.commands.prompts import load_task
from sae_rl.records.clock import Clock
from sae_rl.types import Batch, Prompt, Rollout, Targets
from sae_rl.workers.group import WorkerError, WorkerGroup
from sae_rl.workers.run_workers import RunWorkers
from sae_rl.workers.session import ray_session, start_workers
from tests.stack.conftest import Configure, sampled

pytestmark = pytest.mark.alone


def engine_of(worker: object) -> str:
    """Runs inside a learner's process: which class holds its network."""
    engine = worker._learner.engine  # type: ignore[attr-defined]
    return f"{type(engine).__module__}.{type(engine).__name__}"


def only_worker(workers: RunWorkers, role: str) -> tuple[WorkerGroup, int]:
    group = workers._groups[role]  # type: ignore[index]
    return group, ray.get(group.workers[0].whereabouts.remote()).pid


def sample(workers: RunWorkers, prompts: list[Prompt]) -> list[Rollout]:
    return sampled(workers, prompts, group_size=2, max_tokens=8)


def one_token_more(rollout: Rollout) -> Rollout:
    longer = {"token_ids": 5, "rollout_logprobs": 0, "policy_versions": 0}
    flats = {name: getattr(rollout, name) for name in longer}
    return replace(rollout, **{name: torch.cat([f, f.new_full((1,), longer[name])]) for name, f in flats.items()})


def test_every_role_is_a_process_of_its_own_and_none_can_be_missed(configure: Configure) -> None:
    config = configure("algorithm.bootstrap_truncated=true", "rollout.max_engine_losses=0")
    prompts = list(load_task(config, load_tokenizer(config.model.path))[0].prompts)[:2]
    with ray_session(config), start_workers(config, prompts, Clock()) as workers:
        workers.sync_weights(0)
        pids = {role: only_worker(workers, role)[1] for role in ("rollout", "policy", "critic")}
        assert len({os.getpid(), *pids.values()}) == 4
        for role in ("policy", "critic"):
            engine = ray.get(only_worker(workers, role)[0].workers[0].__ray_call__.remote(engine_of))
            assert engine == "deepspeed.runtime.engine.DeepSpeedEngine"
        children = psutil.Process(pids["rollout"]).children(recursive=True)
        names = [child.name() + " ".join(child.cmdline()) for child in children]
        assert any("EngineCore" in name for name in names), names

        rollouts = sample(workers, prompts)
        batch = Batch.of(rollouts, [float(i % 2) for i in range(len(rollouts))])
        scores = workers.score(batch)
        assert scores.values is not None
        targets = Targets(advantages=batch.rollout_logprobs, returns=torch.ones_like(scores.values))
        workers.update(batch, scores, targets, seed=0)

        assert float(workers.score(batch).final_values.abs().max()) > 0  # type: ignore[union-attr]
        longer = [one_token_more(r) for r in rollouts]
        extended = Batch.of(longer, [0.0] * len(longer))
        behind = workers.score(extended).values[extended.offsets[1:] - 1]  # type: ignore[index]
        torch.testing.assert_close(workers.score(batch).final_values, behind, atol=1e-5, rtol=1e-5)

        parts = workers.score(batch, [workers.start_score(rollouts[:3]), workers.start_score(rollouts[3:])])
        for name in ("old_logprobs", "values", "final_values"):
            torch.testing.assert_close(getattr(parts, name), getattr(workers.score(batch), name), atol=1e-5, rtol=1e-5)

        deaths: list[tuple[str, Callable[[], object]]] = [
            ("critic", lambda: workers.score(batch)),
            ("policy", lambda: workers.sync_weights(1)),
            ("rollout", lambda: sample(workers, prompts)),
        ]
        for role, call in deaths:
            os.kill(pids[role], signal.SIGKILL)
            with pytest.raises(WorkerError, match=f"{role} worker 0 died") as died:
                call()
            assert f"process {pids[role]}" in str(died.value)
        _, alive = psutil.wait_procs(children, timeout=10)
        assert not alive, "vLLM's processes outlive their worker"
