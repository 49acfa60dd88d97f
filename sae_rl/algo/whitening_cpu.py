"""Kernels of `shaping.Whitening` for the CPU. They read each number three times, write it once, and copy nothing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from sae_rl.algo.jit import jit

REORDERED_SUMS = {"contract", "reassoc", "nsz"}  # lets the compiler vectorise a sum


@jit(fastmath=REORDERED_SUMS)
def _count_and_mean(flat: Any, action_mask: Any) -> Any:
    count, total = 0, 0.0
    for i in range(flat.size):
        if action_mask is None:  # noqa: SIM114 (numba removes a branch only if it tests for None alone)
            total += flat[i]
            count += 1
        elif action_mask[i]:
            total += flat[i]
            count += 1
    return count, total / max(count, 1)


@jit(fastmath=REORDERED_SUMS)
def _sum_of_squares(flat: Any, action_mask: Any, mean: Any) -> Any:
    """The sum of squared distances from the mean."""
    total = 0.0
    for i in range(flat.size):
        distance = np.float64(flat[i] - mean)
        if action_mask is None:  # noqa: SIM114 (numba removes a branch only if it tests for None alone)
            total += distance * distance
        elif action_mask[i]:
            total += distance * distance
    return total


@jit()
def _normalize(flat: Any, action_mask: Any, shift: Any, scale: Any, clip: Any, out: Any) -> None:
    for i in range(flat.size):
        normalized = np.float64(flat[i] - shift) * scale
        normalized = min(max(normalized, -clip), clip)
        if action_mask is None:
            out[i] = normalized
        else:
            out[i] = normalized if action_mask[i] else 0.0


def moments(flat: Tensor, action_mask: Tensor | None) -> tuple[float, float]:
    """Mean, rounded to the type of ``flat``, and population std of the sampled tokens; (0, 0) if there are none."""
    array, sampled = flat.numpy(), None if action_mask is None else action_mask.numpy()
    count, mean = _count_and_mean(array, sampled)
    rounded = array.dtype.type(mean)
    return float(rounded), math.sqrt(_sum_of_squares(array, sampled, rounded) / max(count, 1))


def normalize(flat: Tensor, action_mask: Tensor | None, shift: float, scale: float, clip: float, out: Tensor) -> None:
    """``out = clamp((flat - shift) * scale, -clip, clip)`` at sampled tokens, 0 at all others."""
    array, sampled = flat.numpy(), None if action_mask is None else action_mask.numpy()
    _normalize(array, sampled, array.dtype.type(shift), scale, clip, out.numpy())
