"""How well advantages agree with reference advantages: correlation, bias, and what the reference's own noise takes away.

n   tokens that have a reference         E   estimators
G   prompts                              R   resamples of prompts; row 0 of R + 1 is the sample itself
S   slices of the tokens, such as tenths of the response
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sae_rl.algo.jit import jit
from sae_rl.algo.ragged import positions
from sae_rl.correlation.measurements import Measurements, reference_values
from sae_rl.correlation.references import Reference

POSITION_BINS = 20  # that hold equally many tokens
ROUNDED_DIGITS = 12  # decimals of advantages that are compared
ROUNDING = 1e-20  # a variance is 0 below this fraction of the mean square

Codes = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Statistics of tokens with a reference, each of the sample and of its resamples; NaN where undefined."""

    reliability: Tensor  # (R + 1, S) fraction of the reference's variance that is not its noise
    # (R + 1, E, S) each:
    pearson: Tensor
    pearson_corrected: Tensor  # what the correlation with a reference without noise would be
    mean_error: Tensor  # mean of the advantage minus the reference
    slope: Tensor  # regression of the advantage on the true one; 1 where no error depends on the action
    action_error: Tensor  # mean of the error times the true advantage, over the true advantage's standard deviation


def agreement(
    measurements: Measurements, reference: Reference, counts: Tensor, slices: Tensor | None = None, num_slices: int = 1
) -> Agreement:
    """Pearson correlation and bias of every estimator, by slice.

    With x an estimator's advantages, y the reference's, ``y = a + e``, a the true advantages and e the noise of the
    reference, whose variance v is estimated from the spread of each place's continuations:

        reliability        1 - mean(v) / var(y)
        pearson_corrected  cov(x, y) / sqrt(var(x) (var(y) - mean(v)))
        mean_error         mean(x - y)
        slope              cov(x', y) / (var(y) - mean(v)), x' = x minus its mean at this position
        action_error       (slope - 1) sqrt(var(y) - mean(v))

    The reliability equals Spearman and Brown's ``2 r / (1 + r)`` of split halves of the continuations, where r is taken from
    the halves' covariance averaged over all splits. Continuations are independent of the response, so e is independent of x.
    At the end of a response y holds the response's own return, as x may; there e is 0.

    For the token reference, ``E[a | s_t] = 0``, so ``cov(x', y)`` is ``E[x a]``: parts of x that depend on the position or
    on the state alone are not in it, and the slope shows a bias that moves the policy gradient. In the example of
    docs/bias.md it is ``1 + k (1 - q) (1 - lam)`` for `opens` and 1 for `closes`.

    Args:
        counts: (R + 1, G) of `resampled_counts`.
        slices: (n,) the slice of each token, from 0; -1 belongs to none. None: all tokens are slice 0.
    """
    tokens = reference.tokens
    x = measurements.advantages[:, tokens]  # (E, n)
    y = reference.advantages(measurements, reference_values(measurements))
    residual = x - _position_means(x, positions(measurements.batch.offsets)[tokens])
    size = x.square().mean(1)[:, None]
    offset = x.mean(1, keepdim=True), y.mean()  # taken away first, so that variances lose no digits
    x, y = x - offset[0], y - offset[1]
    sums = _sums_by_slice(prompts_of(measurements, reference), counts, slices, num_slices)
    n = sums(torch.ones_like(y))
    mean_y, variance_y = sums(y) / n, sums(y * y) / n - (sums(y) / n) ** 2
    noise = sums(reference.noise(measurements)) / n
    true = torch.where(variance_y > noise, variance_y - noise, torch.nan)[:, None]
    n, mean_y = n[:, None], mean_y[:, None]
    mean_x, mean_residual = sums(x) / n, sums(residual) / n
    variance_x = sums(x * x) / n - mean_x**2
    variance_x = variance_x.masked_fill(variance_x <= ROUNDING * size, torch.nan)
    covariance = sums(x * y) / n - mean_x * mean_y
    slope = (sums(residual * y) / n - mean_residual * mean_y) / true
    return Agreement(
        reliability=1 - noise / variance_y,
        pearson=covariance / (variance_x * variance_y[:, None]).sqrt(),
        pearson_corrected=covariance / (variance_x * true).sqrt(),
        mean_error=mean_x + offset[0] - mean_y - offset[1],
        slope=slope,
        action_error=(slope - 1) * true.sqrt(),
    )


def spearman(measurements: Measurements, reference: Reference, counts: Tensor) -> Tensor:
    """(R + 1, E) rank correlation with the reference; every resample is ranked anew, and equal numbers share their mean rank.

    It is not corrected for the noise of the reference. Spearman and Brown's formula assumes errors that do not depend on
    the truth; those of ranks do, above all where many advantages are equal.
    """
    prompt, weights = prompts_of(measurements, reference).numpy(), counts.numpy()
    y = _codes(reference.advantages(measurements, reference_values(measurements)))
    rows = measurements.advantages[:, reference.tokens]
    return torch.stack([torch.from_numpy(_rank_correlations(_codes(x), y, prompt, weights)) for x in rows], 1)


def _sums_by_slice(
    prompt: Tensor, counts: Tensor, slices: Tensor | None, num_slices: int
) -> Callable[[Tensor], Tensor]:
    """Sums (..., n) over the tokens of each resample and slice: (R + 1, ..., S)."""
    num_tokens, num_prompts = prompt.numel(), counts.shape[1]
    cell = prompt if slices is None else prompt * num_slices + slices
    inside = torch.ones_like(prompt, dtype=torch.bool) if slices is None else slices >= 0

    def sums(of_token: Tensor) -> Tensor:
        rows = of_token.reshape(-1, num_tokens)[:, inside]
        cells = rows.new_zeros(rows.shape[0], num_prompts * num_slices).index_add(1, cell[inside], rows)
        found = torch.einsum("rg,fgs->rfs", counts, cells.view(-1, num_prompts, num_slices))
        return found.reshape(-1, *of_token.shape[:-1], num_slices)

    return sums


def prompts_of(measurements: Measurements, reference: Reference) -> Tensor:
    """(n,) int64, the prompt of each token of a reference."""
    response = torch.searchsorted(measurements.batch.offsets, reference.tokens, right=True) - 1
    return measurements.batch.groups[response]


def _position_means(x: Tensor, position: Tensor) -> Tensor:
    """(E, n) mean of each row over the tokens at about the same position of their response."""
    inner = np.linspace(0, 1, POSITION_BINS + 1)[1:-1]
    edges = torch.from_numpy(np.quantile(position.double().numpy(), inner)).unique()  # torch takes 2^24 numbers at most
    found = torch.searchsorted(edges, position.double())
    sizes = found.bincount(minlength=POSITION_BINS)
    sums = x.new_zeros(x.shape[0], POSITION_BINS).index_add(1, found, x)
    return (sums / sizes)[:, found]


def _codes(numbers: Tensor) -> Codes:
    """(n,) the rank of each number among the distinct ones; numbers that differ by rounding alone are equal."""
    found: Codes = np.unique(numbers.numpy().round(ROUNDED_DIGITS), return_inverse=True)[1].astype(np.int64)
    return found


@jit()
def _rank_correlations(ones: Codes, others: Codes, prompt: Codes, weights: Any) -> Any:
    """(R + 1,) Pearson correlation of mean ranks, each token as often as its prompt is in the resample."""
    found = np.empty(weights.shape[0])
    of_one, of_other = np.empty(ones.max() + 1), np.empty(others.max() + 1)
    for row in range(weights.shape[0]):
        of_one[:] = 0
        of_other[:] = 0
        total = 0.0
        for i in range(ones.size):
            weight = weights[row, prompt[i]]
            of_one[ones[i]] += weight
            of_other[others[i]] += weight
            total += weight
        for sizes in (of_one, of_other):
            below = 0.0
            for code in range(sizes.size):  # ranks from their mean
                size = sizes[code]
                sizes[code] = below + (size - total) / 2
                below += size
        shared, first, second = 0.0, 0.0, 0.0
        for i in range(ones.size):
            weight, a, b = weights[row, prompt[i]], of_one[ones[i]], of_other[others[i]]
            shared += weight * a * b
            first += weight * a * a
            second += weight * b * b
        found[row] = shared / math.sqrt(first * second) if first > 0 and second > 0 else math.nan
    return found
