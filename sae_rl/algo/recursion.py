"""The one backward recursion that every TD estimator shares."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numba  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float64]
Kernel = Callable[[Floats, Floats, npt.NDArray[np.int64], Floats], None]


def discounted_sums(deltas: Tensor, decays: Tensor, offsets: Tensor) -> Tensor:
    """``A_t = delta_t + decay_t * A_{t+1}`` within each response; A is 0 after the last token of a response.

    ``deltas`` (N,), ``decays`` (N,) and ``offsets`` (B+1,) -> (N,), accumulated in float64 and returned in the type
    of ``deltas``. The decay at the last token of a response is never used. No threads: the compiled loop walks 450
    million tokens a second, so the largest batch of the paper (512 x 8 x 8192 tokens) takes it under 0.1 s.
    """
    assert deltas.shape == decays.shape == (int(offsets[-1]),), (deltas.shape, decays.shape, int(offsets[-1]))
    sums = torch.empty(deltas.shape, dtype=torch.float64)
    _backward(_as_numpy(deltas), _as_numpy(decays), offsets.cpu().contiguous().numpy(), sums.numpy())
    return sums.to(deltas)


def discounted_sums_reference(deltas: Tensor, decays: Tensor, offsets: Tensor) -> Tensor:
    """What `discounted_sums` computes, one line per symbol of the formula."""
    sums = torch.zeros_like(deltas, dtype=torch.float64)
    for start, end in pairwise(offsets.tolist()):
        following = torch.zeros((), dtype=torch.float64)
        for t in reversed(range(start, end)):
            following = sums[t] = deltas[t].double() + decays[t].double() * following
    return sums.to(deltas)


def compiled(kernel: Kernel) -> Kernel:
    """The kernel as machine code without the interpreter lock, kept on disk where a folder for it can be written."""
    try:
        machine_code: Kernel = numba.njit(cache=True, nogil=True)(kernel)
    except RuntimeError:  # numba: "cannot cache function ...: no locator available"
        machine_code = numba.njit(nogil=True)(kernel)
    return machine_code


def _backward_python(deltas: Floats, decays: Floats, offsets: npt.NDArray[np.int64], sums: Floats) -> None:
    for response in range(offsets.size - 1):
        following = 0.0
        for t in range(offsets[response + 1] - 1, offsets[response] - 1, -1):
            following = deltas[t] + decays[t] * following
            sums[t] = following


_backward = compiled(_backward_python)


def _as_numpy(flat: Tensor) -> Floats:
    array: Floats = flat.detach().to("cpu", torch.float64).contiguous().numpy()
    return array
