"""The reference model: the policy as it was before training, frozen. Started only if a KL term asks for it."""

from __future__ import annotations

from torch import Tensor

from sae_rl.backends.deepspeed import Learner, Rank, join_group
from sae_rl.backends.models import PolicyNetwork, load_causal_lm
from sae_rl.backends.sequence_parallel import SequenceGroup
from sae_rl.config.schema import LearnerConfig, ModelConfig
from sae_rl.types import Batch
from sae_rl.workers.group import Process


class ReferenceWorker(Process):
    """One data-parallel rank of the reference model."""

    def start(self, rank: Rank, model: ModelConfig, config: LearnerConfig) -> None:
        join_group(rank)

        def build(group: SequenceGroup | None) -> PolicyNetwork:
            fused = model.logprobs == "cut_cross_entropy"  # as the policy, so that they differ by their weights alone
            return PolicyNetwork(load_causal_lm(model, group), group, fused=fused)

        self._learner = Learner(build, model, config, rank, num_steps=None)

    def score(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Which of the N tokens this rank answers for, and their logprobs."""
        return self._learner.score(
            batch, lambda micro: {"ref_logprobs": self._learner.engine(micro, batch.temperature, False)[0]}
        )

    def close(self) -> None:
        self._learner.close()
