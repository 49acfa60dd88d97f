"""What the policy and the critic minimise, as sums over tokens.

A loss is called on a micro-batch of flat tensors (N,) and returns sums; the caller divides them by the token count of
the whole optimizer step, over micro-batches and ranks. So neither micro-batch size nor packing changes a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sae_rl.algo.kl import KL_ESTIMATORS, MAX_LOG_RATIO, k3
from sae_rl.algo.knobs import check_choice, check_number


@dataclass(frozen=True, slots=True)
class LossSum:
    """A loss summed over tokens, and what there is to say about it."""

    sum: Tensor  # scalar, with gradient
    stats: dict[str, Tensor]  # scalars without: each, summed and divided by the tokens, is the metric of its name


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """PPO's clipped surrogate (arXiv 1707.06347) with separate bounds (DAPO, arXiv 2503.14476). Per token:

    ``-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_coef * kl - entropy_coef * entropy``, ``r = pi / pi_old``,
    with ``kl`` an estimate of KL(pi || pi_ref). The paper's recipe has neither of the last two terms.
    """

    clip_low: float = 0.2  # in [0, 1]
    clip_high: float = 0.2  # at least 0
    kl_coef: float = 0.0  # at least 0
    kl_estimator: Literal["k2", "k3"] = "k3"  # see kl.py; k1 is no loss, its expected gradient does not see pi_ref
    entropy_coef: float = 0.0  # at least 0

    def __post_init__(self) -> None:
        check_number("PolicyLoss.clip_low", self.clip_low, 0, 1)
        check_number("PolicyLoss.clip_high", self.clip_high, 0)
        check_number("PolicyLoss.kl_coef", self.kl_coef, 0)
        check_choice("PolicyLoss.kl_estimator", self.kl_estimator, ("k2", "k3"))
        check_number("PolicyLoss.entropy_coef", self.entropy_coef, 0)

    def __call__(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        ref_logprobs: Tensor | None = None,
        entropies: Tensor | None = None,
    ) -> LossSum:
        """All (N,). ``ref_logprobs`` and ``entropies`` are measured where given, required by a coefficient."""
        _check_shapes(logprobs, old_logprobs, advantages, ref_logprobs, entropies)
        ratios = (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()  # r
        surrogate = ratios * advantages
        clipped = ratios.clamp(1 - self.clip_low, 1 + self.clip_high) * advantages
        loss = -torch.minimum(surrogate, clipped).sum()
        binding = clipped < surrogate  # the clip decides, and the token has no gradient
        stats = {
            "policy/clip_fraction": binding.sum(),
            "policy/clip_low_fraction": (binding & (advantages < 0)).sum(),
            "policy/clip_high_fraction": (binding & (advantages > 0)).sum(),
            "policy/approx_kl": k3(old_logprobs, logprobs).sum(),
            "policy/ratio_mean": ratios.sum(),
        }
        if ref_logprobs is not None:
            kl = KL_ESTIMATORS[self.kl_estimator](logprobs, ref_logprobs).sum()
            stats["policy/ref_kl"] = kl
            loss = loss + self.kl_coef * kl if self.kl_coef > 0 else loss
        elif self.kl_coef > 0:
            raise ValueError(f"PolicyLoss.kl_coef = {self.kl_coef}, but ref_logprobs is None: set it to 0 or give them")
        if entropies is not None:
            stats["policy/entropy_mean"] = entropies.sum()
            loss = loss - self.entropy_coef * entropies.sum() if self.entropy_coef > 0 else loss
        elif self.entropy_coef > 0:
            raise ValueError(
                f"PolicyLoss.entropy_coef = {self.entropy_coef}, but entropies is None: set it to 0 or give them"
            )
        return _loss_sum(loss, stats | {"policy/loss": loss})


@dataclass(frozen=True, slots=True)
class ValueLoss:
    """Squared error of the critic. Per token: ``(V - returns)^2 / 2``.

    With ``value_clip`` the larger of it and the same for ``V_old + clip(V - V_old, -value_clip, value_clip)``, as in
    PPO's reference code (studied in arXiv 2006.05990).
    """

    value_clip: float | None = None  # above 0; None: no clipping

    def __post_init__(self) -> None:
        if self.value_clip is not None:
            check_number("ValueLoss.value_clip", self.value_clip, 0, above_low=True)

    def __call__(self, values: Tensor, old_values: Tensor, returns: Tensor) -> LossSum:
        """All (N,)."""
        _check_shapes(values, old_values, returns)
        errors = clipped_errors = (values - returns).square() / 2
        if self.value_clip is not None:
            clipped = old_values + (values - old_values).clamp(-self.value_clip, self.value_clip)
            clipped_errors = (clipped - returns).square() / 2
        loss = torch.maximum(errors, clipped_errors).sum()
        stats = {
            "critic/loss": loss,
            "critic/clip_fraction": (clipped_errors > errors).sum(),
            "critic/value_mean": values.sum(),
            "critic/return_mean": returns.sum(),
        }
        return _loss_sum(loss, stats)


def _loss_sum(loss: Tensor, stats: dict[str, Tensor]) -> LossSum:
    return LossSum(loss, {name: value.detach().float() for name, value in stats.items()})


def _check_shapes(first: Tensor, *others: Tensor | None) -> None:
    """One shape for all: (N,) with (N, 1) would silently broadcast to (N, N)."""
    shapes = [tuple(other.shape) for other in (first, *others) if other is not None]
    assert first.dim() == 1 and len(set(shapes)) == 1, f"a loss needs flat tensors of one length, found {shapes}"
