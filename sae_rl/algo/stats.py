"""What to measure on a batch: pure functions to ``{metric: number}``. Nothing in training reads them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sae_rl.algo.kl import k3
from sae_rl.algo.ragged import positions, sampled_tokens
from sae_rl.types import Batch, Scores


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """``1 - Var(returns - values) / Var(returns)`` over tokens: 1 is a perfect critic, 0 no better than a constant.

    nan where the returns do not vary.
    """
    if bool((returns == returns[0]).all()):
        return math.nan
    returns, values = returns.double(), values.double()
    return 1 - float((returns - values).var(correction=0) / returns.var(correction=0))


def critic_stats(batch: Batch, values: Tensor, returns: Tensor, opens: Tensor) -> dict[str, float]:
    """How much of the returns the critic explains, and where.

    - ``critic/explained_variance``: over all sampled tokens
    - ``critic/explained_variance_starts``: over those that open a segment, whose values SAE bootstraps from
    - ``critic/explained_variance_decile_k``: over those in the k-th tenth of their response, k = 0 .. 9
    """
    deciles = positions(batch.offsets) * 10 // batch.lengths.repeat_interleave(batch.lengths)
    values, returns, opens, deciles = (sampled_tokens(flat, batch) for flat in (values, returns, opens, deciles))
    parts = {"_starts": opens > 0} | {f"_decile_{k}": deciles == k for k in range(10)}
    return {"critic/explained_variance": explained_variance(values, returns)} | {
        f"critic/explained_variance{name}": explained_variance(values[part], returns[part]) if part.any() else math.nan
        for name, part in parts.items()
    }


def advantage_stats(batch: Batch, advantages: Tensor) -> dict[str, float]:
    """Of the advantages as the estimator made them, over sampled tokens; the population's std.

    - ``advantage/mean``, ``advantage/std``
    """
    found = sampled_tokens(advantages, batch).double()
    return {"advantage/mean": float(found.mean()), "advantage/std": float(found.std(correction=0))}


def probability_stats(batch: Batch) -> dict[str, float]:
    """How sure the rollout policy was of the tokens that it sampled.

    - ``probability/below_p20_fraction``: sampled probability below 0.2, the paper's threshold
    - ``probability/bin_k_fraction``: in [k / 10, (k + 1) / 10), k = 0 .. 9; 1 counts to the last
    """
    probabilities = sampled_tokens(batch.rollout_logprobs, batch).double().exp()
    bins = (probabilities * 10).long().clamp(0, 9).bincount(minlength=10).double() / probabilities.numel()
    stats = {"probability/below_p20_fraction": float((probabilities < 0.2).double().mean())}
    return stats | {f"probability/bin_{k}_fraction": float(part) for k, part in enumerate(bins)}


def staleness_stats(batch: Batch, step: int) -> dict[str, float]:
    """How many steps ago the weights were current that sampled; 0 where sampling and learning take turns.

    - ``rollout/staleness_mean``, ``rollout/staleness_max``: over sampled tokens
    - ``rollout/mixed_versions_fraction``: responses whose tokens are of more than one version
    """
    ages = step - sampled_tokens(batch.policy_versions, batch)
    ends = batch.num_sampled.cumsum(0)
    first, last = ages[torch.cat([ends.new_zeros(1), ends[:-1]])], ages[ends - 1]
    return {
        "rollout/staleness_mean": float(ages.double().mean()),
        "rollout/staleness_max": float(ages.max()),
        "rollout/mixed_versions_fraction": float((first != last).double().mean()),
    }


def segment_stats(batch: Batch, opens: Tensor) -> dict[str, float]:
    """How a segmenter cut the sampled tokens; soft weights count as parts of a segment.

    - ``segment/per_response_mean``: segments per response
    - ``segment/tokens_mean``: tokens per segment
    - ``segment/tokens_p50``, ``segment/tokens_p90``: quantiles over segments; of soft ones, over pieces between weights
      of at least 1/2
    - ``segment/opens_fraction``: of the tokens that are not the first of a response, those that open a segment: the
      rate at which the segmenter really cuts. nan where every response has one token
    """
    weights = sampled_tokens(opens, batch).double()
    num_tokens = weights.numel()
    num_segments, num_first = float(weights.sum()), float(weights[batch.num_sampled.cumsum(0)[:-1]].sum() + weights[0])
    num_inner = num_tokens - batch.num_responses
    starts = (weights >= 0.5).nonzero().flatten()
    # The last segment of a response ends where the next begins.
    lengths = torch.cat([starts, torch.tensor([num_tokens])]).diff().double()
    return {
        "segment/per_response_mean": num_segments / batch.num_responses,
        "segment/tokens_mean": num_tokens / num_segments,
        "segment/tokens_p50": _quantile(lengths, 0.5),
        "segment/tokens_p90": _quantile(lengths, 0.9),
        "segment/opens_fraction": (num_segments - num_first) / num_inner if num_inner else math.nan,
    }


def _quantile(numbers: Tensor, q: float) -> float:
    """The smallest number that is not below a fraction q of them. `torch.quantile` takes no more than 16 million."""
    return float(numbers.kthvalue(max(1, math.ceil(q * numbers.numel()))).values)


def rollout_stats(batch: Batch) -> dict[str, float]:
    """Rewards and lengths of the batch.

    - ``rollout/reward_mean``, ``rollout/reward_std``: over responses, the population's std
    - ``rollout/tokens_mean``, ``rollout/tokens_max``: response tokens
    - ``rollout/truncated_fraction``: responses cut at the length limit
    - ``rollout/zero_variance_fraction``: groups whose responses all have the same reward, so that GRPO learns nothing
    """
    names, groups = torch.unique(batch.groups, return_inverse=True)
    rewards, lengths = batch.rewards.double(), batch.lengths.double()
    empty = torch.zeros(names.shape, dtype=torch.float64)
    lowest = empty.scatter_reduce(0, groups, rewards, "amin", include_self=False)
    highest = empty.scatter_reduce(0, groups, rewards, "amax", include_self=False)
    return {
        "rollout/reward_mean": float(rewards.mean()),
        "rollout/reward_std": float(rewards.std(correction=0)),
        "rollout/tokens_mean": float(lengths.mean()),
        "rollout/tokens_max": float(lengths.max()),
        "rollout/truncated_fraction": float(batch.truncated.double().mean()),
        "rollout/zero_variance_fraction": float((lowest == highest).double().mean()),
    }


def mismatch_stats(batch: Batch, scores: Scores) -> dict[str, float]:
    """How far the rollout engine's logprobs of the sampled tokens are from the trainer's; 0 if they were one program.

    - ``mismatch/logprob_abs_mean``, ``mismatch/logprob_abs_max``: nats
    - ``mismatch/kl_mean``: KL(pi_rollout || pi_old) per token, by k3
    """
    rollout_logprobs = sampled_tokens(batch.rollout_logprobs, batch).double()
    old_logprobs = sampled_tokens(scores.old_logprobs, batch).double()
    differences = (rollout_logprobs - old_logprobs).abs()
    return {
        "mismatch/logprob_abs_mean": float(differences.mean()),
        "mismatch/logprob_abs_max": float(differences.max()),
        "mismatch/kl_mean": float(k3(rollout_logprobs, old_logprobs).mean()),
    }
