"""Count sketches keep inner products, on average over seeds."""

from __future__ import annotations

import math

import pytest
import torch

from sae_rl.backends import projection as module
from sae_rl.backends.projection import Projection, hash_of


def splitmix64(state: int) -> int:
    """One output of splitmix64 for a state that was incremented already, with Python's own integers."""
    mask = 2**64 - 1
    state &= mask
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & mask
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & mask
    return state ^ (state >> 31)


def test_the_hash_is_splitmix64() -> None:
    index = torch.tensor([0, 1, 2, 12345, 2**40])
    for seed in (0, 1, 2**31 - 1):
        state = [(int(i) + 1) * 0x9E3779B97F4A7C15 + seed * 0xD1B54A32D192ED03 for i in index]
        assert [bits % 2**64 for bits in hash_of(index, seed).tolist()] == [splitmix64(each) for each in state]
    assert splitmix64(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF, "the first number of seed 0, as published"


def test_inner_products_are_unbiased_and_spread_as_the_bound_says() -> None:
    random = torch.Generator().manual_seed(0)
    sizes, dimension, seeds = ((7, 30), (90,), (3, 3, 5)), 16, 4000
    x = [torch.randn(size, generator=random) for size in sizes]
    y = [a + torch.randn(size, generator=random) for a, size in zip(x, sizes, strict=True)]
    exact, norms = (torch.cat([each.flatten().double() for each in many]) for many in (x, y)), []
    one, other = exact
    norms = [float(one.square().sum()), float(other.square().sum())]
    found = torch.stack([Projection(x, dimension, s)(x) @ Projection(x, dimension, s)(y) for s in range(seeds)])
    assert abs(found.mean() - one @ other) < 4 * found.std() / math.sqrt(seeds)
    bound = (norms[0] * norms[1] + float(one @ other) ** 2) / dimension
    assert 0.7 * bound < found.var() < 1.1 * bound


def test_each_number_goes_with_a_sign_to_one_bucket_whatever_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    parameters = [torch.zeros(11), torch.zeros(2, 3)]
    columns = torch.eye(17)
    project = Projection(parameters, 5, seed=3)
    each = torch.stack([project([column[:11], column[11:].view(2, 3)]) for column in columns])
    assert torch.equal(each.abs().sum(1), torch.ones(17).double())
    numbers = torch.randn(17, generator=torch.Generator().manual_seed(0))
    gradients = [numbers[:11], numbers[11:].view(2, 3)]
    assert torch.allclose(project(gradients), numbers.double() @ each, atol=1e-12)
    monkeypatch.setattr(module, "PIECE", 4)
    assert torch.allclose(project(gradients), numbers.double() @ each, atol=1e-12)
    assert torch.equal(project([numbers[:11], None]), project([numbers[:11], torch.zeros(2, 3)]))


def test_nothing_is_projected_where_there_is_room_for_all() -> None:
    parameters = [torch.zeros(4), torch.zeros(2, 3)]
    numbers = torch.arange(10.0)
    for dimension in (10, 1000):
        project = Projection(parameters, dimension, seed=0)
        assert project.dimension == 10
        assert torch.equal(project([numbers[:4], numbers[4:].view(2, 3)]), numbers.double())
    assert Projection(parameters, 9, seed=0).dimension == 9
