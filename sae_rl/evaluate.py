"""avg@k on held-out prompts, with a bootstrap interval over prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from sae_rl.clock import Clock
from sae_rl.config import EvaluationConfig
from sae_rl.protocols import RolloutEngines
from sae_rl.rewards.pool import RewardPool
from sae_rl.sampling import sample
from sae_rl.types import Prompt

NUM_RESAMPLES = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What a policy scores on a set of prompts."""

    success_mean: float  # avg@k: the mean over prompts of the mean reward of k samples
    success_low: float  # 95 % bootstrap interval over prompts
    success_high: float
    num_prompts: int
    samples_per_prompt: int
    response_tokens_mean: float
    truncated_fraction: float

    def metrics(self) -> dict[str, float]:
        return {f"evaluation/{field.name}": float(getattr(self, field.name)) for field in fields(self)}


def evaluate(
    prompts: Sequence[Prompt],
    engines: RolloutEngines,
    rewards: RewardPool,
    clock: Clock,
    config: EvaluationConfig,
    max_tokens: int,
) -> Evaluation:
    """Samples k responses to each prompt. The same seeds every time: two policies are compared on the same luck."""
    rollouts, checked = sample(
        prompts,
        engines,
        rewards,
        clock,
        group_size=config.samples_per_prompt,
        sampling=config.sampling(max_tokens),
        stream="evaluation",
    )
    scores = np.array(checked.scores).reshape(len(prompts), config.samples_per_prompt)
    low, high = bootstrap_interval(scores.mean(axis=1))
    return Evaluation(
        success_mean=float(scores.mean()),
        success_low=low,
        success_high=high,
        num_prompts=len(prompts),
        samples_per_prompt=config.samples_per_prompt,
        response_tokens_mean=float(np.mean([r.token_ids.numel() for r in rollouts])),
        truncated_fraction=float(np.mean([r.finish_reason == "length" for r in rollouts])),
    )


def bootstrap_interval(per_prompt: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of the mean of (n,) numbers, resampling prompts."""
    random = np.random.default_rng(0)
    draws = random.integers(0, len(per_prompt), size=(NUM_RESAMPLES, len(per_prompt)))
    means = per_prompt[draws].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
