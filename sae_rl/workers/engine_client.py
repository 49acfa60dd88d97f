"""The calls that the policy's sender makes on the rollout engines during a weight transfer."""

from __future__ import annotations

from typing import Any

import ray
from ray.actor import ActorHandle


class EngineClient:
    """Implements vLLM's ``VLLMWeightSyncClient`` over Ray: each call goes to every engine and waits for all of them.

    vLLM's own Ray client gives every engine the same rank offset. Engines that are separate processes need one each.
    """

    def __init__(self, engines: list[ActorHandle], workers_per_engine: int, timeout_s: float) -> None:
        self._engines, self._workers_per_engine = engines, workers_per_engine
        self.num_processes = len(engines) * workers_per_engine  # vLLM's worker processes
        self.timeout_s = timeout_s
        self.version = ""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        infos = [dict(init_info) for _ in self._engines]
        if "rank_offset" in init_info:  # CUDA IPC has no ranks
            for i, info in enumerate(infos):
                info["rank_offset"] += i * self._workers_per_engine
        self._wait(
            [engine.init_weight_transfer.remote(info) for engine, info in zip(self._engines, infos, strict=True)]
        )

    def start_weight_update(self) -> None:
        self._wait([engine.start_weight_update.remote() for engine in self._engines])

    def update_weights(self, update_info: Any) -> None:
        self._wait([engine.update_weights.remote(update_info) for engine in self._engines])

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        version = weight_version or self.version
        self._wait([engine.finish_weight_update.remote(version) for engine in self._engines])

    def _wait(self, references: list[Any]) -> None:
        ray.get(references, timeout=self.timeout_s)
