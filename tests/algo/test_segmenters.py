"""Every member of `SEGMENTERS`: what opens, what always opens, and what must not matter."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_rl.algo import SEGMENTERS, Delimiter, FixedLength, LowProbability, Random, Segmenter
from sae_rl.types import Batch

from .oracle import batches, make_batch, make_scores, property_test, reordered, reordered_batch

MEMBERS: list[Segmenter] = [LowProbability(), FixedLength(3), Random(0.3, seed=5), Delimiter((7, 8, 9, 10, 11, 12))]


def test_every_member_is_under_contract() -> None:
    assert {type(member) for member in MEMBERS} == set(SEGMENTERS.values())
    assert list(SEGMENTERS) == ["low_probability", "fixed_length", "random", "delimiter"]


@pytest.mark.parametrize("segmenter", MEMBERS, ids=lambda member: type(member).__name__)
@property_test
@given(batch=batches(), seed=st.integers(0, 99))
def test_contract(segmenter: Segmenter, batch: Batch, seed: int) -> None:
    opens = segmenter(batch, make_scores(batch))
    assert opens.dtype == torch.bool and opens.shape == (batch.num_tokens,)
    assert bool(opens[batch.offsets[:-1]].all()), "the first token of every response opens"
    assert torch.equal(segmenter(batch, make_scores(batch)), opens), "no hidden state"
    order = torch.randperm(batch.num_responses, generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = reordered_batch(batch, order)
    assert torch.equal(segmenter(shuffled, make_scores(shuffled)), reordered(opens, batch, order)), "order of responses"
    with pytest.raises(FrozenInstanceError):
        setattr(segmenter, next(iter(segmenter.__slots__)), 1)  # type: ignore[attr-defined]


@property_test
@given(batch=batches(), p=st.floats(0, 1))
def test_low_probability_against_a_loop(batch: Batch, p: float) -> None:
    first = set(batch.offsets.tolist())
    expected = [t in first or math.exp(lp) < p for t, lp in enumerate(batch.rollout_logprobs.tolist())]
    assert LowProbability(p)(batch, make_scores(batch)).tolist() == expected


def test_low_probability_reads_the_rollout_policy_and_is_strict() -> None:
    batch = replace(make_batch([4]), rollout_logprobs=torch.tensor([0.9, 0.5, 0.25, 0.125], dtype=torch.float64).log())
    scores = make_scores(batch)
    assert LowProbability(0.25)(batch, scores).tolist() == [True, False, False, True]
    assert LowProbability(0.0)(batch, scores).tolist() == [True, False, False, False]
    certain = replace(batch, rollout_logprobs=torch.zeros(4))
    assert LowProbability(1.0)(certain, scores).tolist() == [True, False, False, False]


@property_test
@given(batch=batches(), num_tokens=st.integers(1, 14))
def test_fixed_length_against_a_loop(batch: Batch, num_tokens: int) -> None:
    expected = [t % num_tokens == 0 for length in batch.lengths.tolist() for t in range(length)]
    assert FixedLength(num_tokens)(batch, make_scores(batch)).tolist() == expected


def test_the_token_after_a_delimiter_opens() -> None:
    batch = replace(make_batch([6, 3]), token_ids=torch.tensor([1, 9, 2, 9, 8, 9, 4, 9, 5]))
    opens = Delimiter((9, 8))(batch, make_scores(batch)).tolist()
    #                 1     9      2     9      8     9   |  4     9      5
    assert opens == [True, False, True, False, True, True, True, False, True]
    assert Delimiter((1,))(batch, make_scores(batch)).tolist() == [True, True] + [False] * 4 + [True, False, False]


def test_a_delimiter_does_not_leak_into_the_next_response() -> None:
    batch = replace(make_batch([2, 3, 1]), token_ids=torch.tensor([1, 9, 2, 3, 9, 4]))
    assert Delimiter((9,))(batch, make_scores(batch)).tolist() == [True, False, True, False, False, True]


def test_random_has_its_rate_its_seed_and_nothing_global() -> None:
    batch = make_batch([500] * 40)
    scores = make_scores(batch)
    torch.manual_seed(0)
    opens = Random(0.2, seed=3)(batch, scores)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(Random(0.2, seed=3)(batch, scores), opens)
    assert not torch.equal(torch.get_rng_state(), state)
    assert abs(float(opens.double().mean()) - 0.2) < 0.01  # 3.5 standard deviations of 20 000 draws
    assert not torch.equal(Random(0.2, seed=4)(batch, scores), opens)
    next_step = make_batch([500] * 40, seed=1)
    assert not torch.equal(Random(0.2, seed=3)(next_step, scores), opens)
    rows = [tuple(opens[a:b].tolist()) for a, b in pairwise(batch.offsets.tolist())]
    assert len(set(rows)) == 40, "responses are cut independently"


def test_random_at_the_ends_of_its_range() -> None:
    batch = make_batch([5, 1, 7])
    assert bool(Random(1.0)(batch, make_scores(batch)).all())
    assert int(Random(0.0)(batch, make_scores(batch)).sum()) == 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowProbability(1.5), r"LowProbability.p = 1.5, but it must be a number in \[0, 1\]"),
        (lambda: LowProbability(-0.1), r"LowProbability.p"),
        (lambda: LowProbability(math.nan), r"LowProbability.p = nan"),
        (lambda: LowProbability("0.2"), r"LowProbability.p = '0.2'"),  # type: ignore[arg-type]
        (lambda: LowProbability(True), r"LowProbability.p = True"),
        (lambda: FixedLength(0), r"FixedLength.num_tokens = 0, but it must be an integer of at least 1"),
        (lambda: FixedLength(2.0), r"FixedLength.num_tokens = 2.0"),  # type: ignore[arg-type]
        (lambda: Random(1.1), r"Random.rate = 1.1"),
        (lambda: Random(0.5, seed=-1), r"Random.seed = -1"),
        (lambda: Delimiter(()), r"Delimiter.token_ids = \(\)"),
        (lambda: Delimiter([3]), r"Delimiter.token_ids = \[3\]"),  # type: ignore[arg-type]
        (lambda: Delimiter((3, -1)), r"Delimiter.token_ids = -1"),
    ],
)
def test_bad_knobs(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


def test_nan_logprobs_name_the_response() -> None:
    batch = make_batch([2, 3, 4])
    batch.rollout_logprobs[6] = math.nan
    with pytest.raises(ValueError, match=r"batch.rollout_logprobs is nan at token 1 of response 2 \(1 of 9 tokens"):
        LowProbability()(batch, make_scores(batch))
