"""Rewards, values and segments -> advantages and critic targets. A new estimator is one class here and one line below.

All TD estimators are the recursion of `recursion` and differ only in ``lambda_t``. Their critic targets come from the
same recursion with a lambda of their own, ``value_lam``: 1 gives the Monte-Carlo return. A response ends with its last
token, V = 0 behind it, unless the scores bring ``final_values`` for those cut at the length limit. Step-level GAE, as in
AlphaMath (arXiv 2405.03553), is SAE with the delimiter segmenter. Advantages are not whitened here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from sae_rl.algo.ragged import check_tokens, response_sums
from sae_rl.algo.recursion import td_recursion
from sae_rl.algo.segmenters import checked_opens
from sae_rl.knobs import Knobs, check_number, number
from sae_rl.types import Batch, Scores, Targets

GROUP_STD_EPSILON = 1e-6


class Estimator(Protocol):
    """(batch, scores, token_rewards (N,), opens (N,)) -> Targets.

    A class may also set ``needs_entropies = True``: then ``scores.entropies`` are computed.
    """

    needs_critic: ClassVar[bool]

    def __call__(self, batch: Batch, scores: Scores, token_rewards: Tensor, opens: Tensor) -> Targets: ...


def estimate(estimator: Estimator, batch: Batch, scores: Scores, token_rewards: Tensor, opens: Tensor) -> Targets:
    """The estimator's answer, checked: nothing that is not a number gets into an update.

    Raises:
        ValueError: an advantage or a critic's target is missing, has another shape or is not finite.
    """
    targets = estimator(batch, scores, token_rewards, opens)
    name = type(estimator).__name__
    check_tokens(f"{name}'s advantages", targets.advantages, batch)
    if targets.returns is not None:
        check_tokens(f"{name}'s returns", targets.returns, batch)
    elif estimator.needs_critic:
        raise ValueError(f"{name} needs a critic, but gives it no returns to learn")
    return targets


@dataclass(frozen=True, slots=True)
class SAE(Knobs):
    """Segmental Advantage Estimation, arXiv 2601.07320: the trace decays only where a segment opens.

    ``lambda_t = lam ^ w_{t+1}``, with ``w`` 1 where a segment opens and 0 inside; soft segments have a w between.
    """

    lam: float = number(0.95, low=0, high=1)
    gamma: float = number(1.0, low=0, high=1)
    value_lam: float = number(1.0, low=0, high=1)  # the lambda of the critic's targets

    needs_critic: ClassVar[bool] = True

    def __call__(self, batch: Batch, scores: Scores, token_rewards: Tensor, opens: Tensor) -> Targets:
        return td_targets(batch, scores, token_rewards, opens, gamma=self.gamma, lam=self.lam, value_lam=self.value_lam)


@dataclass(frozen=True, slots=True)
class GAE(Knobs):
    """Generalized Advantage Estimation, arXiv 1506.02438: ``lambda_t = lam`` at every token."""

    lam: float = number(0.95, low=0, high=1)
    gamma: float = number(1.0, low=0, high=1)
    value_lam: float = number(1.0, low=0, high=1)  # the lambda of the critic's targets

    needs_critic: ClassVar[bool] = True

    def __call__(self, batch: Batch, scores: Scores, token_rewards: Tensor, opens: Tensor) -> Targets:
        everywhere = torch.ones(batch.num_tokens, dtype=torch.bool)
        return td_targets(
            batch, scores, token_rewards, everywhere, gamma=self.gamma, lam=self.lam, value_lam=self.value_lam
        )


@dataclass(frozen=True, slots=True)
class MonteCarlo:
    """The return less a baseline, ``A_t = G_t - V_t``: ``lambda_t = 1``. PPO as most reasoning recipes run it."""

    gamma: float = 1.0  # in [0, 1]

    needs_critic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_number("MonteCarlo.gamma", self.gamma, 0, 1)

    def __call__(self, batch: Batch, scores: Scores, token_rewards: Tensor, opens: Tensor) -> Targets:
        nowhere = torch.zeros(batch.num_tokens, dtype=torch.bool)
        return td_targets(batch, scores, token_rewards, nowhere, gamma=self.gamma, lam=1.0, value_lam=1.0)


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
        everywhere = torch.ones(batch.num_tokens, dtype=torch.bool)
        lams = (1 - 1 / (self.alpha * batch.num_sampled.double())).clamp(min=0)
        return td_targets(
            batch, scores, token_rewards, everywhere, gamma=self.gamma, lam=lams, value_lam=self.value_lam
        )


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
        centred, groups, sizes = _centred_in_groups("GRPO", batch, scores, token_rewards)
        if self.normalize_std:
            variances = _group_sums(centred.square(), groups, sizes) / (sizes - 1)
            centred = centred / (variances.sqrt()[groups] + GROUP_STD_EPSILON)
        return _spread(centred, batch, token_rewards)


@dataclass(frozen=True, slots=True)
class RLOO:
    """REINFORCE leave-one-out, arXiv 2402.14740: the return less the mean return of the *other* responses of its group.

    ``A_t = R - mean of the others``, which is ``n / (n - 1)`` times the distance from the mean of all n.
    """

    needs_critic: ClassVar[bool] = False

    def __call__(self, batch: Batch, scores: Scores, token_rewards: Tensor, opens: Tensor) -> Targets:
        centred, groups, sizes = _centred_in_groups("RLOO", batch, scores, token_rewards)
        return _spread(centred * (sizes.double() / (sizes - 1))[groups], batch, token_rewards)


def td_targets(
    batch: Batch,
    scores: Scores,
    token_rewards: Tensor,
    weights: Tensor,
    *,
    gamma: float | Tensor,
    lam: float | Tensor,
    value_lam: float | Tensor,
) -> Targets:
    """The recursion on a batch, for any weights (N,) in [0, 1]; see `recursion.td_recursion` for the others.

    Raises:
        ValueError: there are no values, or an input has another shape, is not finite, or is no weight.
    """
    if scores.values is None:
        raise ValueError("scores.values is None, but this estimator needs a critic: train one, or choose grpo")
    _check_inputs(batch, scores, token_rewards)
    check_tokens("scores.values", scores.values, batch)
    checked_opens("opens", weights, batch)
    advantages, returns = td_recursion(
        token_rewards,
        scores.values,
        weights,
        batch.offsets,
        gamma=gamma,
        lam=lam,
        value_lam=value_lam,
        final_values=None if scores.final_values is None else scores.final_values.double() * batch.truncated,
        action_mask=batch.action_mask,
        num_threads=torch.get_num_threads(),
    )
    return Targets(advantages=advantages, returns=returns)


def _check_inputs(batch: Batch, scores: Scores, token_rewards: Tensor) -> None:
    """Every step passes here before an update: nothing that is not a number may get further."""
    check_tokens("token_rewards", token_rewards, batch)
    check_tokens("batch.rollout_logprobs", batch.rollout_logprobs, batch)
    check_tokens("scores.old_logprobs", scores.old_logprobs, batch)


def _centred_in_groups(name: str, batch: Batch, scores: Scores, token_rewards: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """R - mean of its group (B,) float64; the group's number of each response (B,); the groups' sizes.

    R is the sum of a response's token rewards.
    """
    _check_inputs(batch, scores, token_rewards)
    names, groups, sizes = torch.unique(batch.groups, return_inverse=True, return_counts=True)
    if int(sizes.min()) < 2:
        raise ValueError(
            f"group {int(names[sizes.argmin()])} has 1 response, but {name} compares the responses of a group: "
            "set a group size of at least 2"
        )
    totals = response_sums(token_rewards.double(), batch.lengths)
    return totals - (_group_sums(totals, groups, sizes) / sizes)[groups], groups, sizes


def _group_sums(per_response: Tensor, groups: Tensor, sizes: Tensor) -> Tensor:
    return torch.zeros(sizes.shape, dtype=torch.float64).index_add(0, groups, per_response)


def _spread(per_response: Tensor, batch: Batch, token_rewards: Tensor) -> Targets:
    """One advantage per response at each of its sampled tokens, and no critic targets."""
    dtype = torch.promote_types(token_rewards.dtype, torch.float32)
    advantages = per_response.to(dtype).repeat_interleave(batch.lengths)
    return Targets(advantages=advantages if batch.action_mask is None else advantages * batch.action_mask, returns=None)


ESTIMATORS: dict[str, type[Estimator]] = {
    "sae": SAE,
    "gae": GAE,
    "monte_carlo": MonteCarlo,
    "length_adaptive_gae": LengthAdaptiveGAE,
    "grpo": GRPO,
    "rloo": RLOO,
}
