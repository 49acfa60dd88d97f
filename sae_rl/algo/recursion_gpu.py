"""Kernel of `recursion` for GPUs: one Triton program per response scans it backwards in blocks."""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from sae_rl.algo.recursion_cpu import Inputs, per_token

BLOCK_TOKENS = 1024


@triton.jit  # type: ignore[untyped-decorator]
def _compose(decay, delta, next_decay, next_delta):  # type: ignore[no-untyped-def]
    """Combines two consecutive steps ``A -> delta + decay A`` into one."""
    return decay * next_decay, next_delta + next_decay * delta


@triton.jit  # type: ignore[untyped-decorator]
def _backward(deltas, decays, offsets, sums, block: tl.constexpr):  # type: ignore[no-untyped-def]
    """``A_t = delta_t + decay_t A_{t+1}``, with A = 0 after the last token. Lane k + 1 holds the token before lane k's."""
    response = tl.program_id(0)
    start, end = tl.load(offsets + response), tl.load(offsets + response + 1)
    lane = tl.arange(0, block)
    following = tl.zeros((), dtype=tl.float64)
    for done in range(0, end - start, block):
        token = end - 1 - done - lane
        inside = token >= start
        delta = tl.load(deltas + token, mask=inside, other=0.0)
        decay = tl.load(decays + token, mask=inside, other=1.0)
        product, total = tl.associative_scan((decay, delta), 0, _compose)
        total += product * following
        tl.store(sums + token, total, mask=inside)
        following = tl.sum(tl.where(lane == block - 1, total, 0.0), 0)


def run(inputs: Inputs, out: tuple[Tensor, Tensor], num_threads: int) -> bool:
    """As `recursion_cpu.run`; ``num_threads`` has no effect."""
    rewards, values, weights, offsets, gamma, lam, value_lam, final_values, action_mask = inputs
    offsets = offsets.to(values.device, torch.int64)
    lam, value_lam = per_token(lam, offsets), per_token(value_lam, offsets)
    if action_mask is not None:  # drop the transparent tokens; `out` is 0 there
        rewards, offsets = _rewards_of_sampled_tokens(rewards, offsets, action_mask)
        values, weights = values[action_mask], weights[action_mask]
        lam, value_lam = lam[action_mask], value_lam[action_mask]
        gamma = gamma[action_mask] if isinstance(gamma, Tensor) else gamma
    lengths, ends, exact = offsets.diff(), offsets[1:], values.double()
    next_values = torch.cat([exact[1:], exact.new_zeros(1)])
    next_weights = torch.cat([weights[1:], weights.new_zeros(1)]).double()
    next_values[ends[lengths > 0] - 1] = final_values[lengths > 0]
    deltas = rewards.double() + gamma * next_values - exact
    advantages, value_advantages = (_scan(deltas, gamma * lams**next_weights, offsets) for lams in (lam, value_lam))
    for part, computed in zip(out, (advantages, value_advantages + exact), strict=True):
        if action_mask is None:
            part.copy_(computed)
        else:
            part.zero_()[action_mask] = computed.to(part)
    return bool(out[0].sum(dtype=torch.float64).isfinite())


def _scan(deltas: Tensor, decays: Tensor, offsets: Tensor) -> Tensor:
    sums = torch.empty_like(deltas)
    _backward[(offsets.numel() - 1,)](deltas.contiguous(), decays.contiguous(), offsets, sums, block=BLOCK_TOKENS)
    return sums


def _rewards_of_sampled_tokens(rewards: Tensor, offsets: Tensor, action_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards and offsets of the sampled tokens; each reward includes those of the transparent tokens that follow it."""
    count = torch.cat([offsets.new_zeros(1), action_mask.cumsum(0)])  # sampled tokens before each token
    kept = count[offsets]
    first_of_response = kept[:-1].repeat_interleave(offsets.diff())
    owner = count[1:] - 1  # index, among sampled tokens, of the last one at or before each token
    owned = owner >= first_of_response
    paid = torch.zeros(int(kept[-1]), dtype=torch.float64, device=rewards.device)
    return paid.index_add_(0, owner[owned], rewards.double()[owned]), kept
