"""The policy's weights on their way to the rollout engines, and the check that they arrived.

`WeightSync` lives on the driver and only gives orders. The weights themselves go from the policy's rank 0
(`sae_rl.backends.weight_sender`) to vLLM's worker processes (`sae_rl.backends.weight_receiver`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from ray.actor import ActorHandle

from sae_rl.config.schema import Config
from sae_rl.types import Batch, Prompt, Scores
from sae_rl.workers.engine_client import EngineClient
from sae_rl.workers.group import WorkerError, WorkerGroup, wait_for
from sae_rl.workers.rollout_pool import RolloutPool
from sae_rl.workers.weight_check import LogprobDifferences, WeightCheck

PROBE_TOKENS = 512  # sampled by all engines together
PROBE_LENGTH = 16  # tokens of a response; short ones, since engines decode many at the same time
LATER_S = 30.0  # the deadline of learners is so much later than that of engines


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
        self._connected: dict[int, ActorHandle] = {}  # the engines that the policy has a connection to, by their ranks
        self._check = WeightCheck()
        self.version = 0  # version of the policy's weights
        self.was_updated = False  # an update has changed them since they were sent

    def sync(self, version: int) -> dict[str, float]:
        """Sends the weights to every engine and probes each of them. The caller holds ``policy_lock``.

        After a failure engines may hold a part of the new weights. All of them are replaced, and the weights are sent once
        more, unless the policy itself died.

        Raises:
            RuntimeError: an engine does not have the weights that were sent, or its logprobs differ too much.
            WorkerError: the policy died or hangs, or no engine is left.
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
        changed = {"sync/changed_fraction": self._send(ranks)}
        self._rollout.engines.hold(ranks, self.version)
        first = self._probe(ranks, again=False)
        if first.are_within(self._config.rollout):
            return changed | first.metrics()
        second = self._probe(ranks, again=True)
        if not second.are_within(self._config.rollout):
            raise second.error(self._config.rollout, self.version)
        metrics, largest = changed | second.metrics(), first.metrics()["sync/logprob_diff_max"]
        return metrics | {"sync/logprob_diff_max": max(largest, metrics["sync/logprob_diff_max"])}

    def _send(self, ranks: list[int]) -> float:
        """Sends the weights to the engines of these ranks; connects first if these are not the connected ones.

        Returns:
            The fraction of tensors that changed since the last time.
        """
        config = self._config
        engines = {rank: self._rollout.engines.group.workers[rank] for rank in ranks}
        connected, self._connected = self._connected, {}  # after a failure, engines are connected anew
        if engines != connected:
            ((address, port),) = self._policy.run(lambda worker: worker.free_address.remote(), [0])
            client = EngineClient(engines, config.rollout.tensor_parallel_size, config.rollout.sync_timeout_s)
            transfer = (client, config.cluster.colocate_rollout, address, port)
            self._ask_policy("connect to rollout engines", lambda worker: worker.open_weight_transfer.remote(*transfer))
        results = self._ask_policy("send weights", lambda worker: worker.send_weights.remote(str(self.version)))
        changed = self._check(*results[0], was_updated=self.was_updated)
        self._connected, self.was_updated = engines, False
        return changed

    def _ask_policy(self, phase: str, call: Callable[[ActorHandle], Any]) -> list[Any]:
        """A remote call on all of the policy's ranks. Its deadline is later than the engines', whose message says more."""
        limit_s = self._config.rollout.sync_timeout_s + LATER_S
        return wait_for([self._policy.start(call)], limit_s, doing=phase, key="rollout.sync_timeout_s")[0]

    def _probe(self, ranks: list[int], again: bool) -> LogprobDifferences:
        """Samples the probe prompts on each engine and scores them with the policy."""
        max_tokens = min(PROBE_LENGTH, self._config.rollout.max_response_tokens)
        num_responses = -(-PROBE_TOKENS // (max_tokens * len(ranks)))
        sampled = self._rollout.probe(ranks, self._probe_prompts, num_responses, max_tokens, again)
        rollouts = [rollout for of_engine in sampled for rollout in of_engine]
        batch = Batch.of(rollouts, [0.0] * len(rollouts))
        differences = (batch.rollout_logprobs - self._score(batch).old_logprobs).abs()
        return LogprobDifferences(dict(zip(ranks, differences.split(num_responses * max_tokens), strict=True)))
