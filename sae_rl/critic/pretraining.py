"""Value pre-training (arXiv 2503.01491): before the policy's first update the critic regresses on its rollouts.

A critic that starts from zero makes the first advantages noise. Prompts are split into training and held-out ones. The
regression stops when the explained variance on held-out prompts no longer rises, and the best critic so far is restored.
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
from sae_rl.rollouts.groups import FailedRule, StepSamples, groups_of
from sae_rl.rollouts.step import respond
from sae_rl.run import Run
from sae_rl.seeds import derive_seed
from sae_rl.types import Batch, Scores, Targets, select


def pretrain(run: Run) -> tuple[float, int]:
    """Pre-trains the critic of a run on rollouts of the initial policy. The prompts come in an order of their own.

    Returns:
        The explained variance on held-out prompts, and the number of responses.

    Raises:
        RuntimeError: sampling or a worker failed, or the checks of all responses failed.
    """
    config, pretraining = run.config, run.config.learner.critic_pretraining
    seed = derive_seed(config.seed, "pretraining")
    prompts = run.sampler.anew(seed).next(pretraining.num_prompts)
    rollouts, rewards = respond(run, prompts, "pretraining")
    groups = groups_of(rollouts, rewards, config.rollout.group_size, FailedRule.of(config))
    kept = StepSamples.of(groups, {}, run.sampler.state())
    best = pretrain_critic(
        Batch.of(kept.rollouts, kept.rewards),
        run.workers,
        config.algorithm,
        pretraining,
        scratch=config.output_dir / ".best_critic",
        seed=seed,
        log=lambda epoch, metrics: run.records.log(epoch, metrics, phase="pretraining"),
    )
    run.workers.set_critic_lr(None)
    left_out = f" ({n} left out: their checks failed)" if (n := len(rollouts) - len(kept.rollouts)) else ""
    run.records.note(
        f"critic pre-trained on {len(kept.rollouts)} responses{left_out}: held-out explained variance {best:.3f}"
    )
    return best, len(kept.rollouts)


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
        scratch: a folder for the best critic so far; it is removed at the end.
        log: called with (epoch, metrics) after each epoch.

    Returns:
        The best explained variance on held-out prompts. The critic is left in that state.
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
    """Splits a batch into training and held-out responses; each prompt's responses stay together.

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
    """One side of the split, with entropies of the frozen policy."""

    batch: Batch
    entropies: Tensor | None  # (N,); None: no segmenter or estimator reads them


def with_entropies(batch: Batch, workers: Workers, algorithm: AlgorithmConfig) -> Part:
    return Part(batch, workers.score(batch).entropies if algorithm.advantages_need_entropies else None)


def values_of(part: Part, workers: Workers) -> Scores:
    """Values of the critic. Policy and reference are still equal, so the rollout logprobs serve as theirs."""
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
