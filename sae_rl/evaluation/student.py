"""Student's t distribution and Holm's correction."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

NODES, WEIGHTS = np.polynomial.legendre.leggauss(128)
LARGEST = 1e4  # a quantile of 0.975 is at most 12.7 for one degree of freedom


def within(t: Floats, df: Floats) -> Floats:
    """P(|T| <= t) of Student's t with ``df`` degrees of freedom, elementwise; t >= 0.

    With T = sqrt(df) tan(u) the density is proportional to cos(u)^(df - 1), which is integrated by Gauss and Legendre.
    """
    end = np.arctan(t / np.sqrt(df))[..., None] / 2
    area = (end * WEIGHTS * np.cos(end * (NODES + 1)) ** (df[..., None] - 1)).sum(-1)
    log_gamma = np.vectorize(math.lgamma, otypes=[float])
    scale = 2 / math.sqrt(math.pi) * np.exp(log_gamma((df + 1) / 2) - log_gamma(df / 2))
    return np.asarray(np.clip(scale * area, 0.0, 1.0))


def quantile(probability: float, df: Floats) -> Floats:
    """t with P(|T| <= t) = ``probability``, by bisection."""
    low, high = np.zeros_like(df), np.full_like(df, LARGEST)
    for _ in range(60):
        middle = (low + high) / 2
        below = within(middle, df) < probability
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return (low + high) / 2


def holm(p_values: npt.ArrayLike) -> Floats:
    """Adjusted p values of Holm (1979), which bound the chance of any false finding; NaN stays and does not count."""
    p = np.asarray(p_values, dtype=float)
    adjusted, order = np.full_like(p, np.nan), np.argsort(p)[: int(np.sum(~np.isnan(p)))]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(factors * p[order]), 1.0)
    return adjusted
