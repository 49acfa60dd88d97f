"""The calls that the policy's sender makes on the rollout engines during a weight transfer."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.actor import ActorHandle

from sae_rl.backends.weight_transfer import HeldWeights, TransferFailed


class EngineClient:
    """Implements vLLM's ``VLLMWeightSyncClient`` over Ray: each call goes to every engine and waits for all of them.

    vLLM's own Ray client gives every engine the same rank offset. Engines that are separate processes need one each.

    Args:
        engines: by their ranks.
        timeout_s: limit of one transfer, from `begin` to its end.
    """

    def __init__(self, engines: dict[int, ActorHandle], workers_per_engine: int, timeout_s: float) -> None:
        self._engines, self._workers_per_engine = engines, workers_per_engine
        self.num_processes = len(engines) * workers_per_engine  # vLLM's worker processes
        self.timeout_s = timeout_s
        self.begin("")

    def begin(self, version: str) -> None:
        """From now on engines have ``timeout_s`` to connect, or to get the weights of this version."""
        self._version, self._deadline = version, time.monotonic() + self.timeout_s
        self.held: dict[int, list[HeldWeights]] = {}  # what each engine's worker processes hold, by the engine's rank

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        infos = {rank: dict(init_info) for rank in self._engines}
        if "rank_offset" in init_info:  # CUDA IPC has no ranks
            for i, info in enumerate(infos.values()):
                info["rank_offset"] += i * self._workers_per_engine
        self._wait("connect", {rank: e.init_weight_transfer.remote(infos[rank]) for rank, e in self._engines.items()})

    def start_weight_update(self) -> None:
        self._wait("pause", {rank: engine.start_weight_update.remote() for rank, engine in self._engines.items()})

    def update_weights(self, update_info: Any) -> None:
        calls = {rank: engine.update_weights.remote(update_info) for rank, engine in self._engines.items()}
        self._wait("receive weights", calls)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        version = weight_version or self._version
        calls = {rank: engine.finish_weight_update.remote(version) for rank, engine in self._engines.items()}
        self.held = self._wait("load weights", calls)

    def _wait(self, phase: str, calls: dict[int, Any]) -> dict[int, Any]:
        """Results by the engines' ranks.

        Raises:
            TransferFailed: as soon as one engine failed, or at the deadline. Other engines may wait for a dead one.
        """
        ranks = {call: rank for rank, call in calls.items()}
        results, pending = {}, list(ranks)
        while pending:
            done, pending = ray.wait(pending, timeout=max(0.0, self._deadline - time.monotonic()))
            if not done:
                late = ", ".join(str(ranks[call]) for call in pending)
                raise TransferFailed(
                    f"rollout engine(s) {late} did not {phase} within rollout.sync_timeout_s = {self.timeout_s:g} s"
                )
            try:
                results[ranks[done[0]]] = ray.get(done[0])
            except ray.exceptions.RayError as error:
                cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
                raise TransferFailed(f"rollout engine {ranks[done[0]]} did not {phase}: {cause}") from None
        return {rank: results[rank] for rank in calls}
