"""Rollout workers: one vLLM engine in each."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

from sae_rl.backends.vllm import Request, RolloutEngine, Sample, prepare_environment
from sae_rl.config.schema import Device, ModelConfig, RolloutConfig
from sae_rl.workers.group import Process


class RolloutWorker(Process):
    """An actor with an event loop; vLLM's engine and its workers are child processes of it."""

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
        self._sockets = tempfile.TemporaryDirectory(prefix="sae_rl_")
        prepare_environment(device, threads, self._sockets.name, sleeps=sleeps)
        self._engine = RolloutEngine(
            model, rollout, device, sleeps=sleeps, max_model_tokens=max_model_tokens, seed=seed
        )
        if sleeps:
            await self._engine.sleep()  # the learners load behind it

    async def generate(self, requests: Sequence[Request]) -> list[Sample]:
        return await self._engine.generate(requests)

    async def check(self) -> None:
        """Answers when the engine does."""
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
        self._sockets.cleanup()  # first: the driver does not wait for long, and connections outlive their names
        self._engine.close()
