"""The driver's handle on all rollout engines: prompts go to the least loaded one, and an engine that is lost is replaced.

A group, the responses to one prompt, is asked of one engine, which so reads the prompt once. Engines are given work as they
answer; what a lost engine had not answered goes to others, and its replacement gets the current weights before any work.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import torch

from sae_rl.backends.vllm import EngineLost, Request, Sample
from sae_rl.config import Config
from sae_rl.seeds import derive_seed
from sae_rl.types import Prompt, Rollout
from sae_rl.workers.group import WorkerError, WorkerGroup, kill_processes

UNSYNCED = "default"  # what vLLM calls the weights that it loaded itself
MAX_ATTEMPTS = 3  # engines that a group may outlive


@dataclass
class Job:
    """One group: the responses to a prompt that are asked of one engine."""

    index: int
    prompt: Prompt
    requests: list[Request]
    attempts: int = 0


@dataclass
class Engine:
    """One rollout worker as the pool sees it. ``ready`` is false from a loss until its replacement has weights."""

    rank: int
    ready: bool = True
    jobs: dict[Any, Job] = field(default_factory=dict)  # what it was asked and has not answered
    starting: Any = None  # its replacement's call to start
    started_at: float = 0.0
    check: Any = None  # a health check under way
    checked_at: float = 0.0

    @property
    def num_responses(self) -> int:
        return sum(len(job.requests) for job in self.jobs.values())


class RolloutPool:
    """All engines of a run.

    Args:
        start: asks a new worker to load ``model.path``, and returns the call.
        refit: gives the engine of a rank the current weights and compares its logprobs; it raises if they differ.
        note: tells the reader of the console.
    """

    def __init__(
        self,
        group: WorkerGroup,
        config: Config,
        start: Callable[[Any], Any],
        refit: Callable[[int], None],
        note: Callable[[str], None],
    ) -> None:
        self._group, self._config = group, config
        self._start, self._refit, self._note = start, refit, note
        self._engines = [Engine(rank) for rank in range(len(group.workers))]
        self.version: int | None = None  # of the weights that every ready engine holds; None: those of model.path
        self.num_losses = 0

    @property
    def ready(self) -> list[int]:
        """Ranks of the engines that can serve."""
        return [engine.rank for engine in self._engines if engine.ready]

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        group_size: int,
        max_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        stream: str,
    ) -> Iterator[list[Rollout]]:
        """``group_size`` responses to each prompt, a group as soon as it is done, in any order.

        Seeds derive from (run seed, ``stream``, prompt id, sample), so that a response does not depend on what else is
        sampled with it, nor on which engine it came from.

        Raises:
            WorkerError: no engine is left, or a prompt outlived too many of them.
            RuntimeError: a response was sampled from other weights than the last sync's.
        """
        jobs = deque(
            Job(
                index,
                prompt,
                [
                    Request(
                        prompt_token_ids=prompt.token_ids,
                        max_tokens=max_tokens,
                        temperature=temperature,
                        top_p=top_p,
                        seed=derive_seed(self._config.seed, stream, prompt.id, sample),
                    )
                    for sample in range(group_size)
                ],
            )
            for index, prompt in enumerate(prompts)
        )
        for job, samples in self._serve(jobs):
            yield [self._rollout(job.prompt, i, sample, temperature) for i, sample in enumerate(samples)]

    def generate_on(
        self, ranks: Sequence[int], prompts: Sequence[Prompt], *, max_tokens: int, temperature: float
    ) -> list[list[Rollout]]:
        """One response to each prompt from each of these engines: what a weight sync is checked with."""
        requests = [
            Request(
                prompt_token_ids=prompt.token_ids,
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=1.0,
                seed=derive_seed(self._config.seed, "probe", self.version, prompt.id),
            )
            for prompt in prompts
        ]
        answers = self._group.run_on(ranks, lambda engine: engine.generate.remote(requests))
        return [
            [self._rollout(prompt, 0, sample, temperature) for prompt, sample in zip(prompts, answer, strict=True)]
            for answer in answers
        ]

    def settle(self) -> list[int]:
        """Takes in replacements that have started and have no weights yet: their ranks, beside those that are ready."""
        started = [engine for engine in self._engines if engine.starting is not None]
        done, _ = ray.wait([e.starting for e in started], num_returns=len(started), timeout=0) if started else ([], [])
        for engine in started:
            if engine.starting in done and self._has_started(engine):
                engine.ready = True
        return self.ready

    def replace(self, why: str) -> None:
        """Gives up all engines, and waits for their replacements, which have the weights of ``model.path``.

        Raises:
            WorkerError: they did not start, or too many engines were lost.
        """
        for engine in self._engines:
            if engine.starting is None:
                self._lose(engine, why, deque())
        while any(engine.starting is not None for engine in self._engines):
            self._wait([engine.starting for engine in self._engines if engine.starting is not None])
            self.settle()
            self._check_deadlines(deque())
        if not self.ready:
            raise WorkerError(f"no rollout engine is left: {why}")

    def _serve(self, jobs: deque[Job]) -> Iterator[tuple[Job, list[Sample]]]:
        last_answer = time.monotonic()
        for engine in self._engines:  # what was asked in an earlier stream may have been answered since
            engine.check, engine.checked_at = None, last_answer
        while jobs or any(engine.jobs for engine in self._engines):
            self._dispatch(jobs)
            done = self._wait(
                [
                    call
                    for engine in self._engines
                    for call in (*engine.jobs, engine.check, engine.starting)
                    if call is not None
                ]
            )
            for engine in self._engines:
                for call in done:
                    if call in engine.jobs and (answer := self._answer(engine, call, jobs)) is not None:
                        last_answer = time.monotonic()
                        yield answer
                self._look_after(engine, done, jobs)
            self._check_deadlines(jobs)
            if time.monotonic() - last_answer > self._config.cluster.call_timeout_s:
                raise WorkerError(
                    f"no rollout engine answered within cluster.call_timeout_s = {self._config.cluster.call_timeout_s:g} s"
                    f"{self._group.last_lines(self.ready[0] if self.ready else 0)}"
                )

    def _wait(self, calls: list[Any]) -> list[Any]:
        if not calls:
            raise WorkerError("no rollout engine is left, and none can be started")
        ray.wait(calls, num_returns=1, timeout=self._config.rollout.health_timeout_s / 4)
        # All that have answered, so that none is taken for late that only nobody listened to.
        done: list[Any] = ray.wait(calls, num_returns=len(calls), timeout=0)[0]
        return done

    def _dispatch(self, jobs: deque[Job]) -> None:
        """Fills engines, the emptiest first, a group beyond what they decode at once, so that none waits for more."""
        while jobs:
            open_engines = [e for e in self._engines if e.ready and e.num_responses < self._config.rollout.max_num_seqs]
            if not open_engines:
                return
            engine = min(open_engines, key=lambda e: e.num_responses)
            job = jobs.popleft()
            if not engine.jobs:
                engine.checked_at = time.monotonic()
            engine.jobs[self._group.workers[engine.rank].generate.remote(job.requests)] = job

    def _answer(self, engine: Engine, call: Any, jobs: deque[Job]) -> tuple[Job, list[Sample]] | None:
        try:
            samples = self._group.result(engine.rank, call)
        except WorkerError as error:
            if not _is_loss(error):
                raise
            self._lose(engine, str(error), jobs)
            return None
        return engine.jobs.pop(call), samples

    def _look_after(self, engine: Engine, done: list[Any], jobs: deque[Job]) -> None:
        """Health checks of an engine with work, and what a replacement needs before it gets any."""
        if engine.starting is not None and engine.starting in done and self._has_started(engine):
            try:
                if self.version is not None:
                    self._refit(engine.rank)
            except WorkerError as error:
                if error.died == "policy":
                    raise
                self._lose(engine, str(error), jobs)
                return
            engine.ready = True
        if engine.check is not None and engine.check in done:
            try:
                self._group.result(engine.rank, engine.check)
            except WorkerError as error:
                self._lose(engine, str(error), jobs)
                return
            engine.check, engine.checked_at = None, time.monotonic()
        idle_s = time.monotonic() - engine.checked_at
        if engine.jobs and engine.check is None and idle_s > self._config.rollout.health_timeout_s / 4:
            engine.check, engine.checked_at = self._group.workers[engine.rank].check.remote(), time.monotonic()

    def _check_deadlines(self, jobs: deque[Job]) -> None:
        now, limit = time.monotonic(), self._config.rollout.health_timeout_s
        for engine in self._engines:
            if engine.check is not None and now - engine.checked_at > limit:
                self._lose(engine, f"it did not answer within rollout.health_timeout_s = {limit:g} s", jobs)
            elif engine.starting is not None and now - engine.started_at > self._config.cluster.start_timeout_s:
                seconds = self._config.cluster.start_timeout_s
                self._lose(engine, f"it did not start within cluster.start_timeout_s = {seconds:g} s", jobs)

    def _has_started(self, engine: Engine) -> bool:
        call, engine.starting = engine.starting, None
        try:
            self._group.result(engine.rank, call)
            self._group.locate_one(engine.rank)
        except WorkerError as error:
            self._lose(engine, str(error), deque())
            return False
        return True

    def _lose(self, engine: Engine, why: str, jobs: deque[Job]) -> None:
        """Ends what is left of an engine, hands its work to others, and starts another in its place."""
        self.num_losses += 1
        self._note(f"rollout engine {engine.rank} is lost, with {engine.num_responses} responses under way: {why}")
        for job in reversed(engine.jobs.values()):
            job.attempts += 1
            if job.attempts >= MAX_ATTEMPTS:
                raise WorkerError(
                    f"prompt {job.prompt.id!r} was under way on {MAX_ATTEMPTS} engines that were lost; the last: {why}"
                )
            jobs.appendleft(job)
        place = self._group.place(engine.rank)
        if place is not None:
            kill_processes(place)
        if self.num_losses > self._config.rollout.max_engine_losses:
            raise WorkerError(
                f"{self.num_losses} rollout engines were lost, more than rollout.max_engine_losses = "
                f"{self._config.rollout.max_engine_losses}; the last: {why}"
            )
        engine.jobs, engine.check, engine.ready = {}, None, False
        engine.starting, engine.started_at = self._start(self._group.replace(engine.rank)), time.monotonic()

    def _rollout(self, prompt: Prompt, index: int, sample: Sample, temperature: float) -> Rollout:
        if sample.weight_version != (UNSYNCED if self.version is None else str(self.version)):
            raise RuntimeError(
                f"stale weights: prompt {prompt.id!r} was answered by weights {sample.weight_version!r}, but the last "
                f"sync sent {self.version}"
            )
        return Rollout(
            prompt=prompt,
            sample=index,
            token_ids=torch.tensor(sample.token_ids, dtype=torch.int64),
            rollout_logprobs=torch.tensor(sample.logprobs, dtype=torch.float32),
            text=sample.text,
            finish_reason=sample.finish_reason,
            policy_version=0 if self.version is None else self.version,
            temperature=temperature,
        )


def _is_loss(error: WorkerError) -> bool:
    """Whether the engine is gone, rather than unable to do what it was asked."""
    cause = error.__cause__
    return not isinstance(cause, ray.exceptions.RayTaskError) or isinstance(cause.cause, EngineLost)
