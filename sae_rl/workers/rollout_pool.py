"""The driver's handle on all rollout engines: prompts go to the least loaded one, responses come as they are done.

A group, the responses to one prompt, is asked of one engine, which so reads the prompt once. Engines are given work as they
answer; what a lost engine had not answered goes to others, and its replacement gets the current weights before any work.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence

import torch

from sae_rl.backends.vllm import Request, Sample
from sae_rl.config.schema import Config
from sae_rl.seeds import derive_seed
from sae_rl.types import Prompt, Rollout, Sampling
from sae_rl.workers.engines import Engine, Engines, Job
from sae_rl.workers.group import WorkerError

UNSYNCED = "default"  # what vLLM calls the weights that it loaded itself


class Stream:
    """Groups under way, to which more may be added; iterating gives each as soon as it is done, in any order."""

    def __init__(self, pool: RolloutPool, group_size: int, sampling: Sampling) -> None:
        self._pool, self._group_size, self._sampling = pool, group_size, sampling
        self.num_open = 0
        self.finished: deque[list[Rollout]] = deque()

    def add(self, prompts: Sequence[Prompt], seed_name: str) -> None:
        """More groups; seeds derive from (run seed, ``seed_name``, prompt id, sample), and nothing else."""
        for prompt in prompts:
            seeds = [(seed_name, prompt.id, sample) for sample in range(self._group_size)]
            self._pool.submit(Job(prompt, [self._pool.request(prompt, seed, self._sampling) for seed in seeds], self))
        self.num_open += len(prompts)

    def __iter__(self) -> Iterator[list[Rollout]]:
        return self

    def __next__(self) -> list[Rollout]:
        while not self.finished:
            if not self.num_open:
                raise StopIteration
            self._pool.poll()
        self.num_open -= 1
        return self.finished.popleft()


class RolloutPool:
    """Implements `sae_rl.protocols.RolloutEngines`.

    One thread may sample while another sends weights, which it does under ``lock``.
    """

    def __init__(self, engines: Engines, config: Config) -> None:
        self.engines, self._config = engines, config
        self._group, self._queue = engines.group, engines.queue
        self._answered_at = self._polled_at = time.monotonic()
        self._interrupted = False
        self._sleeps = self._is_asleep = config.cluster.colocate_rollout  # they start asleep
        self.lock = threading.RLock()

    def generate(
        self, prompts: Sequence[Prompt], *, group_size: int, sampling: Sampling, seed_name: str
    ) -> Iterator[list[Rollout]]:
        """``group_size`` responses to each prompt, a group as soon as it is done, in any order.

        A response does not depend on what else is sampled with it, nor on which engine it came from.

        Raises:
            WorkerError: no engine is left, or a prompt outlived too many of them.
            RuntimeError: a response was sampled from other weights than its engine was sent, or `interrupt` was called.
        """
        groups = self.open(group_size=group_size, sampling=sampling)
        groups.add(prompts, seed_name)
        return groups

    def open(self, *, group_size: int, sampling: Sampling) -> Stream:
        """Groups that are added one after the other, such as those of several steps."""
        return Stream(self, group_size, sampling)

    def submit(self, job: Job) -> None:
        with self.lock:
            self.wake()
            self._queue.append(job)

    def sleep(self) -> None:
        """Engines on the learners' GPUs leave those to them; others do nothing."""
        if self._sleeps and not self._is_asleep:
            self._group.run_on(self.engines.ready, lambda worker: worker.sleep.remote())
            self._is_asleep = True

    def wake(self) -> None:
        if self._is_asleep:
            self._group.run_on(self.engines.ready, lambda worker: worker.wake.remote())
            self._is_asleep = False

    def request(self, prompt: Prompt, seed: tuple[str | int | None, ...], sampling: Sampling) -> Request:
        return Request(prompt_token_ids=prompt.token_ids, sampling=sampling, seed=derive_seed(self._config.seed, *seed))

    def generate_on(self, ranks: Sequence[int], prompts: Sequence[Prompt], sampling: Sampling) -> list[list[Rollout]]:
        """One response to each prompt from each of these engines: what a weight sync is checked with."""
        engines = [engine for engine in self.engines if engine.rank in ranks]
        requests = [self.request(prompt, ("probe", engines[0].version, prompt.id), sampling) for prompt in prompts]
        answers = self._group.run_on([e.rank for e in engines], lambda engine: engine.generate.remote(requests))
        return [
            [
                _rollout(Job(prompt, requests, None, since=engine.version), 0, sample, engine)
                for prompt, sample in zip(prompts, answer, strict=True)
            ]
            for engine, answer in zip(engines, answers, strict=True)
        ]

    def interrupt(self) -> None:
        """Ends the sampling that another thread waits for: it raises there, now and for ever."""
        self._interrupted = True

    def poll(self) -> None:
        """Hands out work, and takes in what was answered, if anything was within a moment."""
        with self.lock:
            self._check_interrupted()
            self._answered_at += time.monotonic() - self._polled_at  # nobody waited in between
            self._dispatch()
            calls = self.engines.calls()
        done = self.engines.wait(calls)
        waited_until = time.monotonic()
        with self.lock:
            self._check_interrupted()
            for engine, job, samples in self.engines.take(done):
                self._answered_at = waited_until
                job.stream.finished.append([_rollout(job, i, sample, engine) for i, sample in enumerate(samples)])
            if not self.engines.ready:  # a replacement has a deadline of its own
                self._answered_at = waited_until
            self._polled_at = time.monotonic()
        if waited_until - self._answered_at > self._config.cluster.call_timeout_s:
            raise WorkerError(
                f"no rollout engine answered within cluster.call_timeout_s = {self._config.cluster.call_timeout_s:g} s"
                f"{self._group.last_lines(self.engines.ready[0])}"
            )

    def _check_interrupted(self) -> None:
        if self._interrupted:
            raise RuntimeError("sampling was interrupted")

    def _dispatch(self) -> None:
        """Fills engines, the emptiest first, a group beyond what they decode at once, so that none waits for more."""
        while self._queue and (engine := self.engines.with_room()) is not None:
            self.engines.ask(engine, self._queue.popleft())


def _rollout(job: Job, index: int, sample: Sample, engine: Engine) -> Rollout:
    """
    Raises:
        RuntimeError: a token was sampled by weights that the engine should not have had since it was asked.
    """
    versions = [0 if version == UNSYNCED else int(version) for version, _ in sample.weight_versions]
    unsynced = any(version == UNSYNCED for version, _ in sample.weight_versions)
    allowed = (job.since or 0, engine.version or 0)
    if (unsynced and job.since is not None) or not allowed[0] <= min(versions) <= max(versions) <= allowed[1]:
        raise RuntimeError(
            f"stale weights: prompt {job.prompt.id!r} was answered by weights {sample.weight_versions}, but engine "
            f"{engine.rank} was sent {allowed[0]} before it was asked, and {allowed[1]} last"
        )
    counts = torch.tensor([count for _, count in sample.weight_versions])
    return Rollout(
        prompt=job.prompt,
        sample=index,
        token_ids=torch.tensor(sample.token_ids, dtype=torch.int64),
        rollout_logprobs=torch.tensor(sample.logprobs, dtype=torch.float32),
        text=sample.text,
        finish_reason=sample.finish_reason,
        policy_versions=torch.tensor(versions).repeat_interleave(counts),
        temperature=job.requests[index].sampling.temperature,
    )
