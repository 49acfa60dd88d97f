"""The one backward recursion that every TD estimator shares, over ragged batches, with nothing padded.

    delta_t = r_t + gamma_t V_{t+1} - V_t
    A_t     = delta_t + gamma_t lambda_t A_{t+1},     lambda_t = lam ^ w_{t+1}

``w_t`` in [0, 1] is the weight with which token t opens a segment: 1 everywhere is GAE (arXiv 1506.02438), 0 everywhere
Monte Carlo, 1 where a segment opens and 0 inside SAE (arXiv 2601.07320). The critic's targets are ``A_t + V_t`` of the
same recursion with a lambda of their own (VC-PPO, arXiv 2503.01491).

Tokens that the policy did not sample are transparent: the recursion runs as if they were not there. A reward paid at one
of them goes to the sampled token before it; before the first sampled token there is none, and nothing is paid.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from sae_rl.algo import recursion_cpu
from sae_rl.algo.jit import empty
from sae_rl.algo.ragged import check_finite

SKEW_BYTES = 65 * 64  # a page and a line
Advantages = tuple[Tensor, Tensor]  # (advantages, returns), both (N,)


def td_recursion(
    rewards: Tensor,
    values: Tensor,
    weights: Tensor,
    offsets: Tensor,
    *,
    gamma: float | Tensor,
    lam: float | Tensor,
    value_lam: float | Tensor,
    final_values: Tensor | None = None,
    action_mask: Tensor | None = None,
    out: Advantages | None = None,
    num_threads: int = 1,
) -> Advantages:
    """Advantages and critic targets of a ragged batch, accumulated in float64.

    Args:
        rewards: (N,) r_t.
        values: (N,) V_t, of the state before token t.
        weights: (N,) w_t, bool or float in [0, 1].
        offsets: (B+1,) int64.
        gamma: discount, or (N,) one for each token.
        lam: of the advantages, or (B,) one for each response.
        value_lam: of the critic's targets, or (B,).
        final_values: (B,) V after the last token; None: the response ends there, V = 0.
        action_mask: (N,) bool, false where a token is transparent; its advantage and target are 0. None: all are sampled.
        out: two contiguous tensors to write to, as they would be returned; None: new ones.
        num_threads: on a CPU, over responses.

    Returns:
        (advantages, returns) on the device of ``values``, in its type, at least float32.

    Raises:
        ValueError: an input or an advantage is not finite, with its response; or ``out`` is unfit.
    """
    run = recursion_cpu.run
    if values.is_cuda:
        from sae_rl.algo.recursion_gpu import run
    out = _checked_out(out, values)
    num_responses = offsets.numel() - 1
    if final_values is None:
        final_values = torch.zeros(num_responses, dtype=torch.float64, device=values.device)
    is_finite = run(
        rewards,
        values,
        weights,
        offsets,
        gamma,
        _per_response(lam, final_values),
        _per_response(value_lam, final_values),
        final_values.double(),
        action_mask,
        out,
        num_threads,
    )
    if not is_finite:
        _name_what_is_not_finite(rewards, values, final_values, offsets, action_mask, out)
    return out


def td_recursion_reference(
    rewards: Tensor,
    values: Tensor,
    weights: Tensor,
    offsets: Tensor,
    *,
    gamma: float | Tensor,
    lam: float | Tensor,
    value_lam: float | Tensor,
    final_values: Tensor | None = None,
    action_mask: Tensor | None = None,
) -> Advantages:
    """What `td_recursion` computes, one line per symbol of the formula."""
    every = torch.ones_like(values, dtype=torch.float64)
    gammas, lengths = every * gamma, offsets.diff()
    lams, value_lams = (
        (torch.ones(len(lengths), dtype=torch.float64) * x).repeat_interleave(lengths) for x in (lam, value_lam)
    )
    advantages, returns = torch.zeros_like(every), torch.zeros_like(every)
    for response, (start, end) in enumerate(pairwise(offsets.tolist())):
        tokens = [t for t in range(start, end) if action_mask is None or action_mask[t]]
        ends = [*tokens, end][1:]
        next_value = torch.tensor(0.0) if final_values is None else final_values[response].double()
        advantage = value_advantage = next_weight = torch.tensor(0.0, dtype=torch.float64)
        for t, following in zip(reversed(tokens), reversed(ends), strict=True):
            reward = rewards[t:following].double().sum()  # with what is paid up to the next sampled token
            delta = reward + gammas[t] * next_value - values[t].double()
            advantage = delta + gammas[t] * lams[t] ** next_weight * advantage
            value_advantage = delta + gammas[t] * value_lams[t] ** next_weight * value_advantage
            advantages[t], returns[t] = advantage, value_advantage + values[t].double()
            next_value, next_weight = values[t].double(), weights[t].double()
    dtype = torch.promote_types(values.dtype, torch.float32)
    return advantages.to(dtype), returns.to(dtype)


def _per_response(lam: float | Tensor, like: Tensor) -> Tensor:
    return torch.full_like(like, lam, dtype=torch.float64) if isinstance(lam, float | int) else lam.to(like).double()


def _name_what_is_not_finite(
    rewards: Tensor, values: Tensor, final_values: Tensor, offsets: Tensor, action_mask: Tensor | None, out: Advantages
) -> None:
    check_finite("rewards", rewards, offsets)
    check_finite("values", values if action_mask is None else values.where(action_mask, 0.0), offsets)
    check_finite("final_values", final_values, torch.arange(offsets.numel()))
    check_finite("the advantage", out[0], offsets)


def _checked_out(out: Advantages | None, values: Tensor) -> Advantages:
    dtype = torch.promote_types(values.dtype, torch.float32)
    if out is None:
        return empty(values, dtype, SKEW_BYTES), empty(values, dtype, 3 * SKEW_BYTES)
    for part in out:
        if (
            part.shape != values.shape
            or part.dtype != dtype
            or part.device != values.device
            or not part.is_contiguous()
        ):
            raise ValueError(
                f"out has {part.dtype} of shape {tuple(part.shape)} on {part.device}, allowed: contiguous {dtype} of "
                f"shape {tuple(values.shape)} on {values.device}"
            )
    return out
