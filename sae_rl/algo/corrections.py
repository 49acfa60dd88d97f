"""Importance weights for the difference between the policy that sampled and the policy that is trained.

The rollout engine and the trainer compute slightly different probabilities, and with stale weights they are different
policies. The weight ``w = pi_old / pi_rollout`` corrects the surrogate for that. It is truncated or masked because it can
be very large at rare tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from sae_rl.algo.kl import MAX_LOG_RATIO
from sae_rl.algo.ragged import response_sums
from sae_rl.knobs import Knobs, choice, number

Mode = Literal["none", "truncate", "mask"]
Level = Literal["token", "sequence"]


@dataclass(frozen=True, slots=True)
class ImportanceCorrection(Knobs):
    """One weight per token, without gradient. With ``level="sequence"`` w is the product over the tokens of the response.

    - ``truncate``: ``min(w, cap)``, truncated importance sampling (TIS)
    - ``mask``: ``w`` where ``1 / cap <= w <= cap``, and 0 elsewhere, so that those tokens or responses have no gradient
    """

    mode: Mode = choice("none", allowed=get_args(Mode))
    level: Level = choice("token", allowed=get_args(Level))
    cap: float = number(2.0, low=1, above_low=True)

    def __call__(self, old_logprobs: Tensor, rollout_logprobs: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Logprobs (n,) of b responses with ``counts`` (b,) tokens -> (weights (n,), where the cap changed them (n,))."""
        log_ratios = old_logprobs - rollout_logprobs
        if self.level == "sequence":
            log_ratios = response_sums(log_ratios, counts).repeat_interleave(counts)
        ratios = log_ratios.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        if self.mode == "truncate":
            return ratios.clamp(max=self.cap), ratios > self.cap
        outside = (ratios > self.cap) | (ratios < 1 / self.cap)
        return ratios.masked_fill(outside, 0.0), outside
