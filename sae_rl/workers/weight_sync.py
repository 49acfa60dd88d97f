"""The policy's weights on their way to the rollout engines, and the check that they arrived.

`WeightSync` lives on the driver and only gives orders. The weights themselves go from the policy's rank 0
(`sae_rl.backends.weight_sender`) to vLLM's worker processes (`sae_rl.backends.weight_receiver`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from ray.actor import ActorHandle

from sae_rl.config.schema import Config
from sae_rl.types import Batch, Prompt, Scores
from sae_rl.workers.engine_client import EngineClient
from sae_rl.workers.group import WorkerError, WorkerGroup
from sae_rl.workers.rollout_pool import RolloutPool

PROBE_TOKENS = 24


class WeightSync:
    """Sends the policy's weights to engines and compares the logprobs of both sides on probe prompts.

    Args:
        policy_lock: held while the policy works, since its weights are sent only while they do not change.
        score: scores a batch with the policy alone.
    """

    def __init__(
        self,
        config: Config,
        policy: WorkerGroup,
        rollout: RolloutPool,
        policy_lock: threading.Lock,
        probe_prompts: Sequence[Prompt],
        score: Callable[[Batch], Scores],
    ) -> None:
        self._config, self._policy, self._rollout = config, policy, rollout
        self._policy_lock, self._probe_prompts, self._score = policy_lock, probe_prompts, score
        self._connected: list[ActorHandle] = []  # the engines that the policy has a connection to
        self.version = 0  # version of the policy's weights

    def sync(self, version: int) -> dict[str, float]:
        """Sends the weights to every engine and probes each of them. The caller holds ``policy_lock``.

        After a failure engines may hold a part of the new weights. All of them are replaced, and the weights are sent once
        more, unless the policy itself died.

        Raises:
            RuntimeError: an engine's logprobs differ from the policy's by more than ``rollout.logprob_tolerance``.
            WorkerError: the policy died, or no engine is left.
        """
        engines = self._rollout.engines
        self.version = version
        self._rollout.wake()
        try:
            probed = self._send_and_probe(engines.settle() or engines.replace_all("none had started"))
        except WorkerError as error:
            if error.died == "policy":
                raise
            probed = self._send_and_probe(engines.replace_all(f"sending weights {version} failed ({error})"))
        return probed | {"rollout/num_lost_engines": float(engines.num_lost)}

    def sync_one(self, rank: int) -> None:
        """Sends the weights to a replaced engine, unless the policy works right now."""
        if not self._policy_lock.acquire(blocking=False):
            return
        try:
            self._send_and_probe([rank])
        finally:
            self._policy_lock.release()

    def _send_and_probe(self, ranks: list[int]) -> dict[str, float]:
        self._send(ranks)
        self._rollout.engines.hold(ranks, self.version)
        return self._probe(ranks)

    def _send(self, ranks: list[int]) -> None:
        """Sends the weights to the engines of these ranks; connects first if these are not the connected ones."""
        policy, config = self._policy, self._config
        engines = [self._rollout.engines.group.workers[rank] for rank in ranks]
        if engines != self._connected:
            self._connected = []
            ((address, port),) = policy.run(lambda worker: worker.free_address.remote(), [0])
            client = EngineClient(engines, config.rollout.tensor_parallel_size, config.cluster.call_timeout_s)
            transfer = (client, config.cluster.colocate_rollout, address, port)
            policy.run(lambda worker: worker.open_weight_transfer.remote(*transfer))
            self._connected = engines
        policy.run(lambda worker: worker.send_weights.remote(str(self.version)))

    def _probe(self, ranks: list[int]) -> dict[str, float]:
        """Samples the probe prompts on each engine and scores them with the policy."""
        rollout = self._config.rollout
        sampling = rollout.sampling(min(PROBE_TOKENS, rollout.max_response_tokens))
        sampled = self._rollout.generate_on(ranks, self._probe_prompts, sampling)
        batch = Batch.of(sampled, [0.0] * len(sampled))
        difference = (batch.rollout_logprobs - self._score(batch).old_logprobs).abs()
        worst = float(difference.max())
        if not worst <= rollout.logprob_tolerance:  # also where it is NaN
            row = int(torch.searchsorted(batch.offsets, difference.argmax(), right=True)) - 1
            raise RuntimeError(
                f"after sending weights {self.version}, rollout engine {ranks[row // len(self._probe_prompts)]} and "
                f"the policy differ by {worst:.4g} nats on a sampled token, more than rollout.logprob_tolerance = "
                f"{rollout.logprob_tolerance:g}: the engine does not have the policy's weights, or computes in another "
                "precision"
            )
        return {"sync/logprob_diff_max": worst}
