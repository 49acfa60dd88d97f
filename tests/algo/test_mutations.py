"""Deliberate mistakes: each is patched into the code, and the test named beside it fails. Without it that test passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_rl.algo import recursion_cpu, segmenters, shaping
from tests.driver import test_loop

from . import test_arguments, test_estimators, test_recursion, test_segmenters, test_shaping
from .oracle import make_batch

kernel, whiten = recursion_cpu.run, shaping.Whitening.__call__


@dataclass(frozen=True)
class Mutation:
    owner: object
    name: str
    mistake: Callable[..., Any]
    caught_by: Callable[..., None]


def on_one_batch(property_test: Any, **arguments: Any) -> Callable[[Path], None]:
    """The body of a property test, on one batch instead of many."""
    return lambda tmp_path: property_test.hypothesis.inner_test(batch=make_batch([4, 1, 6, 2]), **arguments)


def recursion(mistake: Callable[..., tuple[Tensor, Tensor, Tensor | int]], caught_by: Callable[..., None]) -> Mutation:
    """The recursion on weights, offsets and final values that a mistake computes from (values, weights, offsets)."""

    def run(inputs: recursion_cpu.Inputs, *others: Any) -> bool:
        weights, offsets, more = mistake(inputs.values, inputs.weights, inputs.offsets)
        final_values = inputs.final_values + more
        return kernel(inputs._replace(weights=weights, offsets=offsets, final_values=final_values), *others)

    return Mutation(recursion_cpu, "run", run, caught_by)


def per_token(mistake: Callable[[Tensor, Tensor], Tensor]) -> Mutation:
    """The recursion with a mistake in what lambda per token is."""
    correct = recursion_cpu.per_token
    caught_by = test_arguments.test_a_lambda_per_token

    def on_a_batch(tmp_path: Path) -> None:
        inner: Any = caught_by
        for features in (set(""), set("wgvs")):
            inner.hypothesis.inner_test(batch=make_batch([4, 1, 6, 2]), seed=3, gamma=0.8, features=features)

    return Mutation(
        recursion_cpu, "per_token", lambda lam, offsets: mistake(correct(lam, offsets), offsets), on_a_batch
    )


def next_first_values(values: Tensor, offsets: Tensor) -> Tensor:
    return torch.cat([values[offsets[1:-1]], values.new_zeros(1)])


SAE_IS_ITS_DEFINITION = on_one_batch(
    test_estimators.test_sae_is_its_definition, lam=0.7, value_lam=0.9, gamma=0.8, rate=0.4
)
EQUALS_THE_REFERENCE = on_one_batch(
    test_recursion.test_equals_the_reference, seed=0, lam=0.7, gamma=0.8, features=set("wglfs")
)
MUTATIONS = {
    "lam ^ w_t for lam ^ w_{t+1}": recursion(lambda v, w, o: (w.roll(1), o, 0), SAE_IS_ITS_DEFINITION),
    "lambda and 1 swapped": recursion(lambda v, w, o: (~w, o, 0), SAE_IS_ITS_DEFINITION),
    "the next response's value leaks in": recursion(
        lambda v, w, o: (w, o, next_first_values(v, o)), SAE_IS_ITS_DEFINITION
    ),
    "offsets shifted by one": recursion(
        lambda v, w, o: (w, torch.cat([o[:1], o[1:-1] + 1, o[-1:]]), 0), EQUALS_THE_REFERENCE
    ),
    "lambda of the token before": per_token(lambda lam, offsets: lam.roll(1)),
    "lambda of the token after": per_token(lambda lam, offsets: lam.roll(-1)),
    "lambda of the first token for all": per_token(lambda lam, o: lam[o[:-1]].repeat_interleave(o.diff())),
    "the first B lambdas for the responses": per_token(lambda lam, o: lam[: o.numel() - 1].repeat_interleave(o.diff())),
    "reward at the first token": Mutation(
        shaping,
        "last_tokens",
        lambda offsets: offsets[:-1],
        on_one_batch(test_shaping.test_the_reward_is_paid_by_the_last_token),
    ),
    "first tokens open no segment": Mutation(
        segmenters,
        "_with_first_tokens",
        lambda opens, batch: opens,
        on_one_batch(test_segmenters.test_low_probability_against_a_loop, p=0.2),
    ),
    "whitening per micro-batch": Mutation(
        shaping.Whitening,
        "__call__",
        lambda self, advantages, *_: torch.cat([whiten(self, part) for part in advantages.chunk(2)]),
        lambda tmp_path: test_loop.test_the_update_gets_whitened_advantages_and_plain_returns(tmp_path, True),
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mistake_is_caught(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mutation = MUTATIONS[name]
    mutation.caught_by(tmp_path)
    monkeypatch.setattr(mutation.owner, mutation.name, mutation.mistake)
    with pytest.raises(AssertionError):
        mutation.caught_by(tmp_path)
