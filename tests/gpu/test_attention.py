"""Attention over packed rows in bfloat16: one call of torch's kernel, against the definition in float32 and against SDPA.

Tolerance. The kernel multiplies bfloat16 numbers and adds in float32. It rounds probabilities, their gradients and its
results to bfloat16; each rounding is off by at most 2^-8 of a number and by 2^-8 / sqrt(3) = 0.2 % on average. Up to four
follow each other, and their errors are independent, so the root mean square of the error is at most 0.5 % of that of the
result. 1 % is allowed, for each sequence apart. What a wrong mask does is far larger: a window that is one key too short
changes a mean of W values by about 1 / sqrt(W), 12 % for 64 keys.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.gpu.device import Device
from sae_rl.backends.attention import packed_attention, packed_sdpa, packed_varlen

TOLERANCE = 0.01
LENGTHS = {"cuda": [1, 4096, 2, 1000, 17, 64, 128, 129, 2500, 64, 64, 5], "cpu": [1, 70, 2, 17, 17, 64]}
HEADS = {"cuda": [(32, 8, 128), (16, 16, 64), (16, 2, 256)], "cpu": [(4, 2, 16), (2, 2, 8), (8, 1, 32)]}
WINDOWS = [None, 1, 16, 64, 4096]

pytestmark = pytest.mark.usefixtures("varlen")


class Row:
    """A packed row of random numbers, and the gradient of its output."""

    def __init__(self, device: Device, heads: int, key_heads: int, width: int) -> None:
        self.lengths = LENGTHS[device.torch.type]
        torch.manual_seed(0)
        shapes = [(1, count, sum(self.lengths), width) for count in (heads, key_heads, key_heads)]
        self.tensors = [torch.randn(s, device=device.torch, dtype=torch.bfloat16, requires_grad=True) for s in shapes]
        self.gradient = torch.randn(1, sum(self.lengths), heads, width, device=device.torch, dtype=torch.bfloat16)
        self.module: Any = nn.Identity()
        self.module.num_key_value_groups = heads // key_heads

    def run(self, function: Any, window: int | None, *, recomputed: bool = False) -> list[Tensor]:
        """The output and the gradients of query, key and value, each (1, L, heads, d)."""
        ends = torch.tensor([0, *self.lengths], device=self.gradient.device).cumsum(0, dtype=torch.int32)
        arguments = {
            "cu_seq_lens_q": ends,
            "max_length_q": max(self.lengths),
            "sequence_lengths": self.lengths,
            "sliding_window": window,
            "scaling": 0.9 / math.sqrt(self.gradient.shape[-1]),
        }

        def forward(*tensors: Tensor) -> Tensor:
            output: Tensor = function(self.module, *tensors, None, **arguments)[0]
            return output

        output = checkpoint(forward, *self.tensors, use_reentrant=False) if recomputed else forward(*self.tensors)
        gradients = torch.autograd.grad(output, self.tensors, self.gradient)
        return [output.detach(), *(gradient.transpose(1, 2) for gradient in gradients)]

    def relative_error(self, found: Tensor, expected: Tensor) -> float:
        """The largest of all sequences: root mean square of the error, over that of the result."""
        whole = expected.square().mean().sqrt()
        worst, begin = 0.0, 0
        for length in self.lengths:
            at = slice(begin, begin := begin + length)
            error = (found[:, at].float() - expected[:, at]).square().mean().sqrt()
            # Gradients of queries and keys are 0 where a token sees itself only, so a part of the row's is added.
            size = expected[:, at].square().mean().sqrt() + 0.1 * max(float(whole), 1.0)
            worst = max(worst, float(error / size))
        return worst


def by_definition(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: None, *, sequence_lengths: list[int],
    sliding_window: int | None, scaling: float, **arguments: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """In float32, sequence by sequence, with all scores."""
    outputs, begin = [], 0
    for length in sequence_lengths:
        at = slice(begin, begin := begin + length)
        q, k, v = (x[0, :, at].float() for x in (query, key, value))
        k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
        distance = torch.arange(length, device=q.device)[:, None] - torch.arange(length, device=q.device)
        hidden = (distance < 0) | (distance >= (sliding_window or length))
        scores = (q @ k.mT * scaling).masked_fill(hidden, -math.inf)
        outputs.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)[None], None


@pytest.fixture(params=range(3), ids=["four queries to a key", "as many keys", "eight queries to a key"])
def row(request: pytest.FixtureRequest, device: Device) -> Row:
    return Row(device, *HEADS[device.torch.type][request.param])


@pytest.mark.parametrize("window", WINDOWS)
def test_varlen_is_attention_and_as_exact_as_sdpa(row: Row, window: int | None) -> None:
    exact = row.run(by_definition, window)
    found, packed = row.run(packed_varlen, window), row.run(packed_sdpa, window)
    for name, one, other, expected in zip(("output", "query", "key", "value"), found, packed, exact, strict=True):
        assert one.isfinite().all(), name
        errors = row.relative_error(one, expected), row.relative_error(other, expected)
        print(f"{name}: varlen {errors[0]:.2%}, sdpa {errors[1]:.2%}")
        assert max(errors) < TOLERANCE, name


def test_auto_is_varlen(row: Row, device: Device) -> None:
    """The forward pass has no atomic additions, so it is repeated to the bit. On a CPU auto is SDPA."""
    chosen, expected = row.run(packed_attention, None)[0], row.run(packed_varlen, None)[0]
    assert not device.is_gpu or torch.equal(chosen, expected)
    assert row.relative_error(chosen, expected.float()) < TOLERANCE


def test_recomputed_attention_is_the_same(row: Row) -> None:
    """Gradients of keys and queries are added atomically, in an order that differs between runs."""
    plain, recomputed = row.run(packed_varlen, None), row.run(packed_varlen, None, recomputed=True)
    assert torch.equal(plain[0], recomputed[0])
    for one, other in zip(recomputed[1:], plain[1:], strict=True):
        assert row.relative_error(one, other.float()) < 2**-7


def test_no_token_sees_another_sequence(row: Row) -> None:
    before = row.run(packed_varlen, None)
    second = slice(row.lengths[0], row.lengths[0] + row.lengths[1])
    for tensor in row.tensors:
        changed = torch.randn_like(tensor)
        changed[:, :, second] = tensor.detach()[:, :, second]
        tensor.data = changed
    after = row.run(packed_varlen, None)
    assert torch.equal(before[0][:, second], after[0][:, second])
    assert not torch.equal(before[0], after[0])
