"""Importance weights for tokens that another distribution sampled than the one whose gradient is taken.

The rollout engine and the trainer never agree to the last digit, and with stale weights they differ on purpose. The weight
``w = pi_old / pi_rollout`` corrects the surrogate for it; truncated (TIS) or masked, since rare tokens make it explode.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from sae_rl.algo.kl import MAX_LOG_RATIO
from sae_rl.algo.ragged import response_sums
from sae_rl.knobs import check_choice, check_number


@dataclass(frozen=True, slots=True)
class ImportanceCorrection:
    """A weight for each token, no gradient: of the token itself, or of its whole response, the product over its tokens.

    ``truncate``: ``min(w, cap)``, truncated importance sampling. ``mask``: ``w`` where ``1 / cap <= w <= cap``, else 0, so
    that tokens or responses that are too far off teach nothing.
    """

    mode: Literal["none", "truncate", "mask"] = "none"
    level: Literal["token", "sequence"] = "token"
    cap: float = 2.0  # above 1

    def __post_init__(self) -> None:
        check_choice("ImportanceCorrection.mode", self.mode, ("none", "truncate", "mask"))
        check_choice("ImportanceCorrection.level", self.level, ("token", "sequence"))
        check_number("ImportanceCorrection.cap", self.cap, 1, above_low=True)

    def __call__(self, old_logprobs: Tensor, rollout_logprobs: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """(n,), (n,), tokens of each response (b,) -> weights (n,), and where the cap changed them (n,) bool."""
        log_ratios = old_logprobs - rollout_logprobs
        if self.level == "sequence":
            log_ratios = response_sums(log_ratios, counts).repeat_interleave(counts)
        ratios = log_ratios.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        if self.mode == "truncate":
            return ratios.clamp(max=self.cap), ratios > self.cap
        outside = (ratios > self.cap) | (ratios < 1 / self.cap)
        return ratios.masked_fill(outside, 0.0), outside
