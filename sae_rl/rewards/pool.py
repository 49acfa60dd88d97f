"""Verifiers run outside the driver's process, each check under a deadline: a process that overruns it is killed."""

from __future__ import annotations

import os
import pickle
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType

from pebble import ProcessExpired

from sae_rl.rewards.check import OUT_OF_MEMORY
from sae_rl.rewards.processes import Processes
from sae_rl.rewards.table import isolations_of, resolve
from sae_rl.rewards.verdict import Failed, Sample, Verdict, Verifier
from sae_rl.sandbox.folders import remove
from sae_rl.sandbox.isolation import Asked, Isolation, open_folder
from sae_rl.types import Rollout

GB = 10**9
REMOVE_S = 60.0  # for all temporary files


@dataclass(frozen=True, slots=True)
class Rewards:
    """Outcomes by rollout."""

    outcomes: list[Verdict | Failed]
    failed_score: float = 0.0

    @property
    def scores(self) -> list[float]:
        return [each.score if isinstance(each, Verdict) else self.failed_score for each in self.outcomes]

    @property
    def reasons(self) -> list[str]:
        return [each.why for each in self.outcomes]

    @property
    def failures(self) -> list[str]:
        """Why, one text for each failed check."""
        return [each.why for each in self.outcomes if isinstance(each, Failed)]

    @property
    def failed_fraction(self) -> float:
        return len(self.failures) / len(self.outcomes)


@dataclass(frozen=True, slots=True)
class Check:
    """One under way."""

    name: str
    future: Future[Verdict | Failed]


class RewardPool:
    """A few processes that live as long as the run.

    Args:
        deadline_s: of one check.
        memory_gb: that each process may allocate.
        failed_score: of a check that failed.
        max_failed_fraction: of the checks that are collected together.
        verifiers: by the names that prompts use, besides the ready ones.
    """

    def __init__(
        self,
        *,
        num_processes: int,
        deadline_s: float,
        memory_gb: float,
        failed_score: float,
        max_failed_fraction: float,
        verifiers: Mapping[str, Verifier],
    ) -> None:
        self._deadline_s, self._memory_gb = deadline_s, memory_gb
        self._failed_score, self._max_failed_fraction = failed_score, max_failed_fraction
        self._configured = verifiers
        self._pickled = dict[str, bytes]()
        alone = tuple(pickled(name, verifier) for name, verifier in verifiers.items())
        self._folder = tempfile.mkdtemp(prefix="sae_rl_rewards_", dir=open_folder())
        os.chmod(self._folder, 0o711)  # programs in the sandbox are run by others
        start = (self._folder, int(memory_gb * GB), alone)
        self._processes = Processes(num_processes, deadline_s, start)

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._processes.stop()
        remove(self._folder, REMOVE_S)

    def submit(self, rollouts: Sequence[Rollout]) -> list[Check]:
        """Starts r(x, y) of every rollout, as soon as a process is free."""
        futures = self._processes.ask([(self._verifier(each.prompt.reward), sample_of(each)) for each in rollouts])
        return [
            Check(f"{rollout.prompt.reward} on prompt {rollout.prompt.id}", future)
            for rollout, future in zip(rollouts, futures, strict=True)
        ]

    def _verifier(self, name: str) -> bytes:
        if name not in self._pickled:
            verifier = resolve(name, self._configured)
            self._pickled[name] = pickled(name, (verifier, isolations_of(verifier)))
        return self._pickled[name]

    def collect(self, checks: Sequence[Check]) -> Rewards:
        """Waits for checks; outcomes in their order.

        Raises:
            RuntimeError: more checks failed than ``rewards.max_failed_fraction``.
        """
        rewards = Rewards([self._outcome(check) for check in checks], self._failed_score)
        if rewards.failed_fraction > self._max_failed_fraction:
            raise RuntimeError(
                f"{len(rewards.failures)} of {len(checks)} reward checks failed, more than rewards.max_failed_fraction = "
                f"{self._max_failed_fraction:g}; the first: {rewards.failures[0]}"
            )
        return rewards

    def _outcome(self, check: Check) -> Verdict | Failed:
        self._processes.wait(check.future)
        try:
            outcome = check.future.result()
        except TimeoutError:  # pebble's: what a verifier raises stays in its process
            return Failed(f"{check.name}: no answer within rewards.deadline_s = {self._deadline_s:g} s")
        except ProcessExpired as error:
            if error.exitcode == OUT_OF_MEMORY:
                return Failed(f"{check.name}: it needs more than rewards.memory_gb = {self._memory_gb:g}")
            return Failed(f"{check.name}: its process died ({error})")
        return outcome if isinstance(outcome, Verdict) else Failed(f"{check.name}: {outcome.why}")


def pickled(name: str, sent: Verifier | tuple[Verifier, dict[Asked, Isolation]]) -> bytes:
    """As a verifier is sent to the processes, by itself or with what was chosen for it here.

    Raises:
        ValueError: it cannot be sent.
    """
    try:
        return pickle.dumps(sent)
    except Exception as error:  # the user's class
        raise ValueError(
            f"reward {name!r} cannot be sent to another process: {type(error).__name__}: {error}; let a verifier hold "
            "nothing but its knobs, and make the rest when it is called"
        ) from None


def sample_of(rollout: Rollout) -> Sample:
    return Sample(
        prompt=rollout.prompt.text,
        response=rollout.text,
        answer=rollout.prompt.answer,
        num_tokens=rollout.token_ids.numel(),
        truncated=rollout.finish_reason == "length",
    )
