"""`recursion` as machine code: one pass over the tokens of a response from its end, all of them read once.

Each token's advantage waits for the one behind it, so a core that walks through one response mostly waits. Two
responses go side by side.
"""

from __future__ import annotations

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sae_rl.algo.jit import compiled

TOKENS_PER_THREAD = 65_536  # below it a thread costs more than it saves


class Tokens(NamedTuple):
    """(N,) arrays, read and written."""

    rewards: Any
    values: Any
    weights: Any  # uint8 of hard segments, else float
    advantages: Any
    returns: Any


class Responses(NamedTuple):
    """Arrays with a number for each response."""

    offsets: Any  # (B+1,)
    lam: Any  # (B,)
    value_lam: Any  # (B,)
    final_values: Any  # (B,)


def _step_python(
    t: Any, tokens: Any, is_soft: Any, gamma: Any, gammas: Any, action_mask: Any, decays: Any, state: Any
) -> Any:
    """From token t + 1 to token t. numba drops the branches of arguments that are None.

    The state is A_{t+1} under both lambdas, V_{t+1}, gamma lambda between t and t + 1 for both, and what was paid at the
    transparent tokens since.
    """
    advantage, value_advantage, next_value, decay, value_decay, paid_later = state
    if action_mask is not None:  # noqa: SIM102 (on its own, so that numba can drop it)
        if not action_mask[t]:
            tokens.advantages[t] = tokens.returns[t] = 0.0
            return advantage, value_advantage, next_value, decay, value_decay, paid_later + tokens.rewards[t]
    discount = gamma
    if gammas is not None:  # then gamma is 1
        discount = gammas[t]
        decay *= discount
        value_decay *= discount
    value = np.float64(tokens.values[t])
    delta = discount * next_value - value + tokens.rewards[t]
    if action_mask is not None:
        delta += paid_later
    advantage = delta + decay * advantage
    value_advantage = delta + value_decay * value_advantage
    tokens.advantages[t] = advantage
    tokens.returns[t] = value_advantage + value
    if is_soft is None:
        opens = np.uintp(tokens.weights[t])
        decay, value_decay = decays[0, opens], decays[1, opens]  # quicker than to choose between two numbers
    else:
        weight = np.float64(tokens.weights[t])
        decay, value_decay = gamma * decays[2, 0] ** weight, gamma * decays[2, 1] ** weight
    return advantage, value_advantage, value, decay, value_decay, 0.0


def _begin_python(response: Any, responses: Any, gamma: Any, decays: Any) -> Any:
    """Where a response starts and ends, and the state behind its last token. ``decays[:, opens]`` become its own."""
    lam, value_lam = responses.lam[response], responses.value_lam[response]
    decays[0, 0], decays[0, 1] = gamma, gamma * lam
    decays[1, 0], decays[1, 1] = gamma, gamma * value_lam
    decays[2, 0], decays[2, 1] = lam, value_lam
    state = (0.0, 0.0, responses.final_values[response], 0.0, 0.0, 0.0)
    return np.uintp(responses.offsets[response]), np.uintp(responses.offsets[response + 1]), state


_step, _begin = compiled(_step_python, forceinline=True), compiled(_begin_python)


def _backward_python(
    tokens: Any, responses: Any, is_soft: Any, gamma: Any, gammas: Any, action_mask: Any, first: int, last: int
) -> bool:
    """Responses ``first .. last - 1``; whether all advantages are finite.

    Indices are unsigned, since each signed one would be checked for counting from the end.
    """
    one, finite, upcoming = np.uintp(1), True, first
    decays_a, decays_b = np.empty((3, 2)), np.empty((3, 2))
    start_a = t_a = start_b = t_b = np.uintp(0)
    a = b = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    while True:
        if t_a == start_a:
            finite &= np.isfinite(a[0] + a[5])  # what was not a number anywhere behind has reached the first token
            if upcoming < last:
                start_a, t_a, a = _begin(upcoming, responses, gamma, decays_a)
                upcoming += 1
        if t_b == start_b:
            finite &= np.isfinite(b[0] + b[5])
            if upcoming < last:
                start_b, t_b, b = _begin(upcoming, responses, gamma, decays_b)
                upcoming += 1
        both = min(t_a - start_a, t_b - start_b)
        if both > 0:
            stop = t_a - both
            while t_a > stop:
                t_a -= one
                t_b -= one
                a = _step(t_a, tokens, is_soft, gamma, gammas, action_mask, decays_a, a)
                b = _step(t_b, tokens, is_soft, gamma, gammas, action_mask, decays_b, b)
        elif t_a > start_a:  # the last one goes alone
            while t_a > start_a:
                t_a -= one
                a = _step(t_a, tokens, is_soft, gamma, gammas, action_mask, decays_a, a)
        elif t_b > start_b:
            while t_b > start_b:
                t_b -= one
                b = _step(t_b, tokens, is_soft, gamma, gammas, action_mask, decays_b, b)
        elif upcoming == last:
            return finite


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
    action_mask: Tensor | None,
    out: tuple[Tensor, Tensor],
    num_threads: int,
) -> bool:
    """See `recursion.td_recursion`; here ``lams``, ``value_lams`` and ``final_values`` are (B,) float64.

    Writes to ``out``, contiguous, and returns whether all of it is finite.
    """
    dtype = out[0].dtype
    is_hard = weights.dtype == torch.bool
    tokens = Tokens(
        _array(rewards, dtype),
        _array(values, dtype),
        _array(weights, torch.bool).view(np.uint8) if is_hard else _array(weights, dtype),
        out[0].numpy(),
        out[1].numpy(),
    )
    responses = Responses(
        _array(offsets, torch.int64),
        _array(lams, torch.float64),
        _array(value_lams, torch.float64),
        _array(final_values, torch.float64),
    )
    arguments = (
        tokens,
        responses,
        None if is_hard else True,
        float(gamma) if not isinstance(gamma, Tensor) else 1.0,
        _array(gamma, torch.float64) if isinstance(gamma, Tensor) else None,
        None if action_mask is None else _array(action_mask, torch.bool),
    )
    num_threads = max(1, min(num_threads, values.numel() // TOKENS_PER_THREAD))
    cuts = _cuts(responses.offsets, num_threads)
    shares = [_pool(num_threads - 1).submit(_backward, *arguments, a, b) for a, b in pairwise(cuts[1:])]
    found = [_backward(*arguments, cuts[0], cuts[1]), *(share.result() for share in shares)]
    return all(found)


@functools.cache
def _pool(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, num_threads), thread_name_prefix="td_recursion")


# Threads do not outlive a fork: in the child a pool of its parent's would never do its work.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)


def _cuts(offsets: npt.NDArray[np.int64], num_parts: int) -> list[int]:
    """Cuts the responses into consecutive parts of about the same number of tokens."""
    wanted = np.arange(num_parts + 1) * int(offsets[-1]) // num_parts
    cuts: list[int] = np.searchsorted(offsets, wanted).tolist()
    return [*cuts[:-1], offsets.size - 1]


def _array(flat: Tensor, dtype: torch.dtype) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = flat.detach().to("cpu", dtype).contiguous().numpy()
    return array
