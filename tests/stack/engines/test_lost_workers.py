"""Engines that die or fall silent: others do their work, and replacements get the current weights. And dead learners."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest
import torch

from sae_rl.types import Batch, Prompt, Rollout, Sampling, Targets
from sae_rl.workers.group import WorkerError
from sae_rl.workers.run_workers import RunWorkers
from tests.stack.conftest import sampled
from tests.stack.engines.conftest import MAX_ENGINE_LOSSES, Shared

pytestmark = pytest.mark.alone
GROUP_SIZE, MAX_TOKENS = 4, 200
ASKED: dict[str, Any] = {"group_size": GROUP_SIZE, "sampling": Sampling(max_tokens=MAX_TOKENS), "seed_name": "test"}


def engine_core(workers: RunWorkers, rank: int) -> int:
    """The process in which vLLM computes, a child of the Ray worker."""
    place = workers._groups["rollout"].places[rank]
    assert place is not None
    names = {pid: " ".join(psutil.Process(pid).cmdline()) for pid, _ in place.processes}
    (core,) = (pid for pid, name in names.items() if "EngineCore" in name + psutil.Process(pid).name())
    return core


def ray_worker(workers: RunWorkers, rank: int) -> int:
    place = workers._groups["rollout"].places[rank]
    assert place is not None
    return place.pid


def check(workers: RunWorkers, rollouts: list[Rollout], version: int) -> None:
    """The logprobs are those of the policy as it is."""
    batch = Batch.of(rollouts, [0.0] * len(rollouts))
    assert batch.policy_versions.unique().tolist() == [version]
    difference = (batch.rollout_logprobs - workers.score(batch).old_logprobs).abs().max()
    assert float(difference) < 1e-4


def move_policy(workers: RunWorkers, rollouts: list[Rollout], seed: int) -> None:
    batch = Batch.of(rollouts, [0.0] * len(rollouts))
    advantages = torch.randn(batch.num_tokens, generator=torch.Generator().manual_seed(seed))
    scores = workers.score(batch)
    workers.update(batch, scores, Targets(advantages=advantages, returns=scores.values), seed=seed)


def trained_once(shared: Shared) -> tuple[list[Rollout], list[Rollout]]:
    """Responses under the first weights, and those to the same prompts under the next, version 1."""
    before = sampled(shared.workers, shared.prompts, group_size=GROUP_SIZE, max_tokens=MAX_TOKENS)
    check(shared.workers, before, 0)
    move_policy(shared.workers, before, seed=1)
    shared.workers.sync_weights(1)
    return before, sampled(shared.workers, shared.prompts, group_size=GROUP_SIZE, max_tokens=MAX_TOKENS)


def is_gone(pid: int) -> bool:
    limit = time.monotonic() + 5
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > limit:
            return False
        time.sleep(0.1)
    return True


def assert_told(notes: list[str], rank: int) -> None:
    assert f"rollout engine {rank} is lost, with" in notes[-1] and "with 0 responses" not in notes[-1]


def interrupted(workers: RunWorkers, prompts: list[Prompt], pid: int, number: int) -> list[list[Rollout]]:
    """Groups of responses to all prompts; a process gets a signal when the first group is there."""
    groups = workers.rollout.generate(prompts, **ASKED)
    found = [next(groups)]
    os.kill(pid, number)
    return [*found, *groups]


def compare(workers: RunWorkers, groups: list[list[Rollout]], straight: list[Rollout]) -> None:
    """Every prompt is answered once, and as when no engine is lost."""
    found = {group[0].prompt.id: group for group in groups}
    assert len(found) == len(groups) == len(straight) // GROUP_SIZE
    rollouts = [rollout for i in range(0, len(straight), GROUP_SIZE) for rollout in found[straight[i].prompt.id]]
    check(workers, rollouts, 1)
    assert [r.token_ids.tolist() for r in rollouts] == [r.token_ids.tolist() for r in straight]


def test_what_a_lost_engine_had_not_answered_goes_to_others(shared: Shared) -> None:
    workers, prompts, notes = shared.workers, shared.prompts, shared.notes
    engines = workers.rollout.engines
    before, straight = trained_once(shared)

    # vLLM's process dies: the other engine answers.
    found = interrupted(workers, prompts, engine_core(workers, 0), signal.SIGKILL)
    assert engines.settle() == [1]
    compare(workers, found, straight)
    assert_told(notes, 0)

    # Then the other one's Ray worker dies. None is left when weights are to be sent, and they wait for the replacements.
    worker, core = ray_worker(workers, 1), engine_core(workers, 1)
    groups = workers.rollout.generate(prompts, **ASKED)
    found = [next(groups)]
    os.kill(worker, signal.SIGKILL)
    while engines.ready:
        workers.rollout.poll()
    assert_told(notes, 1)
    assert is_gone(core), "a child of the worker that died"
    assert engines.settle() == []
    assert workers.sync_weights(1)["sync/logprob_diff_max"] < 1e-4
    assert engines.ready == [0, 1] and engines.num_lost == 2
    found += groups
    compare(workers, found, straight)  # and what the replacements sampled has the weights of that sync

    # An engine dies in the middle of a weight sync, which waited for it as it was stopped. Both are replaced.
    move_policy(workers, before, seed=2)
    core = engine_core(workers, 1)
    os.kill(core, signal.SIGSTOP)
    killer = threading.Timer(1.5, os.kill, (core, signal.SIGKILL))
    killer.start()
    assert workers.sync_weights(2)["sync/logprob_diff_max"] < 1e-4
    killer.join()
    assert "sending weights 2 failed" in notes[-1]
    assert engines.ready == [0, 1] and engines.num_lost == len(notes) == MAX_ENGINE_LOSSES
    check(workers, sampled(workers, prompts[:4], group_size=GROUP_SIZE, max_tokens=MAX_TOKENS), 2)


def test_the_run_ends_with_one_engine_too_many_and_with_any_learner(shared: Shared) -> None:
    """The last test, as no worker outlives it."""
    workers, prompts, notes = shared.workers, shared.prompts, shared.notes
    _, straight = trained_once(shared)
    batch = Batch.of(straight, [0.0] * len(straight))
    engines = workers.rollout.engines
    engines.num_lost = MAX_ENGINE_LOSSES - 1
    core = engine_core(workers, 0)
    compare(workers, interrupted(workers, prompts, core, signal.SIGSTOP), straight)
    assert_told(notes, 0)
    assert "it did not answer within rollout.health_timeout_s = 6 s" in notes[-1]
    assert is_gone(core), "a process that is stopped does not end by itself"
    while engines.ready != [0, 1]:
        workers.rollout.poll()
    compare(workers, list(workers.rollout.generate(prompts, **ASKED)), straight)  # the replacement got the weights of 1

    pids = {role: place.pid for role in ("policy", "critic") for place in workers._groups[role].locate(60)}
    deaths: list[tuple[str, Callable[[], object]]] = [
        ("critic", lambda: workers.score(batch)),
        ("policy", lambda: workers.sync_weights(2)),
    ]
    for role, call in deaths:
        os.kill(pids[role], signal.SIGKILL)
        with pytest.raises(WorkerError, match=f"{role} worker 0 died") as died:
            call()
        assert f"process {pids[role]}" in str(died.value)

    worker, core = ray_worker(workers, 1), engine_core(workers, 1)
    with pytest.raises(WorkerError, match=r"more than rollout.max_engine_losses = 4; .*rollout worker 1 died") as died:
        interrupted(workers, prompts, worker, signal.SIGKILL)
    assert f"process {worker}" in str(died.value) and is_gone(core)
