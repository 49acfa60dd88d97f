"""Bootstrap over prompts, for statistics that are functions of weighted sums.

G   prompts
R   resamples; row 0 of what has R + 1 rows is the sample itself
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from sae_rl.evaluation.statistics import TAIL, Estimate
from sae_rl.evaluation.student import quantile

NUM_RESAMPLES = 1000


def resampled_counts(num_prompts: int, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> Tensor:
    """(R + 1, G) float64, how often each resample has each prompt. The first row is the sample itself, once each."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, num_prompts, (num_resamples, num_prompts), generator=generator)
    counts = torch.zeros(num_resamples, num_prompts, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(counts))
    return torch.cat([torch.ones(1, num_prompts, dtype=torch.float64), counts])


def student_tail(num_prompts: int) -> float:
    """The normal quantile whose place on either side of a 95 % interval suits resamples of G prompts; below 0.

    A percentile interval of a mean is too narrow: a resample's variance is (G - 1) / G of the unbiased one, and the normal
    quantile stands where Student's belongs. The expanded percentile interval takes the quantiles
    ``Phi(+-sqrt(G / (G - 1)) t)`` with Student's quantile t instead (Hesterberg, arXiv 1411.5279).
    """
    freedom = num_prompts - 1
    return -quantile(1 - 2 * TAIL, np.array([float(freedom)])).item() * math.sqrt(num_prompts / freedom)


def estimates_of(found: Tensor, num_prompts: int) -> list[Estimate]:
    """Values with 95 % intervals, from (R + 1, S) statistics of the sample and of its resamples.

    The intervals are bias-corrected percentile intervals (Efron, 1981) with the quantiles of `student_tail`:
    ``Phi(2 z +- student_tail)``, ``Phi(z)`` the fraction of resamples below the sample. A cosine of mean gradients near 1
    needs the correction: its error is of second order, to which an estimate and its resamples add about the same bias. The
    plain percentile interval then covers 70 to 85 % instead of 95, and the acceleration of BCa changes nothing.

    A statistic is left out, as NaN, where the sample or more than `TAIL` of the resamples leave it undefined. One prompt has
    no interval.
    """
    sample, resamples = found[0], found[1:].sort(0).values  # NaN comes last
    num_defined = (~resamples.isnan()).sum(0)
    undefined = sample.isnan() | (num_defined < (1 - TAIL) * resamples.shape[0])
    ends = torch.full((2, sample.numel()), torch.nan, dtype=found.dtype)
    if num_prompts > 1:
        is_below = ((resamples < sample).double() + (resamples <= sample).double()).sum(0) / 2
        shift = 2 * torch.special.ndtri((is_below / num_defined.clamp(min=1)).clamp(TAIL / 25, 1 - TAIL / 25))
        tail = student_tail(num_prompts)
        for row, z in zip(ends, (tail, -tail), strict=True):
            place = torch.special.ndtr(shift + z) * (num_defined - 1).clamp(min=0)
            below, above = (resamples.gather(0, at.long()[None])[0] for at in (place.floor(), place.ceil()))
            row[:] = below.lerp(above, place.frac())
    rows = torch.cat([sample[None], ends]).masked_fill(undefined, torch.nan)
    return [Estimate(*row) for row in rows.T.tolist()]
