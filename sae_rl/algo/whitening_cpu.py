"""`shaping.Whitening` as machine code: each number is read three times and written once, and nothing is copied."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from torch import Tensor

from sae_rl.algo.jit import compiled


def _mean_python(flat: Any, action_mask: Any) -> Any:
    """How many numbers are sampled, and their mean."""
    count, total = 0, 0.0
    for i in range(flat.size):
        if action_mask is None:  # noqa: SIM114 (numba drops a branch only if it tests for None alone)
            total += flat[i]
            count += 1
        elif action_mask[i]:
            total += flat[i]
            count += 1
    return count, total / max(count, 1)


def _squares_python(flat: Any, action_mask: Any, mean: Any) -> Any:
    """The sum of squared distances from the mean."""
    total = 0.0
    for i in range(flat.size):
        distance = np.float64(flat[i] - mean)
        if action_mask is None:  # noqa: SIM114 (numba drops a branch only if it tests for None alone)
            total += distance * distance
        elif action_mask[i]:
            total += distance * distance
    return total


def _place_python(flat: Any, action_mask: Any, shift: Any, scale: Any, clip: Any, out: Any) -> None:
    for i in range(flat.size):
        moved = np.float64(flat[i] - shift) * scale
        moved = min(max(moved, -clip), clip)
        if action_mask is None:
            out[i] = moved
        else:
            out[i] = moved if action_mask[i] else 0.0


_SUMS = {"fastmath": {"contract", "reassoc", "nsz"}}  # in any order, as several at once
_mean, _squares = compiled(_mean_python, **_SUMS), compiled(_squares_python, **_SUMS)
_place = compiled(_place_python)


def moments(flat: Tensor, action_mask: Tensor | None) -> tuple[float, float]:
    """The mean of the sampled numbers, rounded to their type, and their population std; 0 and 0 of none."""
    array, marks = flat.numpy(), None if action_mask is None else action_mask.numpy()
    count, mean = _mean(array, marks)
    rounded = array.dtype.type(mean)
    return float(rounded), math.sqrt(_squares(array, marks, rounded) / max(count, 1))


def place(flat: Tensor, action_mask: Tensor | None, shift: float, scale: float, clip: float, out: Tensor) -> None:
    """``out = clamp((flat - shift) * scale, -clip, clip)``, and 0 where nothing was sampled."""
    array, marks = flat.numpy(), None if action_mask is None else action_mask.numpy()
    _place(array, marks, array.dtype.type(shift), scale, clip, out.numpy())
