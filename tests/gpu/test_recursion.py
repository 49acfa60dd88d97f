"""The Triton kernel gives what the CPU's kernel gives, which `tests/algo` compares with the paper's sums.

Both compute in float64 and add the same products in another order. The largest advantage of these batches is below 1e3, and
a sum of a million terms in float64 keeps about ten digits, so 1e-10 of the larger of 1 and the result is allowed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.gpu.device import Device
from sae_rl.algo import td_recursion
from sae_rl.types import offsets_of

TOLERANCE = 1e-10
BLOCK = 1024  # tokens of one step of the kernel
LENGTHS = {
    "short": [1, 9, 4, 5, 8, 1, 12],
    "around a block": [1, 5000, BLOCK, BLOCK + 1, BLOCK - 1, 3, 2 * BLOCK],
    "a million tokens": [1_000_000],
    "many responses": [1 + i * 37 % 3000 for i in range(2000)],
}


def check(device: Device, lengths: list[int], seed: int) -> None:
    """The bits of ``seed`` choose which arguments are tensors or given at all."""
    draw = torch.Generator().manual_seed(seed)
    count = sum(lengths)

    def uniform(size: int) -> Tensor:
        return torch.rand(size, generator=draw, dtype=torch.float64)

    flat = [
        torch.randn(count, generator=draw, dtype=torch.float64),
        torch.randn(count, generator=draw, dtype=torch.float64),
        uniform(count) if seed & 16 else uniform(count) < 0.4,
        offsets_of(lengths),
    ]
    options: dict[str, Any] = {
        "gamma": uniform(count) if seed & 1 else 0.9,
        "lam": uniform(len(lengths)) if seed & 2 else 0.7,
        "value_lam": 0.3,
        "final_values": uniform(len(lengths)) if seed & 4 else None,
        "action_mask": uniform(count) < 0.6 if seed & 8 else None,
    }
    expected = td_recursion(*flat, **options)
    moved = {name: x.to(device.torch) if isinstance(x, Tensor) else x for name, x in options.items()}
    found = td_recursion(*[x.to(device.torch) for x in flat], **moved)
    for part, exact in zip(found, expected, strict=True):
        assert part.device.type == device.torch.type
        torch.testing.assert_close(part.cpu(), exact, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_the_kernel_is_the_cpus(device: Device, lengths: str) -> None:
    is_small = sum(LENGTHS[lengths]) < 20_000
    if device.is_gpu or is_small:
        for seed in range(32) if is_small else (0, 31):
            check(device, LENGTHS[lengths], seed)


def test_float32_is_rounded_once(device: Device) -> None:
    """Float32 results are the float64 results, rounded; the inputs are float32 for both."""
    draw = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 5000, generator=draw)
    opens, offsets = torch.rand(5000, generator=draw) < 0.02, offsets_of([1, 2999, 2000])
    known = {"gamma": 1.0, "lam": 0.95, "value_lam": 1.0}
    expected = td_recursion(rewards.double(), values.double(), opens, offsets, **known)
    found = td_recursion(*[x.to(device.torch) for x in (rewards, values, opens, offsets)], **known)
    for part, exact in zip(found, expected, strict=True):
        assert part.dtype == torch.float32
        torch.testing.assert_close(part.cpu(), exact.float(), atol=1e-6, rtol=2.0**-23)


def test_what_is_not_finite_is_named(device: Device) -> None:
    rewards, values = torch.zeros(6), torch.tensor([0.0, 0.0, 0.0, float("nan"), 0.0, 0.0])
    opens, offsets = torch.ones(6, dtype=torch.bool), offsets_of([2, 4])
    flat = [x.to(device.torch) for x in (rewards, values, opens, offsets)]
    with pytest.raises(ValueError, match="response 1"):
        td_recursion(*flat, gamma=1.0, lam=0.95, value_lam=1.0)
