"""The worker roles. A new role is a `Process` in a file of its own and a line here."""

from __future__ import annotations

from sae_rl.config.schema import Config
from sae_rl.workers.critic import CriticWorker
from sae_rl.workers.group import Process
from sae_rl.workers.policy import PolicyWorker
from sae_rl.workers.reference import ReferenceWorker
from sae_rl.workers.rollout import RolloutWorker

# By the name of the role, which is also the name of its section in the configuration's `cluster`.
WORKERS: dict[str, type[Process]] = {
    "rollout": RolloutWorker,
    "policy": PolicyWorker,
    "critic": CriticWorker,
    "reference": ReferenceWorker,
}


def roles_of(config: Config) -> list[str]:
    """The roles that a training run starts. A replay samples nothing, so it starts no rollout engines."""
    return [role for role, worker in WORKERS.items() if worker.is_needed(config)]


def pretraining_roles(config: Config) -> list[str]:
    """The roles that pre-train a critic; the policy only where a segmenter or an estimator reads its entropies."""
    return ["rollout", *(["policy"] if config.algorithm.advantages_need_entropies else []), "critic"]
