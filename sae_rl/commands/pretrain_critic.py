"""``sae-rl pretrain-critic``: pre-trains a critic that several runs can start from."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from sae_rl import checkpoint
from sae_rl.commands.assemble import assembled
from sae_rl.commands.preflight import prepared, show_outline
from sae_rl.config.schema import Config
from sae_rl.critic import card
from sae_rl.critic.pretraining import pretrain
from sae_rl.run_lock import locked
from sae_rl.settings import ConfigError
from sae_rl.workers.table import pretraining_roles


def run_critic_pretraining(config: Config) -> Path | None:
    """Pre-trains a critic for ``model.path`` without training a policy.

    Returns:
        The folder of the critic, for ``learner.critic_pretraining.checkpoint`` of later runs; None with ``dry_run``.

    Raises:
        ConfigError: as in `run_training`; or the estimator has no critic; or there are no prompts for pre-training.
        RuntimeError: pre-training failed, or all returns were equal, so that there was nothing to learn.
    """
    key, folder = "learner.critic_pretraining", config.output_dir / "critic"
    if not config.algorithm.needs_critic:
        if not config.algorithm.estimator.needs_critic:
            raise ConfigError(["algorithm.estimator has no critic to pre-train: choose algorithm=sae, gae, ..."])
        raise ConfigError(["algorithm.value_source has no critic to pre-train: choose algorithm/value_source=critic"])
    if (num_critics := config.algorithm.num_critics) > 1:
        raise ConfigError(
            [f"algorithm.value_source has {num_critics} critics: pre-train one, from which all can begin"]
        )
    if not config.learner.critic_pretraining.num_prompts:
        raise ConfigError([f"{key}.num_prompts = 0: pre-training needs prompts, at least 2"])
    for found, what in ((folder, "a critic"), (checkpoint.newest(config.output_dir / "checkpoints"), "a run")):
        if found is not None and found.exists():
            raise ConfigError([f"output_dir = {config.output_dir} holds {what} already; choose another output_dir"])
    ready = prepared(config, pretraining_roles(config))
    if config.dry_run:
        show_outline(ready)
        return None
    with locked(config.output_dir), assembled(ready) as run:
        explained_variance, num_responses = pretrain(run)
        if not math.isfinite(explained_variance):
            raise RuntimeError(
                "all responses had the same return, so the critic learned nothing: are all rewards equal?"
            )
        partial = folder.with_name(".partial_critic")
        shutil.rmtree(partial, ignore_errors=True)
        run.workers.export_critic(partial)
        card.write_card(partial, config, explained_variance, num_responses)
        partial.rename(folder)
    return folder
