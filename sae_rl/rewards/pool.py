"""Verifiers run outside the driver's process, each check under a deadline: a process that overruns it is killed."""

from __future__ import annotations

import math
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import TimeoutError as CheckTimeout
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from pebble import ProcessExpired, ProcessPool

from sae_rl.config import RewardPoolConfig
from sae_rl.rewards import resolve_reward
from sae_rl.types import Rollout


@dataclass(frozen=True, slots=True)
class Rewards:
    """Scores by rollout. A check that failed is counted apart from a wrong answer, and scores 0."""

    scores: list[float]
    failures: list[str]  # why, one text per failed check

    @property
    def failed_fraction(self) -> float:
        return len(self.failures) / len(self.scores)


@dataclass(frozen=True, slots=True)
class Check:
    """One under way."""

    name: str
    future: Any


def _check(reward: str, prompt: str, response: str, answer: str) -> float:
    score = float(resolve_reward(reward)(prompt, response, answer))
    if not math.isfinite(score):
        raise ValueError(f"returned {score}")
    return score


class RewardPool:
    """A few processes that live as long as the run."""

    def __init__(self, config: RewardPoolConfig) -> None:
        self._config = config
        # Not forked: the driver has threads of Ray and torch, whose locks a fork would copy as they stand.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPool(max_workers=config.num_processes, context=context)

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.stop()
        self._pool.join()

    def submit(self, rollouts: Sequence[Rollout]) -> list[Check]:
        """Starts r(x, y) of every rollout, as soon as a process is free."""
        return [
            Check(
                f"{r.prompt.reward} on prompt {r.prompt.id}",
                self._pool.schedule(
                    _check,
                    args=(r.prompt.reward, r.prompt.text, r.text, r.prompt.answer),
                    timeout=self._config.deadline_s,
                ),
            )
            for r in rollouts
        ]

    def collect(self, checks: Sequence[Check]) -> Rewards:
        """Waits for checks; scores in their order.

        Raises:
            RuntimeError: more checks crashed or timed out than ``rewards.max_failed_fraction``.
        """
        scores, failures = [], []
        for check in checks:
            name = check.name
            try:
                score = check.future.result()
            except CheckTimeout:
                failures.append(f"{name}: no answer within rewards.deadline_s = {self._config.deadline_s:g} s")
                score = 0.0
            except ProcessExpired as error:
                failures.append(f"{name}: its process died ({error})")
                score = 0.0
            except Exception as error:  # a verifier is the user's code: whatever it raises is a failed check
                failures.append(f"{name}: {type(error).__name__}: {error}")
                score = 0.0
            scores.append(score)
        rewards = Rewards(scores, failures)
        if rewards.failed_fraction > self._config.max_failed_fraction:
            raise RuntimeError(
                f"{len(failures)} of {len(scores)} reward checks failed, more than rewards.max_failed_fraction = "
                f"{self._config.max_failed_fraction:g}; the first: {failures[0]}"
            )
        return rewards
