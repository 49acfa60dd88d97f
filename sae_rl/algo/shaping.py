"""From the reward of a response to rewards of its tokens, and from advantages to those that an update uses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sae_rl.algo import whitening_cpu
from sae_rl.algo.jit import empty
from sae_rl.algo.kl import KL_ESTIMATORS
from sae_rl.algo.ragged import check_tokens, last_tokens
from sae_rl.knobs import check_choice, check_integer, check_number
from sae_rl.types import Batch, Scores

WHITEN_EPSILON = 1e-8


@dataclass(frozen=True, slots=True)
class TokenRewards:
    """``r_t = R [t = T-1] - kl_coef * kl_t``: the verifier's reward at the last token, and a KL penalty at every one.

    ``kl_t`` estimates KL(pi_old || pi_ref) at token t (InstructGPT's shaping, arXiv 2203.02155, uses k1). The paper's
    recipe has no penalty, kl_coef = 0, and then no reference model is read.

    With ``overlong_buffer_tokens`` a response that comes near the length limit loses up to ``overlong_penalty`` of R
    (DAPO's soft overlong punishment, arXiv 2503.14476, eq. 13): nothing until so many tokens before
    ``max_response_tokens``, all of it there, in between in proportion.
    """

    kl_coef: float = 0.0  # at least 0
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"  # see kl.py
    overlong_buffer_tokens: int = 0  # at least 0; 0: no penalty for length
    overlong_penalty: float = 1.0  # at least 0
    max_response_tokens: int | None = None  # the rollouts' limit, which the buffer ends at

    def __post_init__(self) -> None:
        check_number("TokenRewards.kl_coef", self.kl_coef, 0)
        check_choice("TokenRewards.kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        check_integer("TokenRewards.overlong_buffer_tokens", self.overlong_buffer_tokens, 0)
        check_number("TokenRewards.overlong_penalty", self.overlong_penalty, 0)
        if self.overlong_buffer_tokens:
            if self.max_response_tokens is None:
                raise ValueError("TokenRewards.overlong_buffer_tokens needs max_response_tokens, found None")
            check_integer("TokenRewards.max_response_tokens", self.max_response_tokens, self.overlong_buffer_tokens)

    def __call__(self, batch: Batch, scores: Scores) -> Tensor:
        bad = ~batch.rewards.isfinite()
        if bool(bad.any()):
            response = int(bad.nonzero()[0])
            raise ValueError(f"batch.rewards is {float(batch.rewards[response])} for response {response}")
        token_rewards = torch.zeros(batch.num_tokens, dtype=batch.rewards.dtype)
        token_rewards[last_tokens(batch.offsets)] = batch.rewards - self.overlong(batch)
        return token_rewards - self.kl_coef * self._kl(batch, scores) if self.kl_coef > 0 else token_rewards

    def overlong(self, batch: Batch) -> Tensor:
        """(B,) what each response loses for its length, in [0, overlong_penalty]."""
        if not self.overlong_buffer_tokens:
            return torch.zeros_like(batch.rewards)
        assert self.max_response_tokens is not None
        free = self.max_response_tokens - self.overlong_buffer_tokens
        used = ((batch.lengths - free).to(batch.rewards) / self.overlong_buffer_tokens).clamp(0, 1)
        return self.overlong_penalty * used

    def _kl(self, batch: Batch, scores: Scores) -> Tensor:
        if scores.ref_logprobs is None:
            raise ValueError(
                f"TokenRewards.kl_coef = {self.kl_coef}, but scores.ref_logprobs is None: "
                "set it to 0 or add a reference model"
            )
        check_tokens("scores.old_logprobs", scores.old_logprobs, batch)
        check_tokens("scores.ref_logprobs", scores.ref_logprobs, batch)
        return KL_ESTIMATORS[self.kl_estimator](scores.old_logprobs, scores.ref_logprobs)


@dataclass(frozen=True, slots=True)
class Whitening:
    """What happens to advantages before the update: ``(A - mean) / (std + 1e-8)``, then ``clamp(-clip, clip)``.

    Mean and std (the population's, division by N) are over the sampled tokens of the *global* batch: parts whitened apart
    are not the whole whitened.
    """

    center: bool = True  # subtract the mean
    scale: bool = True  # divide by the std, of the distances from the mean
    clip: float | None = None  # above 0, of the advantages as they are then; None: no clipping

    def __post_init__(self) -> None:
        for knob in ("center", "scale"):
            if not isinstance(getattr(self, knob), bool):
                raise ValueError(f"Whitening.{knob} = {getattr(self, knob)!r}, but it must be true or false")
        if self.clip is not None:
            check_number("Whitening.clip", self.clip, 0, above_low=True)

    def __call__(self, advantages: Tensor, action_mask: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """(N,) -> (N,), at least float32, written to ``out`` if it is given, which may be ``advantages`` itself.

        ``action_mask`` (N,) bool: others are left out, and become 0; None: all tokens are sampled. One token, or advantages
        that are all the same, become 0 where they are centred.
        """
        advantages = advantages.detach().to(torch.promote_types(advantages.dtype, torch.float32))
        if advantages.is_cuda:
            return self._with_torch(advantages, action_mask, out)
        out = empty(advantages, advantages.dtype) if out is None else out
        shift, scale = 0.0, 1.0
        if self.center or self.scale:
            mean, std = whitening_cpu.moments(advantages, action_mask)
            shift = mean if self.center else 0.0
            scale = 1 / (std + WHITEN_EPSILON) if self.scale else 1.0
        clip = math.inf if self.clip is None else self.clip
        whitening_cpu.place(advantages, action_mask, shift, scale, clip, out)
        return out

    def _with_torch(self, advantages: Tensor, action_mask: Tensor | None, out: Tensor | None) -> Tensor:
        """The same, line by line; on a GPU."""
        counted = (advantages if action_mask is None else advantages[action_mask]).double()
        whitened = advantages.double()
        if counted.numel() and (self.center or self.scale):
            mean = counted.mean()
            whitened = whitened - mean if self.center else whitened
            whitened = whitened / (counted.std(correction=0) + WHITEN_EPSILON) if self.scale else whitened
        if self.clip is not None:
            whitened = whitened.clamp(-self.clip, self.clip)
        if action_mask is not None:
            whitened = whitened * action_mask
        return whitened.to(advantages) if out is None else out.copy_(whitened)
