"""Each recipe of ``conf/algorithm/`` equals the formulas of its paper, written out as loops, to 1e-10 in float64."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from sae_rl.algo.estimators import estimate
from sae_rl.algo.losses import PolicyTokens
from sae_rl.algo.segmentation import segment
from sae_rl.config.compose import load_config
from sae_rl.config.schema import AlgorithmConfig
from sae_rl.types import Batch, Scores, gather_ragged
from tests.algo.oracle import make_batch, make_scores, split

MODEL = ("model.path=nobody/nothing", "model.context_tokens=1024")
STEPS = ("algorithm/segmenter=delimiter", "algorithm.segmenter.token_ids=[7,8]", "algorithm.segmenter.strings=[]")
LENGTHS, GROUP_SIZE = [40, 61, 25, 30, 52, 33], 3


@dataclass(frozen=True)
class Response:
    """One response as Python numbers, at the tokens that the policy sampled."""

    rewards: list[float]  # r_t
    values: list[float]  # V(s_t)
    tokens: list[int]
    probabilities: list[float]
    turns: list[int]  # the turn of each token
    group: list[float]  # R of all responses of its group, and its own is next
    R: float

    def value(self, t: int) -> float:
        """V(s_t); the state after the last token is terminal."""
        return self.values[t] if t < len(self.values) else 0.0

    def delta(self, t: int) -> float:
        return self.rewards[t] + self.value(t + 1) - self.values[t]


@cache
def case(with_tool: bool = False) -> tuple[Batch, Scores]:
    """Two groups of three responses, with rewards 0 and 1."""
    batch = replace(make_batch(LENGTHS, group_size=GROUP_SIZE), rewards=torch.tensor([1, 0, 0, 1, 1, 0]).double())
    if with_tool:
        position = torch.cat([torch.arange(length) for length in LENGTHS])
        batch = replace(batch, action_mask=(position % 17 < 12) | (position % 17 > 15))
    entropies = torch.rand(batch.num_tokens, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    return batch, replace(make_scores(batch), entropies=entropies)


def algorithm_of(*overrides: str) -> AlgorithmConfig:
    return load_config([*MODEL, *overrides]).algorithm


def responses(batch: Batch, scores: Scores) -> Iterator[Response]:
    assert scores.values is not None
    kept = torch.ones(batch.num_tokens, dtype=torch.bool) if batch.action_mask is None else batch.action_mask
    flats = (scores.values, batch.token_ids, batch.rollout_logprobs.exp(), kept)
    for i, (values, tokens, probabilities, mask) in enumerate(zip(*(split(f, batch) for f in flats), strict=True)):
        at = [t for t in range(len(mask)) if mask[t]]
        turns = [sum(b > a + 1 for a, b in pairwise(at[: k + 1])) for k in range(len(at))]
        R = float(batch.rewards[i])
        yield Response(
            rewards=[0.0] * (len(at) - 1) + [R],
            values=[float(values[t]) for t in at],
            tokens=[int(tokens[t]) for t in at],
            probabilities=[float(probabilities[t]) for t in at],
            turns=turns,
            group=[float(r) for r in batch.rewards[batch.groups == batch.groups[i]]],
            R=R,
        )


# ---- Advantages of a response, from its paper -----------------------------------------------------------------------


def gae(y: Response, lam: float) -> list[float]:
    """arXiv 1506.02438, eq. 16: the sum of lambda^l delta_{t+l}."""
    return [math.fsum(lam**k * y.delta(t + k) for k in range(len(y.values) - t)) for t in range(len(y.values))]


def decays_at(y: Response, opens: list[bool], lam: float) -> list[float]:
    """The sum of lambda^n delta, n the number of segments that open after t: SAE (arXiv 2601.07320), AlphaMath."""
    return [
        math.fsum(lam ** sum(opens[t + 1 : k + 1]) * y.delta(k) for k in range(t, len(y.values)))
        for t in range(len(y.values))
    ]


def per_step(y: Response, step_of: list[int], gamma: float, lam: float) -> list[float]:
    """GAE in which a step is one action: Turn-PPO (arXiv 2512.17008), and VinePPO and SPO-chain with lambda = 0."""
    steps = range(step_of[-1] + 1)
    first = [step_of.index(h) for h in steps]
    V = [y.values[t] for t in first] + [0.0]
    r = [math.fsum(x for x, step in zip(y.rewards, step_of, strict=True) if step == h) for h in steps]
    delta = [r[h] + gamma * V[h + 1] - V[h] for h in steps]
    A = [math.fsum((gamma * lam) ** (k - h) * delta[k] for k in steps[h:]) for h in steps]
    return [A[h] for h in step_of]


def step_of(opens: list[bool]) -> list[int]:
    return [sum(opens[1 : t + 1]) for t in range(len(opens))]


def after_delimiter(y: Response) -> list[bool]:
    return [t == 0 or y.tokens[t - 1] in (7, 8) for t in range(len(y.tokens))]


def cutpoints(y: Response) -> list[bool]:
    """arXiv 2505.23564, sec. 4: a segment holds five tokens that were sampled with a probability below .9."""
    unsure = [t for t, p in enumerate(y.probabilities) if p < 0.9]
    return [t == 0 or t in unsure[::5] for t in range(len(y.tokens))]


def group_relative(y: Response) -> float:
    return (y.R - statistics.mean(y.group)) / (statistics.stdev(y.group) + 1e-6)


def tempo(y: Response) -> list[float]:
    """arXiv 2509.18314: (R - mean + V(s_{t+1}) - V(s_t)) / std, where the value of a whole response is its reward."""
    values = [*y.values, y.R]
    scale = statistics.stdev(y.group) + 1e-6
    return [(y.R - statistics.mean(y.group) + values[t + 1] - values[t]) / scale for t in range(len(y.values))]


Advantages = Callable[[Response], list[float]]
ADVANTAGES: dict[str, tuple[tuple[str, ...], Advantages]] = {
    "GAE": (("algorithm=gae",), lambda y: gae(y, 0.95)),
    "Monte Carlo": (("algorithm=monte_carlo",), lambda y: [y.R - v for v in y.values]),
    "SAE": (("algorithm=sae",), lambda y: decays_at(y, [p < 0.2 for p in y.probabilities], 0.95)),
    "AlphaMath": (("algorithm=sae", *STEPS), lambda y: decays_at(y, after_delimiter(y), 0.95)),
    "VC-PPO": (("algorithm=vc_ppo",), lambda y: gae(y, 0.95)),
    "VAPO": (("algorithm=vapo",), lambda y: gae(y, 1 - 1 / (0.05 * len(y.values)))),
    "lambda by segments": (
        ("algorithm=segment_adaptive_sae",),
        lambda y: decays_at(
            y, opens := [t == 0 or p < 0.2 for t, p in enumerate(y.probabilities)], max(0, 1 - 1 / (0.5 * sum(opens)))
        ),
    ),
    "Turn-PPO": (("algorithm=turn_gae",), lambda y: per_step(y, y.turns, 0.99, 0.9)),
    "VinePPO": (("algorithm=vineppo", *STEPS), lambda y: per_step(y, step_of(after_delimiter(y)), 1.0, 0.0)),
    "SPO-chain": (("algorithm=spo_chain",), lambda y: per_step(y, step_of(cutpoints(y)), 1.0, 0.0)),
    "GRPO": (("algorithm=grpo",), lambda y: [group_relative(y)] * len(y.values)),
    "GRPO, token mean": (("algorithm=grpo_token_mean",), lambda y: [group_relative(y)] * len(y.values)),
    "DAPO": (("algorithm=dapo",), lambda y: [group_relative(y)] * len(y.values)),
    "80/20": (("algorithm=dapo_80_20",), lambda y: [group_relative(y)] * len(y.values)),
    "GSPO": (("algorithm=gspo",), lambda y: [group_relative(y)] * len(y.values)),
    "CISPO": (("algorithm=cispo",), lambda y: [group_relative(y)] * len(y.values)),
    "Dr. GRPO": (("algorithm=dr_grpo",), lambda y: [y.R - statistics.mean(y.group)] * len(y.values)),
    "RLOO": (("algorithm=rloo",), lambda y: [y.R - (sum(y.group) - y.R) / (len(y.group) - 1)] * len(y.values)),
    "TEMPO": (("algorithm=tempo",), tempo),
}


@pytest.mark.parametrize("method", ADVANTAGES)
def test_the_advantages_are_those_of_the_paper(method: str) -> None:
    overrides, paper = ADVANTAGES[method]
    algorithm, (batch, scores) = algorithm_of(*overrides), case(with_tool=method == "Turn-PPO")
    opens, token_rewards = segment(algorithm.segmenter, batch, scores), algorithm.token_rewards(batch, scores)
    found = estimate(algorithm.estimator, batch, scores, token_rewards, opens).advantages
    expected = [a for y in responses(batch, scores) for a in paper(y)]
    kept = torch.ones_like(opens) if batch.action_mask is None else batch.action_mask
    torch.testing.assert_close(found[kept], torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-10)
    assert not bool(found[~kept].any())
    assert len(set(map(float, found))) > 1


def test_advantages_of_the_reinforce_pp_baseline_are_whitened_over_the_batch() -> None:
    """arXiv 2501.03262: the reward minus the mean of its group, normalised over all tokens of the global batch."""
    algorithm, (batch, scores) = algorithm_of("algorithm=reinforce_pp_baseline"), case()
    opens, token_rewards = segment(algorithm.segmenter, batch, scores), algorithm.token_rewards(batch, scores)
    advantages = estimate(algorithm.estimator, batch, scores, token_rewards, opens).advantages
    found = algorithm.whitening(advantages, batch.action_mask)
    raw = [y.R - statistics.mean(y.group) for y in responses(batch, scores) for _ in y.values]
    mu, sigma = statistics.fmean(raw), statistics.pstdev(raw)
    expected = torch.tensor([(a - mu) / (sigma + 1e-8) for a in raw], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_gae_on_the_group_mean_is_another_method_than_grpo_lambda() -> None:
    """All values of a response are equal, so GAE decays its advantage from the end towards the beginning.

    GRPO-lambda (arXiv 2510.00194) has one advantage for the response, and a ratio of token t that holds those of the
    tokens before it, token t - l to the power (gamma lambda)^l. So its gradient is largest at the beginning.
    """
    lam = 0.9
    algorithm = algorithm_of("algorithm=gae", "algorithm/value_source=group_mean", f"algorithm.estimator.lam={lam}")
    batch, scores = case()
    opens, token_rewards = segment(algorithm.segmenter, batch, scores), algorithm.token_rewards(batch, scores)

    def unused(at: Tensor, k: int, max_tokens: int) -> Tensor:
        raise AssertionError("the group mean samples nothing")

    scores = algorithm.with_values(batch, scores, token_rewards, opens, unused)
    found = estimate(algorithm.estimator, batch, scores, token_rewards, opens).advantages
    for own, y in zip(split(found, batch), responses(batch, scores), strict=True):
        T, A = len(y.values), y.R - statistics.mean(y.group)
        decayed = torch.tensor([lam ** (T - 1 - t) * A for t in range(T)], dtype=torch.float64)
        torch.testing.assert_close(own, decayed, rtol=1e-10, atol=1e-10)
        log_ratios = torch.zeros(T, dtype=torch.float64, requires_grad=True)  # pi = pi_old
        ratios = [torch.stack([lam ** (t - k) * log_ratios[k] for k in range(t + 1)]).sum().exp() for t in range(T)]
        (gradient,) = torch.autograd.grad(torch.stack(ratios).sum() * A, log_ratios)
        traced = torch.tensor([A * (1 - lam ** (T - t)) / (1 - lam) for t in range(T)], dtype=torch.float64)
        torch.testing.assert_close(gradient, traced, rtol=1e-10, atol=1e-10)
        assert abs(own[0]) < abs(own[-1]) and abs(gradient[0]) > abs(gradient[-1])


# ---- Losses of a mini-batch, from its paper -------------------------------------------------------------------------


@dataclass(frozen=True)
class Token:
    """One token; logprobs are scalars of float64 with a gradient."""

    logprob: Tensor
    old: Tensor
    ref: Tensor
    A: Tensor
    entropy: float
    probability: float

    @property
    def ratio(self) -> Tensor:
        return (self.logprob - self.old).exp()

    def ppo(self, low: float, high: float) -> Tensor:
        return torch.minimum(self.ratio * self.A, self.ratio.clamp(1 - low, 1 + high) * self.A)


Group = list[tuple[list[Token], float]]  # the tokens and the reward of each response of the mini-batch


def every(group: Group) -> list[Token]:
    return [token for tokens, _ in group for token in tokens]


def mean(terms: list[Tensor]) -> Tensor:
    return torch.stack(terms).sum() / len(terms)


def grpo_loss(group: Group) -> Tensor:
    """arXiv 2402.03300, eq. 3 and 4."""

    def kl(token: Token) -> Tensor:
        return (token.ref - token.logprob).exp() - (token.ref - token.logprob) - 1

    return -mean([mean([token.ppo(0.2, 0.2) - 0.04 * kl(token) for token in tokens]) for tokens, _ in group])


def token_mean(low: float, high: float) -> Callable[[Group], Tensor]:
    """DAPO, arXiv 2503.14476, eq. 12; PPO's loss as VAPO (eq. 7) and SAE have it."""
    return lambda group: -mean([token.ppo(low, high) for token in every(group)])


def vapo_loss(group: Group) -> Tensor:
    """arXiv 2504.05118, eq. 8 to 10: the NLL is a mean over the tokens of right responses."""
    right = [token for tokens, reward in group if reward > 0 for token in tokens]
    return token_mean(0.2, 0.28)(group) + 0.1 * -mean([token.logprob for token in right])


def gspo_loss(group: Group) -> Tensor:
    """arXiv 2507.18071, eq. 5 and 7."""
    terms = []
    for tokens, _ in group:
        s, A = mean([token.logprob - token.old for token in tokens]).exp(), tokens[0].A
        terms.append(torch.minimum(s * A, s.clamp(1 - 3e-4, 1 + 4e-4) * A))
    return -mean(terms)


def cispo_loss(group: Group) -> Tensor:
    """arXiv 2506.13585, eq. 4 and 5, without a lower bound."""
    return -mean([token.ratio.detach().clamp(max=5.0) * token.A * token.logprob for token in every(group)])


def dr_grpo_loss(group: Group) -> Tensor:
    """arXiv 2503.20783: the sum over tokens, divided by a constant."""
    return -torch.stack([token.ppo(0.2, 0.2) for token in every(group)]).sum() / (len(group) * 448)


def high_entropy_loss(group: Group) -> Tensor:
    """arXiv 2506.01939, eq. 6: the indicator is in the numerator and in the number of tokens."""
    tokens = every(group)
    tau = sorted((token.entropy for token in tokens), reverse=True)[math.ceil(0.2 * len(tokens)) - 1]
    return -mean([token.ppo(0.2, 0.28) for token in tokens if token.entropy >= tau])


def spo_loss(group: Group) -> Tensor:
    """arXiv 2505.23564, eq. 4: M_t = 1 where pi_old(a_t | s_t) < .9, and Z = sum of M_t."""
    return -mean([token.ppo(0.2, 0.2) for token in every(group) if token.probability < 0.9])


LOSSES: dict[str, tuple[tuple[str, ...], Callable[[Group], Tensor]]] = {
    "SAE": (("algorithm=sae",), token_mean(0.2, 0.2)),
    "VC-PPO": (("algorithm=vc_ppo",), token_mean(0.2, 0.2)),
    "VAPO": (("algorithm=vapo",), vapo_loss),
    "GRPO": (("algorithm=grpo",), grpo_loss),
    "GRPO, token mean": (("algorithm=grpo_token_mean",), token_mean(0.2, 0.2)),
    "DAPO": (("algorithm=dapo",), token_mean(0.2, 0.28)),
    "Dr. GRPO": (("algorithm=dr_grpo",), dr_grpo_loss),
    "GSPO": (("algorithm=gspo",), gspo_loss),
    "CISPO": (("algorithm=cispo",), cispo_loss),
    "80/20": (("algorithm=dapo_80_20",), high_entropy_loss),
    "SPO-chain": (("algorithm=spo_chain",), spo_loss),
}


@pytest.mark.parametrize("num_micro_batches", [1, 3])
@pytest.mark.parametrize("method", LOSSES)
def test_the_loss_and_its_gradient_are_those_of_the_paper(method: str, num_micro_batches: int) -> None:
    """Also of a mini-batch that is a part of the step's batch, and in several micro-batches."""
    overrides, paper = LOSSES[method]
    algorithm, (batch, scores) = algorithm_of(*overrides), case()
    assert scores.old_logprobs is not None and scores.ref_logprobs is not None and scores.entropies is not None
    loss, rows = algorithm.policy_loss, torch.tensor([4, 0, 3, 1])
    draw = torch.Generator().manual_seed(5)
    noise = torch.randn(batch.num_tokens, generator=draw, dtype=torch.float64)
    logprobs = (scores.old_logprobs + 0.3 * noise).requires_grad_()
    advantages = torch.randn(batch.num_responses, generator=draw, dtype=torch.float64).repeat_interleave(batch.lengths)
    if method not in ("GSPO",):  # its own equation has one advantage per response
        advantages = advantages + torch.randn(batch.num_tokens, generator=draw, dtype=torch.float64)

    share, found = loss.share(batch, scores, rows), torch.zeros((), dtype=torch.float64)
    for part in rows.chunk(num_micro_batches):

        def of_part(flat: Tensor, part: Tensor = part) -> Tensor:
            return gather_ragged(flat, batch.offsets, part)

        tokens = PolicyTokens(
            logprobs=of_part(logprobs),
            old_logprobs=of_part(scores.old_logprobs),
            advantages=of_part(advantages),
            counts=batch.lengths[part],
            ref_logprobs=of_part(scores.ref_logprobs),
            rewards=batch.rewards[part],
            kept=None if share.kept is None else of_part(share.kept),
            nll_scale=share.nll_scale,
        )
        found = found + loss(tokens).sum / share.total

    flats = (logprobs, scores.old_logprobs, scores.ref_logprobs, advantages)
    group: Group = []
    for i in rows.tolist():
        span = range(int(batch.offsets[i]), int(batch.offsets[i + 1]))
        tokens_of_i = [
            Token(*(flat[t] for flat in flats), float(scores.entropies[t]), float(batch.rollout_logprobs[t].exp()))
            for t in span
        ]
        group.append((tokens_of_i, float(batch.rewards[i])))
    expected = paper(group)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    (gradient,), (expected_gradient,) = (torch.autograd.grad(x, logprobs) for x in (found, expected))
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-10)
    assert bool(gradient.any())
