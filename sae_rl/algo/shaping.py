"""From the reward of a response to rewards of its tokens, and from advantages to whitened ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sae_rl.algo.kl import KL_ESTIMATORS
from sae_rl.algo.knobs import check_choice, check_number
from sae_rl.algo.ragged import check_tokens, last_tokens
from sae_rl.types import Batch, Scores

WHITEN_EPSILON = 1e-8


@dataclass(frozen=True, slots=True)
class TokenRewards:
    """``r_t = R [t = T-1] - kl_coef * kl_t``: the verifier's reward at the last token, and a KL penalty at every one.

    ``kl_t`` estimates KL(pi_old || pi_ref) at token t (InstructGPT's shaping, arXiv 2203.02155, uses k1). The paper's
    recipe has no penalty, kl_coef = 0, and then no reference model is read.
    """

    kl_coef: float = 0.0  # at least 0
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"  # see kl.py

    def __post_init__(self) -> None:
        check_number("TokenRewards.kl_coef", self.kl_coef, 0)
        check_choice("TokenRewards.kl_estimator", self.kl_estimator, KL_ESTIMATORS)

    def __call__(self, batch: Batch, scores: Scores) -> Tensor:
        bad = ~batch.rewards.isfinite()
        if bool(bad.any()):
            response = int(bad.nonzero()[0])
            raise ValueError(f"batch.rewards is {float(batch.rewards[response])} for response {response}")
        token_rewards = torch.zeros(batch.num_tokens, dtype=batch.rewards.dtype)
        token_rewards[last_tokens(batch.offsets)] = batch.rewards
        return token_rewards - self.kl_coef * self._kl(batch, scores) if self.kl_coef > 0 else token_rewards

    def _kl(self, batch: Batch, scores: Scores) -> Tensor:
        if scores.ref_logprobs is None:
            raise ValueError(
                f"TokenRewards.kl_coef = {self.kl_coef}, but scores.ref_logprobs is None: "
                "set it to 0 or add a reference model"
            )
        check_tokens("scores.old_logprobs", scores.old_logprobs, batch)
        check_tokens("scores.ref_logprobs", scores.ref_logprobs, batch)
        return KL_ESTIMATORS[self.kl_estimator](scores.old_logprobs, scores.ref_logprobs)


def whiten(advantages: Tensor) -> Tensor:
    """(N,) -> (N,) with mean 0 and std 1: ``(A - mean) / (std + 1e-8)``.

    The std is the population's (division by N). Pass the response tokens of the *global* batch: parts whitened apart
    are not the whole whitened. One token, or advantages that are all the same, become 0.
    """
    centred = advantages.double() - advantages.double().mean()
    return (centred / (centred.square().mean().sqrt() + WHITEN_EPSILON)).to(advantages)
