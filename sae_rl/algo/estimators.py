"""Rewards, values and segments -> advantages and critic targets. A new estimator is one class here and one line below.

All TD estimators are one recursion and differ only in ``lambda_t``:

    delta_t = r_t + gamma * V_{t+1} - V_t          V is 0 after the last token of a response, truncated or not
    A_t     = delta_t + gamma * lambda_t * A_{t+1}

Their critic targets, ``returns_t = A_t + V_t``, come from the same recursion with a lambda of their own (``value_lam``,
the decoupling of VC-PPO, arXiv 2503.01491): 1 gives the Monte-Carlo return. Advantages are not whitened here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from sae_rl.algo.knobs import check_number
from sae_rl.algo.ragged import check_tokens, last_tokens, response_sums
from sae_rl.algo.recursion import discounted_sums
from sae_rl.types import Batch, Scores, Targets

GROUP_STD_EPSILON = 1e-6


class Estimator(Protocol):
    """(batch, scores, token_rewards (N,), opens (N,)) -> Targets."""

    needs_critic: ClassVar[bool]

    def __call__(self, batch: Batch, scores: Scores, token_rewards: Tensor, opens: Tensor) -> Targets: ...


@dataclass(frozen=True, slots=True)
class SAE:
    """Segmental Advantage Estimation, arXiv 2601.07320: the trace decays only where a segment opens.

    ``lambda_t = lam ^ w_{t+1}``, with ``w`` 1 where a segment opens and 0 inside; soft segments have a w between.
    """

    lam: float = 0.95  # in [0, 1]
    gamma: float = 1.0  # in [0, 1]
    value_lam: float = 1.0  # in [0, 1], the lambda of the critic's targets

    needs_critic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("SAE.lam", self.lam, 0, 1)
        check_number("SAE.gamma", self.gamma, 0, 1)
        check_number("SAE.value_lam", self.value_lam, 0, 1)

    def __call__(self, batch: Batch, scores: Scores, token_rewards: Tensor, opens: Tensor) -> Targets:
        check_tokens("opens", opens, batch)
        lowest, highest = opens.aminmax()
        if lowest < 0 or highest > 1:
            raise ValueError(f"opens spans [{lowest}, {highest}], but a segmenter's weights must be in [0, 1]")
        next_opens = opens.double().roll(-1)  # w_{t+1}; what follows the last token of a response is never used
        lambdas, value_lambdas = self.lam**next_opens, self.value_lam**next_opens
        return td_targets(batch, scores, token_rewards, self.gamma, lambdas, value_lambdas)


@dataclass(frozen=True, slots=True)
class GAE:
    """Generalized Advantage Estimation, arXiv 1506.02438: ``lambda_t = lam`` at every token."""

    lam: float = 0.95  # in [0, 1]
    gamma: float = 1.0  # in [0, 1]
    value_lam: float = 1.0  # in [0, 1], the lambda of the critic's targets

    needs_critic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("GAE.lam", self.lam, 0, 1)
        check_number("GAE.gamma", self.gamma, 0, 1)
        check_number("GAE.value_lam", self.value_lam, 0, 1)

    def __call__(self, batch: Batch, scores: Scores, token_rewards: Tensor, opens: Tensor) -> Targets:
        lambdas, value_lambdas = _constant(self.lam, batch), _constant(self.value_lam, batch)
        return td_targets(batch, scores, token_rewards, self.gamma, lambdas, value_lambdas)


@dataclass(frozen=True, slots=True)
class MonteCarlo:
    """The return less a baseline, ``A_t = G_t - V_t``: ``lambda_t = 1``. PPO as most reasoning recipes run it."""

    gamma: float = 1.0  # in [0, 1]

    needs_critic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("MonteCarlo.gamma", self.gamma, 0, 1)

    def __call__(self, batch: Batch, scores: Scores, token_rewards: Tensor, opens: Tensor) -> Targets:
        lambdas = _constant(1.0, batch)
        return td_targets(batch, scores, token_rewards, self.gamma, lambdas, lambdas)


@dataclass(frozen=True, slots=True)
class LengthAdaptiveGAE:
    """VAPO, arXiv 2504.05118: ``lambda_t = max(0, 1 - 1 / (alpha * T))``, one lambda per response of T tokens."""

    alpha: float = 0.05  # above 0
    gamma: float = 1.0  # in [0, 1]
    value_lam: float = 1.0  # in [0, 1], the lambda of the critic's targets

    needs_critic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("LengthAdaptiveGAE.alpha", self.alpha, 0, above_low=True)
        check_number("LengthAdaptiveGAE.gamma", self.gamma, 0, 1)
        check_number("LengthAdaptiveGAE.value_lam", self.value_lam, 0, 1)

    def __call__(self, batch: Batch, scores: Scores, token_rewards: Tensor, opens: Tensor) -> Targets:
        lambda_of_response = (1 - 1 / (self.alpha * batch.lengths.double())).clamp(min=0)
        lambdas, value_lambdas = lambda_of_response.repeat_interleave(batch.lengths), _constant(self.value_lam, batch)
        return td_targets(batch, scores, token_rewards, self.gamma, lambdas, value_lambdas)


@dataclass(frozen=True, slots=True)
class GRPO:
    """Group-relative and without a critic, arXiv 2402.03300: ``A_t = (R - mean) / (std + 1e-6)`` at every token.

    R is the sum of the response's token rewards; mean and std (the sample's, n - 1) are over its group, the responses
    to one prompt. ``normalize_std=False`` leaves the division out (Dr. GRPO, arXiv 2503.20783).
    """

    normalize_std: bool = True

    needs_critic: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.normalize_std, bool):
            raise ValueError(f"GRPO.normalize_std = {self.normalize_std!r}, but it must be true or false")

    def __call__(self, batch: Batch, scores: Scores, token_rewards: Tensor, opens: Tensor) -> Targets:
        _check_inputs(batch, scores, token_rewards)
        names, groups, sizes = torch.unique(batch.groups, return_inverse=True, return_counts=True)
        if int(sizes.min()) < 2:
            raise ValueError(
                f"group {int(names[sizes.argmin()])} has 1 response, but GRPO compares the responses of a group: "
                "set a group size of at least 2"
            )
        rewards = response_sums(token_rewards, batch.offsets)  # R
        centred = rewards - _group_sums(rewards, groups, sizes)[groups] / sizes[groups]  # R - mean
        std = (_group_sums(centred.square(), groups, sizes) / (sizes - 1)).sqrt()
        advantages = centred / (std[groups] + GROUP_STD_EPSILON) if self.normalize_std else centred
        advantages = advantages.to(torch.promote_types(token_rewards.dtype, torch.float32))
        return Targets(advantages=advantages.repeat_interleave(batch.lengths), returns=None)


def td_targets(
    batch: Batch, scores: Scores, token_rewards: Tensor, gamma: float, lambdas: Tensor, value_lambdas: Tensor
) -> Targets:
    """The recursion above for any ``lambda_t`` (N,), that of the advantages and that of the critic's targets.

    Computed in float64; the targets have the type of the values, at least float32.
    """
    if scores.values is None:
        raise ValueError("scores.values is None, but this estimator needs a critic: train one, or choose grpo")
    _check_inputs(batch, scores, token_rewards)
    check_tokens("scores.values", scores.values, batch)
    values = scores.values.double()
    next_values = values.roll(-1).index_fill(0, last_tokens(batch.offsets), 0.0)  # V_{t+1}
    deltas = token_rewards.double() + gamma * next_values - values
    advantages = discounted_sums(deltas, gamma * lambdas, batch.offsets)
    same = torch.equal(lambdas, value_lambdas)
    value_advantages = advantages if same else discounted_sums(deltas, gamma * value_lambdas, batch.offsets)
    dtype = torch.promote_types(scores.values.dtype, torch.float32)
    return Targets(advantages=advantages.to(dtype), returns=(value_advantages + values).to(dtype))


def _check_inputs(batch: Batch, scores: Scores, token_rewards: Tensor) -> None:
    """Every step passes here before an update: nothing that is not a number may get further."""
    check_tokens("token_rewards", token_rewards, batch)
    check_tokens("batch.rollout_logprobs", batch.rollout_logprobs, batch)
    check_tokens("scores.old_logprobs", scores.old_logprobs, batch)


def _constant(lam: float, batch: Batch) -> Tensor:
    return torch.full((batch.num_tokens,), lam, dtype=torch.float64)


def _group_sums(per_response: Tensor, groups: Tensor, sizes: Tensor) -> Tensor:
    return torch.zeros(sizes.shape, dtype=torch.float64).index_add(0, groups, per_response)


ESTIMATORS: dict[str, type[Estimator]] = {
    "sae": SAE,
    "gae": GAE,
    "monte_carlo": MonteCarlo,
    "length_adaptive_gae": LengthAdaptiveGAE,
    "grpo": GRPO,
}
