"""Responses of independent decisions, whose values, advantages and policy gradient are known.

A response is n decisions, each right with probability q; its reward is 1 if all are right. The policy is a logit for every
quarter of the decisions: the probability of a right one is its sigmoid. All 2^n responses are enumerated once, with the
package's segmenters and estimators. Populations are sums over them, and samples are draws from them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from sae_rl.algo import estimate, segment
from sae_rl.algo.estimators import GAE, SAE, Estimator, MonteCarlo
from sae_rl.algo.segmentation import Segmenter
from sae_rl.algo.segmenters import FixedLength, LowProbability
from sae_rl.correlation.measurements import Measurements, block_advantages, reference_values
from sae_rl.types import Batch, Scores, offsets_of

from ..algo.oracle import make_batch, make_scores

N, Q = 8, 0.85
QUARTER = torch.arange(N) * 4 // N  # the logit of each decision

# name: (segmenter, estimator, whether its critic is exact)
Arms = Mapping[str, tuple[Segmenter, Estimator, bool]]
OPENS, CLOSES = LowProbability(0.2), LowProbability(0.2, boundary="closes")
ARMS: Arms = {
    "monte_carlo": (OPENS, MonteCarlo(), True),
    "gae": (OPENS, GAE(0.95), True),
    "sae": (OPENS, SAE(0.5), True),
    "closes": (CLOSES, SAE(0.5), True),
    "fixed": (FixedLength(2), SAE(0.5), True),
    "wrong": (OPENS, GAE(0.5), False),
}
NAMES = tuple(ARMS)


@dataclass(frozen=True)
class Chain:
    """All responses with their probabilities."""

    batch: Batch  # 2^n responses of n tokens: 1 is right, 0 wrong
    values: Tensor  # (2^n, n + 1) V before each decision and at the end
    advantages: Tensor  # (E, 2^n, n)
    opens: Tensor  # (E, 2^n, n)

    @staticmethod
    def of(arms: Arms = ARMS) -> Chain:
        tokens = torch.cartesian_prod(*[torch.tensor([0, 1])] * N)
        alive = torch.cat([torch.ones(2**N, 1), tokens.cumprod(1)], 1).double()
        values = alive * Q ** torch.arange(N, -1, -1, dtype=torch.float64)
        batch = replace(
            make_batch([N] * 2**N),
            token_ids=tokens.flatten().int(),
            rollout_logprobs=torch.tensor([1 - Q, Q], dtype=torch.float64).log()[tokens].flatten(),
            rewards=values[:, -1],
            truncated=torch.zeros(2**N, dtype=torch.bool),
        )
        # The wrong critic promises too much early on, and half as much after each wrong decision.
        wrong_before = (1 - tokens).cumsum(1) - (1 - tokens)
        hopeful = values[:, :-1] + 0.5**wrong_before * torch.exp(-torch.arange(N).double() / 2)
        token_rewards = torch.zeros(2**N, N, dtype=torch.float64).index_add(
            1, torch.tensor([N - 1]), batch.rewards[:, None]
        )
        advantages, opened = [], []
        for segmenter, estimator, is_exact in arms.values():
            v = values[:, :-1] if is_exact else hopeful
            scores: Scores = replace(make_scores(batch), values=v.flatten())
            opens = segment(segmenter, batch, scores)
            found = estimate(estimator, batch, scores, token_rewards.flatten(), opens)
            advantages.append(found.advantages.view(-1, N))
            opened.append(torch.ones(2**N, N) if isinstance(estimator, GAE) else opens.float().view(-1, N))
        return Chain(batch, values, torch.stack(advantages), torch.stack(opened))

    @cached_property
    def probabilities(self) -> Tensor:
        return self.batch.rollout_logprobs.view(-1, N).sum(1).exp()

    @cached_property
    def true(self) -> Tensor:
        """(2^n, n) advantages."""
        return self.values.diff(dim=1)

    @cached_property
    def score(self) -> Tensor:
        """(2^n, n, 4) grad log pi."""
        onehot = torch.nn.functional.one_hot(QUARTER, 4).double()
        return (self.batch.token_ids.view(-1, N, 1) - Q) * onehot

    def gradients(self, advantages: Tensor) -> Tensor:
        """(..., 2^n, 4) gradients of responses."""
        return torch.einsum("...rt,rtd->...rd", advantages, self.score)

    @cached_property
    def policy_gradient(self) -> Tensor:
        """(4,) of q^n, by its derivative."""
        return torch.bincount(QUARTER).double() * Q**N * (1 - Q)

    def sample(
        self, num_prompts: int, *, group_size: int = 2, k: int = 8, seed: int = 0, every: int = 1
    ) -> Measurements:
        """A draw of responses and continuations; every token is a place, the neutral ones are ``every`` apart."""
        generator = torch.Generator().manual_seed(seed)
        size = num_prompts * group_size
        drawn = torch.multinomial(self.probabilities, size, replacement=True, generator=generator)
        values = self.values[drawn, :-1].reshape(-1)
        continued = torch.rand(values.numel(), k, generator=generator, dtype=torch.float64) < values[:, None]
        tokens = self.batch.token_ids.view(-1, N)[drawn].flatten()
        batch = replace(
            self.batch,
            prompt_token_ids=torch.zeros(size, dtype=torch.int32),
            prompt_offsets=offsets_of([1] * size),
            token_ids=tokens,
            offsets=offsets_of([N] * size),
            rollout_logprobs=self.batch.rollout_logprobs.view(-1, N)[drawn].flatten(),
            policy_versions=torch.zeros_like(tokens),
            rewards=self.batch.rewards[drawn].float(),
            groups=torch.arange(num_prompts).repeat_interleave(group_size),
            truncated=torch.zeros(size, dtype=torch.bool),
        )
        position = torch.arange(values.numel()) % N
        found = Measurements(
            batch=batch,
            returns=self.batch.rewards[drawn],
            places=torch.arange(values.numel()),
            neutral=(position % every == 0) | (position % every == 1 % every),
            continued=continued.double(),
            names=NAMES,
            advantages=self.advantages[:, drawn].flatten(1),
            opens=self.opens[:, drawn].flatten(1),
        )
        reference = block_advantages(found, reference_values(found))
        of_tokens = torch.cat([found.advantages, reference[None]]).view(-1, size, N)
        of_responses = torch.einsum("ert,rtd->erd", of_tokens, self.score[drawn])
        of_prompts = of_responses.view(-1, num_prompts, group_size, 4).sum(2)
        return replace(found, gradients=of_prompts.float())
