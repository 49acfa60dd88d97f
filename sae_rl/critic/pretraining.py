"""Value pre-training: the critic learns the frozen policy's returns before the policy's first update.

A critic that starts from zero makes every early advantage noise; VC-PPO (arXiv 2503.01491) and the SAE paper train it on
rollouts of the initial policy first. It stops when the explained variance on held-out prompts no longer rises, and goes
back to the best critic it had.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from sae_rl.algo.estimators import estimate
from sae_rl.algo.ragged import sampled_tokens
from sae_rl.algo.segmentation import segment
from sae_rl.algo.stats import explained_variance
from sae_rl.config.schema import AlgorithmConfig, CriticPretrainingConfig
from sae_rl.protocols import Metrics, Workers
from sae_rl.types import Batch, Scores, Targets, select


def pretrain_critic(
    batch: Batch,
    workers: Workers,
    algorithm: AlgorithmConfig,
    config: CriticPretrainingConfig,
    scratch: Path,
    seed: int,
    log: Callable[[int, Metrics], None],
) -> float:
    """Trains the critic on rollouts of the current policy.

    Args:
        batch: rollouts with rewards; a response to a held-out prompt is never trained on.
        scratch: a folder for the best critic so far, removed at the end.
        log: called with (epoch, metrics) after each epoch.

    Returns:
        The best explained variance on held-out prompts, which is that of the critic that is left.
    """
    train, heldout = (
        with_entropies(part, workers, algorithm) for part in split_by_prompt(batch, config.heldout_fraction, seed)
    )
    best, best_epoch = float("-inf"), 0
    for epoch in range(1, config.max_epochs + 1):
        workers.set_critic_lr(config.lr * config.lr_decay ** (epoch - 1))
        scores = values_of(train, workers)
        metrics = workers.update_critic(
            train.batch,
            scores,
            targets_of(train.batch, scores, algorithm),
            responses_per_update=config.responses_per_update,
            seed=seed + epoch,
        )
        explained = heldout_explained_variance(heldout, workers, algorithm)
        log(epoch, {"pretraining/loss": metrics["critic/loss"], "pretraining/explained_variance": explained})
        if explained > best:
            best, best_epoch = explained, epoch
            shutil.rmtree(scratch, ignore_errors=True)
            workers.save_critic(scratch)
        elif epoch - best_epoch >= config.patience:
            break
    if best_epoch:
        workers.load_critic(scratch)
    shutil.rmtree(scratch, ignore_errors=True)
    return best


def split_by_prompt(batch: Batch, heldout_fraction: float, seed: int) -> tuple[Batch, Batch]:
    """Whole groups go to one side or the other, at least one to each.

    Raises:
        ValueError: fewer than two prompts.
    """
    groups = torch.unique(batch.groups)
    if len(groups) < 2:
        raise ValueError(f"learner.critic_pretraining.num_prompts = {len(groups)}: holding some out needs at least 2")
    order = groups[torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))]
    count = min(max(1, round(heldout_fraction * len(groups))), len(groups) - 1)
    is_heldout = torch.isin(batch.groups, order[:count])
    return select(batch, (~is_heldout).nonzero().flatten()), select(batch, is_heldout.nonzero().flatten())


@dataclass(frozen=True, slots=True)
class Part:
    """One side of the split, and what the frozen policy says of it."""

    batch: Batch
    entropies: Tensor | None  # (N,), where a segmenter asks for them


def with_entropies(batch: Batch, workers: Workers, algorithm: AlgorithmConfig) -> Part:
    return Part(batch, workers.score(batch).entropies if algorithm.advantages_need_entropies else None)


def values_of(part: Part, workers: Workers) -> Scores:
    """The critic's values; policy, old policy and reference are still one, so the rollout's logprobs stand for all."""
    logprobs = part.batch.rollout_logprobs
    scores = workers.score_critic(part.batch)
    return replace(scores, old_logprobs=logprobs, ref_logprobs=logprobs, entropies=part.entropies)


def targets_of(batch: Batch, scores: Scores, algorithm: AlgorithmConfig) -> Targets:
    opens = segment(algorithm.segmenter, batch, scores)
    return estimate(algorithm.estimator, batch, scores, algorithm.token_rewards(batch, scores), opens)


def heldout_explained_variance(heldout: Part, workers: Workers, algorithm: AlgorithmConfig) -> float:
    scores = values_of(heldout, workers)
    targets = targets_of(heldout.batch, scores, algorithm)
    assert scores.values is not None and targets.returns is not None, "only critics are pre-trained"
    values, returns = sampled_tokens(scores.values, heldout.batch), sampled_tokens(targets.returns, heldout.batch)
    return explained_variance(values, returns)
