"""`discounted_sums`: against its formula, types, boundaries, and machines where numba cannot keep its code."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given

from sae_rl.algo import discounted_sums, discounted_sums_reference
from sae_rl.algo.recursion import compiled
from sae_rl.types import Batch, offsets_of

from .oracle import batches, close, dense_rewards, make_batch, property_test


@property_test
@given(batch=batches())
def test_equals_the_reference(batch: Batch) -> None:
    deltas, decays = dense_rewards(batch), dense_rewards(batch, seed=4).sigmoid()
    reference = discounted_sums_reference(deltas, decays, batch.offsets)
    assert close(discounted_sums(deltas, decays, batch.offsets), reference, 1e-14)


def test_small_example_by_hand() -> None:
    deltas, decays = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0.5, 100.0, 0.25, 100.0])
    sums = discounted_sums(deltas, decays, torch.tensor([0, 2, 4]))
    assert sums.tolist() == [2.0, 2.0, 6.0, 8.0]  # the decays of 100 sit at last tokens and are never used
    assert discounted_sums_reference(deltas, decays, torch.tensor([0, 2, 4])).tolist() == [2.0, 2.0, 6.0, 8.0]


def test_accumulates_in_float64_and_returns_the_type_it_got() -> None:
    num_tokens = 200_000
    deltas, decays = torch.full((num_tokens,), 0.1), torch.ones(num_tokens)
    sums = discounted_sums(deltas, decays, offsets_of([num_tokens]))
    assert sums.dtype == torch.float32
    assert float(sums[0]) == np.float32(
        np.float64(np.float32(0.1)) * num_tokens
    )  # a float32 sum is off by a thousand ulp


def test_leaves_its_inputs_alone_and_takes_strided_ones() -> None:
    batch = make_batch([3, 1, 4])
    deltas, decays = dense_rewards(batch), torch.full((8,), 0.9, dtype=torch.float64)
    expected = discounted_sums(deltas, decays, batch.offsets)
    strided = torch.stack([deltas, deltas], dim=1)[:, 0]
    copy = deltas.clone()
    assert torch.equal(
        discounted_sums(strided, torch.tensor(0.9, dtype=torch.float64).expand(8), batch.offsets), expected
    )
    assert torch.equal(deltas, copy)


def test_compiles_where_no_cache_can_be_kept() -> None:
    source = "def kernel(deltas, decays, offsets, sums):\n    sums[0] = deltas[0] + decays[0] * offsets[1]\n"
    names: dict[str, object] = {}
    exec(compile(source, "<no file, so numba has no place for a cache>", "exec"), names)
    sums = np.zeros(1)
    compiled(names["kernel"])(np.ones(1), np.full(1, 2.0), np.array([0, 3]), sums)  # type: ignore[arg-type]
    assert sums.tolist() == [7.0]
