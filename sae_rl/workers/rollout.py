"""Rollout workers: one vLLM engine in each, and the driver's handle on all of them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
from ray.actor import ActorHandle

from sae_rl.backends.vllm import Request, RolloutEngine, Sample, prepare_environment
from sae_rl.clock import Clock
from sae_rl.config import Device, ModelConfig, RolloutConfig
from sae_rl.seeds import derive_seed
from sae_rl.types import Prompt, Rollout
from sae_rl.workers.group import Call, Process, WorkerGroup, wait_for

UNSYNCED = "default"  # what vLLM calls the weights that it loaded itself


class RolloutWorker(Process):
    """An actor with an event loop; vLLM's engine and its workers are child processes of it."""

    async def start(
        self, model: ModelConfig, rollout: RolloutConfig, device: Device, threads: int, max_model_tokens: int, seed: int
    ) -> None:
        self._sockets = tempfile.TemporaryDirectory(prefix="sae_rl_")
        prepare_environment(device, threads, self._sockets.name)
        self._engine = RolloutEngine(model, rollout, device, max_model_tokens=max_model_tokens, seed=seed)

    async def generate(self, requests: Sequence[Request]) -> list[Sample]:
        return await self._engine.generate(requests)

    async def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        await self._engine.init_weight_transfer(init_info)

    async def start_weight_update(self) -> None:
        await self._engine.start_weight_update()

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        await self._engine.update_weights(update_info)

    async def finish_weight_update(self, version: str) -> None:
        await self._engine.finish_weight_update(version)

    async def close(self) -> None:
        self._sockets.cleanup()  # first: the driver does not wait for long, and connections outlive their names
        self._engine.close()


class RolloutPool:
    """All engines. Groups are dealt to them in turn, so that a group's prompt is read once and cached."""

    def __init__(self, group: WorkerGroup, seed: int, clock: Clock) -> None:
        self._group = group
        self._clock = clock
        self._seed = seed
        self.version: int | None = None  # of the weights that every engine holds; None: those of model.path

    @property
    def engines(self) -> list[ActorHandle]:
        return self._group.workers

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        group_size: int,
        max_tokens: int,
        temperature: float,
        top_p: float = 1.0,
        stream: str,
    ) -> list[Rollout]:
        """``group_size`` responses to each prompt, group after group.

        Seeds derive from (run seed, ``stream``, prompt id, sample), so that a response does not depend on what else is
        sampled with it.

        Raises:
            WorkerError: an engine died, failed or did not answer.
            RuntimeError: a response was sampled from other weights than the last sync's.
        """
        requests = [
            [
                Request(
                    prompt_token_ids=prompt.token_ids,
                    max_tokens=max_tokens,
                    temperature=temperature,
                    top_p=top_p,
                    seed=derive_seed(self._seed, stream, prompt.id, sample),
                )
                for sample in range(group_size)
            ]
            for prompt in prompts
        ]
        count = len(self.engines)
        shares = [[request for group in requests[i::count] for request in group] for i in range(count)]
        references = [engine.generate.remote(share) for engine, share in zip(self.engines, shares, strict=True)]
        with self._clock.phase("generate"):
            answers = wait_for([Call(self._group, references)], self._group.timeout_s)[0]
        groups: list[list[Sample] | None] = [
            group for row in zip_longest(*(_chunks(answer, group_size) for answer in answers)) for group in row
        ]
        samples = [sample for group in groups if group is not None for sample in group]
        owners = [(prompt, sample) for prompt in prompts for sample in range(group_size)]
        return [
            self._rollout(prompt, index, sample, temperature)
            for (prompt, index), sample in zip(owners, samples, strict=True)
        ]

    def generate_on_each(
        self, prompts: Sequence[Prompt], *, max_tokens: int, temperature: float
    ) -> list[list[Rollout]]:
        """One response to each prompt from every engine, by engine: what a weight sync is checked with."""
        requests = [
            Request(
                prompt_token_ids=prompt.token_ids,
                max_tokens=max_tokens,
                temperature=temperature,
                top_p=1.0,
                seed=derive_seed(self._seed, "probe", self.version, prompt.id),
            )
            for prompt in prompts
        ]
        answers = self._group.run(lambda engine: engine.generate.remote(requests))
        return [
            [self._rollout(prompt, 0, sample, temperature) for prompt, sample in zip(prompts, answer, strict=True)]
            for answer in answers
        ]

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


def _chunks(samples: list[Sample], size: int) -> list[list[Sample]]:
    return [samples[i : i + size] for i in range(0, len(samples), size)]
