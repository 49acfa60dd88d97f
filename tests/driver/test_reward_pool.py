"""Verifiers that misbehave are counted, cost nobody else a score, and leave no process."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import psutil
import pytest
import torch

from sae_rl.config import RewardPoolConfig
from sae_rl.rewards.pool import RewardPool, Rewards
from sae_rl.types import Prompt, Rollout

DEADLINE_S = 1.0


def rollout(verifier: str, index: int, response: str = "yes") -> Rollout:
    name = verifier if verifier == "exact" else f"{__package__}.verifiers:{verifier}"
    return Rollout(
        prompt=Prompt(id=f"p{index}", text="q", token_ids=(1,), answer="yes", task="t", reward=name),
        sample=0,
        token_ids=torch.tensor([1]),
        rollout_logprobs=torch.zeros(1),
        text=response,
        finish_reason="stop",
        policy_versions=torch.zeros(1, dtype=torch.int64),
        temperature=1.0,
    )


def config(max_failed_fraction: float = 1.0, num_processes: int = 1) -> RewardPoolConfig:
    return RewardPoolConfig(num_processes=num_processes, deadline_s=DEADLINE_S, max_failed_fraction=max_failed_fraction)


def score(pool: RewardPool, rollouts: list[Rollout]) -> Rewards:
    return pool.collect(pool.submit(rollouts))


def children() -> dict[int, str]:
    """Without Python's own helper of multiprocessing, which lives as long as this process."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found[process.pid] = " ".join(process.cmdline())
    return {pid: command for pid, command in found.items() if "resource_tracker" not in command}


@pytest.fixture
def no_process_left() -> Iterator[None]:
    before = children()
    yield
    limit = time.monotonic() + 10
    while children().keys() - before.keys() and time.monotonic() < limit:
        time.sleep(0.1)
    assert {pid: command for pid, command in children().items() if pid not in before} == {}


@pytest.mark.usefixtures("no_process_left")
def test_a_verifier_that_hangs_raises_or_dies_fails_alone() -> None:
    asked = ["fine", "hang", "fine", "crash", "die", "words", "exact"]
    with RewardPool(config()) as pool:
        score(pool, [rollout("fine", 9)])  # the process has started
        started = time.monotonic()
        rewards = score(pool, [rollout(name, i) for i, name in enumerate(asked)])
        took_s = time.monotonic() - started
        again = score(pool, [rollout("fine", 0), rollout("fine", 1, response="no")])
    assert rewards.scores == [1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    hang, crash, die, words = rewards.failures
    assert "verifiers:hang on prompt p1: no answer within rewards.deadline_s = 1 s" in hang
    assert "verifiers:crash on prompt p3: KeyError" in crash
    assert "verifiers:die on prompt p4: its process died" in die
    assert "verifiers:words on prompt p5: ValueError" in words
    assert rewards.failed_fraction == pytest.approx(4 / 7)
    assert again.scores == [1.0, 0.0]
    assert (again.failures, again.failed_fraction) == ([], 0.0)
    assert took_s < 120, "a check that hangs is killed at its deadline"


@pytest.mark.usefixtures("no_process_left")
def test_too_many_failures_stop_the_run() -> None:
    with RewardPool(config(max_failed_fraction=0.25)) as pool:
        assert score(pool, [rollout("crash", 0), *(rollout("fine", i) for i in range(1, 4))]).scores == [0, 1, 1, 1]
        with pytest.raises(RuntimeError) as error:
            score(pool, [rollout("fine", 0), rollout("crash", 1)])
    for part in ("1 of 2 reward checks failed", "rewards.max_failed_fraction = 0.25", "prompt p1", "KeyError"):
        assert part in str(error.value)


@pytest.mark.usefixtures("no_process_left")
def test_an_error_of_ours_leaves_no_process_either() -> None:
    with pytest.raises(ZeroDivisionError), RewardPool(config(num_processes=2)) as pool:
        score(pool, [rollout("fine", 0)])
        raise ZeroDivisionError
