"""Token rewards against loops, and whitening of the whole batch."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_rl.algo.shaping import TokenRewards, Whitening
from sae_rl.types import Batch

from .oracle import batches, close, dense_rewards, make_batch, make_scores, property_test

WHITEN = Whitening()
NAIVE_KL = {  # KL(p || q) from a token sampled from p, with logprobs a under p and b under q
    "k1": lambda a, b: a - b,
    "k2": lambda a, b: 0.5 * (a - b) ** 2,
    "k3": lambda a, b: math.exp(b) / math.exp(a) - 1 - (b - a),
}


@property_test
@given(batch=batches())
def test_the_reward_is_paid_by_the_last_token(batch: Batch) -> None:
    expected = [
        reward if t == length - 1 else 0.0
        for reward, length in zip(batch.rewards.tolist(), batch.lengths.tolist(), strict=True)
        for t in range(length)
    ]
    scores = replace(make_scores(batch), ref_logprobs=None)  # kl_coef = 0 needs no reference
    assert TokenRewards()(batch, scores).tolist() == expected


@property_test
@given(batch=batches(), kl_coef=st.floats(1e-3, 2), kind=st.sampled_from(["k1", "k2", "k3"]))
def test_the_kl_penalty_against_a_loop(batch: Batch, kl_coef: float, kind: Literal["k1", "k2", "k3"]) -> None:
    scores = make_scores(batch)
    assert scores.ref_logprobs is not None
    plain = TokenRewards()(batch, scores).tolist()
    pairs = zip(scores.old_logprobs.tolist(), scores.ref_logprobs.tolist(), strict=True)
    expected = [r - kl_coef * NAIVE_KL[kind](old, ref) for r, (old, ref) in zip(plain, pairs, strict=True)]
    assert close(TokenRewards(kl_coef, kind)(batch, scores), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_unbiased_estimators_have_the_kl_as_their_expectation(kind: Literal["k1", "k3"]) -> None:
    """The expectation is a sum over all tokens; it shows that the arguments are not swapped."""
    old, ref = torch.tensor([0.1, 0.2, 0.7], dtype=torch.float64), torch.tensor([0.4, 0.5, 0.1], dtype=torch.float64)
    batch = replace(make_batch([1, 1, 1]), rewards=torch.zeros(3, dtype=torch.float64))
    scores = replace(make_scores(batch), old_logprobs=old.log(), ref_logprobs=ref.log())
    expected = sum(float(p) * math.log(float(p) / float(q)) for p, q in zip(old, ref, strict=True))
    assert math.isclose(-float((old * TokenRewards(1.0, kind)(batch, scores)).sum()), expected, rel_tol=1e-12)


def test_shaping_errors() -> None:
    batch = make_batch([2, 3, 1])
    scores = make_scores(batch)
    with pytest.raises(ValueError, match=r"TokenRewards.kl_coef = 0.1, but scores.ref_logprobs is None"):
        TokenRewards(0.1)(batch, replace(scores, ref_logprobs=None))
    with pytest.raises(ValueError, match=r"TokenRewards.kl_coef = -1, but it must be a number in \[0, inf\)"):
        TokenRewards(-1)
    with pytest.raises(ValueError, match=r"TokenRewards.kl_estimator = 'k4', but it must be one of k1, k2, k3"):
        TokenRewards(0.1, "k4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"batch.rewards is nan for response 1"):
        TokenRewards()(replace(batch, rewards=torch.tensor([0.0, math.nan, 1.0])), scores)
    for name in ("ref_logprobs", "old_logprobs"):
        bad = make_scores(batch)
        flat = bad.ref_logprobs if name == "ref_logprobs" else bad.old_logprobs
        assert flat is not None
        flat[4] = math.nan
        with pytest.raises(ValueError, match=rf"scores.{name} is nan at token 2 of response 1"):
            TokenRewards(0.1)(batch, bad)


@property_test
@given(batch=batches(min_responses=2))
def test_whitening_is_of_the_whole_batch(batch: Batch) -> None:
    advantages = 3.0 + 2.0 * dense_rewards(batch)
    numbers = advantages.tolist()
    mean, std = statistics.fmean(numbers), statistics.pstdev(numbers)
    expected = torch.tensor([(a - mean) / (std + 1e-8) for a in numbers], dtype=torch.float64)
    whitened = WHITEN(advantages)
    assert close(whitened, expected)
    assert abs(float(whitened.mean())) < 1e-12
    assert math.isclose(float(whitened.std(correction=0)), 1.0, abs_tol=1e-6)
    assert close(WHITEN(advantages.flip(0)).flip(0), whitened)


def test_whitening_of_parts_is_another_thing() -> None:
    advantages = torch.tensor([0.0, 1.0, 10.0, 12.0], dtype=torch.float64)
    assert not close(WHITEN(advantages), torch.cat([WHITEN(advantages[:2]), WHITEN(advantages[2:])]), 0.1)


def test_whitening_without_variance_only_centres() -> None:
    assert WHITEN(torch.tensor([5.0])).tolist() == [0.0]
    assert float(WHITEN(torch.full((7,), 0.1)).abs().max()) < 1e-6
    assert WHITEN(torch.tensor([1.0, 3.0])).dtype == torch.float32
    assert WHITEN(torch.empty(0)).tolist() == []


@property_test
@given(batch=batches(min_responses=2), seed=st.integers(0, 99))
def test_each_part_of_whitening_alone(batch: Batch, seed: int) -> None:
    advantages = 3.0 + 2.0 * dense_rewards(batch)
    numbers = advantages.tolist()
    mean, std = statistics.fmean(numbers), statistics.pstdev(numbers)
    assert close(Whitening(scale=False)(advantages), advantages - mean)
    assert close(Whitening(center=False)(advantages), advantages / (std + 1e-8))
    assert torch.equal(Whitening(center=False, scale=False)(advantages), advantages)
    clipped = Whitening(clip=0.5)(advantages)
    assert close(clipped, WHITEN(advantages).clamp(-0.5, 0.5))
    action_mask = torch.rand(batch.num_tokens, generator=torch.Generator().manual_seed(seed)) < 0.6
    whitened = WHITEN(advantages, action_mask)
    assert close(whitened[action_mask], WHITEN(advantages[action_mask])) and not bool(whitened[~action_mask].any())


@property_test
@given(batch=batches(), seed=st.integers(0, 99), whitening=st.sampled_from([WHITEN, Whitening(scale=False, clip=1.0)]))
def test_whitening_as_on_a_gpu_and_in_place(batch: Batch, seed: int, whitening: Whitening) -> None:
    advantages = dense_rewards(batch)
    action_mask = torch.rand(batch.num_tokens, generator=torch.Generator().manual_seed(seed)) < 0.6
    for marks in (None, action_mask):
        expected = whitening(advantages, marks)
        assert close(whitening._with_torch(advantages, marks, None), expected)
        place = advantages.clone()
        assert whitening(place, marks, out=place) is place and torch.equal(place, expected)


def test_whitening_knobs() -> None:
    with pytest.raises(ValueError, match=r"Whitening.center = 1, but it must be true or false"):
        Whitening(center=1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"Whitening.clip = 0, but it must be a number in \(0, inf\)"):
        Whitening(clip=0)


@pytest.mark.parametrize(("length", "lost"), [(3, 0.0), (12, 0.0), (13, 0.125), (16, 0.5), (20, 1.0), (25, 1.0)])
def test_the_overlong_penalty_grows_in_the_buffer(length: int, lost: float) -> None:
    """DAPO's penalty: 0 up to 20 - 8 tokens, then linear, and at its maximum from the limit on."""
    batch = make_batch([length, 1])
    plain, shaped = (
        rewards(batch, make_scores(batch))
        for rewards in (
            TokenRewards(),
            TokenRewards(overlong_buffer_tokens=8, overlong_penalty=0.5, max_response_tokens=20),
        )
    )
    expected = plain.clone()
    expected[length - 1] -= 0.5 * lost
    assert close(shaped, expected)


def test_overlong_knobs() -> None:
    with pytest.raises(ValueError, match=r"overlong_buffer_tokens needs max_response_tokens"):
        TokenRewards(overlong_buffer_tokens=8)
    with pytest.raises(ValueError, match=r"max_response_tokens = 7, but it must be an integer of at least 8"):
        TokenRewards(overlong_buffer_tokens=8, max_response_tokens=7)
    with pytest.raises(ValueError, match=r"TokenRewards.overlong_penalty = -1"):
        TokenRewards(overlong_penalty=-1)
