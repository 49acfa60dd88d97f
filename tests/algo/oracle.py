"""Random ragged batches, and the algorithm as plain loops over Python floats, written from the sums of the paper.

Nothing here calls `sae_rl.algo`, and nothing here is fast.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from sae_rl.types import Batch, Scores, offsets_of, select

property_test = settings(max_examples=30, deadline=None, database=None, derandomize=True)


def make_batch(lengths: list[int], seed: int = 0, group_size: int = 1) -> Batch:
    """A random float64 batch. The probabilities of its tokens are spread over (0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens, num_responses = sum(lengths), len(lengths)
    return Batch(
        prompt_token_ids=torch.randint(0, 50, (2 * num_responses,), generator=generator),
        prompt_offsets=offsets_of([2] * num_responses),
        token_ids=torch.randint(0, 50, (num_tokens,), generator=generator),
        offsets=offsets_of(lengths),
        rollout_logprobs=torch.rand(num_tokens, generator=generator, dtype=torch.float64).clamp(min=1e-6).log(),
        policy_versions=torch.zeros(num_tokens, dtype=torch.int64),
        rewards=torch.randn(num_responses, generator=generator, dtype=torch.float64),
        groups=torch.arange(num_responses) // group_size,
        truncated=torch.rand(num_responses, generator=generator) < 0.5,
        temperature=1.0,
    )


def make_scores(batch: Batch, seed: int = 1) -> Scores:
    generator = torch.Generator().manual_seed(seed)

    def noise() -> Tensor:
        return torch.randn(batch.num_tokens, generator=generator, dtype=torch.float64)

    near = batch.rollout_logprobs
    return Scores(values=noise(), old_logprobs=near + 0.1 * noise(), ref_logprobs=near + 0.5 * noise())


def random_opens(batch: Batch, rate: float, seed: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    opens = torch.rand(batch.num_tokens, generator=generator) < rate
    opens[batch.offsets[:-1]] = True
    return opens


def dense_rewards(batch: Batch, seed: int = 3) -> Tensor:
    """(N,) random rewards at all tokens, a harder case than the paper's single reward at the end."""
    return torch.randn(batch.num_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_values(scores: Scores, values: Tensor) -> Scores:
    return replace(scores, values=values)


def reordered(flat: Tensor, batch: Batch, order: list[int]) -> Tensor:
    """The tokens of the responses in ``order``, concatenated."""
    pieces = split(flat, batch)
    return torch.cat([pieces[i] for i in order])


def reordered_batch(batch: Batch, order: list[int]) -> Batch:
    return select(batch, torch.tensor(order))


def split(flat: Tensor, batch: Batch) -> list[Tensor]:
    return [flat[a:b] for a, b in pairwise(batch.offsets.tolist())]


def batches(min_responses: int = 1) -> st.SearchStrategy[Batch]:
    lengths = st.lists(st.one_of(st.just(1), st.integers(1, 12)), min_size=min_responses, max_size=6)
    return st.builds(make_batch, lengths, seed=st.integers(0, 10**6))


unit = st.one_of(st.sampled_from([0.0, 0.5, 0.95, 1.0]), st.floats(0, 1, allow_subnormal=False))


# ---- The definitions of the paper, one response at a time -----------------------------------------------------------


def n_step_advantage(rewards: list[float], values: list[float], t: int, n: int, gamma: float) -> float:
    """A_t^(n) = r_t + gamma r_{t+1} + ... + gamma^n V_{t+n} - V_t, with V = 0 after the last token."""
    bootstrap = values[t + n] if t + n < len(values) else 0.0
    return sum(gamma**i * rewards[t + i] for i in range(n)) + gamma**n * bootstrap - values[t]


def segmental_advantage(
    rewards: list[float], values: list[float], opens: list[bool], t: int, lam: float, gamma: float
) -> float:
    """(1 - lam) sum_{k<K} lam^{k-1} A_t^{(n_k)} + lam^{K-1} A_t^{(n_K)}, in O(T K)."""
    length = len(rewards)
    distances = [s - t for s in range(t + 1, length) if opens[s]] + [length - t]
    last = len(distances)
    total = 0.0
    for k, n in enumerate(distances, start=1):
        weight = lam ** (k - 1) if k == last else (1 - lam) * lam ** (k - 1)
        total += weight * n_step_advantage(rewards, values, t, n, gamma)
    return total


def segmental_advantages(
    batch: Batch, token_rewards: Tensor, values: Tensor, opens: Tensor, lam: float, gamma: float
) -> Tensor:
    """(N,) `segmental_advantage` of every token of every response."""
    advantages = [
        segmental_advantage(r.tolist(), v.tolist(), o.tolist(), t, lam, gamma)
        for r, v, o in zip(split(token_rewards, batch), split(values, batch), split(opens, batch), strict=True)
        for t in range(len(r))
    ]
    return torch.tensor(advantages, dtype=torch.float64)


def forward_trace_advantages(
    batch: Batch, token_rewards: Tensor, values: Tensor, lambdas: Tensor, gamma: float
) -> Tensor:
    """(N,) A_t = sum_l (prod_{i=t}^{l-1} gamma lambda_i) delta_l, for any lambda per token, looking forward."""
    advantages = []
    for rewards, response_values, trace in zip(
        split(token_rewards, batch), split(values, batch), split(lambdas, batch), strict=True
    ):
        r, v, lam = rewards.tolist(), response_values.tolist(), trace.tolist()
        for t in range(len(r)):
            terms = [
                math.prod(gamma * lam[i] for i in range(t, step)) * n_step_advantage(r, v, step, 1, gamma)
                for step in range(t, len(r))
            ]
            advantages.append(math.fsum(terms))
    return torch.tensor(advantages, dtype=torch.float64)


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
) -> tuple[Tensor, Tensor]:
    """`td_recursion` with all of its arguments, one line per symbol of the formula."""
    every = torch.ones_like(values, dtype=torch.float64)
    gammas, lengths = every * gamma, offsets.diff()
    lams, value_lams = (
        every * x
        if isinstance(x, Tensor) and x.shape == values.shape
        else (torch.ones(len(lengths), dtype=torch.float64) * x).repeat_interleave(lengths)
        for x in (lam, value_lam)
    )
    advantages, returns = torch.zeros_like(every), torch.zeros_like(every)
    for response, (start, end) in enumerate(pairwise(offsets.tolist())):
        tokens = [t for t in range(start, end) if action_mask is None or action_mask[t]]
        ends = [*tokens, end][1:]
        next_value = torch.tensor(0.0) if final_values is None else final_values[response].double()
        advantage = value_advantage = next_weight = torch.tensor(0.0, dtype=torch.float64)
        for t, following in zip(reversed(tokens), reversed(ends), strict=True):
            reward = rewards[t:following].double().sum()  # includes rewards at the transparent tokens after t
            delta = reward + gammas[t] * next_value - values[t].double()
            advantage = delta + gammas[t] * lams[t] ** next_weight * advantage
            value_advantage = delta + gammas[t] * value_lams[t] ** next_weight * value_advantage
            advantages[t], returns[t] = advantage, value_advantage + values[t].double()
            next_value, next_weight = values[t].double(), weights[t].double()
    dtype = torch.promote_types(values.dtype, torch.float32)
    return advantages.to(dtype), returns.to(dtype)


def discounted_returns(batch: Batch, token_rewards: Tensor, gamma: float) -> Tensor:
    """(N,) G_t = sum of gamma^i r_{t+i} to the end of the response."""
    returns = [
        sum(gamma**i * reward for i, reward in enumerate(rewards.tolist()[t:]))
        for rewards in split(token_rewards, batch)
        for t in range(len(rewards))
    ]
    return torch.tensor(returns, dtype=torch.float64)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> bool:
    return found.shape == expected.shape and bool(torch.allclose(found, expected, rtol=tolerance, atol=tolerance))
