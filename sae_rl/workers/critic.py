"""The critic: values of states, and their regression to the estimator's returns."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from sae_rl.algo.losses import LossSum, ValueLoss
from sae_rl.backends.deepspeed import Learner, Rank, join_group
from sae_rl.backends.models import CriticNetwork, export_critic, load_causal_lm
from sae_rl.backends.packing import MicroBatch, draw_mini_batches
from sae_rl.backends.sequence_parallel import SequenceGroup
from sae_rl.config.schema import LearnerConfig, ModelConfig
from sae_rl.types import Batch, Scores, Targets
from sae_rl.workers.group import Process


class CriticWorker(Process):
    """One data-parallel rank of the critic."""

    def start(
        self,
        rank: Rank,
        model: ModelConfig,
        config: LearnerConfig,
        loss: ValueLoss,
        num_steps: int,
        checkpoint: str | None,
    ) -> None:
        """``checkpoint``: a critic's folder; None: the policy's weights under a head that is zero."""
        join_group(rank)
        self._rank = rank
        self._model = model
        self._config = config
        self._loss = loss

        def build(group: SequenceGroup | None) -> CriticNetwork:
            if checkpoint is None:
                return CriticNetwork.on(load_causal_lm(model, group), group)
            return CriticNetwork.load(checkpoint, model, group)

        self._learner = Learner(build, model, config, rank, num_steps=num_steps)

    def score(self, batch: Batch, with_final: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Which of the N tokens this rank answers for, their values, and those behind last tokens if asked for."""

        def forward(micro: MicroBatch) -> dict[str, Tensor]:
            values, final = self._learner.engine(micro, with_final)
            return {"values": values} if final is None else {"values": values, "final_values": final}

        return self._learner.score(batch, forward)

    def update(self, batch: Batch, scores: Scores, targets: Targets, seed: int) -> list[dict[str, float]]:
        """All epochs and mini-batches of one step; sums over this rank's tokens for each update."""
        updates = []
        for epoch in range(self._config.num_epochs):
            updates += self._epoch(batch, scores, targets, self._config.num_mini_batches, seed + epoch)
        return updates

    def pretrain(
        self, batch: Batch, scores: Scores, targets: Targets, responses_per_update: int, seed: int
    ) -> list[dict[str, float]]:
        """One pass over rollouts of the frozen policy."""
        num_mini_batches = max(1, batch.num_responses // responses_per_update)
        return self._epoch(batch, scores, targets, num_mini_batches, seed)

    def _epoch(
        self, batch: Batch, scores: Scores, targets: Targets, num_mini_batches: int, seed: int
    ) -> list[dict[str, float]]:
        assert scores.values is not None and targets.returns is not None
        old_values, returns = scores.values, targets.returns

        def loss(micro: MicroBatch) -> LossSum:
            values, _ = self._learner.engine(micro)
            at = micro.token_index.cpu()
            return self._loss(values, old_values[at].to(values.device), returns[at].to(values.device))

        return [
            self._learner.update(batch, rows, loss, float(batch.num_sampled[rows].sum()))
            for rows in draw_mini_batches(batch.num_responses, num_mini_batches, seed)
        ]

    def set_lr(self, lr: float | None) -> None:
        """A constant learning rate, or None: the configured schedule from its beginning."""
        if lr is None:
            self._learner.schedule.restart()
        else:
            self._learner.schedule.hold(lr)

    def save(self, folder: Path) -> None:
        self._learner.save(folder)

    def load(self, folder: Path) -> None:
        self._learner.load(folder)

    def export(self, folder: Path) -> None:
        """Writes the critic as a Hugging Face folder; rank 0 writes, all ranks gather."""
        weights = self._learner.full_weights()
        if self._rank.index == 0:
            export_critic(self._learner.network, weights, self._model.path, folder)
        else:
            for _ in weights:
                pass

    def close(self) -> None:
        self._learner.close()
