"""Bootstrap over prompts, for statistics that are functions of weighted sums.

G   prompts
R   resamples; row 0 of what has R + 1 rows is the sample itself
"""

from __future__ import annotations

from statistics import NormalDist

import torch
from torch import Tensor

from sae_rl.evaluation.statistics import TAIL, Estimate

NUM_RESAMPLES = 1000


def resampled_counts(num_prompts: int, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> Tensor:
    """(R + 1, G) float64, how often each resample has each prompt. The first row is the sample itself, once each."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, num_prompts, (num_resamples, num_prompts), generator=generator)
    counts = torch.zeros(num_resamples, num_prompts, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(counts))
    return torch.cat([torch.ones(1, num_prompts, dtype=torch.float64), counts])


def tail(num_prompts: int) -> float:
    """The probability on either side of a 95 % interval, as a quantile of resamples of G prompts.

    A percentile interval of a mean is too narrow: a resample's variance is (G - 1) / G of the unbiased one, and the normal
    quantile stands where Student's belongs. The expanded percentile interval takes the quantiles
    ``Phi(+-sqrt(G / (G - 1)) t)`` instead (Hesterberg, arXiv 1411.5279). t is Student's quantile, by the first
    terms of its Cornish-Fisher expansion.
    """
    freedom = num_prompts - 1
    z = NormalDist().inv_cdf(1 - TAIL)
    student = z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    return NormalDist().cdf(-student * ((freedom + 1) / freedom) ** 0.5)


def estimates_of(found: Tensor, num_prompts: int) -> list[Estimate]:
    """Values with expanded percentile intervals, from (R + 1, S) statistics of the sample and its resamples.

    A statistic is left out, as NaN, where the sample or more than `TAIL` of the resamples leave it undefined. One prompt has
    no interval.
    """
    sample, resamples = found[0], found[1:]
    undefined = sample.isnan() | (resamples.isnan().double().mean(0) > TAIL)
    ends = torch.full((2, sample.numel()), torch.nan, dtype=found.dtype)
    if num_prompts > 1:
        quantile = tail(num_prompts)
        ends = resamples.nanquantile(torch.tensor([quantile, 1 - quantile], dtype=found.dtype), 0)
    rows = torch.cat([sample[None], ends]).masked_fill(undefined, torch.nan)
    return [Estimate(*row) for row in rows.T.tolist()]
