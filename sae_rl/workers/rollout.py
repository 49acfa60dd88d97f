"""Rollout workers: one vLLM engine in each."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

from sae_rl.backends.vllm import Request, RolloutEngine, Sample, prepare_environment
from sae_rl.config.schema import Config, Device, ModelConfig, RolloutConfig
from sae_rl.workers.group import Process


class RolloutWorker(Process):
    """An actor with an event loop. vLLM's engine and its worker processes are children of it."""

    @staticmethod
    def is_needed(config: Config) -> bool:
        return config.replay is None

    @staticmethod
    def settings(config: Config) -> tuple[object, ...]:
        cluster, max_tokens = config.cluster, config.task.max_prompt_tokens + config.rollout.max_response_tokens
        return (
            *(config.model, config.rollout, cluster.device, cluster.rollout.threads_per_worker),
            *(cluster.colocate_rollout, max_tokens, config.seed),
        )

    async def start(
        self,
        model: ModelConfig,
        rollout: RolloutConfig,
        device: Device,
        threads: int,
        sleeps: bool,
        max_model_tokens: int,
        seed: int,
    ) -> None:
        """Loads the engine. ``sleeps``: it shares the learners' GPUs, so it starts asleep."""
        self._sockets = tempfile.TemporaryDirectory(prefix="sae_rl_")
        prepare_environment(device, threads, self._sockets.name, sleeps=sleeps)
        self._engine = RolloutEngine(
            model, rollout, device, sleeps=sleeps, max_model_tokens=max_model_tokens, seed=seed
        )
        if sleeps:
            await self._engine.sleep()  # the learners load next

    async def generate(self, requests: Sequence[Request]) -> list[Sample]:
        return await self._engine.generate(requests)

    async def check(self) -> None:
        """Returns when vLLM's own process answers."""
        await self._engine.check()

    async def init_weight_transfer(self, init_info: dict[str, Any]) -> None:
        await self._engine.init_weight_transfer(init_info)

    async def start_weight_update(self) -> None:
        await self._engine.start_weight_update()

    async def update_weights(self, update_info: dict[str, Any]) -> None:
        await self._engine.update_weights(update_info)

    async def finish_weight_update(self, version: str) -> None:
        await self._engine.finish_weight_update(version)

    async def sleep(self) -> None:
        await self._engine.sleep()

    async def wake(self) -> None:
        await self._engine.wake()

    async def close(self) -> None:
        # The sockets go first: the driver waits only briefly, and open connections survive their file names.
        self._sockets.cleanup()
        self._engine.close()
