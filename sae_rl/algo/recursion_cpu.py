"""`recursion` as machine code: one pass over the tokens of a response from its end, all of them read once."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numba  # type: ignore[import-untyped]
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

TOKENS_PER_THREAD = 65_536  # below it a thread costs more than it saves


def compiled(kernel: Callable[..., None]) -> Callable[..., None]:
    """The kernel without the interpreter lock and with fused multiply-adds, kept on disk where a folder can be written."""
    options = {"nogil": True, "fastmath": {"contract"}}
    try:
        machine_code: Callable[..., None] = numba.njit(cache=True, **options)(kernel)
    except RuntimeError:  # numba: "cannot cache function ...: no locator available"
        machine_code = numba.njit(**options)(kernel)
    return machine_code


def _backward_python(
    rewards: Any,
    values: Any,
    weights: Any,
    is_soft: Any,
    offsets: Any,
    gamma: float,
    gammas: Any,
    lams: Any,
    value_lams: Any,
    final_values: Any,
    sampled: Any,
    advantages: Any,
    returns: Any,
    first: int,
    last: int,
) -> None:
    """Responses ``first .. last - 1``. numba drops the branches of arguments that are None.

    Indices are unsigned, since each signed one would be checked for counting from the end.
    """
    for response in range(first, last):
        end = offsets[response + 1]
        lam, value_lam, next_value = lams[response], value_lams[response], final_values[response]
        advantage = value_advantage = paid_later = 0.0
        next_lam = next_value_lam = 1.0
        for i in range(end - offsets[response]):
            t = np.uintp(end - 1 - i)
            if sampled is not None:  # noqa: SIM102 (on its own, so that numba can drop it)
                if not sampled[t]:
                    paid_later += rewards[t]
                    advantages[t] = returns[t] = 0.0
                    continue
            discount = gamma
            if gammas is not None:
                discount = gammas[t]
            value = np.float64(values[t])
            delta = rewards[t] + discount * next_value - value
            if sampled is not None:
                delta += paid_later
                paid_later = 0.0
            advantage = delta + discount * next_lam * advantage
            value_advantage = delta + discount * next_value_lam * value_advantage
            advantages[t] = advantage
            returns[t] = value_advantage + value
            next_value = value
            if is_soft is None:
                next_lam = lam if weights[t] else 1.0
                next_value_lam = value_lam if weights[t] else 1.0
            else:
                next_lam = lam ** np.float64(weights[t])
                next_value_lam = value_lam ** np.float64(weights[t])


_backward = compiled(_backward_python)


def run(
    rewards: Tensor,
    values: Tensor,
    weights: Tensor,
    offsets: Tensor,
    gamma: float | Tensor,
    lams: Tensor,
    value_lams: Tensor,
    final_values: Tensor,
    sampled: Tensor | None,
    num_threads: int,
) -> tuple[Tensor, Tensor]:
    """See `recursion.td_recursion`; here ``lams``, ``value_lams`` and ``final_values`` are (B,) float64."""
    dtype = torch.promote_types(values.dtype, torch.float32)
    advantages, returns = torch.empty(values.shape, dtype=dtype), torch.empty(values.shape, dtype=dtype)
    is_hard = weights.dtype == torch.bool
    arrays = (
        _array(rewards, dtype),
        _array(values, dtype),
        _array(weights, torch.bool if is_hard else dtype),
        None if is_hard else True,
        _array(offsets, torch.int64),
        float(gamma) if not isinstance(gamma, Tensor) else 1.0,
        _array(gamma, torch.float64) if isinstance(gamma, Tensor) else None,
        _array(lams, torch.float64),
        _array(value_lams, torch.float64),
        _array(final_values, torch.float64),
        None if sampled is None else _array(sampled, torch.bool),
        advantages.numpy(),
        returns.numpy(),
    )
    num_threads = max(1, min(num_threads, values.numel() // TOKENS_PER_THREAD))
    if num_threads == 1:
        _backward(*arrays, 0, offsets.numel() - 1)
    else:
        cuts = _cuts(arrays[4], num_threads)
        with ThreadPoolExecutor(num_threads) as pool:
            for share in [pool.submit(_backward, *arrays, a, b) for a, b in pairwise(cuts)]:
                share.result()
    return advantages, returns


def _cuts(offsets: npt.NDArray[np.int64], num_parts: int) -> list[int]:
    """Cuts the responses into consecutive parts of about the same number of tokens."""
    wanted = np.arange(num_parts + 1) * int(offsets[-1]) // num_parts
    cuts: list[int] = np.searchsorted(offsets, wanted).tolist()
    return [*cuts[:-1], offsets.size - 1]


def _array(flat: Tensor, dtype: torch.dtype) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = flat.detach().to("cpu", dtype).contiguous().numpy()
    return array
