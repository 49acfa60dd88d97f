"""Schulman's estimators of KL(p || q) from tokens sampled from p: http://joschu.net/blog/kl-approx.html.

With ``r = q(a) / p(a)``: k1 = -log r is unbiased and can be negative. k2 = (log r)^2 / 2 is biased and has a small
variance. k3 = (r - 1) - log r is unbiased and never negative.

In a *loss* only the gradient with respect to p matters. The gradient of k2 is that of KL(p || q), and the gradient of k3 is
close to it while r is near 1. The gradient of k1 does not depend on q, so `KL_LOSSES` gives k1 the gradient of k2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import Tensor

MAX_LOG_RATIO = 20.0  # e^20 = 5e8 is far beyond any useful ratio and finite in float32


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
    """(N,) the values of k1 with the gradient of k2. The gradient of k1 itself is zero in expectation, whatever q is."""
    with_gradient = k2(logprobs, other_logprobs)
    return with_gradient + (k1(logprobs, other_logprobs) - with_gradient).detach()


KLName = Literal["k1", "k2", "k3"]
KLEstimator = Callable[[Tensor, Tensor], Tensor]
KL_ESTIMATORS: dict[str, KLEstimator] = {"k1": k1, "k2": k2, "k3": k3}
KL_LOSSES: dict[str, KLEstimator] = KL_ESTIMATORS | {"k1": k1_as_loss}
