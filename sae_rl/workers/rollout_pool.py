"""The driver's handle on all rollout engines: a prompt goes to the least loaded engine, and groups come as they finish.

One engine samples all responses to a prompt, so it reads the prompt once. Groups that a lost engine had not finished go to
other engines. Its replacement gets the current weights before any work.
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

UNSYNCED = "default"  # vLLM's name for the version of weights that it loaded from disk


class PendingGroups:
    """Implements `sae_rl.protocols.Groups`."""

    def __init__(self, pool: RolloutPool, group_size: int, sampling: Sampling) -> None:
        self._pool, self._group_size, self._sampling = pool, group_size, sampling
        self.num_pending = 0
        self.finished: deque[list[Rollout]] = deque()

    def add(self, prompts: Sequence[Prompt], seed_name: str) -> None:
        for prompt in prompts:
            seeds = [(seed_name, prompt.id, sample) for sample in range(self._group_size)]
            self._pool.submit(Job(prompt, [self._pool.request(prompt, seed, self._sampling) for seed in seeds], self))
        self.num_pending += len(prompts)

    def __iter__(self) -> Iterator[list[Rollout]]:
        return self

    def __next__(self) -> list[Rollout]:
        while not self.finished:
            if not self.num_pending:
                raise StopIteration
            self._pool.poll()
        self.num_pending -= 1
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
        self._sleeps = self._is_asleep = config.cluster.colocate_rollout  # such engines start asleep
        self.lock = threading.RLock()

    def generate(
        self, prompts: Sequence[Prompt], *, group_size: int, sampling: Sampling, seed_name: str
    ) -> Iterator[list[Rollout]]:
        groups = self.open(group_size=group_size, sampling=sampling)
        groups.add(prompts, seed_name)
        return groups

    def open(self, *, group_size: int, sampling: Sampling) -> PendingGroups:
        return PendingGroups(self, group_size, sampling)

    def submit(self, job: Job) -> None:
        with self.lock:
            self.wake()
            self._queue.append(job)

    def sleep(self) -> None:
        """Engines that share the learners' GPUs free them. Other engines do nothing."""
        if self._sleeps and not self._is_asleep:
            self._group.run(lambda worker: worker.sleep.remote(), self.engines.ready)
            self._is_asleep = True

    def wake(self) -> None:
        if self._is_asleep:
            self._group.run(lambda worker: worker.wake.remote(), self.engines.ready)
            self._is_asleep = False

    def request(self, prompt: Prompt, seed: tuple[str | int | None, ...], sampling: Sampling) -> Request:
        return Request(prompt_token_ids=prompt.token_ids, sampling=sampling, seed=derive_seed(self._config.seed, *seed))

    def generate_on(self, ranks: Sequence[int], prompts: Sequence[Prompt], sampling: Sampling) -> list[Rollout]:
        """One response to each prompt from each of these engines, engine after engine, for the check of a weight sync."""
        engines = [engine for engine in self.engines if engine.rank in ranks]
        requests = [self.request(prompt, ("probe", engines[0].version, prompt.id), sampling) for prompt in prompts]
        answers = self._group.run(lambda worker: worker.generate.remote(requests), [e.rank for e in engines])
        return [
            _rollout(Job(prompt, requests, None, since=engine.version), 0, sample, engine)
            for engine, answer in zip(engines, answers, strict=True)
            for prompt, sample in zip(prompts, answer, strict=True)
        ]

    def interrupt(self) -> None:
        self._interrupted = True

    def poll(self) -> None:
        """Gives engines work, waits for a moment, and takes in the answers."""
        with self.lock:
            self._check_interrupted()
            self._answered_at += time.monotonic() - self._polled_at  # time between two polls is no delay of an engine
            self._dispatch()
            calls = self.engines.calls()
        done = self.engines.wait(calls)
        waited_until = time.monotonic()
        with self.lock:
            self._check_interrupted()
            for engine, job, samples in self.engines.take(done):
                self._answered_at = waited_until
                job.owner.finished.append([_rollout(job, i, sample, engine) for i, sample in enumerate(samples)])
            if not self.engines.ready:  # starting a replacement has a deadline of its own
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
        """Gives each engine one group more than it decodes at once, so that it never idles. The emptiest comes first."""
        while self._queue and (engine := self.engines.with_room()) is not None:
            self.engines.ask(engine, self._queue.popleft())


def _rollout(job: Job, index: int, sample: Sample, engine: Engine) -> Rollout:
    """An engine's answer as a rollout.

    Raises:
        RuntimeError: a token was sampled from weights that the engine cannot have had since it got the request.
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
        token_ids=torch.tensor(sample.token_ids, dtype=torch.int32),
        rollout_logprobs=torch.tensor(sample.logprobs, dtype=torch.float32),
        text=sample.text,
        finish_reason=sample.finish_reason,
        policy_versions=torch.tensor(versions, dtype=torch.int32).repeat_interleave(counts),
        temperature=job.requests[index].sampling.temperature,
    )
