"""Schulman's estimators of KL(p || q) from tokens sampled from p: http://joschu.net/blog/kl-approx.html.

With ``r = q(a) / p(a)``: k1 = -log r is unbiased and can be negative, k2 = (log r)^2 / 2 is biased with a small
variance, k3 = (r - 1) - log r is unbiased and never negative. As a *loss* in p only their gradients count, and these
differ from their values: k2's is that of KL(p || q), k3's is close to it while r is near 1, and k1's does not see q, so
that a loss gives it k2's.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

MAX_LOG_RATIO = 20.0  # e^20 is 5e8: far beyond any ratio to learn from, and finite in float32


def k1(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """(N,) ``log p - log q``."""
    return logprobs - other_logprobs


def k2(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """(N,) ``(log p - log q)^2 / 2``."""
    return (logprobs - other_logprobs).square() / 2


def k3(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """(N,) ``q/p - 1 - log(q/p)``."""
    log_ratio = (other_logprobs - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return log_ratio.expm1() - log_ratio


def k1_as_loss(logprobs: Tensor, other_logprobs: Tensor) -> Tensor:
    """(N,) the values of k1 with the gradient of k2: k1's own, of log p, is zero in expectation whatever q is."""
    slope = k2(logprobs, other_logprobs)
    return slope + (k1(logprobs, other_logprobs) - slope).detach()


Estimate = Callable[[Tensor, Tensor], Tensor]
KL_ESTIMATORS: dict[str, Estimate] = {"k1": k1, "k2": k2, "k3": k3}
KL_LOSSES: dict[str, Estimate] = KL_ESTIMATORS | {"k1": k1_as_loss}
