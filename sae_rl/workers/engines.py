"""The state of every rollout engine of a run: whether it can serve, its pending groups, and its replacement when lost."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray

from sae_rl.backends.vllm import EngineLost, Request, Sample
from sae_rl.config.schema import Config
from sae_rl.types import Prompt
from sae_rl.workers.group import WorkerError, WorkerGroup, kill_processes

MAX_ATTEMPTS = 3  # engines that may be lost while they sample the same group
LISTEN_S = 1.0  # the longest wait between two looks at all engines


@dataclass(eq=False)
class Job:
    """One group: the requests for all responses to a prompt, for one engine."""

    prompt: Prompt
    requests: list[Request]
    owner: Any  # the `PendingGroups` that the finished group goes to
    since: int | None = None  # version of the engine's weights when it got the requests
    attempts: int = 0


@dataclass(eq=False)
class Engine:
    """One rollout engine as the driver sees it."""

    rank: int
    is_ready: bool = True  # false: it loads its model, or waits for the current weights
    version: int | None = None  # version of its weights; None: the weights of model.path
    jobs: dict[Any, Job] = field(default_factory=dict)  # pending groups, by remote call
    starting: Any = None  # the pending remote call that loads a replacement's model
    started_at: float = 0.0
    check: Any = None  # the pending remote call of a health check
    checked_at: float = 0.0

    @property
    def num_responses(self) -> int:
        return sum(len(job.requests) for job in self.jobs.values())


class Engines:
    """All engines of a run.

    Args:
        start: makes a new worker load ``model.path``; returns the pending remote call.
        sync_one: sends the policy's weights to the engine of a rank, unless they are changing right now.
        note: prints a line for the user.
    """

    def __init__(
        self,
        group: WorkerGroup,
        config: Config,
        start: Callable[[Any], Any],
        sync_one: Callable[[int], None],
        note: Callable[[str], None],
    ) -> None:
        self.group = group
        self.queue: deque[Job] = deque()  # groups that no engine has
        self._config = config
        self._start, self._sync_one, self._note = start, sync_one, note
        self._engines = [Engine(rank) for rank in range(len(group.workers))]
        self._is_synced = False  # true: every replacement needs the policy's weights
        self._listened_at = time.monotonic()
        self.num_lost = 0

    def __iter__(self) -> Iterator[Engine]:
        return iter(self._engines)

    @property
    def ready(self) -> list[int]:
        """Ranks of the engines that can serve."""
        return [engine.rank for engine in self._engines if engine.is_ready]

    @property
    def is_idle(self) -> bool:
        """Whether every engine runs and no request is pending."""
        return not self.queue and all(engine.is_ready and not engine.jobs for engine in self._engines)

    def hold(self, ranks: Sequence[int], version: int) -> None:
        """Notes that these engines now have the weights of this version and can serve."""
        self._is_synced = True
        for rank in ranks:
            self._engines[rank].is_ready, self._engines[rank].version = True, version

    def with_room(self) -> Engine | None:
        """The engine with the fewest pending responses; None: every engine is full."""
        room = [e for e in self._engines if e.is_ready and e.num_responses < self._config.rollout.max_num_seqs]
        return min(room, key=lambda engine: engine.num_responses, default=None)

    def ask(self, engine: Engine, job: Job) -> None:
        if not engine.jobs:
            engine.checked_at = time.monotonic()
        job.since = engine.version
        engine.jobs[self.group.workers[engine.rank].generate.remote(job.requests)] = job

    def wait(self, calls: Sequence[Any]) -> list[Any]:
        """Waits for a moment for these calls. Time in which the driver did not listen is not an engine's delay."""
        away = time.monotonic() - self._listened_at
        for engine in self._engines:
            engine.checked_at += away if engine.check is not None else 0.0
        if calls:
            timeout = min(LISTEN_S, self._config.rollout.health_timeout_s / 4)
            ray.wait(list(calls), num_returns=1, timeout=timeout)
        else:
            time.sleep(LISTEN_S / 10)  # the policy works; a replacement waits for its weights
        # Takes all answers that are there, so that no engine counts as late because the driver did not look.
        done = _answered(calls)
        self._listened_at = time.monotonic()
        return done

    def calls(self) -> list[Any]:
        """All pending remote calls."""
        return [call for e in self._engines for call in (*e.jobs, e.check, e.starting) if call is not None]

    def take(self, done: Sequence[Any]) -> Iterator[tuple[Engine, Job, list[Sample]]]:
        """Yields finished groups. Checks on engines that are silent, dead or starting."""
        self.settle()
        for engine in self._engines:
            for call in done:
                if call in engine.jobs:
                    with self._losing(engine, _is_loss):
                        samples: list[Sample] = self.group.result(engine.rank, call)
                        yield engine, engine.jobs.pop(call), samples
            self._check_on(engine, done)
        self._check_deadlines()

    def settle(self) -> list[int]:
        """Admits replacements that have started. Returns the ranks of all engines that can take weights."""
        starting = {engine.starting: engine for engine in self._engines if engine.starting is not None}
        for call in _answered(list(starting)):
            engine = starting[call]
            engine.starting = None
            with self._losing(engine):
                self.group.result(engine.rank, call)
                self.group.locate(self._config.cluster.call_timeout_s, [engine.rank])
                engine.is_ready = not self._is_synced
        return [engine.rank for engine in self._engines if engine.starting is None]

    def replace_all(self, why: str) -> list[int]:
        """Replaces all engines and waits until the new ones can take weights. Returns their ranks.

        Raises:
            WorkerError: too many engines were lost.
        """
        for engine in self._engines:
            if engine.starting is None:
                self._lose(engine, why)
        while starting := [engine.starting for engine in self._engines if engine.starting is not None]:
            self.wait(starting)
            self.settle()
            self._check_deadlines()
        return [engine.rank for engine in self._engines]

    def _check_on(self, engine: Engine, done: Sequence[Any]) -> None:
        if not engine.is_ready and engine.starting is None:
            with self._losing(engine, lambda error: error.died != "policy"):
                self._sync_one(engine.rank)
        if engine.check is not None and engine.check in done:
            with self._losing(engine):
                self.group.result(engine.rank, engine.check)
                engine.check, engine.checked_at = None, time.monotonic()
        idle_s = time.monotonic() - engine.checked_at
        if engine.jobs and engine.check is None and idle_s > self._config.rollout.health_timeout_s / 4:
            engine.check, engine.checked_at = self.group.workers[engine.rank].check.remote(), time.monotonic()

    def _check_deadlines(self) -> None:
        health_s, start_s = self._config.rollout.health_timeout_s, self._config.cluster.start_timeout_s
        for engine in self._engines:
            if _is_late(engine.check, engine.checked_at, health_s):
                self._lose(engine, f"it did not answer within rollout.health_timeout_s = {health_s:g} s")
            elif _is_late(engine.starting, engine.started_at, start_s):
                self._lose(engine, f"it did not start within cluster.start_timeout_s = {start_s:g} s")

    @contextmanager
    def _losing(self, engine: Engine, is_loss: Callable[[WorkerError], bool] = lambda error: True) -> Iterator[None]:
        """Replaces the engine if a `WorkerError` inside means that it is lost."""
        try:
            yield
        except WorkerError as error:
            if not is_loss(error):
                raise
            self._lose(engine, str(error))

    def _lose(self, engine: Engine, why: str) -> None:
        """Kills an engine's processes, gives its groups to other engines, and starts a replacement."""
        self.num_lost += 1
        self._note(f"rollout engine {engine.rank} is lost, with {engine.num_responses} pending responses: {why}")
        for job in reversed(engine.jobs.values()):
            job.attempts += 1
            if job.attempts >= MAX_ATTEMPTS:
                raise WorkerError(
                    f"prompt {job.prompt.id!r} was pending on {MAX_ATTEMPTS} engines that were lost; the last: {why}"
                )
            self.queue.appendleft(job)
        place = self.group.places[engine.rank]
        if place is not None:
            kill_processes(place)
        if self.num_lost > self._config.rollout.max_engine_losses:
            raise WorkerError(
                f"{self.num_lost} rollout engines were lost, more than rollout.max_engine_losses = "
                f"{self._config.rollout.max_engine_losses}; the last: {why}"
            )
        engine.jobs, engine.check, engine.is_ready, engine.version = {}, None, False, None
        engine.starting, engine.started_at = self._start(self.group.replace(engine.rank)), time.monotonic()


def _answered(calls: Sequence[Any]) -> list[Any]:
    """The remote calls that have been answered by now."""
    return ray.wait(list(calls), num_returns=len(calls), timeout=0)[0] if calls else []


def _is_late(call: Any, since: float, limit_s: float) -> bool:
    """Whether a call is overdue. A call that was answered while the driver did not look is not."""
    return call is not None and time.monotonic() - since > limit_s and not _answered([call])


def _is_loss(error: WorkerError) -> bool:
    """Whether the engine is gone; otherwise it runs, and a request failed."""
    cause = error.__cause__
    return not isinstance(cause, ray.exceptions.RayTaskError) or isinstance(cause.cause, EngineLost)
