"""`td_recursion`: its formula, values by hand, types, threads, errors, and numba without a cache."""

from __future__ import annotations

import math
import os
import signal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sae_rl.algo import td_recursion
from sae_rl.algo.jit import jit
from sae_rl.types import Batch, offsets_of

from .oracle import (
    batches,
    close,
    dense_rewards,
    make_batch,
    make_scores,
    property_test,
    random_opens,
    split,
    td_recursion_reference,
    unit,
)


def numbers(count: int, seed: int) -> torch.Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@property_test
@given(batch=batches(), seed=st.integers(0, 10**6), lam=unit, gamma=unit, features=st.sets(st.sampled_from("wglfs")))
def test_equals_the_reference(batch: Batch, seed: int, lam: float, gamma: float, features: set[str]) -> None:
    """gamma and lambda are numbers or tensors; weights are hard or soft; with final values and transparent tokens or not."""
    values = make_scores(batch).values
    assert values is not None
    n, b = batch.num_tokens, batch.num_responses
    weights = numbers(n, seed) if "w" in features else random_opens(batch, 0.4, seed)
    arguments = {
        "gamma": numbers(n, seed + 1) if "g" in features else gamma,
        "lam": numbers(b, seed + 2) if "l" in features else lam,
        "value_lam": 0.3,
        "final_values": numbers(b, seed + 3) if "f" in features else None,
        "action_mask": numbers(n, seed + 4) < 0.7 if "s" in features else None,
    }
    found = td_recursion(dense_rewards(batch), values, weights, batch.offsets, **arguments)  # type: ignore[arg-type]
    expected = td_recursion_reference(dense_rewards(batch), values, weights, batch.offsets, **arguments)  # type: ignore[arg-type]
    assert close(found[0], expected[0], 1e-12) and close(found[1], expected[1], 1e-12)


def test_by_hand() -> None:
    """Two responses of two tokens, all deltas powers of two; the second response's value does not leak into the first."""
    rewards, values = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0.0, 0.0, 1.0, 0.0])
    offsets, opens = torch.tensor([0, 2, 4]), torch.tensor([True, True, True, False])
    advantages, returns = td_recursion(rewards, values, opens, offsets, gamma=0.5, lam=0.5, value_lam=1.0)
    # A_1 = 2, A_0 = 1 + 0.5 * 0.5 * 2; A_3 = 8, A_2 = 4 - 1 + 0.5 * 1 * 8, since token 3 opens no segment
    assert advantages.tolist() == [1.5, 2.0, 7.0, 8.0]
    assert returns.tolist() == [2.0, 2.0, 8.0, 8.0]


@property_test
@given(batch=batches(), seed=st.integers(0, 10**6), gamma=unit, lam=unit)
def test_transparent_tokens_have_no_effect(batch: Batch, seed: int, gamma: float, lam: float) -> None:
    values, rewards, opens = make_scores(batch).values, dense_rewards(batch), random_opens(batch, 0.5)
    assert values is not None
    action_mask = numbers(batch.num_tokens, seed) < 0.6
    action_mask[batch.offsets[:-1]] = True
    rewards = rewards * action_mask
    settings = {"gamma": gamma, "lam": lam, "value_lam": 0.9}
    with_holes = td_recursion(rewards, values, opens, batch.offsets, action_mask=action_mask, **settings)
    lengths = [int(piece.sum()) for piece in split(action_mask, batch)]
    without = td_recursion(
        rewards[action_mask], values[action_mask], opens[action_mask], offsets_of(lengths), **settings
    )
    for holes, plain in zip(with_holes, without, strict=True):
        assert torch.equal(holes[action_mask], plain)
        assert not bool(holes[~action_mask].any())


def test_a_reward_at_a_transparent_token_goes_to_the_sampled_token_before_it() -> None:
    rewards, action_mask = torch.tensor([5.0, 0.0, 1.0, 0.0]), torch.tensor([False, True, False, True])
    advantages, _ = td_recursion(
        rewards, torch.zeros(4), torch.ones(4, dtype=torch.bool), offsets_of([4]), gamma=1.0, lam=0.0, value_lam=0.0,
        action_mask=action_mask,
    )  # fmt: skip
    assert advantages.tolist() == [0.0, 1.0, 0.0, 0.0], "rewards before the first sampled token are dropped"


def test_accumulates_in_float64_and_returns_the_type_of_the_values() -> None:
    num_tokens = 200_000
    rewards, nowhere = torch.full((num_tokens,), 0.1), torch.zeros(num_tokens, dtype=torch.bool)
    for dtype, returned in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32)):
        values = torch.zeros(num_tokens, dtype=dtype)
        sums, _ = td_recursion(rewards, values, nowhere, offsets_of([num_tokens]), gamma=1.0, lam=1.0, value_lam=1.0)
        assert sums.dtype == returned
        assert float(sums[0]) == np.float32(
            np.float64(np.float32(0.1)) * num_tokens
        )  # a float32 sum is off by a thousand ulp


@pytest.mark.parametrize("lengths", [[1_000_000], [300_000, 1, 299_999, 5, 100_000], [70_000] * 3])
def test_threads_change_nothing(lengths: list[int]) -> None:
    batch = make_batch(lengths)
    values, rewards, opens = make_scores(batch).values, dense_rewards(batch), random_opens(batch, 0.02)
    assert values is not None
    one, three = (
        td_recursion(rewards, values, opens, batch.offsets, gamma=1.0, lam=0.95, value_lam=1.0, num_threads=n)
        for n in (1, 3)
    )
    assert torch.equal(one[0], three[0]) and torch.equal(one[1], three[1])


def test_leaves_its_inputs_alone_and_takes_strided_ones() -> None:
    batch = make_batch([3, 1, 4])
    values, rewards, opens = make_scores(batch).values, dense_rewards(batch), random_opens(batch, 0.5)
    assert values is not None
    settings = {"gamma": 0.9, "lam": 0.8, "value_lam": 1.0}
    expected = td_recursion(rewards, values, opens, batch.offsets, **settings)
    strided = torch.stack([rewards, rewards], dim=1)[:, 0]
    copies = [x.clone() for x in (rewards, values, opens)]
    found = td_recursion(strided, values, opens, batch.offsets, **settings)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert all(torch.equal(x, copy) for x, copy in zip((rewards, values, opens), copies, strict=True))


@pytest.mark.parametrize("name", ["rewards", "values", "final_values"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("token", [0, 2, 3, 8])
def test_errors_name_non_finite_inputs(name: str, bad: float, token: int) -> None:
    """At every token, even if lambda and gamma are 0."""
    batch = make_batch([3, 1, 5])
    values, opens = make_scores(batch).values, random_opens(batch, 0.5)
    inputs = {"rewards": dense_rewards(batch), "values": values, "final_values": torch.zeros(3, dtype=torch.float64)}
    response = int(torch.searchsorted(batch.offsets, token, right=True)) - 1
    inputs[name][response if name == "final_values" else token] = bad  # type: ignore[index]
    message = rf"^{name} is {bad} at token \d of response {response} "
    for gamma, lam in ((0.0, 0.0), (1.0, 0.9)):
        with pytest.raises(ValueError, match=message):
            td_recursion(weights=opens, offsets=batch.offsets, gamma=gamma, lam=lam, value_lam=1.0, **inputs)  # type: ignore[arg-type]


def test_an_overflow_is_named() -> None:
    huge = torch.full((4,), 3e38)
    settings = {"gamma": 1.0, "lam": 1.0, "value_lam": 1.0}
    with pytest.raises(ValueError, match=r"^the advantage is inf at token 0 of response 1"):
        td_recursion(
            torch.tensor([0.0, 1e308, 1e308, 1e308], dtype=torch.float64),
            torch.zeros(4, dtype=torch.float64), torch.ones(4), offsets_of([1, 3]), **settings,
        )  # fmt: skip
    assert bool(
        td_recursion(huge / 8, torch.zeros(4), torch.ones(4), offsets_of([1, 3]), **settings)[0].isfinite().all()
    )


def test_writes_to_out() -> None:
    batch = make_batch([3, 1, 5])
    values, rewards, opens = make_scores(batch).values, dense_rewards(batch), random_opens(batch, 0.5)
    assert values is not None
    settings = {"gamma": 0.9, "lam": 0.8, "value_lam": 1.0}
    expected = td_recursion(rewards, values, opens, batch.offsets, **settings)
    out = (torch.empty_like(values), torch.empty_like(values))
    found = td_recursion(rewards, values, opens, batch.offsets, out=out, **settings)
    assert all(a is b and torch.equal(a, c) for a, b, c in zip(found, out, expected, strict=True))
    for unfit in (out[0].float(), out[0][:-1], torch.stack(out, 1)[:, 0]):
        with pytest.raises(ValueError, match=r"out has torch.float\d\d of shape .*, allowed: contiguous torch.float64"):
            td_recursion(rewards, values, opens, batch.offsets, out=(out[0], unfit), **settings)


def test_new_tensors_have_no_spare_storage() -> None:
    """Sending a tensor to another process sends its whole storage."""
    batch = make_batch([100_000])
    values = make_scores(batch).values
    assert values is not None
    found = td_recursion(
        dense_rewards(batch), values, random_opens(batch, 0.5), batch.offsets, gamma=1.0, lam=0.9, value_lam=1.0
    )
    assert [part.untyped_storage().nbytes() for part in found] == [800_000] * 2


def test_a_fork_has_threads_of_its_own() -> None:
    """The parent's threads do not exist in the child, so its pool would wait forever."""
    batch = make_batch([200_000] * 2)
    values, rewards, opens = make_scores(batch).values, dense_rewards(batch), random_opens(batch, 0.02)
    assert values is not None

    def compute() -> torch.Tensor:
        return td_recursion(rewards, values, opens, batch.offsets, gamma=1.0, lam=0.9, value_lam=1.0, num_threads=2)[0]

    expected = compute()
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        os._exit(0 if torch.equal(compute(), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_compiles_without_a_cache_folder() -> None:
    source = "def kernel(deltas, decays, offsets, sums):\n    sums[0] = deltas[0] + decays[0] * offsets[1]\n"
    names: dict[str, object] = {}
    exec(compile(source, "<no file, so numba has no place for a cache>", "exec"), names)
    sums = np.zeros(1)
    jit()(names["kernel"])(np.ones(1), np.full(1, 2.0), np.array([0, 3]), sums)  # type: ignore[arg-type]
    assert sums.tolist() == [7.0]
