"""Lines about a wait for workers, with Ray's answers and the clock made up."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from sae_rl.workers import group
from sae_rl.workers.group import Call, WorkerError, WorkerGroup, wait_for


class Clock:
    """Each reference is answered at its time; `wait` moves the clock."""

    def __init__(self, answered_at: dict[str, float]) -> None:
        self.now, self.answered_at = 0.0, answered_at

    def monotonic(self) -> float:
        return self.now

    def wait(self, pending: list[str], num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
        first = min(pending, key=self.answered_at.__getitem__)
        done = self.answered_at[first] <= self.now + timeout
        self.now = max(self.now, self.answered_at[first]) if done else self.now + timeout
        return ([first] if done else []), [reference for reference in pending if not (done and reference == first)]


class Ranks(WorkerGroup):
    def __init__(self, role: str) -> None:
        self.role, self.places = role, [None, None]

    def result(self, rank: int, reference: Any) -> str:
        return f"{self.role} {rank}"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock({"engine": 50.0, "other engine": 20.0, "policy": 33.0})
    monkeypatch.setattr(group.ray, "wait", clock.wait)
    monkeypatch.setattr(group.time, "monotonic", clock.monotonic)
    return clock


CALLS = [Call(Ranks("rollout"), {0: "engine", 1: "other engine"}), Call(Ranks("policy"), {0: "policy"})]


@pytest.mark.parametrize(
    ("is_terminal", "lines"),
    [
        (
            True,
            [
                "waiting for rollout 0, rollout 1, policy 0 to load its model: 15 s",
                "waiting for rollout 0, policy 0 to load its model: 30 s",
                "waiting for rollout 0 to load its model: 45 s",
            ],
        ),
        (False, []),  # a log gets a line per minute
    ],
)
def test_a_long_wait_names_the_ranks_that_are_missing(
    is_terminal: bool, lines: list[str], clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal, raising=False)
    noted: list[str] = []
    answers = wait_for(CALLS, 200.0, doing="load its model", note=noted.append)
    assert answers == [["rollout 0", "rollout 1"], ["policy 0"]] and noted == lines


def test_a_wait_ends_at_its_limit(clock: Clock) -> None:
    noted: list[str] = []
    with pytest.raises(WorkerError, match="worker\\(s\\) rollout 0 did not answer within 40 s"):
        wait_for(CALLS, 40.0, note=noted.append)
    assert clock.now == 40.0


def test_a_wait_says_nothing_where_nobody_asked(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    wait_for(CALLS, 200.0)
    assert capsys.readouterr().out == ""


def test_rays_line_about_tokens_is_not_shown(caplog: pytest.LogCaptureFixture) -> None:
    from ray._private.authentication.authentication_token_setup import _warn_token_auth_enabled

    import sae_rl.workers.session  # noqa: F401

    with caplog.at_level(logging.INFO):
        _warn_token_auth_enabled()
    assert caplog.text == ""
