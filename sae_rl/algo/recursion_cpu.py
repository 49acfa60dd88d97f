"""Kernel of `recursion` for the CPU: one backward pass over each response, which reads every token once.

Each advantage depends on the next one, so a core that walks through a single response mostly waits for its own arithmetic.
The kernel therefore walks through two responses side by side.
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

from sae_rl.algo.jit import jit

TOKENS_PER_THREAD = 65_536  # with fewer tokens a thread costs more than it saves


class Inputs(NamedTuple):
    """What `recursion.td_recursion` is computed from, as both kernels take it."""

    rewards: Tensor  # (N,)
    values: Tensor  # (N,)
    weights: Tensor  # (N,)
    offsets: Tensor  # (B+1,)
    gamma: float | Tensor  # a number, or (N,)
    lam: Tensor  # (B,) or (N,) float64
    value_lam: Tensor  # (B,) or (N,) float64
    final_values: Tensor  # (B,) float64
    action_mask: Tensor | None  # (N,)


class Tokens(NamedTuple):
    """(N,) arrays: three to read, two to write."""

    rewards: Any
    values: Any
    weights: Any  # uint8 for hard segments, float for soft ones
    advantages: Any
    returns: Any


class Lambdas(NamedTuple):
    """Lambda of the advantages and of the critic's targets: (N,) arrays."""

    lam: Any
    value_lam: Any


class Responses(NamedTuple):
    """Arrays with one number per response."""

    offsets: Any  # (B+1,)
    lam: Any  # (B,); not read if lambda differs by token
    value_lam: Any  # (B,); the same
    final_values: Any  # (B,)


@jit(forceinline=True)
def _step(
    t: Any, tokens: Any, is_soft: Any, gamma: Any, gammas: Any, lambdas: Any, action_mask: Any, decays: Any, state: Any
) -> Any:
    """Goes from token t + 1 to token t. numba removes the branches of arguments that are None.

    The state holds A_{t+1} under lam and under value_lam, V_{t+1}, gamma lambda_t for both, and the sum of rewards at the
    transparent tokens passed since the last sampled one. Where lambda differs by token, it holds w_{t+1} for gamma lambda_t.
    """
    advantage, value_advantage, next_value, decay, value_decay, carried_reward = state
    if action_mask is not None:  # noqa: SIM102 (numba removes a branch only if it tests for None alone)
        if not action_mask[t]:
            tokens.advantages[t] = tokens.returns[t] = 0.0
            return advantage, value_advantage, next_value, decay, value_decay, carried_reward + tokens.rewards[t]
    if lambdas is not None:
        decay, value_decay = gamma * lambdas.lam[t] ** decay, gamma * lambdas.value_lam[t] ** value_decay
    discount = gamma
    if gammas is not None:  # then gamma is 1, and the decays do not include the discount
        discount = gammas[t]
        decay *= discount
        value_decay *= discount
    value = np.float64(tokens.values[t])
    delta = discount * next_value - value + tokens.rewards[t]
    if action_mask is not None:
        delta += carried_reward
    advantage = delta + decay * advantage
    value_advantage = delta + value_decay * value_advantage
    tokens.advantages[t] = advantage
    tokens.returns[t] = value_advantage + value
    if lambdas is not None:
        weight = np.float64(tokens.weights[t])
        return advantage, value_advantage, value, weight, weight, 0.0
    if is_soft is None:
        opens = np.uintp(tokens.weights[t])
        decay, value_decay = decays[0, opens], decays[1, opens]  # a table lookup is faster than a branch
    else:
        weight = np.float64(tokens.weights[t])
        decay, value_decay = gamma * decays[2, 0] ** weight, gamma * decays[2, 1] ** weight
    return advantage, value_advantage, value, decay, value_decay, 0.0


@jit()
def _begin(response: Any, responses: Any, gamma: Any, decays: Any) -> Any:
    """(start, end, state after the last token) of a response; writes the response's decays to ``decays[:, opens]``."""
    lam, value_lam = responses.lam[response], responses.value_lam[response]
    decays[0, 0], decays[0, 1] = gamma, gamma * lam
    decays[1, 0], decays[1, 1] = gamma, gamma * value_lam
    decays[2, 0], decays[2, 1] = lam, value_lam
    state = (0.0, 0.0, responses.final_values[response], 0.0, 0.0, 0.0)
    return np.uintp(responses.offsets[response]), np.uintp(responses.offsets[response + 1]), state


@jit()
def _backward(
    tokens: Any,
    responses: Any,
    is_soft: Any,
    gamma: Any,
    gammas: Any,
    lambdas: Any,
    action_mask: Any,
    first: int,
    last: int,
) -> bool:
    """Computes responses ``first .. last - 1``; returns whether all their advantages are finite.

    NaN checks are nearly free: a NaN propagates to the first token of its response, so only that one is tested.
    Indices are unsigned, because numba tests every signed one for counting from the end.
    """
    one, finite, upcoming = np.uintp(1), True, first
    decays_a, decays_b = np.empty((3, 2)), np.empty((3, 2))
    start_a = t_a = start_b = t_b = np.uintp(0)
    a = b = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    while True:
        if t_a == start_a:
            finite &= np.isfinite(a[0] + a[5])
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
                a = _step(t_a, tokens, is_soft, gamma, gammas, lambdas, action_mask, decays_a, a)
                b = _step(t_b, tokens, is_soft, gamma, gammas, lambdas, action_mask, decays_b, b)
        elif t_a > start_a:  # the last response runs alone
            while t_a > start_a:
                t_a -= one
                a = _step(t_a, tokens, is_soft, gamma, gammas, lambdas, action_mask, decays_a, a)
        elif t_b > start_b:
            while t_b > start_b:
                t_b -= one
                b = _step(t_b, tokens, is_soft, gamma, gammas, lambdas, action_mask, decays_b, b)
        elif upcoming == last:
            return finite


def run(inputs: Inputs, out: tuple[Tensor, Tensor], num_threads: int) -> bool:
    """Writes the results to the contiguous ``out`` and returns whether all advantages are finite."""
    gamma, action_mask, dtype = inputs.gamma, inputs.action_mask, out[0].dtype
    is_hard = inputs.weights.dtype == torch.bool
    tokens = Tokens(
        _array(inputs.rewards, dtype),
        _array(inputs.values, dtype),
        _array(inputs.weights, torch.bool).view(np.uint8) if is_hard else _array(inputs.weights, dtype),
        out[0].numpy(),
        out[1].numpy(),
    )
    lam, value_lam = inputs.lam, inputs.value_lam
    responses = Responses(
        _array(inputs.offsets, torch.int64),
        _array(lam, torch.float64),
        _array(value_lam, torch.float64),
        _array(inputs.final_values, torch.float64),
    )
    num_responses = inputs.offsets.numel() - 1
    lambdas = None
    if lam.numel() != num_responses or value_lam.numel() != num_responses:
        lambdas = Lambdas(*(_array(per_token(each, inputs.offsets), torch.float64) for each in (lam, value_lam)))
    arguments = (
        tokens,
        responses,
        None if is_hard else True,
        float(gamma) if not isinstance(gamma, Tensor) else 1.0,
        _array(gamma, torch.float64) if isinstance(gamma, Tensor) else None,
        lambdas,
        None if action_mask is None else _array(action_mask, torch.bool),
    )
    num_threads = max(1, min(num_threads, inputs.values.numel() // TOKENS_PER_THREAD))
    cuts = _balanced_cuts(responses.offsets, num_threads)
    others = [_pool(num_threads - 1).submit(_backward, *arguments, a, b) for a, b in pairwise(cuts[1:])]
    finite = [_backward(*arguments, cuts[0], cuts[1]), *(part.result() for part in others)]
    return all(finite)


def per_token(lam: Tensor, offsets: Tensor) -> Tensor:
    """(N,) lambda, which is given as (B,) per response or as (N,) per token."""
    return lam if lam.numel() != offsets.numel() - 1 else lam.repeat_interleave(offsets.diff())


@functools.cache
def _pool(num_threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, num_threads), thread_name_prefix="td_recursion")


# Threads do not survive a fork, so work submitted to the parent's pool would never finish in the child.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)


def _balanced_cuts(offsets: npt.NDArray[np.int64], num_parts: int) -> list[int]:
    """Bounds (num_parts + 1,) of consecutive groups of responses with about the same number of tokens each."""
    wanted = np.arange(num_parts + 1) * int(offsets[-1]) // num_parts
    cuts: list[int] = np.searchsorted(offsets, wanted).tolist()
    return [*cuts[:-1], offsets.size - 1]


def _array(flat: Tensor, dtype: torch.dtype) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = flat.detach().to("cpu", dtype).contiguous().numpy()
    return array
