"""The policy: its logprobs, its PPO updates, and its weights on their way to the rollout engines."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae_rl.algo.losses import LossSum, MiniBatchShare, PolicyLoss, PolicyTokens
from sae_rl.backends.deepspeed import Rank
from sae_rl.backends.lora import add_adapters, without_adapters
from sae_rl.backends.packing import MicroBatch
from sae_rl.backends.sequence_parallel import SequenceGroup
from sae_rl.backends.weight_transfer import HeldWeights
from sae_rl.config.schema import Config, LearnerConfig, LoraConfig, ModelConfig
from sae_rl.types import Batch, Scores, Targets
from sae_rl.workers.engine_client import EngineClient
from sae_rl.workers.learner import LearnerWorker

if TYPE_CHECKING:
    from sae_rl.backends.models import PolicyNetwork  # imports transformers' models
    from sae_rl.backends.weight_sender import Sender  # imports vLLM


class PolicyWorker(LearnerWorker):
    """One data-parallel rank of the policy."""

    @staticmethod
    def is_needed(config: Config) -> bool:
        return True

    @staticmethod
    def settings(config: Config) -> tuple[object, ...]:
        algorithm, learner = config.algorithm, config.learner
        return (
            *(config.model, learner.policy, algorithm.policy_loss, config.steps, learner.lora),
            *(config.is_own_reference, algorithm.needs_entropies),
        )

    def start(
        self,
        rank: Rank,
        model: ModelConfig,
        config: LearnerConfig,
        loss: PolicyLoss,
        num_steps: int,
        lora: LoraConfig,
        with_reference: bool,
        with_entropies: bool,
    ) -> None:
        """
        Args:
            with_reference: `score` also returns the logprobs without adapters, which are the reference's.
            with_entropies: `score` also returns entropies.
        """
        from sae_rl.backends.models import PolicyNetwork, load_causal_lm

        self._loss = loss
        self._with_reference, self._with_entropies = with_reference, with_entropies

        def build(group: SequenceGroup | None) -> PolicyNetwork:
            causal_lm = load_causal_lm(model, group)
            if lora.rank:
                add_adapters(causal_lm, lora)
            return PolicyNetwork(causal_lm, group, fused=model.logprobs == "cut_cross_entropy")

        self._start(rank, model, config, build, num_steps)
        self._sender: Sender | None = None

    def score(self, batch: Batch, threads: int) -> tuple[Tensor, dict[str, Tensor]]:
        """(n,) the indices of this rank's tokens among all N, and their ``old_logprobs`` (n,) and what `start` asked for.

        Args:
            threads: threads of this process while it scores.
        """

        def forward(micro: MicroBatch) -> dict[str, Tensor]:
            logprobs, entropies = self._learner.engine(micro, batch.temperature, self._with_entropies)
            scores = {"old_logprobs": logprobs}
            if entropies is not None:
                scores["entropies"] = entropies
            if self._with_reference:
                with without_adapters(self._learner.network):
                    scores["ref_logprobs"], _ = self._learner.engine(micro, batch.temperature, False)
            return scores

        return self._score(batch, forward, threads)

    def gradients(self, batch: Batch, advantages: Tensor, dimension: int, seed: int, threads: int) -> Tensor:
        """(E, D) float64 projections of this rank's part of ``sum_t A_t grad log pi(a_t | s_t)``; all parts add up.

        Args:
            advantages: (E, N).
            dimension, seed: as of `sae_rl.backends.projection.Projection`.
            threads: threads of this process meanwhile.
        """

        def logprobs(micro: MicroBatch) -> Tensor:
            found: Tensor = self._learner.network(micro, batch.temperature, False)[0]
            return found

        with self._more_threads(threads), self._at_work():
            return self._learner.projected_gradients(batch, logprobs, advantages, dimension, seed)

    def update(
        self, batch: Batch, scores: Scores, targets: Targets, seed: int
    ) -> tuple[list[dict[str, float]], tuple[Tensor, dict[str, Tensor]]]:
        """All epochs and mini-batches of one step.

        Returns:
            For each update, sums over this rank's tokens; and the ``logprobs`` of the first update, as `score` returns its
            results, if nobody has computed them before.
        """
        with_entropies = self._loss.entropy_coef > 0
        old_logprobs = scores.old_logprobs
        is_unscored = old_logprobs is None or self._loss.old_logprobs == "rollout"
        engine = self._learner.engine
        steps_before = engine.global_steps
        first: list[tuple[Tensor, Tensor]] = []  # (token index, logprobs) of the passes of the first update
        share: MiniBatchShare

        def loss(micro: MicroBatch) -> LossSum:
            logprobs, entropies = self._learner.engine(micro, batch.temperature, with_entropies)
            at, device = micro.token_index.cpu(), logprobs.device
            if is_unscored and engine.global_steps == steps_before:
                first.append((at, logprobs.detach().cpu()))
            tokens = PolicyTokens(
                logprobs=logprobs,
                # Without a scoring pass there is one update, whose own pass still has the weights of pi_old.
                old_logprobs=logprobs.detach() if old_logprobs is None else old_logprobs[at].to(device),
                advantages=targets.advantages[at].to(device),
                counts=micro.counts,
                ref_logprobs=None if scores.ref_logprobs is None else scores.ref_logprobs[at].to(device),
                entropies=entropies,
                rollout_logprobs=batch.rollout_logprobs[at].to(device),
                rewards=batch.rewards[micro.rows.cpu()].to(device),
                kept=None if share.kept is None else share.kept[at].to(device),
                nll_scale=share.nll_scale,
            )
            return self._loss(tokens)

        def total(rows: Tensor) -> float:  # it is asked for before the passes of a mini-batch
            nonlocal share
            share = self._loss.share(batch, scores, rows)
            return share.total

        updates = self._train(batch, loss, total, self._config.num_epochs, self._config.num_mini_batches, seed)
        if not first:
            return updates, (torch.empty(0, dtype=torch.int64), {})
        return updates, (torch.cat([at for at, _ in first]), {"logprobs": torch.cat([flat for _, flat in first])})

    def open_weight_transfer(self, engines: EngineClient, shares_gpus: bool, address: str, port: int) -> None:
        """Connects rank 0 with vLLM's worker processes; ``shares_gpus``: each rank with the engine on its GPU.

        Ends an earlier connection.
        """
        from sae_rl.backends.weight_sender import Sender

        if self._sender is not None:
            self._sender.close()
            self._sender = None
        self._engines = engines
        engines.begin("")
        self._sender = Sender(
            self._learner,
            engines,
            shares_gpus=shares_gpus,
            address=address,
            port=port,
            world_size=1 + engines.num_processes,
            timeout_s=engines.timeout_s,
        )

    def send_weights(self, version: str) -> tuple[dict[str, int], dict[int, list[HeldWeights]]]:
        """Sends the weights to the connected engines. All ranks take part, since ZeRO-3 shards are gathered.

        Returns:
            The checksums of what was sent, and what each engine holds, by its rank. Ranks other than 0 know neither.
        """
        assert self._sender is not None, "open_weight_transfer comes first"
        self._engines.begin(version)
        with self._at_work():
            return self._sender.send(), self._engines.held
