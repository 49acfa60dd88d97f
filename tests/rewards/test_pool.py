"""Verifiers that misbehave are counted, cost nobody else a score, and leave no process."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest
import torch

from sae_rl.rewards.format import Format
from sae_rl.rewards.pool import RewardPool, Rewards
from sae_rl.rewards.table import READY
from sae_rl.rewards.verdict import Failed, Verdict
from sae_rl.types import Prompt, Rollout

from .verifiers import Deadly, Unreadable, Unsendable

DEADLINE_S = 1.0
CONFIGURED = {
    "unreadable": Unreadable(),
    "unsendable": Unsendable(),
    "pattern": Format(pattern=r"(a|aa|a?a)+b", timeout_s=0.2),
}
HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")


def rollout(verifier: str, index: int | str, response: str = "yes", answer: str = "yes") -> Rollout:
    name = verifier if verifier in READY or verifier in CONFIGURED else f"{__package__}.verifiers:{verifier}"
    return Rollout(
        prompt=Prompt(id=f"p{index}", text="q", token_ids=(1,), answer=answer, task="t", reward=name),
        sample=0,
        token_ids=torch.tensor([1]),
        rollout_logprobs=torch.zeros(1),
        text=response,
        finish_reason="stop",
        policy_versions=torch.zeros(1, dtype=torch.int64),
        temperature=1.0,
    )


def make_pool(**changes: Any) -> RewardPool:
    defaults = {
        "num_processes": 1,
        "deadline_s": DEADLINE_S,
        "memory_gb": 0.5,
        "failed_score": 0.0,
        "max_failed_fraction": 1.0,
        "verifiers": {},
    }
    return RewardPool(**defaults | changes)


def score(pool: RewardPool, rollouts: list[Rollout]) -> Rewards:
    return pool.collect(pool.submit(rollouts))


def children() -> dict[int, str]:
    """Without Python's own helpers of multiprocessing, which live as long as this process; but with what they forked."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            command = " ".join(process.cmdline())
            if process.ppid() != os.getpid() or not any(helper in command for helper in HELPERS):
                found[process.pid] = command
    return found


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
    asked = ["fine", "hang", "fine", "crash", "die", "words", "nan", "swell", "exact", "talkative"]
    with make_pool() as pool:
        score(pool, [rollout("fine", 9)])  # the process has started
        started = time.monotonic()
        rewards = score(pool, [rollout(name, i) for i, name in enumerate(asked)])
        took_s = time.monotonic() - started
        again = score(pool, [rollout("fine", 0), rollout("fine", 1, response="no")])
    assert rewards.scores == [1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.5]
    hang, crash, die, words, nan, swell = rewards.failures
    assert "verifiers:hang on prompt p1: no answer within rewards.deadline_s = 1 s" in hang
    assert "verifiers:crash on prompt p3: " in crash and "KeyError: 'no such thing'" in crash
    assert "verifiers:die on prompt p4: its process died" in die
    assert "verifiers:words on prompt p5: " in words and "allowed: a number or a Verdict" in words
    assert "verifiers:nan on prompt p6: " in nan and nan.endswith("): returned the score nan")
    assert "verifiers:swell on prompt p7: it needs more than rewards.memory_gb = 0.5" in swell
    assert rewards.failed_fraction == pytest.approx(6 / 10)
    assert rewards.outcomes[-1] == Verdict(0.5, "half of q", "yes")
    assert again.scores == [1.0, 0.0]
    assert (again.failures, again.failed_fraction) == ([], 0.0)
    assert took_s < 60, "a check that hangs is killed at its deadline"


# What odd verifiers raise or return, and what is said of it.
ODD = {
    "status": "Status: 503: busy",
    "coded": "Coded: code 7",
    "mute": "Mute: (its message cannot be read: AttributeError)",
    "locked": "Locked: locked",
    "leaves": "SystemExit: 0",
    "wordy": "): aaaaa",
    "half": "): half a character: ?",
    "late": "TimeoutError: the judge was late",
    "listing": "ValueError: returned a Verdict with why = ['equal'], which is not text",
    "unreadable": "ValueError: invalid literal for int() with base 10: 'no number'",
}


@pytest.mark.usefixtures("no_process_left")
def test_no_exception_of_a_verifier_reaches_other_checks() -> None:
    with make_pool(num_processes=2, verifiers={"unreadable": CONFIGURED["unreadable"]}) as pool:
        started = time.monotonic()
        asked = [name for odd in ODD for name in (odd, "fine")]
        rewards = score(pool, [*(rollout(name, i) for i, name in enumerate(asked)), rollout("subclass", "last")])
        took_s = time.monotonic() - started
        assert score(pool, [rollout("fine", 0)]).scores == [1.0]
    assert rewards.scores == [0.0, 1.0] * len(ODD) + [1.0]
    for (name, said), why in zip(ODD.items(), rewards.failures, strict=True):
        assert f"{name} on prompt p" in why and said in why
        assert len(why) < 1200
    last = rewards.outcomes[-1]
    assert last == Verdict(1.0, "equal", "yes") and isinstance(last, Verdict) and type(last.why) is str
    assert took_s < 30


@pytest.mark.usefixtures("no_process_left")
def test_a_process_that_ran_out_of_memory_is_replaced() -> None:
    """What filled it would stay, and fail every check to come."""
    with make_pool(deadline_s=10.0) as pool:
        outcomes = [score(pool, [rollout("hoard", i)]) for i in range(4)]
    assert [rewards.scores for rewards in outcomes] == [[1.0], [0.0], [1.0], [0.0]]
    assert "it needs more than rewards.memory_gb = 0.5" in outcomes[1].failures[0]


@pytest.mark.usefixtures("no_process_left")
def test_a_verifier_that_is_late_by_its_own_limit_says_so() -> None:
    with make_pool(deadline_s=5.0, verifiers={"pattern": CONFIGURED["pattern"]}) as pool:
        (why,) = score(pool, [rollout("pattern", 0, response="a" * 60 + "cb")]).failures
    assert (
        "pattern on prompt p0: TimeoutError: format: '(a|aa|a?a)+b' found no end within Format.timeout_s = 0.2" in why
    )


def test_a_verifier_that_cannot_be_sent_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"reward 'unsendable' cannot be sent to another process: TypeError: cannot pickle"
    ):
        make_pool(verifiers={"unsendable": CONFIGURED["unsendable"]})


@pytest.mark.usefixtures("no_process_left")
def test_failed_checks_score_as_the_rule_says() -> None:
    with make_pool(failed_score=-0.5) as pool:
        rewards = score(pool, [rollout("crash", 0), rollout("fine", 1)])
    assert rewards.scores == [-0.5, 1.0]
    assert isinstance(rewards.outcomes[0], Failed)


@pytest.mark.usefixtures("no_process_left")
def test_too_many_failures_stop_the_run() -> None:
    with make_pool(max_failed_fraction=0.25) as pool:
        assert score(pool, [rollout("crash", 0), *(rollout("fine", i) for i in range(1, 4))]).scores == [0, 1, 1, 1]
        with pytest.raises(RuntimeError) as error:
            score(pool, [rollout("fine", 0), rollout("crash", 1)])
    for part in ("1 of 2 reward checks failed", "rewards.max_failed_fraction = 0.25", "prompt p1", "KeyError"):
        assert part in str(error.value)


@pytest.mark.usefixtures("no_process_left")
def test_an_error_of_ours_leaves_no_process_either() -> None:
    with pytest.raises(ZeroDivisionError), make_pool(num_processes=2) as pool:
        score(pool, [rollout("fine", 0)])
        raise ZeroDivisionError


def reward_processes(before: dict[int, str]) -> list[int]:
    return [pid for pid in children() if pid not in before]


@pytest.mark.usefixtures("no_process_left")
@pytest.mark.parametrize("wait_s", [0.0, 0.1, 1.0])  # before, while and after its death is noticed
def test_a_process_killed_while_it_waits_is_replaced(wait_s: float, caplog: pytest.LogCaptureFixture) -> None:
    """As the kernel does when memory is short, most likely during an update."""
    before = children()
    with make_pool(num_processes=2) as pool:
        for _ in range(3):
            assert score(pool, [rollout("fine", i) for i in range(4)]).scores == [1.0] * 4
            os.kill(reward_processes(before)[0], signal.SIGKILL)
            time.sleep(wait_s)
        assert score(pool, [rollout("fine", i) for i in range(40)]).scores == [1.0] * 40
    if wait_s == 1.0:
        assert "reward processes stopped working" in caplog.text and "do 4 checks again" in caplog.text


@pytest.mark.usefixtures("no_process_left")
def test_what_was_not_answered_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    """All processes go at once, with the server that forks them, while most checks wait for one."""
    before = children()
    with make_pool(num_processes=2, deadline_s=5.0) as pool:
        assert score(pool, [rollout("fine", 0)]).scores == [1.0]
        checks = pool.submit([rollout("slow", i) for i in range(20)])
        time.sleep(0.3)
        for pid in reward_processes(before):
            os.kill(pid, signal.SIGKILL)
        rewards = pool.collect(checks)
        assert score(pool, [rollout("fine", 0)]).scores == [1.0]
    assert len(rewards.failures) <= 2, "those that ran in them"
    assert all("its process died" in why for why in rewards.failures)
    assert rewards.scores.count(1.0) >= 18


def test_processes_that_cannot_start_end_the_run() -> None:
    with (
        make_pool(verifiers={"deadly": Deadly()}) as pool,
        pytest.raises(RuntimeError, match=r"4 times in a row .* rewards.memory_gb"),
    ):
        score(pool, [rollout("fine", 0)])
