"""Engines that die or fall silent: their work goes to others, their replacements have the current weights."""

from __future__ import annotations

import os
import signal
import threading
import time

import psutil
import pytest
import torch

from sae_rl.commands.assemble import load_tokenizer
from sae_rl.commands.prompts import load_task
from sae_rl.records.clock import Clock
from sae_rl.types import Batch, Prompt, Rollout, Sampling, Targets
from sae_rl.workers.group import WorkerError
from sae_rl.workers.run_workers import RunWorkers
from sae_rl.workers.session import ray_session, start_workers
from tests.stack.conftest import Configure, sampled

pytestmark = pytest.mark.alone
TWO_ENGINES = [
    "algorithm=grpo",
    "cluster.rollout.num_workers=2",
    "rollout.max_response_tokens=200",
    "rollout.max_num_seqs=8",
    "rollout.health_timeout_s=6",
    "rollout.max_engine_losses=7",
]
GROUP_SIZE, MAX_TOKENS = 4, 200


def engine_core(workers: RunWorkers, rank: int) -> int:
    """The process in which vLLM computes, a child of the Ray worker."""
    place = workers._groups["rollout"].place(rank)
    assert place is not None
    names = {pid: " ".join(psutil.Process(pid).cmdline()) for pid, _ in place.processes}
    (core,) = (pid for pid, name in names.items() if "EngineCore" in name + psutil.Process(pid).name())
    return core


def ray_worker(workers: RunWorkers, rank: int) -> int:
    place = workers._groups["rollout"].place(rank)
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
    workers.update(batch, workers.score(batch), Targets(advantages=advantages, returns=None), seed=seed)


def interrupted(workers: RunWorkers, prompts: list[Prompt], pid: int, number: int) -> dict[str, list[Rollout]]:
    """Samples, and sends a signal when the first group is there."""
    groups: dict[str, list[Rollout]] = {}
    groups = workers.rollout.generate(
        prompts, group_size=GROUP_SIZE, sampling=Sampling(max_tokens=MAX_TOKENS), seed_name="test"
    )
    for group in groups:
        if not groups:
            os.kill(pid, number)
        assert group[0].prompt.id not in groups, "a prompt was answered twice"
        groups[group[0].prompt.id] = group
    return groups


def test_what_a_lost_engine_had_not_answered_goes_to_others_until_too_many_are_lost(configure: Configure) -> None:
    config = configure(*TWO_ENGINES)
    prompts = list(load_task(config, load_tokenizer(config.model.path))[0].prompts)
    notes: list[str] = []
    with ray_session(config), start_workers(config, prompts[:2], Clock(), note=notes.append) as workers:
        workers.sync_weights(0)
        before = sampled(workers, prompts, group_size=GROUP_SIZE, max_tokens=MAX_TOKENS)
        check(workers, before, 0)
        move_policy(workers, before, seed=1)
        workers.sync_weights(1)
        straight = sampled(workers, prompts, group_size=GROUP_SIZE, max_tokens=MAX_TOKENS)
        for kind, number in (("core", signal.SIGKILL), ("worker", signal.SIGKILL), ("core", signal.SIGSTOP)):
            pid = engine_core(workers, 0) if kind == "core" else ray_worker(workers, 0)
            found = interrupted(workers, prompts, pid, number)
            assert "rollout engine 0 is lost, with" in notes[-1], notes
            assert "with 0 responses" not in notes[-1]
            rollouts = [rollout for prompt in prompts for rollout in found[prompt.id]]
            check(workers, rollouts, 1)  # also what the replacement sampled has the weights of the last sync
            assert [r.token_ids.tolist() for r in rollouts] == [r.token_ids.tolist() for r in straight]
            assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
            limit = time.monotonic() + 120
            while workers.rollout.engines.settle() != [0, 1] and time.monotonic() < limit:
                time.sleep(0.5)
            workers.sync_weights(1)  # which makes the one that was replaced after the last group a full member
            assert workers.rollout.engines.ready == [0, 1]
        assert len(notes) == workers.rollout.engines.num_lost == 3

        # In the middle of a weight sync: it waits for an engine that is stopped, and then dies.
        move_policy(workers, before, seed=2)
        core = engine_core(workers, 1)
        os.kill(core, signal.SIGSTOP)
        killer = threading.Timer(1.5, os.kill, (core, signal.SIGKILL))
        killer.start()
        assert workers.sync_weights(2)["sync/logprob_diff_max"] < 1e-4
        killer.join()
        assert "sending weights 2 failed" in notes[-1] and workers.rollout.engines.ready == [0, 1]
        check(workers, sampled(workers, prompts[:4], group_size=GROUP_SIZE, max_tokens=MAX_TOKENS), 2)

        # None is left when weights are to be sent: they wait for the replacements.
        for engine in workers.rollout.engines:
            workers.rollout.engines._lose(engine, "a test")
        assert workers.rollout.engines.settle() == []
        assert workers.sync_weights(2)["sync/logprob_diff_max"] < 1e-4

        with pytest.raises(WorkerError, match=r"8 rollout engines were lost, more than rollout.max_engine_losses = 7"):
            interrupted(workers, prompts, engine_core(workers, 0), signal.SIGKILL)
