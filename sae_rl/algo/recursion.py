"""The backward recursion that all TD estimators share, on ragged batches without padding.

    delta_t = r_t + gamma_t V_{t+1} - V_t
    A_t     = delta_t + gamma_t lambda_t A_{t+1},     lambda_t = lam ^ w_{t+1}

``w_t`` in [0, 1] is the weight with which token t opens a segment. w = 1 everywhere is GAE (arXiv 1506.02438), w = 0
everywhere is Monte Carlo, and w = 1 where a segment opens and 0 inside is SAE (arXiv 2601.07320). The critic's targets are
``A_t + V_t``, computed by the same recursion with a separate lambda (VC-PPO, arXiv 2503.01491).

Tokens that the policy did not sample are transparent: the recursion skips them. A reward at a transparent token goes to
the sampled token before it. Rewards before the first sampled token of a response are dropped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_rl.algo import recursion_cpu
from sae_rl.algo.jit import empty
from sae_rl.algo.ragged import check_finite
from sae_rl.algo.recursion_cpu import Inputs

SKEW_BYTES = 65 * 64  # a page and a cache line
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
        gamma: discount; a number, or (N,) per token.
        lam: lambda of the advantages; a number, or (B,) per response.
        value_lam: lambda of the critic's targets; a number, or (B,) per response.
        final_values: (B,) V after the last token. None: V = 0, the response is over.
        action_mask: (N,) bool, false at transparent tokens, whose advantages and targets are 0. None: all are sampled.
        out: two contiguous tensors for the results, with the shape, type and device of the results. None: new tensors.
        num_threads: number of threads on a CPU; each computes some of the responses.

    Returns:
        (advantages, returns), both (N,), on the device of ``values`` and in its type, but at least float32.

    Raises:
        ValueError: an input or an advantage is not finite (the message names the response), or ``out`` does not fit.
    """
    run = recursion_cpu.run
    if values.is_cuda:
        from sae_rl.algo.recursion_gpu import run
    out = _checked_out(out, values)
    if final_values is None:
        final_values = torch.zeros(offsets.numel() - 1, dtype=torch.float64, device=values.device)
    inputs = Inputs(
        rewards=rewards,
        values=values,
        weights=weights,
        offsets=offsets,
        gamma=gamma,
        lam=_per_response(lam, final_values),
        value_lam=_per_response(value_lam, final_values),
        final_values=final_values.double(),
        action_mask=action_mask,
    )
    if not run(inputs, out, num_threads):
        check_finite("rewards", rewards, offsets)
        check_finite("values", values if action_mask is None else values.where(action_mask, 0.0), offsets)
        check_finite("final_values", final_values, torch.arange(offsets.numel()))
        check_finite("the advantage", out[0], offsets)
    return out


def _per_response(lam: float | Tensor, like: Tensor) -> Tensor:
    return torch.full_like(like, lam, dtype=torch.float64) if isinstance(lam, float | int) else lam.to(like).double()


def _checked_out(out: Advantages | None, values: Tensor) -> Advantages:
    dtype = torch.promote_types(values.dtype, torch.float32)
    if out is None:
        return empty(values, dtype, SKEW_BYTES), empty(values, dtype, 3 * SKEW_BYTES)
    for part in out:
        fits = part.shape == values.shape and part.dtype == dtype and part.device == values.device
        if not (fits and part.is_contiguous()):
            raise ValueError(
                f"out has {part.dtype} of shape {tuple(part.shape)} on {part.device}, allowed: contiguous {dtype} of "
                f"shape {tuple(values.shape)} on {values.device}"
            )
    return out
